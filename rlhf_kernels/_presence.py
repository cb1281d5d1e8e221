"""Which backends this machine has, and which tensors each of them takes."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from . import _native

_UP_TO_FP32 = (torch.float32, torch.bfloat16, torch.float16)


def on_cpu(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    return device.type == "cpu" and dtype in _UP_TO_FP32


def on_gpu(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    return (device.type == "cuda" or (device.type == "cpu" and _interpreting())) and dtype in _UP_TO_FP32


def on_nvidia(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    fibers = device.type == "cpu" and bool(os.environ.get(_native.CUDA_ON_CPU))
    return (device.type == "cuda" or fibers) and dtype in _UP_TO_FP32


def anywhere(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    return True


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreting() -> bool:
    """Whether Triton's kernels run on CPU tensors, in its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def missing(name: str) -> str | None:
    """Why the backend cannot run on this machine, or None if it can."""
    if name == "cpu":
        return _native.missing()
    if name == "cuda":
        return _native.missing_cuda()
    if name == "triton" and not _has_triton():
        return "the package triton is not installed"
    if name == "triton" and not _native.has_gpu() and not _interpreting():
        return "there is no GPU (TRITON_INTERPRET=1 runs the kernels on CPU tensors, slowly)"
    return None
