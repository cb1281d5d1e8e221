"""The options of PPO. Names follow TRL 1.12; a default that changes the mathematics is neutral, not the paper's."""

import os
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from ..ranges import ANY, FINITE, SEED, above, at_least, check, option, within


@dataclass
class PPOConfig:
    """Options of `rlhf ppo`. The paper's values stand in the preset `instructgpt`."""

    # models and data
    sft_model_path: str = option("demo", "Policy to start from, and reference of the KL: a folder, or `demo`.")
    reward_model_path: str | None = option(None, "Reward model folder. None only with a reward function or server.")
    value_model_path: str | None = option(
        None, "Value network to start from, or a language model, given a new head. None: the reward model (paper)."
    )
    dataset_name: str | None = option(
        None, "Prompts: a file, a pattern, a folder or a data set's name; or several: a.jsonl:0.7,b.csv:0.3."
    )
    dataset_config: str | None = option(None, "Configuration of a named data set.")
    dataset_train_split: str = option("train", "Split of a named data set.")
    columns: str | None = option(
        None, "Which columns hold what: prompt=instruction+input; paths into nested rows: prompt=turns[0].text."
    )
    data_format: str = option("auto", "How a public data set is read (see `rlhf data --formats`). auto: recognised.")
    bad_rows: Literal["error", "skip"] = option(
        "error", "Rows that cannot be used: stop and list them, or leave them out and count them."
    )
    dataset_num_proc: int | None = option(
        None, "Processes that read and encode large data. None: one for each core.", at_least(1)
    )
    max_prompt_length: int | None = option(
        None, "Most tokens of a prompt. None: what response_length leaves of the model's context.", at_least(1)
    )
    long_prompts: Literal["truncate", "drop", "error"] = option(
        "truncate",
        "A prompt that is too long: cut its left end (of a chat: its oldest turns), drop it, or stop.",
    )
    chat_template: str | None = option(None, "Chat template: chatml, or a file; None: the model's.")
    output_dir: str = option("runs/ppo", "Folder of the run.")
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = option("float32", "Weights' type.")
    bf16: bool = option(False, "Mixed precision: products in bfloat16 of weights that stay float32.")
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward: less memory, about a third more time."
    )
    attn_implementation: str | None = option(
        None, "Attention of transformers: sdpa, eager, flash_attention_2, ... None: sdpa where the model has it."
    )
    trust_remote_code: bool = option(False, "Run code that comes with a model.")
    pad_token: str | None = option(None, "Pad token, for a tokenizer that has none.")
    eos_token: str | None = option(None, "EOS token, for a tokenizer that has none.")
    # rollouts
    total_episodes: int | None = option(
        None, "Responses in the whole run. None: num_train_epochs. Paper: 256k.", at_least(1)
    )
    num_train_epochs: float = option(1.0, "Passes over the prompts, where total_episodes is None.", above(0))
    max_steps: int = option(-1, "Iterations; overrides total_episodes. -1: off.", at_least(1, also=(-1,)))
    rollout_batch_size: int | None = option(
        None,
        "Responses an iteration, all processes together. None: per_device_train_batch_size * "
        "gradient_accumulation_steps * num_mini_batches * processes. Paper: 512.",
        at_least(1),
    )
    num_responses: int = option(1, "Responses a prompt; must divide the responses of an iteration.", at_least(1))
    packing: Literal["auto", "false"] = option(
        "auto", "Responses to one prompt share its computation: auto (where the models can and it saves time) or false."
    )
    response_length: int = option(53, "Most tokens of a response, stop token included.", at_least(1))
    temperature: float = option(1.0, "Divides the logits, in sampling and in every log-prob. Paper: 1.", above(0))
    stop_token: str | None = option(None, "A further token that ends a response, beside EOS. `eos` adds nothing.")
    stop_token_id: int | None = option(None, "The same by its id.", at_least(0))
    missing_eos_penalty: float | None = option(
        None, "Taken off the score of a response without a stop token.", at_least(0)
    )
    local_rollout_forward_batch_size: int = option(
        64, "Rows of a forward without gradient (scores, log-probs).", at_least(1)
    )
    local_rollout_batch_size: int | None = option(None, "Rows sampled at a time on a process. None: all.", at_least(1))
    rollout_engine: str = option(
        "builtin",
        "What samples: builtin, generate (transformers), generate_batch (its continuous batching, for GPUs), vllm "
        "(docs/rollouts.md), or path/to/file.py:name, as rlhf.rollouts.sampling.RolloutEngine says.",
    )
    vllm_server: list[str] | None = option(
        None, "Servers of vLLM that are running, http://host:port each. None: vLLM runs in this process."
    )
    vllm_timeout: float = option(
        300.0, "Seconds a server may take for an answer, and that one which died is waited for.", above(0)
    )
    vllm_weights_dir: str | None = option(
        None, "Where weights are put for vLLM to load; its servers read it. None: output_dir/rollout_weights."
    )
    vllm_options: list[str] | None = option(
        None, "Arguments of vllm.LLM in this process: gpu_memory_utilization=0.4, tensor_parallel_size=2, ..."
    )
    rollout_gap_warning: float | None = option(
        0.05,
        "Warn where an engine's log-probs are farther from the trainer's in the mean, nats a token. None: never.",
        at_least(0),
    )
    rollout_gap_limit: float | None = option(0.1, "Stop there. None: never.", at_least(0))
    rollout_correction: Literal[
        "none", "token", "sequence", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = option(
        "none",
        "Weights for an engine's samples: token (truncated), token_mask, sequence (truncated), sequence_mask.",
    )
    rollout_correction_low: float | None = option(None, "Lower bound of the weights. None: none.", above(0))
    rollout_correction_high: float | None = option(2.0, "Upper bound of the weights. None: none.", above(0))
    rollout_ahead: int = option(0, "1: a concurrent engine draws the next samples early.", within(0, 1))
    # rewards
    reward_function: str | None = option(None, "file.py:name, math_answer, regex, json_schema, unit_test; or several.")
    reward_weights: list[float] | None = option(
        None, "Factors of the reward model, if any, and each function. None: 1.", FINITE
    )
    reward_server: str | None = option(None, "Server with the reward model: http://host:port.")
    reward_server_bias: float | None = option(
        None, "Subtracted from its scores. None: as reward_model_path says.", FINITE
    )
    reward_server_timeout: float = option(600.0, "Seconds in which it must answer.", above(0))
    reward_tokenizer: Literal["same", "auto"] = option("same", "same as the policy's, checked; auto: any.")
    kl_coef: float = option(0.05, "beta, the weight of the KL in the reward. Paper: 0.02.", at_least(0))
    kl_estimator: Literal["k1", "k2", "k3"] = option(
        "k1", "KL of a token: k1 = log-ratio, k3 = the one that is never negative."
    )
    kl_target: float | None = option(None, "Steer beta to this KL per response, nats. None: beta stays.", above(0))
    kl_horizon: float = option(10_000, "Episodes over which the steering acts.", above(0))
    max_kl: float | None = option(None, "Stop when the KL per response exceeds this, nats. None: never.", above(0))
    reward_clip_range: list[float] | None = option(
        None, "Clip the reward model's scores to these two numbers. None: no clipping.", ANY
    )
    kl_in: Literal["reward", "loss"] = option("reward", "The KL is part of the rewards (paper), or of the loss (GRPO).")
    kl_gradient: Literal["plain", "straight_through", "ratio", "straight_through_ratio"] = option(
        "straight_through",
        "Of kl_in loss: plain, straight_through, ratio, straight_through_ratio (rlhf_kernels.KLTerm).",
    )
    # advantages
    advantage: Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++-baseline"] = option(
        "gae", "gae: a value network (paper). None: grpo, dr_grpo, rloo, reinforce++, reinforce++-baseline."
    )
    advantage_eps: float = option(1e-6, "Added to the standard deviation of grpo.", at_least(0))
    whiten_rewards: bool = option(False, "Scale the per-token rewards to variance 1; their mean stays.")
    whiten_advantages: bool = option(True, "Advantages to mean 0 and variance 1 over an iteration's tokens.")
    gamma: float = option(1.0, "Discount. Paper: 1.", within(0, 1))
    lam: float = option(0.95, "Lambda of generalised advantage estimation.", within(0, 1))
    # loss and optimizer
    num_ppo_epochs: int = option(4, "Passes over the responses of an iteration. Paper: 1.", at_least(1))
    num_mini_batches: int = option(1, "Optimizer steps a pass. Paper: 8 (512 / 64).", at_least(1))
    per_device_train_batch_size: int = option(8, "Rows of a forward with gradient, on a process.", at_least(1))
    gradient_accumulation_steps: int = option(1, "Such forwards an optimizer step.", at_least(1))
    learning_rate: float = option(3e-6, "Peak rate of the policy. Paper: 9.6e-6 at 1.3B and 6B.", at_least(0))
    value_learning_rate: float | None = option(
        None, "The same of the value network. None: equal. Paper: 9e-6.", at_least(0)
    )
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = option(
        "constant", "After the warm-up: constant (paper), linear or cosine."
    )
    warmup_iterations: int = option(0, "Iterations over which the rates rise from a tenth. Paper: 10.", at_least(0))
    adam_beta1: float = option(0.9, "Adam's first decay.", within(0, 1, open_high=True))
    adam_beta2: float = option(0.999, "Adam's second decay. Paper: 0.95.", within(0, 1, open_high=True))
    adam_epsilon: float = option(1e-8, "Adam's epsilon.", at_least(0))
    weight_decay: float = option(0.0, "AdamW's weight decay.", at_least(0))
    max_grad_norm: float | None = option(1.0, "Clips each network's gradient. 0, None: no clipping.", at_least(0))
    objective: str = option(
        "clip",
        "clip, gspo, rloo, reinforce, gpg, cispo, sapo, gmpo, dppo, dro, clip_cov or kl_cov; with parameters: "
        "cispo:low=0.2,high=4.",
    )
    log_ratio_clamp: float | None = option(None, "Bound on the log of a token's ratio. None: none.", above(0))
    cliprange: float = option(0.2, "The ratio is clipped to 1 - this and 1 + this. Paper: 0.2.", within(0, 1))
    cliprange_high: float | None = option(None, "Upper clip, where it differs from the lower.", at_least(0))
    dual_clip: float | None = option(None, "Bound on the loss of a token with negative advantage; > 1.", above(1))
    cliprange_value: float | None = option(
        0.2, "Values stay this close to the old ones in the loss; mind the scores' scale. None: no clipping.", above(0)
    )
    vf_coef: float = option(0.1, "Weight of the value loss.", at_least(0))
    entropy_coef: float = option(0.0, "Weight of an entropy bonus.", FINITE)
    loss_agg_mode: Literal[
        "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
    ] = option(
        "token-mean",
        "How token losses are joined, as in rlhf_kernels.ppo_loss: token-mean, token-sum, seq-mean-token-sum, "
        "seq-mean-token-mean or seq-mean-token-sum-norm.",
    )
    ptx_coef: float = option(
        0.0, "gamma of PPO-ptx: multiplies the mean -log p of pretraining text. Paper: 27.8.", at_least(0)
    )
    ptx_dataset_name: str | None = option(None, "Pretraining text: rows with `text`, or a plain text file.")
    ptx_batch_multiplier: int = option(1, "Pretraining texts an episode. Paper: 8.", at_least(1))
    ptx_max_length: int = option(512, "Tokens of a pretraining text; a longer one becomes several.", at_least(2))
    ptx_streaming: bool = option(
        False, "Read pretraining texts as they are needed, for files larger than memory; a bad row is met on the way."
    )
    ptx_shuffle_buffer: int = option(
        10_000, "Texts that are held for drawing the next, with ptx_streaming.", at_least(1)
    )
    ema_decay: float | None = option(
        None, "Decay of the policy weights' average. None: no average. Paper: 0.992.", within(0, 1, open_high=True)
    )
    # LoRA
    use_peft: bool = option(
        False, "Train LoRA adapters on policy and value network (package peft); the reference is the policy without."
    )
    lora_r: int = option(16, "LoRA rank.", at_least(1))
    lora_alpha: int = option(32, "LoRA scale.", at_least(1))
    lora_dropout: float = option(
        0.0, "Dropout in front of the adapters: only 0, as the ratio would not be 1.", within(0, 1, open_high=True)
    )
    lora_target_modules: list[str] | None = option(
        None, "Layers to adapt, or all-linear. None: peft's choice, else all linear ones."
    )
    # health
    on_health: Literal["warn", "stop", "ignore"] = option(
        "warn", "When a run looks unhealthy: stop, warn or ignore. NaN always stops it."
    )
    health_kl: float = option(1.0, "KL of a response over its tokens above this, nats.", FINITE)
    health_entropy: float = option(0.25, "Entropy below this share of the first iterations'.", FINITE)
    health_explained_variance: float = option(-2.0, "Explained variance of the values below this.", FINITE)
    health_clip_fraction: float = option(0.5, "Share of tokens with a clipped ratio above this.", FINITE)
    health_patience: int = option(3, "So many iterations in a row.", at_least(1))
    # the run
    seed: int = option(42, "Seed of sampling, shuffling and new heads.", SEED)
    save_steps: int = option(50, "A checkpoint every so many iterations, and at the end. 0: none.", at_least(0))
    save_updates: int = option(
        0, "Also one every so many optimizer steps inside an iteration (0, n, ...). 0: none.", at_least(0)
    )
    save_total_limit: int | None = option(2, "Checkpoints to keep. None: all.", at_least(1))
    resume_from_checkpoint: str | None = option(None, "`true`: the newest of output_dir; or a checkpoint's folder.")
    report_to: Literal["none", "tensorboard"] = option("none", "none or tensorboard; metrics.jsonl is always written.")
    num_logged_samples: int = option(4, "Responses an iteration that go to samples.jsonl.", at_least(0))
    disable_tqdm: bool = option(False, "No progress bar.")

    groups: ClassVar[dict[str, tuple[str, ...]]]  # of `rlhf ppo --help`; filled in below from the first name of each

    def __post_init__(self):
        self.packing = {True: "auto", False: "false"}.get(self.packing, self.packing)
        self.dtype = str(self.dtype).removeprefix("torch.")
        self.output_dir = os.path.expanduser(self.output_dir)
        check(self)
        if self.rollout_correction in ("token", "sequence"):
            self.rollout_correction += "_truncate"
        if self.bf16 and self.dtype != "float32":
            raise ValueError(
                f"bf16: got True with dtype {self.dtype}, want dtype float32: its weights are what is rounded"
            )
        if self.rollout_correction != "none" and self.rollout_engine == "builtin":
            raise ValueError(
                f"rollout_correction: got {self.rollout_correction}, want none with rollout_engine builtin, whose "
                "samples are the trainer's own"
            )
        if self.rollout_ahead and self.rollout_engine in ("builtin", "generate", "generate_batch"):
            raise ValueError(
                f"rollout_ahead: got 1 with rollout_engine {self.rollout_engine}, which reads the weights that train; "
                "want an engine that samples elsewhere, as vllm does with vllm_server"
            )
        for name in ("vllm_server", "vllm_weights_dir", "vllm_options"):
            if getattr(self, name) is not None and self.rollout_engine != "vllm":
                raise ValueError(
                    f"{name}: got {getattr(self, name)} with rollout_engine {self.rollout_engine}, want none, or "
                    "rollout_engine vllm"
                )
        if self.vllm_server is not None and self.vllm_options is not None:
            raise ValueError("vllm_options: got some beside vllm_server, want none: a server has its own")
        bounds = self.rollout_correction_low, self.rollout_correction_high
        if None not in bounds and bounds[0] > bounds[1]:
            raise ValueError(
                f"rollout_correction_low: got {bounds[0]}, want at most rollout_correction_high, {bounds[1]}"
            )
        if (self.objective, self.advantage) != ("clip", "gae"):
            from .objective import check_objective  # imports torch

            check_objective(self)
        self.max_grad_norm = self.max_grad_norm or None  # 0 is no clipping, as in the other stages
        if self.ptx_coef and not self.ptx_dataset_name:
            raise ValueError(f"ptx_dataset_name: got none, wants pretraining text for ptx_coef {self.ptx_coef}")
        limits = self.reward_clip_range
        if limits is not None and not (len(limits) == 2 and limits[0] < limits[1]):
            raise ValueError(f"reward_clip_range: got {limits}, wants two numbers, low and high")
        if self.reward_server_bias is not None and self.reward_server is None:
            raise ValueError(f"reward_server_bias: got {self.reward_server_bias}, want none without reward_server")
        if self.lora_dropout:
            raise ValueError(
                f"lora_dropout: got {self.lora_dropout}, wants 0: with dropout an unchanged policy's ratio is not 1"
            )

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
    advantages="advantage",
    loss_and_optimizer="num_ppo_epochs",
    LoRA="use_peft",
    health="on_health",
    run_and_output="seed",
)
