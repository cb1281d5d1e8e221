"""The settings that the SFT, reward and preference stages share."""

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from transformers import TrainingArguments


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
    attn_implementation: str | None = option(
        None, "Attention of transformers: sdpa, eager, flash_attention_2, ...; default: sdpa where the model has it."
    )
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
        self.packing = str(self.packing).lower()  # a bool too, as in TRL
        if self.packing not in ("auto", "true", "false"):
            raise ValueError(f"packing: got {self.packing!r}, wants auto, true or false")
        self.output_dir = self.output_dir or f"runs/{self.stage}"
        if str(self.resume_from_checkpoint).lower() in ("true", "false"):
            self.resume_from_checkpoint = True if str(self.resume_from_checkpoint).lower() == "true" else None
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False
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
