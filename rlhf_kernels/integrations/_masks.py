"""Masks as other trainers hold them."""

import torch
from torch import Tensor

from .._checks import reads_values


def kept(name: str, mask: Tensor | None, like: Tensor) -> Tensor:
    """A peer's mask, also one of floats 0 and 1, as bool; None keeps all of `like`.

    Raises:
        ValueError: an entry is neither 0 nor 1. On a GPU it is an assertion of the device, so that nothing waits.
    """
    if mask is None:
        return torch.ones_like(like, dtype=torch.bool)
    if mask.is_floating_point():
        binary = ((mask == 0) | (mask == 1)).all()
        if reads_values(mask) and not binary:
            wrong = mask[(mask != 0) & (mask != 1)][0].item()
            raise ValueError(f"{name} has the entry {wrong}, expected 0 or 1: tokens are kept or not")
        if mask.is_cuda:
            torch._assert_async(binary, f"{name} has an entry that is neither 0 nor 1")
    return mask != 0
