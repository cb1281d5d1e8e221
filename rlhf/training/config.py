"""The settings that the SFT, reward and preference stages share."""

import dataclasses
import importlib.util
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from transformers import TrainingArguments

from ..ranges import SEED, Range, above, at_least, check, option, within
from .inherited import RANGES, REFUSED, refuse_unused


@dataclass
class StageConfig(TrainingArguments):
    """Settings of a stage: what is listed here, and every setting of transformers.TrainingArguments."""

    model_name_or_path: str = option("demo", "Folder of the model to start from; 'demo' is the embedded story model.")
    dataset_name: str | None = option(
        None, "Data to train on: a file, a pattern, a folder or a `datasets` name; or several: a.jsonl:0.7,b.csv:0.3."
    )
    dataset_config: str | None = option(None, "Configuration of a `datasets` name.")
    dataset_train_split: str = option("train", "Split to train on, of a folder or a `datasets` name.")
    dataset_test_split: str = option("test", "Split of eval_dataset_name to evaluate on.")
    eval_dataset_name: str | None = option(None, "Held-out data; without it, eval_fraction of the prompts is held out.")
    eval_fraction: float = option(
        0.1, "Share of the prompts held out for evaluation when there is no eval data.", within(0, 1, open_high=True)
    )
    max_length: int | None = option(
        None, "Tokens of prompt and response; default: the model's context, at most 1024.", at_least(2)
    )
    long_prompts: Literal["truncate", "drop", "error"] = option(
        "truncate",
        "A prompt that is too long: cut its left end (of a chat: its oldest turns), drop the row, or stop.",
    )
    columns: str | None = option(
        None, "Which columns hold what: prompt=instruction+input,completion=output; paths: completions[].text."
    )
    data_format: str = option("auto", "How a public data set is read (see `rlhf data --formats`); auto: recognised.")
    bad_rows: Literal["error", "skip"] = option(
        "error", "Rows that cannot be used: stop and list them, or leave them out and count them."
    )
    dataset_num_proc: int | None = option(
        None, "Processes that read and encode large data. Default: one for each core.", at_least(1)
    )
    chat_template: str | None = option(None, "Chat template: chatml, or a file; None: the model's.")
    packing: Literal["auto", "true", "false"] = option(
        "auto", "Prompts and responses share rows instead of padding; auto: where the model can and it saves time."
    )
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = option("float32", "Type of the weights.")
    attn_implementation: str | None = option(
        None, "Attention of transformers: sdpa, eager, flash_attention_2, ...; default: sdpa where the model has it."
    )
    trust_remote_code: bool = option(False, "Let the model's folder run code of its own.")
    pad_token: str | None = option(None, "Token to pad with, if the tokenizer names none; it may be the EOS token.")
    eos_token: str | None = option(None, "Token that ends a response, if the tokenizer names none.")
    use_peft: bool = option(False, "Train LoRA adapters (package peft) and merge them at the end.")
    lora_r: int = option(16, "LoRA rank.", at_least(1))
    lora_alpha: int = option(32, "LoRA scale.", at_least(1))
    lora_dropout: float = option(0.0, "Dropout in front of the LoRA adapters.", within(0, 1, open_high=True))
    lora_target_modules: list[str] | None = option(
        None, "Layers to adapt, or all-linear; default: peft's choice, else all linear ones."
    )
    output_dir: str | None = option(None, "Where the run is written; default: runs/ and the stage's name.")
    learning_rate: float = option(2e-5, "Peak learning rate.", at_least(0))
    per_device_train_batch_size: int = option(8, "Prompts in one forward pass.", at_least(1))
    per_device_eval_batch_size: int = option(8, "Prompts in one forward pass of an evaluation.", at_least(1))
    gradient_accumulation_steps: int = option(1, "Forward passes to one optimizer step.", at_least(1))
    num_train_epochs: float = option(1.0, "Passes over the data.", above(0))
    max_steps: int = option(-1, "Optimizer steps; above 0 it overrides num_train_epochs.", at_least(1, also=(-1,)))
    max_grad_norm: float | None = option(1.0, "Clip the gradient to this norm; 0 or None: do not.", at_least(0))
    seed: int = option(42, "Seed of the data order, of new weights and of samples.", SEED)
    logging_steps: float = option(0.01, "Steps between lines of metrics.jsonl; below 1: a share of the run.", above(0))
    eval_strategy: str = option("steps", "When to evaluate besides the end: no, steps or epoch.")
    eval_steps: float | None = option(0.25, "Steps between evaluations; below 1: a share of the run.", above(0))
    save_steps: float = option(100, "Steps between checkpoints; below 1: a share of the run.", at_least(0))
    save_total_limit: int | None = option(2, "Checkpoints to keep.", at_least(1))
    resume_from_checkpoint: str | None = option(None, "true (the newest checkpoint of output_dir), or a checkpoint.")
    report_to: None | str | list[str] = option(  # noqa: RUF036 - the parser of transformers wants this order
        "none", "Trackers besides metrics.jsonl: tensorboard, wandb, ..."
    )
    disable_tqdm: bool = option(False, "No progress bar.")
    remove_unused_columns: bool = option(False, "Not used: the batches are made here.")
    logging_nan_inf_filter: bool = option(False, "Hide losses that are not finite.")

    stage: ClassVar[str] = ""
    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "model and data": (
            "model_name_or_path", "dataset_name", "dataset_config", "dataset_train_split", "eval_dataset_name",
            "dataset_test_split", "eval_fraction", "data_format", "columns", "bad_rows", "dataset_num_proc",
            "max_length", "long_prompts", "chat_template", "pad_token", "eos_token", "trust_remote_code",
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
        "gradient_checkpointing": "Recompute activations in the backward: less memory, about a third more time.",
        "use_cpu": "Stay on the CPU where there is a GPU.",
    }
    inherited_ranges: ClassVar[dict[str, Range]] = RANGES
    refused: ClassVar[dict[str, str]] = REFUSED

    def __post_init__(self):
        self.packing = str(self.packing).lower()  # a bool too, as in TRL
        self.dtype = str(self.dtype).removeprefix("torch.")
        for name in ("eval_strategy", "logging_strategy", "save_strategy"):
            if str(getattr(self, name)).lower() == "false":
                setattr(self, name, "no")  # YAML reads a bare no as false
        check(self)
        refuse_unused(self)
        self.max_grad_norm = self.max_grad_norm or 0.0
        self.output_dir = self.output_dir or f"runs/{self.stage}"
        if str(self.resume_from_checkpoint).lower() in ("true", "false"):
            self.resume_from_checkpoint = True if str(self.resume_from_checkpoint).lower() == "true" else None
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False
        if self.deepspeed and importlib.util.find_spec("deepspeed") is None:
            raise ValueError("deepspeed: got settings, but the package is not installed (pip install deepspeed)")
        super().__post_init__()


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
