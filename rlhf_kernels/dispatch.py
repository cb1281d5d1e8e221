"""Which backend serves a call: one table, read from top to bottom.

An op's first row that applies to the tensor and whose backend is present serves it. `with backend(name)` or the
environment variable RLHF_KERNELS_BACKEND names one backend instead; that choice is obeyed or raises, it never falls
back.
The module rlhf_kernels.<backend>.<op> has the functions `<name>_fwd` and `<name>_bwd` that the op's reference defines.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from types import ModuleType

import torch

from ._choice import block, chosen
from ._presence import anywhere, missing, on_cpu, on_gpu, on_nvidia

Applies = Callable[[torch.device, torch.dtype, tuple[int, ...]], bool]


_CPU, _REFERENCE = ("cpu", on_cpu), ("reference", anywhere)
_TRITON, _CUDA = ("triton", on_gpu), ("cuda", on_nvidia)

TABLE: dict[str, list[tuple[str, Applies]]] = {
    "logprobs": [_CPU, _TRITON, _CUDA, _REFERENCE],
    "cross_entropy": [_CPU, _TRITON, _REFERENCE],
    "linear": [_CPU, _TRITON, _REFERENCE],
    "kl": [_CPU, _TRITON, _CUDA, _REFERENCE],
    "advantages": [_CPU, _CUDA, _TRITON, _REFERENCE],  # one warp a row, as Triton has it, leaves a large GPU idle
    "policy": [_CPU, _TRITON, _CUDA, _REFERENCE],
    "ppo": [_CPU, _TRITON, _CUDA, _REFERENCE],
    "bradley_terry": [_CPU, _TRITON, _CUDA, _REFERENCE],
    "preference": [_CPU, _TRITON, _REFERENCE],
    "kept": [_REFERENCE],
    "distillation": [_REFERENCE],
    "packing": [_REFERENCE],
}

BACKENDS: tuple[str, ...] = tuple(dict.fromkeys(row[0] for rows in TABLE.values() for row in rows))


@functools.cache
def _module(name: str, op: str) -> ModuleType:
    return importlib.import_module(f".{name}.{op}", __package__)


def _check_backend(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} names the unknown backend {name!r}; known backends: {', '.join(BACKENDS)}")
    return name


def _explicit() -> tuple[str, str] | None:
    """The backend that somebody asked for, and where; None if the choice is automatic."""
    name = chosen()
    if name is not None:
        return name, f"backend({name!r})"
    name = os.environ.get("RLHF_KERNELS_BACKEND")
    if not name:
        return None
    return _check_backend(name, "RLHF_KERNELS_BACKEND"), f"RLHF_KERNELS_BACKEND={name}"


def pick(op: str, tensor: torch.Tensor) -> ModuleType:
    """The backend module that serves `op` on this tensor; raises RuntimeError if an explicit choice cannot."""
    if op not in TABLE:
        raise ValueError(f"unknown op {op!r}; known ops: {', '.join(TABLE)}")
    facts = (tensor.device, tensor.dtype, tuple(tensor.shape))
    explicit = _explicit()
    if explicit is None:
        for name, applies in TABLE[op]:
            if applies(*facts) and missing(name) is None:
                return _module(name, op)
        raise RuntimeError(f"no backend serves {op} on a {tensor.dtype} tensor on {tensor.device}")
    wanted, source = explicit
    for name, applies in TABLE[op]:
        if name == wanted:
            reason = missing(name)
            if reason is None and applies(*facts):
                return _module(name, op)
            reason = reason or f"it does not take a {tensor.dtype} tensor on {tensor.device}"
            raise RuntimeError(f"{source} was asked for, but cannot serve {op}: {reason}")
    has = ", ".join(row[0] for row in TABLE[op])
    raise RuntimeError(f"{source} was asked for, but {op} has no such backend; it has: {has}")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Serve every op inside the `with` block by one backend.

    It holds for this thread (or asyncio task), and for threads that are in no such block themselves; blocks of several
    threads may overlap. A call that the backend cannot serve raises RuntimeError and says why. A backward pass takes
    the backend of its forward, wherever it runs; that of a function compiled by torch.compile takes the one that is
    chosen when it runs.

    Args:
        name: a backend listed by `backends()`.
    Raises:
        ValueError: the name is unknown; the message lists the known ones.
    Example:
        >>> import torch, rlhf_kernels
        >>> with rlhf_kernels.backend("reference"):
        ...     advantages, returns = rlhf_kernels.gae(torch.ones(1, 2), torch.zeros(1, 2), lam=1.0)
        >>> advantages
        tensor([[2., 1.]])
    """
    with block(_check_backend(name, "backend()")):
        yield


class _Backends(dict):
    """{op: {backend: "available" or "missing: why"}} that prints as a table."""

    def __str__(self) -> str:
        return "\n".join(f"{op:14} {name:10} {state}" for op, row in self.items() for name, state in row.items())

    __repr__ = __str__


def backends() -> dict[str, dict[str, str]]:
    """What can serve each op on this machine, in order of preference, and for what cannot, why.

    Returns:
        {op: {backend: "available" or "missing: why"}}; it prints as a table.
    Example:
        >>> import rlhf_kernels
        >>> rlhf_kernels.backends()["advantages"]["reference"]
        'available'
    """
    state = {name: "available" if (why := missing(name)) is None else f"missing: {why}" for name in BACKENDS}
    return _Backends({op: {name: state[name] for name, _ in rows} for op, rows in TABLE.items()})
