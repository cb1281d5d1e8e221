"""Callbacks of a stage's Trainer: its progress bar, its metrics.jsonl, and the users' own, checked."""

import logging
from typing import ClassVar

from transformers import ProgressCallback, TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from .. import checkpoint, models
from .steps import WeightsMoved

logger = logging.getLogger("rlhf")


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


class SavingTried(TrainerCallback):
    """transformers fits the model's settings to the tokenizer's tokens as training begins; can they still be saved?"""

    def on_train_begin(self, args, state, control, model=None, processing_class=None, **kwargs):
        if args.should_save:
            models.check_saving(model, processing_class, args.output_dir)


class StepsArrive(TrainerCallback):
    """The share of 16-bit weights that moved up to the first line of the log, there; a warning where it is low."""

    moved = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        keeps_more_bits = bool(args.deepspeed)  # its engine steps fp32 copies of the weights
        self.moved = None if state.global_step or keeps_more_bits else WeightsMoved(model.parameters())

    def on_log(self, args, state, control, logs=None, optimizer=None, **kwargs):
        if self.moved is None or "loss" not in logs:
            return
        share = self.moved.share(optimizer)
        if share is not None:
            logs["train/weights_moved"] = share
        complaint = self.moved.complaint(share, state.global_step)
        if complaint and state.is_world_process_zero:
            logger.warning("weights_moved: %s", complaint)
        self.moved = None


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


def check_callbacks(callbacks):
    """Raise ValueError unless they are None or a list of transformers' TrainerCallbacks, classes among them."""
    if callbacks is not None and not isinstance(callbacks, (list, tuple)):
        raise ValueError(f"callbacks: got {type(callbacks).__name__}, wants a list")
    for callback in callbacks or ():
        if not issubclass(callback if isinstance(callback, type) else type(callback), TrainerCallback):
            raise ValueError(f"callbacks: got {callback!r}, wants transformers.TrainerCallback objects")


def check_trackers(report_to):
    """Raise ValueError for a tracker that transformers does not know, or whose package is not installed."""
    try:
        for callback in get_reporting_integration_callbacks(report_to):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        raise ValueError(f"report_to: got {report_to!r}: {' '.join(str(error).split())}") from None
