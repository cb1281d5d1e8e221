"""Saving models with their tokenizers, and trying before the training whether they can be saved after it."""

import contextlib
import re
import shutil
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..checkpoint import atomic_directory, remove_directory
from ..disk import WriteError, json_bytes, temporary_name
from .loading import stop_token_ids
from .parts import quiet, unwrapped

MAX_FILE_SIZE = "5GB"
WEIGHTS_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


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
    _name_stop_tokens(model, tokenizer)
    with atomic_directory(directory) as folder, quiet():
        model.save_pretrained(folder, state_dict=state_dict)
        tokenizer.save_pretrained(folder)


def _name_stop_tokens(model, tokenizer):
    if getattr(model, "generation_config", None) is not None:
        stop = stop_token_ids(tokenizer, model)
        model.generation_config.eos_token_id = stop if len(stop) > 1 else stop[0]


def save_cut_model(model, tokenizer, directory, *, main, max_file_size=MAX_FILE_SIZE):
    """`save_model` of a model that FSDP2 has cut: whole tensors, of which the main process holds one file's at a time.

    Called by all processes; the main one writes.

    Args:
        main: whether this is the main process.
        max_file_size: in bytes, or with a unit, as in transformers' `max_shard_size`.
    Raises:
        WriteError: names the folder and the cause.
    """
    _name_stop_tokens(model, tokenizer)
    with atomic_directory(directory) if main else contextlib.nullcontext() as folder, quiet():
        written = save_cut_weights(model, folder, max_file_size=max_file_size)
        if main:
            tokenizer.save_pretrained(folder)
    if main:  # an earlier save may have made more files, or fewer
        for file in Path(directory).glob("model*.safetensors*"):
            if WEIGHTS_FILE.fullmatch(file.name) and file.name not in written:
                file.unlink()


def save_cut_weights(model, folder, *, max_file_size=MAX_FILE_SIZE, untied=False):
    """Write a model that FSDP2 has cut as `save_pretrained` does, file by file; called by all processes.

    One whose weights transformers converts is gathered whole, as they are converted together.

    Args:
        folder: where the main process writes; None on the others.
        untied: write weights that are tied under each of their names.
    Returns:
        The names of the files of weights.
    """
    state = model.state_dict(keep_vars=True)
    converted = getattr(model, "_weight_conversions", None) or get_model_conversion_mapping(model, add_legacy=False)
    if converted:
        state = {name: _whole(tensor, folder is not None) for name, tensor in state.items()}
        if folder is None:
            return set()
        model.save_pretrained(folder, state_dict=state, max_shard_size=max_file_size)
        return {file.name for file in Path(folder).glob("model*.safetensors*")}
    tied, left_out = set(model.all_tied_weights_keys), set(model._keys_to_ignore_on_save or ())
    left_out = left_out - tied if untied else left_out | tied
    state = {name: tensor for name, tensor in state.items() if name not in left_out}
    shapes = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in state.items()}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=max_file_size)
    if folder is not None:
        model.save_pretrained(folder, state_dict={})  # the config, and all else but the weights
        (Path(folder) / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)
    for file, names in split.filename_to_tensors.items():
        part = {name: _whole(state[name], folder is not None) for name in names}
        if folder is not None:
            save_file(part, Path(folder) / file, metadata={"format": "pt"})
    if not split.is_sharded:
        return {*split.filename_to_tensors}
    if folder is not None:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (Path(folder) / SAFE_WEIGHTS_INDEX_NAME).write_bytes(json_bytes(index, indent=2))
    return {*split.filename_to_tensors, SAFE_WEIGHTS_INDEX_NAME}


def _whole(tensor, keep):
    """The whole of a tensor on the CPU, where it is kept; all processes call."""
    whole = tensor.detach()
    whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
    return whole.cpu().contiguous() if keep else None


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
