"""Saving models with their tokenizers, and trying before the training whether they can be saved after it."""

import shutil
from pathlib import Path

from torch import nn

from ..checkpoint import atomic_directory, remove_directory
from ..disk import WriteError, temporary_name
from .loading import stop_token_ids
from .parts import quiet, unwrapped


def save_model(model, tokenizer, directory, state_dict=None):
    """Write a model (safetensors), or another state of it, and its tokenizer; a reader sees all of it or none of it.

    Its generation config names all tokens that end a response, so that other engines stop there too.

    Files are written aside and moved when all are there, config.json last; without it a folder is not a model. A disk
    that is full leaves the folder as it was.

    Raises:
        WriteError: names the folder and the cause.
    """
    while hasattr(model, "module") and isinstance(model.module, nn.Module):
        model = model.module
    if getattr(model, "generation_config", None) is not None:
        stop = stop_token_ids(tokenizer, model)
        model.generation_config.eos_token_id = stop if len(stop) > 1 else stop[0]
    with atomic_directory(directory) as folder, quiet():
        model.save_pretrained(folder, state_dict=state_dict)
        tokenizer.save_pretrained(folder)


def check_saving(model, tokenizer, directory):
    """Save everything of a model but its weights into an output folder, and remove it again.

    What cannot be saved (settings that transformers refuses to write, a tokenizer, a folder that is read-only, a disk
    that is too small) is found before the training instead of after it.

    Raises:
        ValueError: what cannot be saved, and why; or the weights do not fit on the disk.
        WriteError: the folder cannot be written.
    """
    directory, model = Path(directory), unwrapped(model)
    trial = directory / temporary_name("trial")
    for part, save in (
        ("model's settings", lambda folder: model.save_pretrained(folder, state_dict={})),
        ("tokenizer", tokenizer.save_pretrained),
    ):
        try:
            with atomic_directory(trial) as folder, quiet():
                save(folder)
            remove_directory(trial)
        except WriteError as error:
            raise WriteError(error.errno, error.strerror, str(directory)) from error
        except Exception as error:  # of transformers, or of a model's or tokenizer's own code
            reason = " ".join(str(error).split())
            raise ValueError(
                f"the {part} could not be saved after the training, so it does not start: {reason}"
            ) from error
    disk = shutil.disk_usage(directory)
    needed = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    if disk.total > 0 and disk.free < needed:
        raise ValueError(
            f"output_dir: {directory} has {disk.free / 1e9:.1f} GB left on its disk, the weights alone are "
            f"{needed / 1e9:.1f} GB; make room, or give another directory"
        )
