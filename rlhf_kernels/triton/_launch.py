"""How every Triton kernel is launched, and the few numbers that decide its shape.

A kernel takes one-dimensional grids (x goes to 2^31 - 1, y only to 65535) and int64 offsets. With TRITON_INTERPRET=1
set before the import, kernels run on CPU tensors, in numpy.
"""

import contextlib
import math

import torch
import triton

INTERPRETED = bool(triton.knobs.runtime.interpret)
MERGED = 256  # parts, of one or more rows, that a warp holds
FREE = 255  # registers a thread: left to itself, ptxas spills a few bytes to fit one more block on a processor


def run(kernel, programs: int, *args, num_warps: int = 4, registers: int | None = None, **options) -> None:
    """Launch `programs` instances on the device of the first tensor, on its current stream; none if there are none.

    `registers` is how many a thread may have on NVIDIA, where the compiler's own choice would spill.
    Products and sums are rounded one after the other: a contraction into fma would make z - max z positive.
    """
    if programs == 0:
        return
    device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    if registers is not None and torch.version.hip is None:
        options["maxnreg"] = registers
    with guard:
        kernel[(programs,)](*args, num_warps=num_warps, enable_fp_fusion=False, **options)


def power_of_two(count: int) -> int:
    """The smallest power of two that is not below `count`, at least 1."""
    return 1 << max(count - 1, 0).bit_length()


def pieces(count: int, size: int) -> int:
    """How many pieces of `size` cover `count`."""
    return (count + size - 1) // size


def warps(block: int) -> int:
    """Warps for a block of so many entries, 32 a thread: four vectors of 8 are on their way at a time."""
    return max(block // 1024, 1)


def unit(*counts: int) -> int:
    """The largest power of two up to 8 that divides all counts, such as distances of rows: so many entries of a row at
    a time are whole vectors. Handed to a kernel, it stands for all of the counts' alignment."""
    return math.gcd(8, *counts)


def tile_rows(rows: int, parts: int) -> int:
    """Rows whose parts a single warp merges: at most `rows`, and so few that the registers hold them all."""
    return max(min(rows, MERGED // power_of_two(parts)), 1)


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """[N, V] of [..., V], with a dense last dimension; a copy only where the strides leave no other way."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.shape[-1] <= 1 or rows.stride(-1) == 1 else rows.contiguous()
