"""Argument checks that all ops share. Each raises a ValueError that names the argument, what came and what is wanted.

The checks of shapes, dtypes and devices cost nothing and never wait for a device. Checks that read values
(`check_cu_seqlens`, label ranges) do so only where `reads_values` allows it: for CPU tensors, or anywhere with
RLHF_KERNELS_CHECK=1, and never while torch.compile traces. Call those inside the opaque operator.
"""

import numbers
import os

import torch
from torch._C import _functorch as functorch
from torch._subclasses.fake_tensor import is_fake

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
READ_ON = "cpu"  # the device whose tensors checks may read


def _dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def check_tensor(name, tensor):
    """Raise unless `tensor` is a tensor."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")


def check_index(name, tensor):
    """Return the tensor as int64; int32 is taken too. Raise for another dtype."""
    check_dtype(name, tensor, (torch.int64, torch.int32))
    return tensor if tensor.dtype == torch.int64 else tensor.to(torch.int64)


def check_shape(name, tensor, expected, meaning=""):
    """Raise unless the tensor's shape is `expected`: an entry is a size, or None for any size.

    `meaning` says in words what is wanted, for example "[B, T], like log_probs".
    """
    check_tensor(name, tensor)
    if tensor.shape == expected:
        return
    fits = tensor.dim() == len(expected) and all(
        want is None or got == want for got, want in zip(tensor.shape, expected, strict=True)
    )
    if not fits:
        wanted = "[" + ", ".join("*" if size is None else str(size) for size in expected) + "]"
        explained = f" ({meaning})" if meaning else ""
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {wanted}{explained}")


def check_dtype(name, tensor, allowed=FLOATS):
    """Raise unless the tensor's dtype is among `allowed` (a dtype or a sequence of them)."""
    check_tensor(name, tensor)
    allowed = (allowed,) if isinstance(allowed, torch.dtype) else allowed
    if tensor.dtype not in allowed:
        names = ", ".join(_dtype_name(dtype) for dtype in allowed)
        raise ValueError(f"{name} has dtype {_dtype_name(tensor.dtype)}, expected one of: {names}")


def check_same_device(**tensors):
    """Raise unless all tensors (None entries are skipped) live on one device."""
    first_name = device = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        check_tensor(name, tensor)
        if device is None:
            first_name, device = name, tensor.device
        elif tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, expected {device}, where {first_name} is")


def check_mask(name, mask, shape=None):
    """Return the mask as bool (1 = keep); bool and integer dtypes are taken, any nonzero integer keeps.

    Raise for a float mask, which is too often an additive one (0 = keep), and for another shape than `shape`.
    """
    check_tensor(name, mask)
    if mask.dtype != torch.bool and mask.dtype not in INTEGERS:
        raise ValueError(f"{name} has dtype {_dtype_name(mask.dtype)}, expected bool or an integer dtype, 1 = keep")
    if shape is not None:
        check_shape(name, mask, shape, "1 = keep")
    return mask if mask.dtype == torch.bool else mask != 0


def check_in(name, value, options):
    """Raise unless `value` is one of `options`."""
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(repr(option) for option in options)}, got {value!r}")


def check_range(name, value, low=None, high=None, *, low_open=False, high_open=False):
    """Raise unless `value` is a real number between `low` and `high`; a None bound is absent, an open one excluded.

    NaN never passes; infinity passes only where the bound on its side is None.
    """
    ok = type(value) in (float, int) or (isinstance(value, numbers.Real) and not isinstance(value, bool))
    ok = ok and value == value  # not NaN; torch.compile traces this also for a float that it made symbolic
    ok = ok and (low is None or (value > low if low_open else value >= low))
    ok = ok and (high is None or (value < high if high_open else value <= high))
    if not ok:
        parts = []
        if low is not None:
            parts.append(f"{'>' if low_open else '>='} {low}")
        if high is not None:
            parts.append(f"{'<' if high_open else '<='} {high}")
        raise ValueError(f"{name} must be a number{' ' if parts else ''}{' and '.join(parts)}, got {value!r}")


def _is_ordinary(tensor):
    """Whether a look at its type tells that the tensor is not fake: `is_fake` takes longer than the checks."""
    if type(tensor) is not torch.Tensor:
        return False
    return not (torch._is_functional_tensor(tensor) or functorch.is_functorch_wrapped_tensor(tensor))


def reads_values(tensor):
    """Whether a check may read this tensor's values: yes on the CPU, elsewhere only with RLHF_KERNELS_CHECK=1."""
    kind = tensor.device.type
    if torch.compiler.is_compiling() or kind == "meta" or (not _is_ordinary(tensor) and is_fake(tensor)):
        return False
    return kind == READ_ON or os.environ.get("RLHF_KERNELS_CHECK") == "1"


def check_cu_seqlens(name, cu_seqlens, total):
    """Raise unless `cu_seqlens` is 1-D int32 or int64 with offsets 0 <= ... <= total (equal neighbours = empty).

    The offsets themselves are read only where `reads_values` allows it.
    """
    check_dtype(name, cu_seqlens, (torch.int32, torch.int64))
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{name} has shape {list(cu_seqlens.shape)}, expected [number of segments + 1]")
    if not reads_values(cu_seqlens):
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0:
        raise ValueError(f"{name} starts with {first}, expected 0")
    if last != total:
        raise ValueError(f"{name} ends with {last}, expected {total}, the number of packed entries")
    if bool((cu_seqlens[1:] < cu_seqlens[:-1]).any()):
        raise ValueError(f"{name} descends somewhere, expected offsets in ascending order")
