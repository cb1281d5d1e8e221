"""fp32 products that are fp32: without autocast, and whatever PyTorch's switches say (TF32 on a GPU, bf16 on a CPU)."""

from __future__ import annotations

import threading

import torch

from ._autograd import without_autocast

# Since torch 2.9 each backend has a switch of its own; the older one, for all, is kept in step with them.
_BACKENDS = {"cuda": "cuda", "cpu": "mkldnn"}
_getter = getattr(torch._C, "_get_fp32_precision_getter", None)
_lock = threading.Lock()
_inside = 0  # blocks, of whatever thread, for which the switches are turned
_before = None


def _rounds(device_type):
    """Whether fp32 products on this kind of device are rounded."""
    if device_type not in _BACKENDS:
        return False
    if _getter is None:
        return torch.get_float32_matmul_precision() != "highest"
    return _getter(_BACKENDS[device_type], "matmul") not in ("none", "ieee")


def _switches():
    """(the older switch, those of the backends)."""
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # out of step: only the newer ones are in use
        older = None
    return older, {} if _getter is None else {name: _getter(name, "matmul") for name in _BACKENDS.values()}


def _turn(older, newer):
    if older is not None:
        torch.set_float32_matmul_precision(older)
    for name, value in newer.items():
        torch._C._set_fp32_precision_setter(name, "matmul", value)


class exact_products:
    """A block whose products on the device are exact but for their sums in fp32.

    The switches are the process's: while one thread is inside, fp32 products of others are exact too. Where they are
    off, and for no other thread, the block costs a microsecond.
    """

    def __init__(self, device: torch.device):
        self.device, self.outside, self.turned = device, without_autocast(device), False

    def __enter__(self):
        global _inside, _before
        with _lock:
            self.turned = _inside > 0 or _rounds(self.device.type)
            if self.turned:
                if _inside == 0:
                    _before = _switches()
                    _turn(None if _before[0] is None else "highest", dict.fromkeys(_before[1], "ieee"))
                _inside += 1
        self.outside.__enter__()

    def __exit__(self, *error):
        global _inside
        self.outside.__exit__(*error)
        if self.turned:
            with _lock:
                _inside -= 1
                if _inside == 0:
                    _turn(*_before)
