"""Whether optimizer steps arrive: a step that is smaller than half a weight's last bit is rounded away.

bfloat16 keeps 8 bits of a weight, so at the usual rates of fine-tuning most weights never move, and no loss shows it.
"""

import torch
from torch.distributed.tensor import DTensor

SAMPLE = 4096
"""Entries that are looked at of each weight."""
ENOUGH = 0.5


class WeightsMoved:
    """The share of 16-bit weights that steps have moved so far, of those that had a gradient; on a sample of them.

    Args:
        weights: parameters that train, sharded by FSDP2 or not; those of more bits are passed over.
    """

    def __init__(self, weights):
        self.weights = [
            weight
            for weight in weights
            if weight.requires_grad and weight.dtype in (torch.bfloat16, torch.float16) and _local(weight).numel()
        ]
        self.start = [_sample(weight).clone() for weight in self.weights]

    def share(self, optimizer) -> float | None:
        """None without such weights. Gradients are told by the optimizer's first moments, where it keeps them."""
        moved = total = 0
        for weight, start in zip(self.weights, self.start, strict=True):
            moment = optimizer.state.get(weight, {}).get("exp_avg")
            asked = torch.ones_like(start, dtype=torch.bool) if moment is None else _sample(moment) != 0
            moved += (asked & (_sample(weight) != start)).sum().item()
            total += asked.sum().item()
        return moved / total if total else None

    def complaint(self, share: float | None, steps: int) -> str | None:
        """What to tell of a share that is low, and what to do; None where it is not."""
        if share is None or share >= ENOUGH:
            return None
        name = str(self.weights[0].dtype).removeprefix("torch.")
        return (
            f"only {share:.0%} of the {name} weights with a gradient moved in the first {steps} steps, the rest was "
            "rounded away: use --bf16 true (float32 weights, bfloat16 products), --dtype float32, or a larger rate"
        )


def _local(tensor):
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _sample(tensor):
    flat = _local(tensor).flatten()
    return flat[:: max(1, flat.numel() // SAMPLE)]
