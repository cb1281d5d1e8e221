"""transformers' Trainer with what the SFT, reward and preference stages have in common."""

import logging
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate.utils import DistributedType, broadcast_object_list, set_seed
from transformers import PrinterCallback, ProgressCallback, Trainer

from .. import checkpoint, locks, models
from ..data import reading, rows_of
from ..interrupt import deferred
from ..models.adapters import add_adapters, check_merge, merged, merged_whole
from ..models.dropout import residual_dropout_off
from ..models.parts import use_cache_kept
from ..models.sequences import packing_pays
from ..processes import check_launch_settings, check_processes
from ..settings import refuse
from .batches import make_batch
from .callbacks import MetricsFile, SavingTried, StageProgress, StepsArrive, check_callbacks, check_trackers
from .config import settings
from .probes import try_model
from .resume import GoesOn, StopAtSignal, check_record, digests, this_run, write_logged, write_record
from .stage import load_data, load_stage_tokenizer, make_room, once, set_max_length, show_example

logger = logging.getLogger("rlhf")


def may_pack(args, model):
    """Whether rows may be packed: the run allows it, and the model gives the same hidden states packed as apart."""
    possible = args.packing != "false" and models.share_prompts([model], args.max_length)
    if args.packing == "true" and not possible:
        raise ValueError(
            f"packing: {type(model).__name__} with {model.config._attn_implementation} attention does not give the "
            "same results packed as apart; use --packing false"
        )
    return possible


class StageTrainer(Trainer):
    """transformers.Trainer with whole-or-absent checkpoints, a normaliser over the accumulated batch, and metrics.

    A subclass gives `config_class`, `kind` (of `data.load_rows`), `task_type`, `load_model`, `encode`, `compute_loss`,
    `count_items` (what its loss is a mean over) and `evaluate_rows`.

    Args:
        model: a model of transformers or PEFT, which is trained; or its path. None = args.model_name_or_path.
        args: the settings; None = the defaults.
        train_dataset, eval_dataset: rows (dicts) in a list or a `datasets.Dataset`, or a file. None = what args name;
            without held-out rows, args.eval_fraction of the prompts is held out.
        processing_class: the tokenizer, or its path. None = that of the model's folder.
        callbacks: of transformers.
        optimizers: (optimizer, scheduler) as for transformers.Trainer.
        peft_config: a `peft.LoraConfig`: train adapters on the model.
        refused: arguments of other trainers that have no meaning here, as name: value; one that is not None raises.
    Raises:
        ValueError: names the argument or setting that is wrong, or the row of the data.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by num_items_in_batch

    def __init__(
        self, model=None, args=None, *, train_dataset=None, eval_dataset=None, processing_class=None, callbacks=None,
        optimizers=(None, None), peft_config=None, **refused,
    ):  # fmt: skip
        refuse(**refused)
        args = self.config_class() if args is None else args
        if not isinstance(args, self.config_class):
            raise ValueError(f"args: got {type(args).__name__}, wants {self.config_class.__name__}")
        check_trackers(args.report_to)
        checkpoint.refuse_file(args.output_dir)
        check_processes(args.world_size, args.distributed_state.distributed_type)
        check_launch_settings(args.gradient_accumulation_steps)
        if model is None or isinstance(model, (str, Path)):
            args.model_name_or_path = str(model or args.model_name_or_path)
        elif hasattr(model, "config"):
            args.model_name_or_path = model.config._name_or_path or type(model).__name__
        else:
            raise ValueError(f"model: got {type(model).__name__}, wants a model of transformers, or its path")
        check_callbacks(callbacks)
        tokenizer = load_stage_tokenizer(args, processing_class)
        train, held_out = load_data(args, self.kind, train_dataset, eval_dataset)
        self.check_data(args, train, held_out)
        with models.loaded_whole(args.deepspeed_plugin):
            model = self.load_model(args, model, tokenizer)
            networks, adapters = (model, *self.also_compared().values()), bool(args.use_peft or peft_config)
            make_room(args, networks, tokenizer, adapters=adapters)
        set_max_length(args, model)
        self.args, self.tokenizer = args, tokenizer
        sides = [(train, "training"), (held_out, "held-out")]
        train, self.held_out = once(args.distributed_state, lambda: [self.encode(*side) for side in sides])
        models.check_token_ids(model, tokenizer, [rows.largest_id for rows in (train, self.held_out)])
        show_example(args, tokenizer, train)
        if hasattr(model, "get_base_model"):
            check_merge(model, "model")
        self.can_pack = may_pack(args, model)
        if not (args.fsdp or args.deepspeed):  # sharded weights are tried whole, where they were loaded
            model.to(args.device)
        options = {"packing": args.packing if self.can_pack else "false", "samples": self.samples_behind_prompts}
        with torch.random.fork_rng(), residual_dropout_off(model):
            self.can_pack = try_model(model, train, **options)
        self.evaluation, self.evaluated_step = {}, None
        self._finite = None  # whether the losses since the last look were, a bool on their device
        self.samples = self._aside = None
        self._best_is_loaded = False
        self._sums = {}
        if not self.held_out:
            args.eval_strategy = "no"
        if args.n_gpu > 1:
            logger.warning("this process uses 1 of %d GPUs; start one for each (torchrun --nproc_per_node)", args.n_gpu)
            args._n_gpu = 1  # or transformers splits batches over the GPUs (DataParallel), but not their labels
        set_seed(args.seed)  # adapters are drawn
        args.use_peft = args.use_peft or peft_config is not None or hasattr(model, "get_base_model")
        if not hasattr(model, "get_base_model"):
            model = add_adapters(args, model, self.task_type, peft_config)
        elif peft_config is not None:
            raise ValueError("peft_config: got one with a model that has adapters already")
        if self.task_type == "CAUSAL_LM":
            models.linear_head(model)  # found now, while the weights are whole
        with use_cache_kept(model):
            super().__init__(
                model=model,
                args=args,
                train_dataset=train,
                eval_dataset=self.held_out or None,
                data_collator=self.collate,
                processing_class=tokenizer,
                callbacks=list(callbacks or ()),
                optimizers=optimizers,
            )
        self.check_sharding()
        self.digests = digests(self)
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)  # metrics.jsonl has it all
        if self.pop_callback(ProgressCallback):
            self.add_callback(StageProgress())

    @property
    def samples_behind_prompts(self):
        """Whether the stage samples from its model."""
        return False

    def check_data(self, args, train, held_out):
        """Look at the rows before the model is loaded; a subclass may refuse some, or keep others for later."""

    def train(self, resume_from_checkpoint=None, **options):
        """Run the stage: train, or go on training, evaluate, and write the run with the final model to args.output_dir.

        Args:
            resume_from_checkpoint: True (the newest of output_dir) or a checkpoint; None = what args say.
        Returns:
            transformers' TrainOutput.
        Raises:
            ValueError: output_dir holds another run, or another process writes there; the run that is resumed was
                another one; or the model could not be saved there.
            FloatingPointError: the loss or a weight became NaN or infinite; no model is written.
            WriteError: a file of the run could not be written.
            Interrupted: the command got SIGTERM or SIGINT; a checkpoint was written after the step.
        """
        with deferred() as signals, locks.released(self.args.output_dir):
            return self._train(resume_from_checkpoint, signals, **options)

    def _train(self, resume_from_checkpoint, signals, **options):
        args, output, step = self.args, Path(self.args.output_dir), None
        resume = args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        last = checkpoint.resolve_checkpoint(output, resume)
        self.this_run = this_run(self)
        if last:
            check_record(self.this_run, last)
        if args.process_index == 0:
            checkpoint.prepare_output_dir(output, resume=bool(resume))
            step = (int(last.name.rpartition("-")[2]) if last else 0) if resume else None
        log, stop = MetricsFile(output, step), StopAtSignal(signals, self.accelerator)
        for callback in (StepsArrive(), log, SavingTried(), GoesOn(self, last), stop):
            self.remove_callback(type(callback))  # of an earlier call
            self.add_callback(callback)
        self.samples = checkpoint.JsonLines(output / "samples.jsonl", resume_step=step)
        if args.should_save:
            models.check_saving(self.model, self.tokenizer, output)
        self.before_training()
        run = {"stage": args.stage, "config": settings(args), "summary": {}}
        if args.should_save:
            checkpoint.write_json(output / "run.json", run)
        result = super().train(resume_from_checkpoint=str(last) if last else None, **options)
        self.stop_if_diverged()
        run["summary"] = self.finish()
        if self._best_is_loaded:
            run["summary"]["best_step"] = self.state.best_global_step
        model, state = self.whole_model()
        if args.should_save:
            models.save_model(model, self.tokenizer, output, state)
            checkpoint.write_json(output / "run.json", run)
        self.after_saving()
        return result

    def also_compared(self):
        """{setting: rows, or a model} that a resumed run must have the same, besides its rows and its model."""
        return {}

    def before_training(self):
        """What a stage computes once the run directory is there."""

    def finish(self):
        """The summary of the run for run.json, after training; it may still change the model's config."""
        return self.last_evaluation()

    def after_saving(self):
        """What a stage shows of the final model once that is safe."""

    def check_sharding(self):
        """Refuse what would fail in the middle, or at the end, of a run."""
        state, args = self.accelerator.state, self.args
        for name, kind in (("fsdp", DistributedType.FSDP), ("deepspeed", DistributedType.DEEPSPEED)):
            if getattr(args, name) and state.distributed_type != kind:
                raise ValueError(
                    f"{name}: got {getattr(args, name)}, which accelerate ignores here ({state.distributed_type})"
                )
        if state.distributed_type == DistributedType.FSDP and state.fsdp_plugin.fsdp_version != 2:
            raise ValueError(f"fsdp_version: got {state.fsdp_plugin.fsdp_version}, wants 2")
        if state.distributed_type == DistributedType.DEEPSPEED:
            zero = state.deepspeed_plugin.deepspeed_config["zero_optimization"]
            if zero["stage"] == 3 and zero.get("stage3_gather_16bit_weights_on_model_save") is not True:
                raise ValueError("zero3_save_16bit_model: got false, wants true, or the run could not save its model")

    @property
    def is_sharded(self):
        """Whether no process has the whole weights, so that all of them must run the model, and save it, together."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def collate(self, examples):
        width = models.hidden_size(self.model)
        groups = [(len(example["prompt"]), list(map(len, example["responses"]))) for example in examples]
        packed = self.can_pack and (self.args.packing == "true" or packing_pays(groups, width))
        return make_batch(examples, self.tokenizer.pad_token_id, packed=packed, hidden_size=width)

    def count_items(self, batch):
        """How many items of the batch the loss is a mean over, a number or a 0-d tensor: prompts, unless overridden."""
        return len(batch["cu_groups"]) - 1

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = torch.as_tensor(sum(self.count_items(batch) for batch in batches), device=device)
        return batches, self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    def global_mean(self, loss):
        """Undo the mean over processes that follows: the loss is divided by the items of all processes already."""
        return loss * self.accelerator.num_processes

    def compute_loss_context_manager(self):
        """Mixed precision for all that a loss computes; accelerate gives it to the model's own forward alone."""
        return self.accelerator.autocast()

    def record(self, metrics, weight=1):
        """Add to the metrics of the next log line: weighted means over its batches, on the device until then."""
        for name, value in metrics.items():
            total, weights = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (total + value * weight, weights + weight)

    def training_step(self, *args, **options):
        loss = super().training_step(*args, **options)
        finite = loss.detach().isfinite()
        self._finite = finite if self._finite is None else self._finite & finite
        return loss

    @torch.no_grad()
    def stop_if_diverged(self, *, weights=True):
        """Raise FloatingPointError if a loss, or a weight that trains, is NaN or infinite. All processes must call."""
        checked = {"the loss": self._finite}
        if weights:
            checked["weights of the model"] = models.all_finite(self.model)
        checked = {name: finite for name, finite in checked.items() if finite is not None}
        if not checked:
            return
        bad = torch.stack([(~finite).float().to(self.args.device) for finite in checked.values()])
        bad = self.accelerator.reduce(bad, "sum").tolist()
        self._finite = None
        for name, count in zip(checked, bad):
            if count:
                last = checkpoint.last_checkpoint(self.args.output_dir)
                kept = f"the last checkpoint, {last.name}, is whole" if last else "there is no checkpoint yet"
                raise FloatingPointError(
                    f"step {self.state.global_step}: {name} became NaN or infinite, so the run has diverged: lower "
                    f"--learning_rate; no model is written, {kept}"
                )

    def log(self, logs, start_time=None):
        if "loss" in logs and self._sums:
            pairs = [[float(x) for x in pair] for pair in self._sums.values()]
            sums = torch.tensor(pairs, dtype=torch.float32, device=self.args.device)
            sums = self.accelerator.reduce(sums, "sum")
            logs.update(zip(self._sums, (sums[:, 0] / sums[:, 1]).tolist()))
            self._sums = {}
        super().log(logs, start_time)
        if "loss" in logs:
            self.stop_if_diverged(weights=False)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        examples = self.held_out
        if eval_dataset is not None:
            rows = rows_of(eval_dataset, self.kind, name="eval_dataset", **reading(self.args))
            examples = self.encode(rows, "held-out")
        if not examples:
            raise ValueError("eval_dataset: got none, and the run holds no rows out (eval_fraction)")
        metrics = self.measure(examples)
        metrics = {name: value for name, value in metrics.items() if not isinstance(value, dict)}
        self.log({f"eval/{name}": value for name, value in metrics.items()})
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure(self, examples):
        """What `evaluate_rows` says of the model as it is now, which becomes the run's last evaluation."""
        self.stop_if_diverged()
        self.model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            metrics = self.evaluate_rows(examples)
        self.model.train()
        self.evaluation = {f"eval/{name}": value for name, value in metrics.items()}
        self.evaluated_step = self.state.global_step
        return metrics

    def save_model(self, output_dir=None, _internal_call=False):
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            checkpoint.let_others_read(Path(output_dir or self.args.output_dir))

    def last_evaluation(self):
        """What `evaluate` says of the model as it is now, by its names in metrics.jsonl; {} without held-out rows."""
        if self.held_out and self._best_is_loaded:
            self.measure(self.held_out)  # not logged: its step has a line already
        elif self.held_out and self.evaluated_step != self.state.global_step:
            self.evaluate()
        return self.evaluation

    def create_optimizer(self, *args):
        try:
            return super().create_optimizer(*args)
        except ImportError as error:  # many optimizers come with packages of their own
            raise ValueError(f"optim: {' '.join(str(error).split())}") from None

    def _determine_best_metric(self, *args, **options):
        try:
            return super()._determine_best_metric(*args, **options)
        except KeyError as error:
            raise ValueError(error.args[0]) from None

    def _load_best_model(self):
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        self.state.best_model_checkpoint = str(best)  # it was written under another name
        super()._load_best_model()
        self._best_is_loaded = True

    def batches(self, examples):
        """The examples as batches on the model's device, in order."""
        size = self.args.per_device_eval_batch_size
        for start in range(0, len(examples), size):
            yield self._prepare_inputs(self.collate(examples[start : start + size]))

    def whole_model(self):
        """(model, state dict) to save, the adapters merged; None: the model's own state. All processes must ask."""
        model = self.accelerator.unwrap_model(self.model)
        if not self.is_sharded:
            return merged(model)
        if self.args.use_peft:
            model, state = merged_whole(model, zero=self.is_deepspeed_enabled)
        else:
            state = self.accelerator.get_state_dict(self.model_wrapped) or {}  # empty or None but on the main process
        return model, {name: weight for name, weight in state.items() if name not in model.all_tied_weights_keys}

    def _get_output_dir(self, trial):
        return self._aside or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        """Write aside, then rename: a killed run or a full disk leaves nothing that looks like a checkpoint."""
        self.stop_if_diverged()
        output, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        best = output / f"checkpoint-{self.state.best_global_step}"
        self.state.best_model_checkpoint = str(best) if best.is_dir() else None
        whole = checkpoint.atomic_directory(output / name, replace=True) if self.args.should_save else nullcontext()
        with whole as folder:
            self._aside = broadcast_object_list([str(folder)])[0]
            try:
                with models.quiet():
                    super()._save_checkpoint(model, trial)
                write_logged(self, folder)
                self.accelerator.wait_for_everyone()
                if folder is not None:
                    for file in (folder / name).iterdir():
                        file.rename(folder / file.name)
                    (folder / name).rmdir()
                    write_record(self.this_run, folder)
            finally:
                self._aside = None
        if self.args.should_save and self.args.save_total_limit:
            keep = {str(best), *map(str, checkpoint.checkpoints(output)[-self.args.save_total_limit :])}
            for old in checkpoint.checkpoints(output):
                if str(old) not in keep:
                    checkpoint.remove_directory(old)
