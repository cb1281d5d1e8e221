"""The operators behind preference.py: registration, fake results and autograd; the contract is reference/preference.py.

And what stands around an operator's call: weighted sums of losses, sorted and token-mean ones.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch
from ._autograd import custom_op, direct, register
from .preferences import AOT, SFT, AOTUnpaired, BCOPair
from .reference.preference import accumulator_dtype


@custom_op("preference_fwd")
def preference_fwd(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    anchor: Tensor | None,
    term: str,
    beta: float,
    a: float,
    b: float,
    divergence: str,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses, gradients of chosen and rejected, rewards; the contract is in reference/preference.py."""
    return dispatch.pick("preference", chosen).preference_fwd(
        chosen,
        rejected,
        ref_chosen,
        ref_rejected,
        chosen_lengths,
        rejected_lengths,
        anchor,
        term,
        beta,
        a,
        b,
        divergence,
        alpha,
    )


@custom_op("preference_bwd")
def preference_bwd(grad_loss: Tensor, grad_chosen: Tensor, grad_rejected: Tensor) -> tuple[Tensor, Tensor]:
    """The saved gradients times the upstream gradient of each loss."""
    return dispatch.pick("preference", grad_chosen).preference_bwd(grad_loss, grad_chosen, grad_rejected)


@preference_fwd.register_fake
def _(chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, anchor, term, *numbers):
    dtype = accumulator_dtype(chosen.dtype)
    size = chosen.shape[0] + rejected.shape[0] if term == "kto" else chosen.shape[0]
    like = [x.new_empty(x.shape, dtype=dtype) for x in (chosen, rejected, chosen, rejected)]
    return chosen.new_empty(size, dtype=dtype), *like


@preference_bwd.register_fake
def _(grad_loss, grad_chosen, grad_rejected):
    return torch.empty_like(grad_chosen), torch.empty_like(grad_rejected)


_preference_bwd = direct(preference_bwd)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(output[1], output[2])
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss, *_):
    nothing = (None,) * 11
    if grad_loss is None:
        return None, None, *nothing
    chosen, rejected = _preference_bwd(grad_loss.contiguous(), *ctx.saved_tensors)
    return chosen.to(ctx.dtypes[0]), rejected.to(ctx.dtypes[1]), *nothing


differentiable = register(preference_fwd, _backward, _setup_context, policy_chosen_logps=0, policy_rejected_logps=1)


class Sides(NamedTuple):
    """What the losses of one call share: log-probs, references and lengths of both sides, z of KTO, the divergence."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor | None
    ref_rejected: Tensor | None
    chosen_lengths: Tensor | None
    rejected_lengths: Tensor | None
    kl: Tensor | None
    divergence: tuple[str, float]

    def compared(self, loss):
        """Log-probs and references, in the dtype of the arithmetic and, for a loss that wants it, by token."""
        dtype = accumulator_dtype(self.chosen.dtype)
        found = [x.to(dtype) for x in (*self[:2], *(ref.detach() for ref in self[2:4]))]
        if loss.by_token:
            found = [x / n.to(dtype) for x, n in zip(found, self[4:6] * 2, strict=True)]
        return found


def weighted_sum(losses, sides, beta):
    """Weighted sum of the losses [N], and the rewards of the first that is not SFT."""
    total, rewards = None, {}
    for loss, weight in losses:
        value, *own = _one(loss, sides, beta)
        value = value if weight == 1.0 else weight * value
        total = value if total is None else total + value
        rewards.setdefault(isinstance(loss, SFT), own)
    return total, *rewards.get(False, rewards.get(True))


def _one(loss, sides, beta):
    """(loss [N], rewards of chosen and rejected) of one preference loss."""
    if isinstance(loss, SFT):
        return _sft(loss, sides, beta)
    if isinstance(loss, AOT):
        return _aot(loss, sides, beta)
    refs = sides[2:4] if loss.has_reference else (None, None)
    lengths = sides[4:6] if loss.by_token else (None, None)
    anchor = sides.kl
    if isinstance(loss, BCOPair) and (isinstance(loss.delta, Tensor) or loss.delta != 0):
        anchor = constant(loss.delta, sides.chosen)
    results = differentiable(*sides[:2], *refs, *lengths, anchor, loss.term, beta, *loss.numbers(), *sides.divergence)
    return results[0], *results[3:]


def _sft(loss, sides, beta):
    dtype = accumulator_dtype(sides.chosen.dtype)
    lengths = [x.to(dtype) for x in sides[4:6]]
    mean_length = lengths[0].mean() if loss.mean_length is None else constant(loss.mean_length, sides.chosen)
    rewards = [beta * x.detach().to(dtype) / n for x, n in zip(sides[:2], lengths, strict=True)]
    return -sides.chosen.to(dtype) / mean_length, *rewards


def _aot(loss, sides, beta):
    """Both sides are sorted, then compared as DPO compares a pair; sorting passes each gradient to where it belongs."""
    chosen, rejected, ref_chosen, ref_rejected = sides.compared(loss)
    if isinstance(loss, AOTUnpaired):
        better, worse = (chosen - ref_chosen).sort(stable=True)[0], (rejected - ref_rejected).sort(stable=True)[0]
    else:
        better = (chosen - rejected).sort(stable=True)[0]
        worse = (ref_chosen - ref_rejected).sort(stable=True)[0]
    value, *_ = differentiable(better, worse, *(None,) * 5, loss.term, beta, *loss.numbers(), "reverse_kl", 1.0)
    return value, beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)


def constant(number, like):
    """A number or 0-d tensor as a 0-d tensor of the arithmetic's dtype on the device."""
    dtype = accumulator_dtype(like.dtype)
    if isinstance(number, Tensor):
        return number.detach().to(like.device, dtype)
    return torch.full((), float(number), dtype=dtype, device=like.device)
