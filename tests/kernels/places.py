"""Logits whose rows lie in many ways, and what memory PyTorch's operators make."""

import importlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

V = 64
IN_PLACE = {
    "dense": lambda x: x[0],
    "all but the last": lambda x: x[0, :, :-1],
    "all but the first": lambda x: x[0, :, 1:],
    "one of two": lambda x: x[0, ::2],
    "batch last": lambda x: x[0].transpose(0, 1),
    "four dimensions": lambda x: x[:, :, 1:4],
    "one sequence": lambda x: x[0, :1, :-1],
    "some columns": lambda x: x[0, :, :-1, 3:-2],
    "one row": lambda x: x[0, 0, 0],
}
COPIED = {
    "three distances": lambda x: x[:, :2, :3],
    "columns first": lambda x: x[0].transpose(1, 2)[:, :2],
}


def laid(name):
    """Logits [..., V] that lie so, and a dense copy of them."""
    generator = torch.Generator().manual_seed(0)
    x = {**IN_PLACE, **COPIED}[name](torch.randn(2, 3, 5, V, generator=generator))
    return x, x.contiguous()


class Allocated(TorchDispatchMode):
    """The bytes of every piece of memory that PyTorch's operators return anew."""

    def __init__(self):
        super().__init__()
        self.bytes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        old = {x.untyped_storage().data_ptr() for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in old:
                self.bytes.append(x.untyped_storage().nbytes())
        return out


def leave_out_the_interpreter(monkeypatch):
    """Triton's copies what its kernels are given; `Allocated` is to know of what the launchers make."""
    launcher = importlib.import_module("rlhf_kernels.triton._launch")
    launch = launcher.run

    def run(*args, **kwargs):
        with _disable_current_modes():
            launch(*args, **kwargs)

    monkeypatch.setattr(launcher, "run", run)
