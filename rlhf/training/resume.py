"""Runs of the SFT, reward and preference stages that are stopped and go on: what must be the same, and signals."""

import dataclasses
import json
from pathlib import Path

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from ..checkpoint import write_json
from ..data import store
from ..interrupt import Interrupted
from ..processes import agreed_signal
from ..same_run import check_same_run, weights_digest

RECORD, LOG_STATE = "same_run.json", "log_state.pt"
LOGGED = ("_sums", "_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_initial_global_step")
"""Attributes of a trainer (all but the first are transformers') that a line of the log is made of."""
MAY_CHANGE = {
    # where things lie; the rows and the weights themselves must be the same
    "model_name_or_path", "dataset_config", "dataset_train_split", "dataset_test_split", "columns", "data_format",
    "bad_rows", "dataset_num_proc", "output_dir", "trust_remote_code",
    # what is told and kept
    "logging_strategy", "logging_steps", "logging_first_step", "log_level", "log_level_replica", "log_on_each_node",
    "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id",
    "trackio_static_space_id", "save_strategy", "save_steps", "save_total_limit", "save_on_each_node",
    "resume_from_checkpoint", "skip_memory_metrics", "debug", "restore_callback_states_from_checkpoint",
    # when and how it is evaluated
    "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "do_eval", "per_device_eval_batch_size",
    "num_samples", "sample_length",
    # how the machine does the same
    "use_cpu", "local_rank", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
    "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "ddp_backend", "ddp_timeout",
    "ddp_bucket_cap_mb", "ddp_find_unused_parameters", "ddp_broadcast_buffers", "ddp_static_graph",
    "torch_empty_cache_steps", "activation_checkpointing", "activation_checkpointing_kwargs",
    "gradient_checkpointing", "gradient_checkpointing_kwargs",
}  # fmt: skip
"""Settings that a resumed run may have otherwise."""
DATA, WEIGHTS = ("dataset_name", "eval_dataset_name", "demonstrations"), ("model_name_or_path", "ref_model")
LENGTH = ("max_steps", "num_train_epochs")


def this_run(trainer) -> dict:
    """What must be the same for a run to go on: the stage, the processes, the settings, the rows and the model."""
    args = trainer.args
    free = MAY_CHANGE | (set(LENGTH) if args.lr_scheduler_type.value == "constant" else set())
    settings = {
        item.name: _plain(getattr(args, item.name))
        for item in dataclasses.fields(args)
        if item.init and item.name not in free
    }
    return {"stage": args.stage, "num_processes": args.world_size, **settings, **trainer.digests}


def digests(trainer) -> dict:
    """{setting: a name of the content of its rows, or of its model}; where they lie does not count."""
    rows = {"dataset_name": trainer.train_dataset, "eval_dataset_name": trainer.held_out}
    compared = {**rows, "model_name_or_path": trainer.model, **trainer.also_compared()}
    return {
        name: weights_digest(content) if isinstance(content, torch.nn.Module) else store.digest(content).hex()[:16]
        for name, content in compared.items()
    }


def _plain(value):
    value = getattr(value, "value", value)
    value = value.to_dict() if hasattr(value, "to_dict") else value
    return json.loads(json.dumps(value, default=str))


def write_record(run: dict, folder: Path) -> None:
    write_json(folder / RECORD, run)


def check_record(run: dict, folder: Path) -> None:
    """Raise ValueError unless the checkpoint in `folder` was written by this run."""
    if not (folder / RECORD).is_file():
        raise ValueError(f"resume_from_checkpoint: {folder} was written by another version or another stage")
    theirs = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    if theirs["stage"] != run["stage"]:
        raise ValueError(f"resume_from_checkpoint: {folder} was written by rlhf {theirs['stage']}, not {run['stage']}")
    check_same_run(theirs, run, folder, DATA, WEIGHTS)


def write_logged(trainer, folder: Path | None) -> None:
    """Write what the next log line and the run's mean loss are made of; called by every process, `folder` by one."""
    own = {name: getattr(trainer, name) for name in LOGGED if hasattr(trainer, name)}
    ranks = gather_object([own])
    if folder is not None:
        torch.save({"ranks": ranks}, folder / LOG_STATE)


class GoesOn(TrainerCallback):
    """Goes on with the log of a checkpoint: its next line is that of a run that was not stopped."""

    def __init__(self, trainer, folder: Path | None):
        self.trainer, self.folder = trainer, folder

    def on_train_begin(self, args, state, control, **kwargs):
        if self.folder is not None:
            ranks = torch.load(self.folder / LOG_STATE, weights_only=True, map_location="cpu")["ranks"]
            for name, value in ranks[args.process_index].items():
                setattr(self.trainer, name, value.to(args.device) if isinstance(value, torch.Tensor) else value)


class StopAtSignal(TrainerCallback):
    """Ends a run after the step in which a signal came, behind its checkpoint; all processes agree on the step."""

    def __init__(self, noted, accelerator):
        self.noted, self.accelerator, self.number = noted, accelerator, 0

    def on_step_end(self, args, state, control, **kwargs):
        if self.noted.active and not control.should_training_stop:  # the last step: what is left is to save the model
            self.number = agreed_signal(self.noted.number, self.accelerator)
            control.should_save = control.should_save or self.number > 0
        return control

    def on_save(self, args, state, control, **kwargs):
        if self.number and not control.should_training_stop:
            raise Interrupted(self.number, f"checkpoint-{state.global_step}")
