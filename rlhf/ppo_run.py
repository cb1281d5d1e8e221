"""What a PPO run needs around the algorithm: data, networks and optimizer at the start, logs and files on the way."""

import dataclasses
import json
import math
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.optim.lr_scheduler import LambdaLR

from . import checkpoint, models
from .adapters import AdaptersOff, add_adapters, load_adapters, merged
from .data import encode_prompt, load_rows
from .guards import HealthGuards, refuse_bad_weights
from .kl_controller import KLController
from .ppo_config import PPOConfig
from .ppo_state import Cursor, WeightAverage, learning_rate_factor, load_checkpoint, save_checkpoint
from .rollout import RolloutError, Rollouts, warn_ignored_sampling_settings
from .rollout_engines import gap_complaint, load_engine, log_prob_gap
from .sequences import Batch, by_length, join, response_log_probs, response_values, text_loss
from .startup_check import check_contract

CPU_PADDING = 64  # tokens; about what one more forward and backward cost on a CPU beside the tokens themselves


class ActorCritic(torch.nn.Module):
    """Policy and value network under one `forward`, as wrappers for many processes want it."""

    def __init__(self, policy, value):
        super().__init__()
        self.policy, self.value = policy, value

    def forward(self, batch=None, *, temperature=1.0, texts=None, num_items_in_batch=None):
        if texts is not None:
            return text_loss(self.policy, texts, num_items_in_batch=num_items_in_batch)
        log_probs, entropy = response_log_probs(self.policy, batch, temperature=temperature)
        return batch.unpack(log_probs), batch.unpack(entropy), batch.unpack(response_values(self.value, batch))


class PPORun:
    """The run around the loop of `rlhf.ppo.PPOTrainer`. The numbers are those of the list in `rlhf/ppo.py`."""

    def __init__(self, args: PPOConfig, *, reward_fn=None, callbacks=()):
        if (args.reward_model_path is None) == (reward_fn is None):
            got = "none" if reward_fn is None else "one and a reward_fn"
            raise ValueError(f"reward_model_path: got {got}, want a reward model's folder (in Python, or reward_fn)")
        if args.dataset_name is None:
            raise ValueError("dataset_name: got none, want a file of prompts")
        self.args, self.reward_fn, self.callbacks = args, reward_fn, callbacks
        self.accelerator = Accelerator()
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.local_batch_size, self.mini_batch_size = args.batch_sizes(self.world)
        self.resumes = checkpoint.wants_resume(args.resume_from_checkpoint)
        resume = checkpoint.resolve_checkpoint(args.output_dir, args.resume_from_checkpoint)
        self.output_dir = Path(args.output_dir)
        if self.accelerator.is_main_process:
            checkpoint.prepare_output_dir(self.output_dir, resume=self.resumes)
        self.engine = load_engine(args.rollout_engine, batch_size=args.local_rollout_batch_size)
        self.guards = HealthGuards(args)  # 15
        self._load_data()
        set_seed(args.seed + self.rank)
        self._load_models(resume)
        self._make_optimizer()
        self.kl = KLController(args.kl_coef, args.kl_target, args.kl_horizon)  # 10
        self.ema = None if args.ema_decay is None else WeightAverage(self.policy, args.ema_decay)  # 9
        self.prompt_cursor = Cursor(len(self.prompts), args.seed)
        self.ptx_cursor = Cursor(len(self.texts), args.seed + 1) if self.texts else None
        self.step, self.episode, self.seconds, self.stopped = 0, 0, {}, None
        self.contract = self.within_budget = None
        if resume is not None:
            load_checkpoint(self, resume)
        else:
            self.contract = check_contract(self)
        self._open_logs()

    def _load_data(self) -> None:
        args = self.args
        options = {"trust_remote_code": args.trust_remote_code}
        self.tokenizer = models.load_tokenizer(
            args.sft_model_path, pad_token=args.pad_token, eos_token=args.eos_token, **options
        )
        where = {"split": args.dataset_train_split, "config": args.dataset_config}
        self.prompts = load_rows(args.dataset_name, "prompts", **where)
        for row in self.prompts:
            row["prompt_ids"] = encode_prompt(self.tokenizer, row["prompt"])
        self.texts = []
        if args.ptx_coef:  # 7
            for row in load_rows(args.ptx_dataset_name, "text"):
                ids = [*encode_prompt(self.tokenizer, row["text"]), self.tokenizer.eos_token_id]
                pieces = [ids[i : i + args.ptx_max_length] for i in range(0, len(ids), args.ptx_max_length)]
                self.texts += [piece for piece in pieces if len(piece) > 1]
        episodes = self.local_batch_size * self.world
        wanted = args.total_episodes or math.ceil(args.num_train_epochs * len(self.prompts) * args.num_responses)
        self.iterations = args.max_steps if args.max_steps > 0 else math.ceil(wanted / episodes)

    def _load_models(self, resume: Path | None) -> None:
        args = self.args
        options = {
            "dtype": getattr(torch, args.dtype), "attn_implementation": args.attn_implementation,
            "trust_remote_code": args.trust_remote_code,
        }  # fmt: skip
        whole = None if args.use_peft else resume
        self.policy = models.load_policy(whole or args.sft_model_path, **options)
        self.reference = self.reward_model = None
        if not args.use_peft:
            self.reference = models.load_policy(args.sft_model_path, **options).requires_grad_(False).eval()
        if args.reward_model_path is not None:
            self.reward_model = models.load_reward_model(args.reward_model_path, **options).requires_grad_(False).eval()
        start = (whole / "value") if whole else (args.value_model_path or args.reward_model_path)  # 4
        if start is not None:
            self.value = models.load_reward_model(start, **options)
        else:
            self.value = models.reward_model_from_policy(
                args.sft_model_path, args.seed, pad_token_id=self.tokenizer.pad_token_id, **options
            )
        warn_ignored_sampling_settings(self.policy)  # 1
        extra = [token for token in (args.stop_token, args.stop_token_id) if token not in (None, "eos")]
        self.stop_ids = models.stop_token_ids(self.tokenizer, self.policy, extra)  # 3
        self._check_context()
        for model in (self.reference, self.reward_model):
            if model is not None:
                model.to(self.accelerator.device)
        longest = max(len(row["prompt_ids"]) for row in self.prompts) + args.response_length
        networks = (self.policy, self.reference, self.value, self.reward_model)
        wanted = args.packing != "false" and args.num_responses > 1
        self.share_width = None  # 12
        if wanted and models.share_prompts(networks, longest):
            self.share_width = self.policy.config.get_text_config().hidden_size
        if args.use_peft:  # 14
            self._add_adapters(resume)

    def _add_adapters(self, resume: Path | None) -> None:
        self.policy = add_adapters(self.args, self.policy, "CAUSAL_LM")
        self.value = add_adapters(self.args, self.value, "SEQ_CLS")
        if resume is not None:
            load_adapters(self.policy, resume)
            load_adapters(self.value, resume / "value")
        self.reference = AdaptersOff(self.policy)

    def _check_context(self) -> None:
        networks = {"policy": self.policy, "value network": self.value, "reward model": self.reward_model}
        for name, model in networks.items():
            context = model and getattr(model.config.get_text_config(), "max_position_embeddings", None)
            for row in self.prompts if context else ():
                if len(row["prompt_ids"]) + self.args.response_length > context:
                    raise ValueError(
                        f"{row['at']}: the prompt has {len(row['prompt_ids'])} tokens; with response_length "
                        f"{self.args.response_length} it does not fit the {name}'s context of {context}"
                    )

    def _make_optimizer(self) -> None:
        args = self.args
        groups = [  # 4
            {"params": [x for x in network.parameters() if x.requires_grad], "lr": rate}
            for network, rate in (
                (self.policy, args.learning_rate),
                (self.value, args.value_learning_rate or args.learning_rate),
            )
        ]
        betas = (args.adam_beta1, args.adam_beta2)
        optimizer = torch.optim.AdamW(
            groups, betas=betas, eps=args.adam_epsilon, weight_decay=args.weight_decay, fused=True
        )
        updates = args.num_ppo_epochs * (self.local_batch_size // self.mini_batch_size)
        self.scheduler = LambdaLR(  # 8
            optimizer,
            lambda update: learning_rate_factor(
                update, updates_per_iteration=updates, iterations=self.iterations,
                warmup_iterations=args.warmup_iterations, schedule=args.lr_scheduler_type,
            ),
        )  # fmt: skip
        self.model, self.optimizer = self.accelerator.prepare(ActorCritic(self.policy, self.value), optimizer)

    def _open_logs(self) -> None:
        resumed = self.step if self.resumes else None
        self.metrics_log = self.samples_log = self.writer = None
        if self.accelerator.is_main_process:
            self.metrics_log = checkpoint.MetricsLog(self.output_dir, resume_step=resumed)
            self.samples_log = checkpoint.JsonLines(self.output_dir / "samples.jsonl", resume_step=resumed)
            if resumed and (self.output_dir / "run.json").exists():
                self.contract = json.loads((self.output_dir / "run.json").read_text(encoding="utf-8")).get("contract")
            self._write_run({})
            if self.args.report_to == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(self.output_dir / "tensorboard", purge_step=resumed)

    def _write_run(self, summary: dict) -> None:
        run = {"stage": "ppo", "config": dataclasses.asdict(self.args), "summary": summary, "contract": self.contract}
        run["health"] = self.guards.found
        self.warnings_written = len(self.guards.found)
        checkpoint.write_json(self.output_dir / "run.json", run)

    def next_prompts(self) -> list[dict]:
        """Return this process's share of the next prompts, each `num_responses` times in a row."""
        count = self.local_batch_size // self.args.num_responses
        chosen = self.prompt_cursor.take(count * self.world)[self.rank :: self.world]
        return [self.prompts[i] for i in chosen for _ in range(self.args.num_responses)]

    def next_texts(self, episodes: int) -> list[list[int]]:
        """Return this process's share of the next pretraining texts for so many episodes; none without gamma."""
        if self.ptx_cursor is None:
            return []
        count = episodes * self.args.ptx_batch_multiplier  # 7
        return [self.texts[i] for i in self.ptx_cursor.take(count * self.world)[self.rank :: self.world]]

    def _chunks(self, rollouts: Rollouts, rows, size: int) -> list[list[int]]:
        """Cut rows into chunks of like length, at most `size` rows each, so that little padding is computed; the
        responses to one prompt stay together, so that they can share it.

        On a CPU, where a few large forwards are no faster than many small ones, one process also ends a chunk before
        its padding exceeds CPU_PADDING tokens. Several processes make equally many chunks, as sharded weights need it.
        """
        lengths = [len(p) + len(r) for p, r in zip(rollouts.prompt_ids, rollouts.response_ids, strict=True)]
        limit = CPU_PADDING if self.world == 1 and self.accelerator.device.type == "cpu" else math.inf
        chunks, padding = [], 0
        for row in by_length(rollouts.prompt_ids, rollouts.response_ids, rows):
            if chunks:
                padding += len(chunks[-1]) * max(lengths[row] - lengths[chunks[-1][-1]], 0)
            if not chunks or len(chunks[-1]) == size or padding > limit:
                chunks, padding = [*chunks, []], 0
            chunks[-1].append(row)
        return chunks

    def _all_chunks(self, rollouts: Rollouts) -> list[list[int]]:
        return self._chunks(rollouts, range(len(rollouts.response_ids)), self.args.local_rollout_forward_batch_size)

    def _join(self, rollouts: Rollouts, rows) -> Batch:
        prompts, responses = ([ids[row] for row in rows] for ids in (rollouts.prompt_ids, rollouts.response_ids))
        options = {"steps": self.args.response_length, "share_width": self.share_width}
        return join(prompts, responses, self.accelerator.device, **options)

    def _sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over the processes."""
        return tensor if self.world == 1 else self.accelerator.reduce(tensor.to(self.accelerator.device), "sum")

    def _group(self):
        return torch.distributed.group.WORLD if self.world > 1 else None

    def _decode(self, response_ids) -> list[str]:
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in response_ids]

    def _count_tokens(self, rollouts: Rollouts, rows) -> int:
        return sum(len(rollouts.prompt_ids[row]) + len(rollouts.response_ids[row]) for row in rows)

    def _throughput(self, rollouts: Rollouts) -> dict[str, float]:
        """Tokens a second of each phase, all processes together: those sampled; those of prompts and responses, a
        prompt counted with each of its responses; and those that optimizer steps were made from.
        """
        seen = self._count_tokens(rollouts, range(len(rollouts.response_ids)))
        sampled = sum(map(len, rollouts.response_ids))
        tokens = {"rollout": sampled, "score": seen, "evaluate": seen, "update": self.tokens_trained}
        return {
            f"throughput/{phase}_tokens_per_sec": self.world * tokens[phase] / seconds
            for phase, seconds in self.seconds.items()
        }

    def compare_engine(self, experience) -> dict[str, float]:
        """Return how far the log-probs that the rollout engine gave lie from the trainer's; {} where it gave none.

        Raises:
            RolloutError: farther than `rollout_gap_limit`.
        """
        if experience.rollouts.log_probs is None:
            return {}
        gather = self.accelerator.gather
        gap = log_prob_gap(experience.rollouts.log_probs, experience.log_probs, experience.mask, gather)
        complaint = gap_complaint(gap, self.args.rollout_gap_limit)
        if complaint:
            raise RolloutError(f"{complaint}; rollout_gap_limit sets the limit")
        complaint = gap_complaint(gap, self.args.rollout_gap_warning)
        if complaint:
            self.guards.warn(self.step + 1, "rollout_gap", complaint)
        return gap

    def must_be_finite(self, metrics: dict) -> dict:
        """Leave out the explained variance of returns that do not vary, and gradients that a GradScaler sees to: it
        skips such a step by itself.
        """
        exempt = ("val/explained_variance", *(() if self.accelerator.scaler is None else ("grad_norm/",)))
        return {name: value for name, value in metrics.items() if not name.startswith(exempt)}

    def _log(self, metrics: dict[str, float]) -> None:
        holding = self.guards.check(self.step, metrics)
        self.stopped = self.stopped or self.guards.reason_to_stop(holding)
        if self.metrics_log is not None:
            self.metrics_log.log(self.step, metrics | ({"health": holding} if holding else {}))
            if len(self.guards.found) > self.warnings_written:
                self._write_run({})
        for name, value in metrics.items() if self.writer else ():
            self.writer.add_scalar(name, value, self.step)

    def _log_samples(self, rows: list[dict], rollouts: Rollouts, scores: torch.Tensor) -> None:
        if self.samples_log is not None:
            count = self.args.num_logged_samples
            shown = zip(rows[:count], self._decode(rollouts.response_ids[:count]), scores[:count].tolist(), strict=True)
            self.samples_log.append([
                {"step": self.step, "prompt": row["prompt"], "completion": completion, "score": score}
                for row, completion, score in shown
            ])  # fmt: skip

    def save_checkpoint(self) -> None:
        """Write `checkpoint-N` for the iteration just done, and remove the oldest beyond `save_total_limit`."""
        refuse_bad_weights(self)  # 15
        save_checkpoint(self, self.output_dir / f"checkpoint-{self.step}")
        if self.accelerator.is_main_process:
            checkpoint.remove_old_checkpoints(self.output_dir, self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    def save(self, metrics: dict[str, float]) -> None:
        """Write the final policy (the average, where there is one), the value network, and the summary."""
        refuse_bad_weights(self)  # 15
        if self.accelerator.is_main_process:
            if self.ema is not None:
                self.ema.swap(self.policy)  # 9
            model, state = merged(self.policy)  # 14
            models.save_model(model, self.tokenizer, self.output_dir, state)
            if self.ema is not None:
                self.ema.swap(self.policy)
            model, state = merged(self.value)
            models.save_model(model, self.tokenizer, self.output_dir / "value", state)
            self._write_run({**metrics, "iterations": self.step, "episode": self.episode, "stopped": self.stopped})
        self.accelerator.wait_for_everyone()
