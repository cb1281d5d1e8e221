"""What the SFT, reward and preference stages share: their settings, their batches and a Trainer around transformers'.

A batch holds rows of tokens and says which of their hidden states matter, so that padded rows and packed rows (a prompt
once, its responses behind it) go through one and the same loss.
"""

import dataclasses
import logging
import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch
from accelerate.utils import DistributedType, broadcast_object_list, set_seed
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from rlhf_kernels import pack_responses

from . import checkpoint, data, models, rankings
from .adapters import add_adapters, merged, merged_whole
from .processes import check_processes
from .sequences import label_log_probs, packing_pays

logger = logging.getLogger("rlhf")
DEFAULT_CONTEXT = 1024


def option(default, text):
    """A settings field with its one-line help."""
    return field(default=default, metadata={"help": text})


@dataclass
class StageConfig(TrainingArguments):
    """Settings of a stage: what is listed here, and every setting of transformers.TrainingArguments."""

    model_name_or_path: str = option("demo", "Folder of the model to start from; 'demo' is the embedded story model.")
    dataset_name: str | None = option(None, "Data to train on: a .jsonl, .json or .parquet file, or a `datasets` name.")
    dataset_config: str | None = option(None, "Configuration of a `datasets` name.")
    dataset_train_split: str = option("train", "Split to train on, of a folder or a `datasets` name.")
    dataset_test_split: str = option("test", "Split of eval_dataset_name to evaluate on.")
    eval_dataset_name: str | None = option(None, "Held-out data; without it, eval_fraction of the prompts is held out.")
    eval_fraction: float = option(0.1, "Share of the prompts held out for evaluation when there is no eval data.")
    max_length: int | None = option(None, "Tokens of prompt and response; default: the model's context, at most 1024.")
    long_prompts: Literal["truncate", "error"] = option(
        "truncate", "A prompt that is too long: cut its left end, or stop with an error."
    )
    packing: Literal["auto", "true", "false"] = option(
        "auto", "Prompts and responses share rows instead of padding; auto: where the model can and it saves time."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "Type of the weights.")
    attn_implementation: str = option("sdpa", "Attention of transformers: sdpa, eager, flash_attention_2, ...")
    trust_remote_code: bool = option(False, "Let the model's folder run code of its own.")
    pad_token: str | None = option(None, "Token to pad with, if the tokenizer names none; it may be the EOS token.")
    eos_token: str | None = option(None, "Token that ends a response, if the tokenizer names none.")
    use_peft: bool = option(False, "Train LoRA adapters (package peft) and merge them at the end.")
    lora_r: int = option(16, "LoRA rank.")
    lora_alpha: int = option(32, "LoRA scale.")
    lora_dropout: float = option(0.0, "Dropout in front of the LoRA adapters.")
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules to adapt; default: peft's choice for the architecture."}
    )
    output_dir: str | None = option(None, "Where the run is written; default: runs/ and the stage's name.")
    learning_rate: float = option(2e-5, "Peak learning rate.")
    per_device_train_batch_size: int = option(8, "Prompts in one forward pass.")
    per_device_eval_batch_size: int = option(8, "Prompts in one forward pass of an evaluation.")
    gradient_accumulation_steps: int = option(1, "Forward passes to one optimizer step.")
    num_train_epochs: float = option(1.0, "Passes over the data.")
    max_steps: int = option(-1, "Optimizer steps; above 0 it overrides num_train_epochs.")
    seed: int = option(42, "Seed of the data order, of new weights and of samples.")
    logging_steps: float = option(0.01, "Steps between lines of metrics.jsonl; below 1: a share of the run.")
    eval_strategy: str = option("steps", "When to evaluate besides the end: no, steps or epoch.")
    eval_steps: float | None = option(0.25, "Steps between evaluations; below 1: a share of the run.")
    save_steps: float = option(100, "Steps between checkpoints; below 1: a share of the run.")
    save_total_limit: int | None = option(2, "Checkpoints to keep.")
    resume_from_checkpoint: str | None = option(None, "true (the newest checkpoint of output_dir), or a checkpoint.")
    report_to: None | str | list[str] = field(  # noqa: RUF036 - the parser of transformers wants this order
        default="none", metadata={"help": "Trackers besides metrics.jsonl: tensorboard, wandb, ..."}
    )
    disable_tqdm: bool = option(False, "No progress bar.")
    remove_unused_columns: bool = option(False, "Not used: the batches are made here.")
    logging_nan_inf_filter: bool = option(False, "Hide losses that are not finite.")

    stage: ClassVar[str] = ""
    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "model and data": (
            "model_name_or_path", "dataset_name", "dataset_config", "dataset_train_split", "eval_dataset_name",
            "dataset_test_split", "eval_fraction", "max_length", "long_prompts", "pad_token", "eos_token",
            "trust_remote_code",
        ),
        "the method": (),
        "optimisation": (
            "learning_rate", "lr_scheduler_type", "warmup_steps", "per_device_train_batch_size",
            "gradient_accumulation_steps", "num_train_epochs", "max_steps", "weight_decay", "max_grad_norm", "seed",
            "packing", "dtype", "attn_implementation", "gradient_checkpointing", "use_cpu",
        ),
        "run and output": (
            "output_dir", "resume_from_checkpoint", "logging_steps", "eval_strategy", "eval_steps",
            "per_device_eval_batch_size", "save_steps", "save_total_limit", "report_to", "disable_tqdm",
        ),
        "LoRA": ("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"),
    }  # fmt: skip

    inherited_help: ClassVar[dict[str, str]] = {
        "lr_scheduler_type": "Course of the learning rate: linear, cosine, cosine_with_min_lr, constant, ...",
        "warmup_steps": "Optimizer steps of warm-up; below 1: a share of the run.",
        "weight_decay": "Weight decay of AdamW.",
        "max_grad_norm": "Clip the gradient to this norm; 0: do not.",
        "gradient_checkpointing": "Recompute activations in the backward: less memory, about a third more time.",
        "use_cpu": "Stay on the CPU where there is a GPU.",
    }

    def __post_init__(self):
        self.output_dir = self.output_dir or f"runs/{self.stage}"
        if str(self.resume_from_checkpoint).lower() in ("true", "false"):
            self.resume_from_checkpoint = True if str(self.resume_from_checkpoint).lower() == "true" else None
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False
        if not self.dataset_name:
            raise ValueError("dataset_name: got none, wants the data to train on (--dataset_name FILE)")
        super().__post_init__()


def load_data(args, kind):
    """(train, held-out) rows of the stage, all checked; the held-out side is empty if eval_fraction is 0."""
    options = {"config": args.dataset_config}
    rows = data.load_rows(args.dataset_name, kind, split=args.dataset_train_split, **options)
    if args.eval_dataset_name:
        return rows, data.load_rows(args.eval_dataset_name, kind, split=args.dataset_test_split, **options)
    return data.split_rows(rows, args.eval_fraction, args.seed)


def load_stage_tokenizer(args):
    return models.load_tokenizer(
        args.model_name_or_path,
        pad_token=args.pad_token,
        eos_token=args.eos_token,
        trust_remote_code=args.trust_remote_code,
    )


def model_options(args):
    names = ("dtype", "attn_implementation", "trust_remote_code")
    return {name: getattr(args, name) for name in names}


def context_length(model):
    """Tokens that the model can read at once, or None if its config does not say."""
    return next((getattr(model.config, name, None) for name in ("max_position_embeddings", "n_positions")), None)


def set_max_length(args, model):
    """Fill in max_length from the model's context, or check that it fits there."""
    context = context_length(model)
    if args.max_length is None:
        args.max_length = min(context or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    elif args.max_length < 2 or (context and args.max_length > context):
        raise ValueError(f"max_length: got {args.max_length}, wants 2 to {context}, the model's context")
    return args.max_length


def encode_rows(tokenizer, rows, names, args, *, what):
    """Ids of each row's prompt and completions: {"prompt": ids, "responses": [ids, ...], "row": row}.

    All completions of a row get the same prompt, cut on the left so that the longest completion fits. A row with a
    completion that does not fit is dropped (of a ranking, that completion only, as long as a pair is left). Both are
    counted and told.

    Args:
        names: fields that hold completions, or one field that holds a list of them.
        what: the name of these rows in messages.
    Raises:
        ValueError: no row is left; a long prompt under long_prompts="error".
    """
    encoded, dropped, cut = [], 0, 0
    for row in rows:
        prompt, responses = _encode_row(tokenizer, row, names)
        if not prompt:
            raise data.DataError(f"{row['at']}: the prompt gives no tokens")
        if names == ("completions",) and max(map(len, responses)) >= args.max_length:
            kept = [index for index, ids in enumerate(responses) if len(ids) < args.max_length]
            row = rankings.keep(row, kept)
            responses = [responses[index] for index in kept] if len(set(row["ranks"])) > 1 else responses
        room = args.max_length - max(map(len, responses))
        if room < 1:
            dropped += 1
            continue
        fitted = data.fit_prompt(tokenizer, prompt, room, args.long_prompts, f"{row['at']}: ")
        cut += len(fitted) < len(prompt)
        encoded.append({"prompt": fitted, "responses": responses, "row": row})
    limit = f"max_length {args.max_length}"
    if cut:
        logger.warning("cut the left end of %d of %d %s prompts to fit into %s", cut, len(rows), what, limit)
    if dropped:
        logger.warning("dropped %d of %d %s rows: a completion alone fills %s", dropped, len(rows), what, limit)
    if rows and not encoded:
        raise ValueError(f"max_length: got {args.max_length}, too short for every completion of the {what} rows")
    return encoded


def _encode_row(tokenizer, row, names):
    if "text" in row:
        ids = data.encode_text(tokenizer, row["text"])
        return ids[:1], [ids[1:]]
    texts = row["completions"] if names == ("completions",) else [row[name] for name in names]
    return data.encode_prompt(tokenizer, row["prompt"]), [data.encode_completion(tokenizer, text) for text in texts]


def make_batch(examples, pad_id, *, packed, hidden_size=768):
    """One forward pass over examples of `encode_rows`.

    Returns:
        input_ids [B, T]; position_ids [B, T]; attention_mask [B, T] bool, or if packed, for `models.model_inputs`:
        [B, 1, T, T] bool or the layout [B, 1, 2, T], whichever is faster on a CPU at this hidden_size; label_rows [N]
        and labels [N]: row b * T + t of the flat hidden states predicts that response token; last_token_rows [S]: the
        row of each response's last token; cu_groups [P+1]: prompt p owns the responses cu_groups[p] up to
        cu_groups[p+1]; cu_responses [S+1]: response s owns the labels cu_responses[s] up to cu_responses[s+1].
    """
    prompts, responses = [ex["prompt"] for ex in examples], [ex["responses"] for ex in examples]
    if packed:
        rows = pack_responses(prompts, responses, pad_token_id=pad_id)
        fields = rows._asdict()
        layout = fields.pop("layout")
        return {**fields, "attention_mask": layout if rows.two_part_is_faster(hidden_size) else rows.attention_mask}
    return _padded(prompts, responses, pad_id)


def _padded(prompts, responses, pad_id):
    rows = [(prompt, ids) for prompt, group in zip(prompts, responses) for ids in group]
    input_ids, mask = data.pad_batch([prompt + ids for prompt, ids in rows], pad_id)
    width = input_ids.shape[1]
    starts = [row * width + len(prompt) - 1 for row, (prompt, _) in enumerate(rows)]
    label_rows = [torch.arange(start, start + len(ids)) for start, (_, ids) in zip(starts, rows)]
    return {
        "input_ids": input_ids,
        "position_ids": models.position_ids_from_mask(mask),
        "attention_mask": mask,
        "label_rows": torch.cat(label_rows),
        "labels": torch.tensor([token for _, ids in rows for token in ids]),
        "last_token_rows": torch.tensor([start + len(ids) for start, (_, ids) in zip(starts, rows)]),
        "cu_groups": torch.tensor([0] + [len(group) for group in responses]).cumsum(0),
        "cu_responses": torch.tensor([0] + [len(ids) for _, ids in rows]).cumsum(0),
    }


def response_log_probs(model, batch):
    """[N] fp32: log p of each response token of a batch, in nats; differentiable."""
    return label_log_probs(model, batch_inputs(batch), batch["labels"], batch["label_rows"])


def batch_inputs(batch):
    """(input_ids, attention_mask, position_ids) of a batch of `make_batch`."""
    return batch["input_ids"], batch["attention_mask"], batch["position_ids"]


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

    A subclass gives `compute_loss`, `count_items` (what its loss is a mean over) and `evaluate_rows`.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by num_items_in_batch

    def __init__(self, model, args, tokenizer, train, held_out, callbacks=()):
        self.can_pack = may_pack(args, model)
        self.held_out = held_out
        self.tokenizer = tokenizer
        self.evaluation, self.evaluated_step = {}, None
        self._sums = {}
        self._aside = None
        if not held_out:
            args.eval_strategy = "no"
        if args.n_gpu > 1:
            logger.warning("this process uses 1 of %d GPUs; start one for each (torchrun --nproc_per_node)", args.n_gpu)
            args._n_gpu = 1  # or transformers splits batches over the GPUs (DataParallel), but not their labels
        set_seed(args.seed)  # adapters are drawn
        model = add_adapters(args, model, self.task_type)
        if self.task_type == "CAUSAL_LM":
            models.linear_head(model)  # found now, while the weights are whole
        super().__init__(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=held_out or None,
            data_collator=self.collate,
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
        self.check_sharding()
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)  # metrics.jsonl has it all
        if self.pop_callback(ProgressCallback):
            self.add_callback(StageProgress())

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
        width = self.model.config.hidden_size
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

    def record(self, metrics, weight=1):
        """Add to the metrics of the next log line: weighted means over its batches, on the device until then."""
        for name, value in metrics.items():
            total, weights = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (total + value * weight, weights + weight)

    def log(self, logs, start_time=None):
        if "loss" in logs and self._sums:
            sums = torch.tensor([[float(x) for x in pair] for pair in self._sums.values()], device=self.args.device)
            sums = self.accelerator.reduce(sums, "sum")
            logs.update(zip(self._sums, (sums[:, 0] / sums[:, 1]).tolist()))
            self._sums = {}
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        self.model.eval()
        with torch.no_grad():
            metrics = self.evaluate_rows(eval_dataset or self.held_out)
        self.model.train()
        self.evaluation = {f"eval/{name}": value for name, value in metrics.items()}
        self.evaluated_step = self.state.global_step
        metrics = {name: value for name, value in metrics.items() if not isinstance(value, dict)}
        self.log({f"eval/{name}": value for name, value in metrics.items()})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}

    def last_evaluation(self):
        """What `evaluate` says of the model as it is now, by its names in metrics.jsonl; {} without held-out rows."""
        if self.held_out and self.evaluated_step != self.state.global_step:
            self.evaluate()
        return self.evaluation

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
        output, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        best = output / f"checkpoint-{self.state.best_global_step}"
        self.state.best_model_checkpoint = str(best) if best.is_dir() else None
        whole = checkpoint.atomic_directory(output / name, replace=True) if self.args.should_save else nullcontext()
        with whole as folder:
            self._aside = broadcast_object_list([str(folder)])[0]
            try:
                with models.quiet():
                    super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if folder is not None:
                    for file in (folder / name).iterdir():
                        file.rename(folder / file.name)
                    (folder / name).rmdir()
            finally:
                self._aside = None
        if self.args.should_save and self.args.save_total_limit:
            keep = {str(best), *map(str, checkpoint.checkpoints(output)[-self.args.save_total_limit :])}
            for old in checkpoint.checkpoints(output):
                if str(old) not in keep:
                    checkpoint.remove_directory(old)


class StageProgress(ProgressCallback):
    """A progress bar that carries the latest numbers, instead of printing a line for each."""

    def __init__(self):
        super().__init__()
        self.latest = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None:
            wanted = {"loss": "loss", "accuracy": "acc", "eval/loss": "eval loss", "eval/accuracy": "eval acc"}
            self.latest.update({label: f"{logs[name]:.4g}" for name, label in wanted.items() if name in logs})
            self.training_bar.set_postfix(self.latest, refresh=False)


class MetricsFile(TrainerCallback):
    """Every log line into metrics.jsonl of the run; a resumed run goes on behind its checkpoint's line."""

    renamed: ClassVar = {"learning_rate": "lr", "train_loss": "train/loss", "train_runtime": "train/seconds"}

    def __init__(self, output_dir, resume_step):
        self.file = checkpoint.MetricsLog(output_dir, resume_step=resume_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            dropped = ("total_flos", "train_samples_per_second", "train_steps_per_second")
            self.file.log(
                state.global_step,
                {self.renamed.get(name, name): value for name, value in logs.items() if name not in dropped},
            )


def run_stage(args, make_trainer, finish):
    """Prepare the run directory, train or go on training, finish, and write run.json and the final model.

    Args:
        make_trainer: callable(callbacks) -> StageTrainer.
        finish: callable(trainer) -> summary of the run for run.json; it may still change the model's config.
    Returns:
        Path of the run directory.
    """
    check_processes(args.world_size, args.distributed_state.distributed_type)
    last = checkpoint.resolve_checkpoint(args.output_dir, args.resume_from_checkpoint)
    output, step = Path(args.output_dir), None
    if args.process_index == 0:
        checkpoint.prepare_output_dir(output, resume=bool(args.resume_from_checkpoint))
        step = (int(last.name.rpartition("-")[2]) if last else 0) if args.resume_from_checkpoint else None
    trainer = make_trainer([MetricsFile(output, step)])
    trainer.samples = checkpoint.JsonLines(output / "samples.jsonl", resume_step=step)
    run = {"stage": args.stage, "config": settings(args), "summary": {}}
    if trainer.args.should_save:
        checkpoint.write_json(output / "run.json", run)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    run["summary"] = finish(trainer)
    model, state = trainer.whole_model()
    if trainer.args.should_save:
        models.save_model(model, trainer.tokenizer, output, state)
        checkpoint.write_json(output / "run.json", run)
    return output


def settings(args):
    """The settings that a reader of the run wants: those that --help lists, and any that differs from its default."""
    shown = {name for group in args.groups.values() for name in group}
    found = {}
    for item in dataclasses.fields(args):
        value = getattr(args, item.name)
        value = getattr(value, "value", value)
        is_default = value == item.default or not value
        if item.init and (item.name in shown or not is_default) and isinstance(value, (str, int, float, bool, list)):
            found[item.name] = value
    return found


def perplexity(loss):
    return math.exp(loss) if loss < 700 else math.inf
