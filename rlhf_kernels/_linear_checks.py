"""The checks of the functions that take hidden states and an LM head: each returns what the operators take."""

from __future__ import annotations

import torch
from torch import Tensor

from ._autograd import needs_grad, without_autocast
from ._checks import check_dtype, check_in, check_index, check_range, check_same_device, check_shape
from .reference.logprobs import accumulator_dtype

PRECISIONS = ("exact", "fast")
_INF = float("inf")


def _check_plain(names, tensors):
    for name, x in zip(names, tensors):
        if hasattr(x, "device_mesh"):
            raise ValueError(
                f"{name} is a DTensor with placements {list(x.placements)}, expected a plain tensor: pass "
                "full_tensor(), or, of a head sharded by vocabulary, to_local() with process_group and "
                "vocab_start_index; under FSDP2 call inside the model's forward (linear_logprobs_from_model does)"
            )


def check_head(hidden_states, weight, bias, prefix=""):
    """Check one model's hidden states, head and bias; return them as autocast wants them, hidden states flat."""
    names = [prefix + name for name in ("hidden_states", "weight", "bias")]
    _check_plain(names, (hidden_states, weight, bias))
    check_dtype(names[0], hidden_states)
    check_dtype(names[1], weight)
    if hidden_states.dim() < 1 or hidden_states.shape[-1] < 1:
        raise ValueError(f"{names[0]} has shape {list(hidden_states.shape)}, expected [..., H] with H >= 1")
    check_shape(names[1], weight, (None, hidden_states.shape[-1]), f"[V, H], H as in {names[0]}")
    if weight.shape[0] < 1:
        raise ValueError(f"{names[1]} has shape {list(weight.shape)}, expected [V, H] with V >= 1")
    if bias is not None:
        check_dtype(names[2], bias)
        check_shape(names[2], bias, (weight.shape[0],), f"[V], V as in {names[1]}")
    check_same_device(**dict(zip(names, (hidden_states, weight, bias))))
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden_states.dtype, weight.dtype):
        dtype = torch.get_autocast_dtype(device)
        hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
    if (hidden_states.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise ValueError(
            f"{names[1]} has dtype {weight.dtype}, {names[0]} {hidden_states.dtype}; expected float64 for both or for "
            "neither"
        )
    return hidden_states.reshape(-1, hidden_states.shape[-1]), weight, bias


def check_scale(temperature, softcap, labels, shape=None):
    """(temperatures [M] or None, temperature, softcap) from a number or a tensor of temperatures.

    labels: None where only a number will do; shape: theirs, if it is another tensor that stands for them.
    """
    if softcap is not None:
        check_range("softcap", softcap, 0.0, _INF, low_open=True, high_open=True)
        softcap = float(softcap)
    if isinstance(temperature, Tensor) and labels is not None:
        check_dtype("temperature", temperature)
        check_shape(
            "temperature",
            temperature,
            tuple(labels.shape if shape is None else shape),
            "a number, or the shape of labels",
        )
        check_same_device(labels=labels, temperature=temperature)
        return temperature.detach().reshape(-1), 1.0, softcap
    check_range("temperature", temperature, 0.0, _INF, low_open=True, high_open=True)
    return None, float(temperature), softcap


def check_lora(lora, hidden, weight, kept, rows):
    """(low [N, r], up [V, r]) of a LoRA layer on the head, or (None, None): low up^T is added to the logits.

    hidden [N, H], weight, kept [M] and rows [M] as the operators take them. A's gradient, and what A gives that of the
    hidden states, are autograd's.
    """
    if lora is None:
        return None, None
    if not isinstance(lora, (tuple, list)) or len(lora) != 3:
        size = f" of {len(lora)}" if isinstance(lora, (tuple, list)) else ""
        raise ValueError(f"lora must be (A, B, scaling), got {type(lora).__name__}{size}")
    a, b, scaling = lora
    names = ("lora[0]", "lora[1]")
    _check_plain(names, (a, b))
    for name, x in zip(names, (a, b)):
        check_dtype(name, x)
    check_shape(names[0], a, (None, hidden.shape[1]), "A [r, H], H as in hidden_states")
    if a.shape[0] < 1:
        raise ValueError(f"lora[0] has shape {list(a.shape)}, expected A [r, H] with r >= 1")
    check_shape(names[1], b, (weight.shape[0], a.shape[0]), "B [V, r], V as in weight, r as in lora[0]")
    check_range("lora[2]", scaling, -_INF, _INF, low_open=True, high_open=True)
    check_same_device(hidden_states=hidden, **dict(zip(names, (a, b))))
    for name, x in zip(names, (a, b)):
        if (x.dtype == torch.float64) != (hidden.dtype == torch.float64):
            raise ValueError(
                f"{name} has dtype {x.dtype}, hidden_states {hidden.dtype}; expected float64 for both or for neither"
            )
    if rows is not None:  # a row counts if one of its labels does
        count = hidden.shape[0]
        places = torch.where(kept & (rows >= 0), rows, count).clamp(max=count)
        kept = torch.zeros(count + 1, dtype=torch.bool, device=rows.device).index_fill(0, places, True)[:count]
    dtype = accumulator_dtype(hidden)
    with without_autocast(hidden.device):
        h = torch.where(kept.unsqueeze(-1), hidden, 0.0).to(dtype)
        return float(scaling) * (h @ a.to(dtype).t()), b


def check_labels(labels, rows, hidden_states):
    """Check labels and rows; return them flat."""
    labels = check_index("labels", labels)
    if rows is None:
        check_shape("labels", labels, tuple(hidden_states.shape[:-1]), "hidden_states without its last dimension")
    else:
        if hidden_states.dim() != 2:
            raise ValueError(f"hidden_states has shape {list(hidden_states.shape)}, expected [N, H] to go with rows")
        rows = check_index("rows", rows)
        check_shape("rows", rows, tuple(labels.shape), "the shape of labels")
        rows = rows.reshape(-1)
    check_same_device(hidden_states=hidden_states, labels=labels, rows=rows)
    return labels.reshape(-1), rows


def check_execution(chunk_size, precision, process_group, vocab_start_index):
    """(chunk size or 0, whether factors may be rounded, name of the group or "", first column)."""
    if chunk_size is not None:
        check_range("chunk_size", chunk_size, 1)
    check_in("precision", precision, PRECISIONS)
    check_range("vocab_start_index", vocab_start_index, 0)
    if process_group is None and vocab_start_index:
        raise ValueError(f"vocab_start_index is {vocab_start_index}, expected 0 when process_group is None")
    name = "" if process_group is None else process_group.group_name
    return int(chunk_size or 0), precision == "fast", name, int(vocab_start_index)


def wants_slopes(hidden, weight, bias, low=None):
    """Whether the gradient goes to the hidden states alone, so that the forward can make it."""
    return low is None and needs_grad(hidden) and not (needs_grad(weight) or needs_grad(bias))
