"""The options of PPO. Names follow TRL 1.12; a default that changes the mathematics is neutral, not the paper's."""

import math
from dataclasses import dataclass, field, fields
from typing import ClassVar


def _option(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class PPOConfig:
    """Options of `rlhf ppo`. The paper's values stand in the preset `instructgpt`."""

    # models and data
    sft_model_path: str = _option("demo", "Policy to start from, and reference of the KL: a folder, or `demo`.")
    reward_model_path: str | None = _option(None, "Reward model folder. None only with a reward function.")
    value_model_path: str | None = _option(
        None, "Value network to start from, or a language model, given a new head. None: the reward model (paper)."
    )
    dataset_name: str | None = _option(None, "Prompts: a jsonl, json or parquet file, or a data set's name.")
    dataset_config: str | None = _option(None, "Configuration of a named data set.")
    dataset_train_split: str = _option("train", "Split of a named data set.")
    output_dir: str = _option("runs/ppo", "Folder of the run.")
    dtype: str = _option("float32", "Weights' type: float32, bfloat16 or float16.")
    bf16: bool = _option(False, "Mixed precision: products in bfloat16 of weights that stay float32.")
    attn_implementation: str | None = _option(
        None, "Attention of transformers: sdpa, eager, flash_attention_2, ... None: sdpa where the model has it."
    )
    trust_remote_code: bool = _option(False, "Run code that comes with a model.")
    pad_token: str | None = _option(None, "Pad token, for a tokenizer that has none.")
    eos_token: str | None = _option(None, "EOS token, for a tokenizer that has none.")
    # rollouts
    total_episodes: int | None = _option(None, "Responses in the whole run. None: num_train_epochs. Paper: 256k.")
    num_train_epochs: float = _option(1.0, "Passes over the prompts, where total_episodes is None.")
    max_steps: int = _option(-1, "Iterations; overrides total_episodes. -1: off.")
    rollout_batch_size: int | None = _option(
        None,
        "Responses an iteration, all processes together. None: per_device_train_batch_size * "
        "gradient_accumulation_steps * num_mini_batches * processes. Paper: 512.",
    )
    num_responses: int = _option(1, "Responses a prompt; must divide the responses of an iteration.")
    packing: str = _option(
        "auto", "Responses to one prompt share its computation: auto (where the models can and it saves time) or false."
    )
    response_length: int = _option(53, "Most tokens of a response, stop token included.")
    temperature: float = _option(1.0, "Divides the logits, in sampling and in every log-prob. Paper: 1.")
    stop_token: str | None = _option(None, "A further token that ends a response, beside EOS. `eos` adds nothing.")
    stop_token_id: int | None = _option(None, "The same by its id.")
    missing_eos_penalty: float | None = _option(None, "Taken off the score of a response without a stop token.")
    local_rollout_forward_batch_size: int = _option(64, "Rows of a forward without gradient (scores, log-probs).")
    local_rollout_batch_size: int | None = _option(None, "Rows sampled at a time on a process. None: all.")
    rollout_engine: str = _option(
        "builtin",
        "What samples: builtin, generate (transformers), generate_batch (its continuous batching, for GPUs), or "
        "path/to/file.py:name, as rlhf.rollouts.sampling.RolloutEngine says.",
    )
    rollout_gap_warning: float | None = _option(
        0.05, "Warn where an engine's log-probs are farther from the trainer's in the mean, nats a token. None: never."
    )
    rollout_gap_limit: float | None = _option(0.1, "Stop there. None: never.")
    # rewards
    reward_function: str | None = _option(None, "file.py:name, math_answer, regex, json_schema, unit_test; or several.")
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Factors of the reward model, if any, and of each function. None: all 1."}
    )
    reward_tokenizer: str = _option("same", "same: as the policy's, checked. auto: may be another.")
    kl_coef: float = _option(0.05, "beta, the weight of the KL in the reward. Paper: 0.02.")
    kl_estimator: str = _option("k1", "KL of a token: k1 = log-ratio, k3 = the one that is never negative.")
    kl_target: float | None = _option(None, "Steer beta to this KL per response, nats. None: beta stays.")
    kl_horizon: float = _option(10_000, "Episodes over which the steering acts.")
    max_kl: float | None = _option(None, "Stop when the KL per response exceeds this, nats. None: never.")
    reward_clip_range: list[float] | None = field(
        default=None, metadata={"help": "Clip the reward model's scores to these two numbers. None: no clipping."}
    )
    whiten_rewards: bool = _option(False, "Scale the per-token rewards to variance 1; their mean stays.")
    whiten_advantages: bool = _option(True, "Advantages to mean 0 and variance 1 over an iteration's tokens.")
    gamma: float = _option(1.0, "Discount. Paper: 1.")
    lam: float = _option(0.95, "Lambda of generalised advantage estimation.")
    # loss and optimizer
    num_ppo_epochs: int = _option(4, "Passes over the responses of an iteration. Paper: 1.")
    num_mini_batches: int = _option(1, "Optimizer steps a pass. Paper: 8 (512 / 64).")
    per_device_train_batch_size: int = _option(8, "Rows of a forward with gradient, on a process.")
    gradient_accumulation_steps: int = _option(1, "Such forwards an optimizer step.")
    learning_rate: float = _option(3e-6, "Peak rate of the policy. Paper: 9.6e-6 at 1.3B and 6B.")
    value_learning_rate: float | None = _option(None, "The same of the value network. None: equal. Paper: 9e-6.")
    lr_scheduler_type: str = _option("constant", "After the warm-up: constant (paper), linear or cosine.")
    warmup_iterations: int = _option(0, "Iterations over which the rates rise from a tenth. Paper: 10.")
    adam_beta1: float = _option(0.9, "Adam's first decay.")
    adam_beta2: float = _option(0.999, "Adam's second decay. Paper: 0.95.")
    adam_epsilon: float = _option(1e-8, "Adam's epsilon.")
    weight_decay: float = _option(0.0, "AdamW's weight decay.")
    max_grad_norm: float | None = _option(1.0, "Clips each network's gradient. None: no clipping.")
    cliprange: float = _option(0.2, "The ratio is clipped to 1 - this and 1 + this. Paper: 0.2.")
    cliprange_high: float | None = _option(None, "Upper clip, where it differs from the lower.")
    dual_clip: float | None = _option(None, "Bound on the loss of a token with negative advantage; > 1.")
    cliprange_value: float = _option(0.2, "Values stay this close to the old ones in the loss; mind the scores' scale.")
    vf_coef: float = _option(0.1, "Weight of the value loss.")
    entropy_coef: float = _option(0.0, "Weight of an entropy bonus.")
    loss_agg_mode: str = _option("token-mean", "How token losses are joined, as in rlhf_kernels.ppo_loss.")
    ptx_coef: float = _option(0.0, "gamma of PPO-ptx: multiplies the mean -log p of pretraining text. Paper: 27.8.")
    ptx_dataset_name: str | None = _option(None, "Pretraining text: rows with `text`, or a plain text file.")
    ptx_batch_multiplier: int = _option(1, "Pretraining texts an episode. Paper: 8.")
    ptx_max_length: int = _option(512, "Tokens of a pretraining text; a longer one becomes several.")
    ema_decay: float | None = _option(None, "Decay of the policy weights' average. None: no average. Paper: 0.992.")
    # LoRA
    use_peft: bool = _option(
        False, "Train LoRA adapters on policy and value network (package peft); the reference is the policy without."
    )
    lora_r: int = _option(16, "LoRA rank.")
    lora_alpha: int = _option(32, "LoRA scale.")
    lora_dropout: float = _option(0.0, "Dropout in front of the adapters: only 0, as the ratio would not be 1.")
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules to adapt. None: peft's choice for the architecture."}
    )
    # health
    on_health: str = _option("warn", "When a run looks unhealthy: stop, warn or ignore. NaN always stops it.")
    health_kl: float = _option(1.0, "KL of a response over its tokens above this, nats.")
    health_entropy: float = _option(0.25, "Entropy below this share of the first iterations'.")
    health_explained_variance: float = _option(-2.0, "Explained variance of the values below this.")
    health_clip_fraction: float = _option(0.5, "Share of tokens with a clipped ratio above this.")
    health_patience: int = _option(3, "So many iterations in a row.")
    # the run
    seed: int = _option(42, "Seed of sampling, shuffling and new heads.")
    save_steps: int = _option(50, "A checkpoint every so many iterations, and at the end. 0: none.")
    save_updates: int = _option(0, "Also one every so many optimizer steps inside an iteration (0, n, ...). 0: none.")
    save_total_limit: int | None = _option(2, "Checkpoints to keep. None: all.")
    resume_from_checkpoint: str | None = _option(None, "`true`: the newest of output_dir; or a checkpoint's folder.")
    report_to: str = _option("none", "none or tensorboard; metrics.jsonl is always written.")
    num_logged_samples: int = _option(4, "Responses an iteration that go to samples.jsonl.")
    disable_tqdm: bool = _option(False, "No progress bar.")

    groups: ClassVar[dict[str, tuple[str, ...]]]  # of `rlhf ppo --help`; filled in below from the first name of each

    def __post_init__(self):
        at_least_one = (
            "num_responses", "response_length", "num_ppo_epochs", "num_mini_batches", "per_device_train_batch_size",
            "gradient_accumulation_steps", "local_rollout_forward_batch_size", "ptx_batch_multiplier",
            "lora_r", "health_patience",
        )  # fmt: skip
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, want at least 1")
        if self.bf16 and self.dtype != "float32":
            raise ValueError(
                f"bf16: got True with dtype {self.dtype}, want dtype float32: its weights are what is rounded"
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature: got {self.temperature}, want a number > 0")
        if self.ptx_coef < 0:
            raise ValueError(f"ptx_coef: got {self.ptx_coef}, want a number >= 0")
        if self.ptx_coef and not self.ptx_dataset_name:
            raise ValueError(f"ptx_dataset_name: got none, want pretraining text for ptx_coef {self.ptx_coef}")
        if self.ptx_max_length < 2:
            raise ValueError(f"ptx_max_length: got {self.ptx_max_length}, want at least 2")
        if self.reward_clip_range is not None and not (
            len(self.reward_clip_range) == 2 and self.reward_clip_range[0] < self.reward_clip_range[1]
        ):
            raise ValueError(f"reward_clip_range: got {self.reward_clip_range}, want two numbers, low and high")
        if self.reward_weights is not None and not all(map(math.isfinite, self.reward_weights)):
            raise ValueError(f"reward_weights: got {self.reward_weights}, want finite numbers")
        if self.reward_tokenizer not in ("same", "auto"):
            raise ValueError(f"reward_tokenizer: got {self.reward_tokenizer!r}, want same or auto")
        self.packing = {True: "auto", False: "false"}.get(self.packing, self.packing)
        if self.packing not in ("auto", "false"):
            raise ValueError(f"packing: got {self.packing!r}, want auto or false")
        if self.save_updates < 0:
            raise ValueError(f"save_updates: got {self.save_updates}, want a number of optimizer steps, or 0 for none")
        if self.lr_scheduler_type not in ("constant", "linear", "cosine"):
            raise ValueError(f"lr_scheduler_type: got {self.lr_scheduler_type!r}, want constant, linear or cosine")
        if self.on_health not in ("stop", "warn", "ignore"):
            raise ValueError(f"on_health: got {self.on_health!r}, want stop, warn or ignore")
        if self.lora_dropout:
            raise ValueError(
                f"lora_dropout: got {self.lora_dropout}, want 0: with dropout the ratio of an unchanged policy is not 1"
            )
        if self.report_to not in ("none", "tensorboard"):
            raise ValueError(f"report_to: got {self.report_to!r}, want none or tensorboard")

    def batch_sizes(self, num_processes: int) -> tuple[int, int]:
        """Return (responses an iteration, responses an optimizer step), both on one process.

        Raises:
            ValueError: the sizes do not divide each other.
        """
        mini = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if self.rollout_batch_size is None:
            local = mini * self.num_mini_batches
        else:
            local, rest = divmod(self.rollout_batch_size, num_processes)
            mini = local // self.num_mini_batches if self.num_mini_batches > 1 else min(mini, local)
            if rest or mini < 1 or local % mini:
                raise ValueError(
                    f"rollout_batch_size: got {self.rollout_batch_size}, want a multiple of {num_processes} processes "
                    f"* {max(mini, 1)} responses an optimizer step"
                )
        if local % self.num_responses:
            raise ValueError(f"num_responses: got {self.num_responses}, want a divisor of {local} responses")
        return local, mini


def _groups(**first: str) -> dict[str, tuple[str, ...]]:
    names = [item.name for item in fields(PPOConfig)]
    starts = [names.index(name) for name in first.values()] + [len(names)]
    return {title.replace("_", " "): tuple(names[a:b]) for title, a, b in zip(first, starts, starts[1:], strict=False)}


PPOConfig.groups = _groups(
    models_and_data="sft_model_path",
    rollouts="total_episodes",
    rewards="reward_function",
    loss_and_optimizer="num_ppo_epochs",
    LoRA="use_peft",
    health="on_health",
    run_and_output="seed",
)
