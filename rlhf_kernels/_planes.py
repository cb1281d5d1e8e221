"""Rows of V entries where they lie: [B, T, V] views of tensors [..., V], which kernels read by two strides."""

from __future__ import annotations

from torch import Tensor


def planes(*tensors: Tensor) -> list[Tensor]:
    """Each tensor [..., V] as [B, T, V] with dense rows, in which row b T + t is the same of all of them.

    A view, if the last dimension is dense and the others merge into two, as those of logits[:, :-1] do; else a copy.
    Where other tensors are cut into rows of rows in another way, the first one decides.
    """
    if len(tensors) == 1 and tensors[0].is_contiguous():
        return [tensors[0].view(1, _count(tensors[0]), tensors[0].shape[-1])]
    cuts = [_cut(x) for x in tensors]
    batch, length = next((cut for cut in cuts if cut is not None and cut[0] > 1), (1, _count(tensors[0])))
    return [_as(x, cut, batch, length) for x, cut in zip(tensors, cuts)]


def _count(x: Tensor) -> int:
    """The number of rows."""
    return x.shape[:-1].numel()


def _cut(x: Tensor) -> tuple[int, int] | None:
    """(B, T) that its rows lie in; (1, N) if they lie at one distance; None if it takes a copy."""
    if x.is_contiguous():
        return 1, _count(x)
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return None
    sizes, inner = [], None  # of dimensions that merge, outermost first; `inner`: the stride of the last one
    for size, stride in reversed(list(zip(x.shape[:-1], x.stride()[:-1]))):
        if size == 1:
            continue
        if sizes and stride == sizes[0] * inner:
            sizes[0] *= size
        else:
            sizes.insert(0, size)
            inner = stride
    if len(sizes) > 2:
        return None
    return (sizes[0], sizes[1]) if len(sizes) == 2 else (1, _count(x))


def _as(x: Tensor, cut: tuple[int, int] | None, batch: int, length: int) -> Tensor:
    if cut is None or cut not in ((1, batch * length), (batch, length)):
        x = x.contiguous()
    return x.view(batch, length, x.shape[-1])


def places(rows: Tensor) -> tuple[int, int, int]:
    """(T, distance from plane to plane, from row to row) of what `planes` returned."""
    return rows.shape[1], rows.stride(0), rows.stride(1)


def blocks(rows: Tensor, entries: int) -> list[tuple[slice, tuple[slice, slice]]]:
    """What `planes` returned in blocks of about so many entries: (rows b T + t of the block, its place in [B, T])."""
    batch, length, vocab = rows.shape
    step = max(1, entries // max(vocab, 1))
    if step >= length:
        step = step // max(length, 1)
        parts = [(slice(b, min(b + step, batch)), slice(0, length)) for b in range(0, batch, step)]
    else:
        times = [slice(t, min(t + step, length)) for t in range(0, length, step)]
        parts = [(slice(b, b + 1), time) for b in range(batch) for time in times]
    return [(slice(b.start * length + t.start, (b.stop - 1) * length + t.stop), (b, t)) for b, t in parts]
