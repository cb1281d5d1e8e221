"""Networks of which each process reads its own slices: built without weights, cut, then filled from safetensors.

transformers loads whole weights first, or (5.24) slices of its own plan for a mesh. Here a network is cut as the caller
cuts it, and rows [a, b) of each tensor are read by safetensors' `get_slice`. Where a checkpoint is not, name for name,
what the network holds, nothing is read and the caller loads it whole: never other weights than transformers would give.
"""

import contextlib
import copy
import json
import logging

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .parts import brings_code

logger = logging.getLogger("rlhf")


class NotSliced(Exception):
    """A network that has to be loaded whole before it is cut; the message says why. A `cut` may raise it, too."""


def load_slices(model_class, folder, config, cut, *, dtype, attn_implementation=None, change=None):
    """The model of a folder with this process's slices of its weights, in eval mode; None where it must load whole.

    Weights that the checkpoint does not hold because `change` made them new are not initialised: `fill` them.

    Args:
        model_class: an auto class of transformers, or a class with `_from_config`.
        folder: pathlib.Path of the model's folder.
        cut: `cut(model)` cuts a model on the meta device in place by FSDP2, all of its weights; called by all
            processes. It may raise `NotSliced`.
        dtype: torch.dtype of the weights.
        change: `change(model)` gives the model to load in place of that of the folder, made of its modules.
    """
    try:
        model, names, files = _planned(model_class, folder, config, dtype, attn_implementation, change)
        cut(model)
    except NotSliced as reason:
        logger.debug("%s is loaded whole by each process, and cut then: %s", folder, reason)
        return None
    buffers = dict(model.named_buffers(remove_duplicate=False))
    mesh = next(model.parameters()).device_mesh
    model.to_empty(device=mesh.device_type)
    with torch.no_grad():
        for name, buffer in model.named_buffers(remove_duplicate=False):
            buffer.copy_(buffers[name])
    _read(model, names, files)
    return model.eval()


@torch.no_grad()
def fill(tensor, whole) -> None:
    """Copy a whole tensor, the same on all processes, into one that may be cut.

    Args:
        whole: a tensor, or what gives rows of it by a slice, as safetensors' slices do.
    """
    if isinstance(tensor, DTensor):
        mine = tensor.to_local()
        start = first_row(tensor)
        if len(mine):
            mine.copy_(whole[start : start + len(mine)])
    else:
        tensor.copy_(whole[...])


def first_row(tensor: DTensor) -> int:
    """The row of a tensor, cut by rows as `fully_shard` does, with which this process's slice begins."""
    processes, rank = tensor.device_mesh.size(), tensor.device_mesh.get_local_rank()
    return min(len(tensor), rank * -(-len(tensor) // processes))


def _planned(model_class, folder, config, dtype, attn_implementation, change):
    """(the model without weights, {name of a weight or buffer: its name in the files or None}, {name there: file})."""
    try:
        files = _tensors(folder, config)
        model, stored = _empty(model_class, folder, config, files, dtype, attn_implementation)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise NotSliced(error) from error  # the whole load says it better
    model = model if change is None else change(model)
    names = {id(tensor): name for name, tensor in stored.items()}
    return model, {name: names.get(id(tensor)) for name, tensor in model.state_dict(keep_vars=True).items()}, files


def _tensors(folder, config) -> dict:
    """{name: file} of the tensors in the files that transformers would read.

    Raises:
        NotSliced: the folder holds something else than plain weights of a text model.
    """
    obstacles = {
        "its config asks for quantized weights": getattr(config, "quantization_config", None) is not None,
        "its config names the file of its weights": getattr(config, "transformers_weights", None) is not None,
        "it comes with code of its own": brings_code(config),
        "it takes more than text": config.get_text_config(decoder=True) is not config,
        "it holds adapters": (folder / "adapter_config.json").exists(),
    }
    files, index = [folder / SAFE_WEIGHTS_NAME], folder / SAFE_WEIGHTS_INDEX_NAME
    if not files[0].is_file() and index.is_file():
        files = sorted({folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    obstacles["it lacks files of its weights"] = not all(file.is_file() for file in files)
    for reason, holds in obstacles.items():
        if holds:
            raise NotSliced(reason)
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    return found


def _empty(model_class, folder, config, files, dtype, attn_implementation):
    """(the model with its weights on the meta device, its weights and buffers by their names in the files).

    Buffers are real: those that no file holds have the numbers that the model gives them.
    """
    config = copy.deepcopy(config)
    config.name_or_path = str(folder)
    make = getattr(model_class, "from_config", None) or model_class._from_config
    with init_empty_weights(include_buffers=False), torch.random.fork_rng():
        model = make(config, dtype=dtype, attn_implementation=attn_implementation)
    model.tie_weights()
    if get_model_conversion_mapping(model, add_legacy=False):
        raise NotSliced(f"transformers converts the weights of {type(model).__name__}")
    upcast = [model._keep_in_fp32_modules_strict, dtype == torch.float16 and model._keep_in_fp32_modules]
    if any(upcast) and dtype in (torch.float16, torch.bfloat16):
        raise NotSliced(f"some weights of {type(model).__name__} stay in fp32")
    tensors, owners = model.state_dict(keep_vars=True), {}
    for name, tensor in tensors.items():
        owners.setdefault(id(tensor), []).append(name)
    for aliases in owners.values():
        held = [name for name in aliases if name in files]
        if len(held) != 1:  # of tied weights that are both there, transformers compares the numbers
            raise NotSliced(f"it holds {' and '.join(held) or f'no {aliases[0]}'}")
    stored = {name: tensor for name, tensor in tensors.items() if name in files}
    _check_shapes(stored, files)
    if model.can_generate():
        with contextlib.suppress(OSError):  # a folder without one: the model made its own
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model, stored


def _by_file(names, files) -> dict:
    found = {}
    for name in names:
        found.setdefault(files[name], []).append(name)
    return found


def _check_shapes(stored, files) -> None:
    for file, names in _by_file(stored, files).items():
        with safe_open(file, framework="pt") as opened:
            for name in names:
                shape, wanted = opened.get_slice(name).get_shape(), list(stored[name].shape)
                if shape != wanted:
                    raise NotSliced(f"its {name} is {shape}, that of the model {wanted}")


def _read(model, names, files) -> None:
    """Fill in the weights and buffers that the files hold, each process its slices."""
    tensors = model.state_dict(keep_vars=True)
    wanted = {name: source for name, source in names.items() if source is not None}
    for file, sources in _by_file(set(wanted.values()), files).items():
        with safe_open(file, framework="pt") as opened:
            for source in sorted(sources):
                for name in (name for name, of in wanted.items() if of == source):
                    fill(tensors[name], opened.get_slice(source))
