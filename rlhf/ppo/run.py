"""What a PPO run needs around the algorithm: data, networks and optimizer at the start, logs and files on the way."""

import dataclasses
import importlib.util
import itertools
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.utils import set_seed
from torch.optim.lr_scheduler import LambdaLR

from .. import checkpoint, models
from ..data import as_text
from ..interrupt import Interrupted, Noted
from ..models.adapters import merged, merged_whole
from ..models.sequences import Batch, by_length, cheapest_cut, join, policy_loss, response_values, text_loss
from ..processes import agreed_signal
from ..rewards.scoring import Scorer, reward_functions
from ..rollouts.ahead import Ahead
from ..rollouts.engines import load_engine
from ..rollouts.sampling import Rollouts
from ..settings import refuse
from ..training.stage import once
from ..training.steps import WeightsMoved
from . import sharding
from .ahead import check_ahead
from .callbacks import Callbacks
from .checkpoint import load_checkpoint, save_checkpoint
from .config import PPOConfig
from .contract import check_contract
from .guards import HealthGuards, refuse_bad_weights, stop_if_not_finite
from .iteration import Experience, Iteration, draws, gather, minibatches, sampling_noise
from .kl_controller import KLController
from .networks import Given, load_networks
from .prompts import load_prompts
from .state import Cursor, WeightAverage, learning_rate_factor
from .texts import pretraining_texts

CPU_CHUNK = 64  # tokens; about what one more forward and backward cost on a CPU beside the tokens themselves


logger = logging.getLogger("rlhf")


class ActorCritic(torch.nn.Module):
    """Policy and value network under one `forward`, as wrappers for many processes want it."""

    def __init__(self, policy, value):
        super().__init__()
        self.policy, self.value = policy, value

    def forward(self, batch=None, old_log_probs=None, advantages=None, *, texts=None, **options):
        """Return (policy loss, values [S, T] or None) of the responses of `batch`; or the loss of `texts`."""
        if texts is not None:
            return text_loss(self.policy, texts, **options)
        policy = policy_loss(self.policy, batch, old_log_probs, advantages, **options)
        return policy, None if self.value is None else batch.unpack(response_values(self.value, batch))


class PPORun:
    """The run around the loop of `rlhf.ppo.PPOTrainer`. The numbers are those of the list in `rlhf/ppo/trainer.py`."""

    def __init__(
        self, args: PPOConfig | None = None, processing_class=None, model=None, ref_model=None, reward_model=None,
        train_dataset=None, value_model=None, data_collator=None, eval_dataset=None, optimizers=(None, None),
        callbacks=(), peft_config=None, *, reward_fn=None,
    ):  # fmt: skip
        args = PPOConfig() if args is None else args
        self.given = Given(processing_class, model, ref_model, reward_model, value_model, peft_config)
        args = self.given.settings(args)
        refuse(data_collator=data_collator, optimizers=None if optimizers == (None, None) else optimizers)
        if eval_dataset is not None:
            logger.warning("eval_dataset: not used; PPO measures on its rollouts, rlhf.evaluate on held-out prompts")
        self.reward_functions = reward_functions(reward_fn, args.reward_function)
        if not (args.reward_model_path or args.reward_server or reward_model is not None or self.reward_functions):
            raise ValueError(
                "reward_model_path: got none, want a reward model's folder, or a reward_function, or both (in Python "
                "reward_model, reward_fn)"
            )
        if args.dataset_name is None and train_dataset is None:
            raise ValueError("dataset_name: got none, want a file of prompts (in Python train_dataset)")
        if args.report_to == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
            raise ValueError("report_to: got tensorboard, which is not installed (pip install tensorboard)")
        self.args = args
        self.accelerator, self.sharding = sharding.start(args)  # 19
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.local_batch_size, self.mini_batch_size = args.batch_sizes(self.world)
        self.resumes = checkpoint.wants_resume(args.resume_from_checkpoint)
        resume = checkpoint.resolve_checkpoint(args.output_dir, args.resume_from_checkpoint)
        self.output_dir = Path(args.output_dir)
        self.engine = load_engine(args.rollout_engine, batch_size=args.local_rollout_batch_size, settings=args)
        check_ahead(args, self.engine)  # 22
        self.guards = HealthGuards(args)  # 18
        self._load_data(train_dataset)
        if self.accelerator.is_main_process:
            checkpoint.prepare_output_dir(self.output_dir, resume=self.resumes)
        set_seed(args.seed + self.rank)
        load_networks(self, resume)
        if self.accelerator.is_main_process:
            for network in self.trained().values():
                models.check_saving(network, self.tokenizer, self.output_dir)
        if hasattr(self.engine, "check"):
            self.engine.check(self.policy, max(self.prompts.lengths) + args.response_length)
        self.scorer = Scorer(self, self.reward_functions)
        self.iterations = self._count_iterations()
        self._make_optimizer()
        self.kl = KLController(args.kl_coef, args.kl_target, args.kl_horizon)  # 10
        self.ema = None if args.ema_decay is None else WeightAverage(self.policy, args.ema_decay)  # 9
        self.prompt_cursor = Cursor(len(self.prompts), args.seed)
        self.step, self.episode, self.seconds, self.stopped, self.tokens_trained = 0, 0, {}, None, 0
        self.contract = self.within_budget = self.begun = self.moved = None
        self.signals, self.ahead = Noted(), Ahead()
        if resume is not None:
            load_checkpoint(self, resume)
        else:
            self.contract = check_contract(self)
            self.moved = WeightsMoved(self.model.parameters())
        self._open_logs()
        self.callbacks = Callbacks(self, callbacks)

    def _load_data(self, train_dataset) -> None:
        args = self.args
        self.tokenizer = self.given.tokenizer(args)
        self.prompts = load_prompts(self, train_dataset)
        self.texts = once(self.accelerator, lambda: pretraining_texts(args, self.tokenizer))  # 7

    def _count_iterations(self) -> int:
        args = self.args
        if args.max_steps > 0:
            return args.max_steps
        wanted = args.total_episodes or math.ceil(args.num_train_epochs * len(self.prompts) * args.num_responses)
        return math.ceil(wanted / (self.local_batch_size * self.world))

    def _make_optimizer(self) -> None:
        args = self.args
        value_rate = args.learning_rate if args.value_learning_rate is None else args.value_learning_rate
        rates = {"policy": args.learning_rate, "value": value_rate}
        groups = [  # 4
            {"params": [x for x in network.parameters() if x.requires_grad], "lr": rates[name]}
            for name, network in self.trained().items()
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
        self.model = ActorCritic(self.policy, self.value)
        if self.sharding.mesh is None:
            self.model, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        else:
            self.optimizer = self.accelerator.prepare(optimizer)  # 19

    def trained(self) -> dict[str, torch.nn.Module]:
        """The networks that train, by name: the policy, and the value network where there is one."""
        networks = {"policy": self.policy, "value": self.value}
        return {name: network for name, network in networks.items() if network is not None}

    def _open_logs(self) -> None:
        resumed = self.step if self.resumes else None
        self.metrics_log = self.samples_log = self.writer = None
        if self.accelerator.is_main_process:
            self.metrics_log = checkpoint.MetricsLog(self.output_dir, resume_step=resumed)
            self.samples_log = checkpoint.JsonLines(self.output_dir / "samples.jsonl", resume_step=resumed)
            if self.contract is None and (self.output_dir / "run.json").exists():
                self.contract = json.loads((self.output_dir / "run.json").read_text(encoding="utf-8")).get("contract")
            self._write_run({})
            if self.args.report_to == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(self.output_dir / "tensorboard", purge_step=resumed)

    def _write_run(self, summary: dict) -> None:
        config = {**dataclasses.asdict(self.args), **self.given.names()}
        run = {"stage": "ppo", "config": config, "summary": summary, "contract": self.contract}
        run["rewards"] = self.scorer.describe()
        run["health"] = self.guards.found
        self.warnings_written = len(self.guards.found)
        checkpoint.write_json(self.output_dir / "run.json", run)

    def next_prompts(self) -> list[dict]:
        """Return this process's share of the next prompts, each `num_responses` times in a row."""
        count = self.local_batch_size // self.args.num_responses
        chosen = self.prompt_cursor.take(count * self.world)[self._share(count)]  # 13
        return [self.prompts[i] for i in chosen for _ in range(self.args.num_responses)]

    def noise(self, prompts: int) -> torch.Tensor:
        """Return the numbers that choose the tokens of so many prompts, this process's share of the iteration's."""
        shape = (prompts * self.world, self.args.num_responses, self.args.response_length)
        return sampling_noise(self.args.seed, self.step, shape)[self._share(prompts)]  # 13

    def engine_seed(self, iteration: int) -> int:
        """Return the seed of another rollout engine, of an iteration (counted from 0) and this process."""
        return int(draws(self.args.seed, 2, iteration, self.rank).integers(2**31 - 1))  # 13

    def minibatches(self, begun: Iteration) -> Iterator[list[int]]:
        """Yield this process's rows of each optimizer step that is left of the iteration."""
        size = self.mini_batch_size * self.world
        episodes, epochs = len(begun.experience.mask), self.args.num_ppo_epochs
        steps = minibatches(self.args.seed, self.step, episodes=episodes, epochs=epochs, size=size)
        for chosen in itertools.islice(steps, begun.updates, None):
            yield chosen[self._share(self.mini_batch_size)]  # 13

    def _share(self, count: int) -> slice:
        return slice(self.rank * count, (self.rank + 1) * count)

    def gather(self, experience: Experience, rows: list[dict], raw_scores: torch.Tensor) -> Experience:
        """Return the experience of all processes, the same on each."""
        experience.raw_scores, experience.prompts = raw_scores, [row["row_number"] for row in rows]
        return experience if self.world == 1 else gather(experience, self.accelerator)  # 13

    def next_texts(self, episodes: int) -> list[list[int]]:
        """Return this process's share of the next pretraining texts for so many episodes; none without gamma."""
        if self.texts is None:
            return []
        count = episodes * self.args.ptx_batch_multiplier  # 7
        return self.texts.take(count * self.world)[self.rank :: self.world]

    def _chunks(self, rollouts: Rollouts, rows, size: int) -> list[list[int]]:
        """Cut rows into chunks of like length, at most `size` rows each, so that little padding is computed; the
        responses to one prompt stay together, so that they can share it.

        On a CPU, where a few large forwards are no faster than many small ones, one process cuts where that makes the
        least of padding and forwards. Several processes make equally many chunks, as sharded weights need it.
        """
        rows = by_length(rollouts.prompt_ids, rollouts.response_ids, rows)
        if self.world > 1 or self.accelerator.device.type != "cpu":
            return [rows[start : start + size] for start in range(0, len(rows), size)]
        lengths = [len(rollouts.prompt_ids[row]) + len(rollouts.response_ids[row]) for row in rows]
        ends = cheapest_cut(lengths, size, CPU_CHUNK)
        return [rows[start:end] for start, end in itertools.pairwise([0, *ends])]

    def _all_chunks(self, rollouts: Rollouts) -> list[list[int]]:
        return self._chunks(rollouts, range(len(rollouts.response_ids)), self.args.local_rollout_forward_batch_size)

    def _join(self, rollouts: Rollouts, rows) -> Batch:
        prompts, responses = ([ids[row] for row in rows] for ids in (rollouts.prompt_ids, rollouts.response_ids))
        options = {"steps": self.args.response_length, "share_width": self.share_width}
        return join(prompts, responses, self.accelerator.device, **options)

    def _sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over the processes."""
        return tensor if self.world == 1 else self.accelerator.reduce(tensor.to(self.accelerator.device), "sum")

    def _decode(self, response_ids) -> list[str]:
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in response_ids]

    def _count_tokens(self, rollouts: Rollouts, rows) -> int:
        return sum(len(rollouts.prompt_ids[row]) + len(rollouts.response_ids[row]) for row in rows)

    def _throughput(self, rollouts: Rollouts, sampling: float | None = None) -> dict[str, float]:
        """Tokens a second of each phase, all processes together: those sampled; those of prompts and responses, a
        prompt counted with each of its responses; and those that optimizer steps were made from.

        Args:
            sampling: seconds that the samples took where that is not the time of the phase: they were drawn ahead.
        """
        seen = self._count_tokens(rollouts, range(len(rollouts.response_ids)))
        sampled, trained = sum(map(len, rollouts.response_ids)), self.world * self.tokens_trained
        seconds = self.seconds | ({} if sampling is None else {"rollout": sampling})
        tokens = {"rollout": sampled, "score": seen, "evaluate": seen, "update": trained}
        return {f"throughput/{phase}_tokens_per_sec": tokens[phase] / spent for phase, spent in seconds.items()}

    def weights_moved(self, updates: int) -> dict[str, float]:
        """Return the share of 16-bit weights that the first iteration's optimizer steps have moved; {} later on."""
        moved, self.moved = self.moved, None
        share = moved.share(self.optimizer) if moved and updates else None
        if share is None:
            return {}
        complaint = moved.complaint(share, updates)
        if complaint:
            self.guards.warn(self.step, "weights_moved", complaint)
        return {"train/weights_moved": share}

    def must_be_finite(self, metrics: dict) -> dict:
        """Leave out the explained variance, which returns that do not vary have not."""
        return {name: value for name, value in metrics.items() if name != "val/explained_variance"}

    def _log(self, metrics: dict[str, float]) -> None:
        holding = self.guards.check(self.step, metrics)
        self.stopped = self.stopped or self.guards.reason_to_stop(holding)
        if self.metrics_log is not None:
            self.metrics_log.log(self.step, metrics | ({"health": holding} if holding else {}))
            if len(self.guards.found) > self.warnings_written:
                self._write_run({})
        for name, value in metrics.items() if self.writer else ():
            self.writer.add_scalar(name, value, self.step)

    def _log_samples(self, experience: Experience) -> None:
        if self.samples_log is not None:
            count = self.args.num_logged_samples
            completions, scores = self._decode(experience.rollouts.response_ids[:count]), experience.raw_scores
            if experience.rollouts.step_rewards is not None:  # 14
                scores = scores + experience.rollouts.step_rewards.sum(-1)
            prompts = [as_text(self.prompts[number]["prompt"]) for number in experience.prompts[:count]]
            shown = zip(prompts, completions, scores[:count].tolist(), strict=True)
            self.samples_log.append([
                {"step": self.step, "prompt": prompt, "completion": completion, "score": score}
                for prompt, completion, score in shown
            ])  # fmt: skip

    def save_inside(self, begun: Iteration) -> None:
        """Write `checkpoint-N-U` if one is due after U of the iteration's steps and more of them are to come.

        Raises:
            Interrupted: a signal asked for the end; the checkpoint is written.
        """
        every, steps = self.args.save_updates, len(begun.experience.mask) // (self.mini_batch_size * self.world)
        if begun.updates == steps * self.args.num_ppo_epochs or self.stopped is not None:
            return
        signal = self.signal()
        if signal or (every > 0 and begun.updates % every == 0):
            found = self.must_be_finite(begun.averages.read(self._sum))
            stop_if_not_finite(self, found, begun.experience, begun.averages)  # 18
            self.begun = begun
            self.save_checkpoint()
        self.end_if(signal)

    def signal(self) -> int:
        """The signal that asks for the end of the run, on all processes the same; 0: none."""
        return agreed_signal(self.signals.number, self.accelerator) if self.signals.active else 0

    def end_if(self, signal: int) -> None:
        """Raise Interrupted behind a checkpoint that was written for a signal."""
        if signal:
            raise Interrupted(signal, checkpoint.last_checkpoint(self.output_dir).name)

    def save_checkpoint(self) -> None:
        """Write `checkpoint-N` for the iteration just done, and remove the oldest beyond `save_total_limit`."""
        refuse_bad_weights(self)  # 18
        place = f"{self.step}" if self.begun is None else f"{self.step}-{self.begun.updates}"
        save_checkpoint(self, self.output_dir / f"checkpoint-{place}")
        if self.accelerator.is_main_process:
            checkpoint.remove_old_checkpoints(self.output_dir, self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir=None) -> None:
        """Write the policy as it is now, adapters merged, with its tokenizer; None: into the run's directory."""
        self._hand_on(self.policy, Path(output_dir or self.output_dir))

    def save(self, metrics: dict[str, float]) -> None:
        """Write the final policy (the average, where there is one), the value network, and the summary."""
        refuse_bad_weights(self)  # 18
        if self.ema is not None:
            self.ema.swap(self.policy)  # 9
        self._hand_on(self.policy, self.output_dir)
        if self.ema is not None:
            self.ema.swap(self.policy)
        if self.value is not None:
            self._hand_on(self.value, self.output_dir / "value")
        if self.accelerator.is_main_process:
            metrics = metrics or self.metrics_log.last()  # none of this process where only the end was left to do
            self._write_run({**metrics, "iterations": self.step, "episode": self.episode, "stopped": self.stopped})
        self.accelerator.wait_for_everyone()

    def _hand_on(self, network, folder: Path) -> None:
        main = self.accelerator.is_main_process
        if self.sharding.mesh is not None and not self.args.use_peft:
            models.save_cut_model(network, self.tokenizer, folder, main=main)  # 19
            return
        model, state = merged(network) if self.sharding.mesh is None else merged_whole(network)  # 17, 19
        if main:
            models.save_model(model, self.tokenizer, folder, state)
