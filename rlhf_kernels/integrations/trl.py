"""TRL's trainers on these kernels: what TRL scores tokens with is replaced, and put back.

    from rlhf_kernels.integrations import trl as rk_trl

    rk_trl.enable()                        # until disable(), or: with rk_trl.patched(): ...
    trainer = SFTTrainer(model, ...)       # DPO, KTO, GRPO, RLOO, Reward too

    rk_trl.RankedRewardTrainer(model, ...)  # TRL's RewardTrainer on rows of K ranked responses; needs no enable()

Served: the head of `model(..., fused_lm_head=True)`, with all its outputs from one read and on every device of the
positions alone that have a label; `selective_log_softmax`, `entropy_from_logits` and
`selective_log_softmax_and_entropy`, wherever TRL has imported them; the pair loss of RewardTrainer. Results are fp32
and exact for the inputs as they are. docs/integrations/trl.md tells what differs from TRL's own, and how far.
"""

from __future__ import annotations

import importlib
import weakref
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from .. import _linear_ops as ops
from .. import _statistics_ops as statistics_ops
from .._checks import check_in
from .._linear_checks import PRECISIONS, check_lora
from ..logprobs import entropy_from_logits as our_entropy
from ..logprobs import logprobs_and_entropy_from_logits, logprobs_from_logits
from ..model_head import active_lora
from ._patch import Patches, check_signatures

TESTED = ("1.16.0",)
RESULTS = ("float32", "input")
_IGNORED = -100
# What TRL's functions take, in the versions tested: a release that changes one is refused rather than guessed at.
_SIGNATURES = {
    "_ChunkedLogProbFunction": (
        "ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping",
        "logit_scale", "outputs",
    ),
    "add_fused_lm_head": ("model", "temperature", "cast_lm_head_to_fp32", "outputs"),
    "selective_log_softmax": ("logits", "index", "temperature", "row_mask"),
    "entropy_from_logits": ("logits", "chunk_size"),
    "selective_log_softmax_and_entropy": ("logits", "index", "entropy_requires_grad", "temperature", "row_mask"),
    "_use_triton": ("device",),
}  # fmt: skip
_TRAINERS = ("sft", "dpo", "kto", "rloo")  # whose heads may have an adapter; GRPO looks for one for other reasons too
_models: weakref.WeakSet = weakref.WeakSet()  # whose heads were fused while enabled, or that a callback has met


_options = [("exact", "float32")]  # (precision, results): the default, and those of each enable() in force


class _Scores(torch.autograd.Function):
    """(log-probs, entropy, log sum p^2, mean logit, top-1) [N] of the outputs asked for; the others are None.

    The head's weight is saved as it came, and gathered again in the backward, where DeepSpeed has it in parts.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, low, up, labels, temperature, softcap, outputs, fast, gather):
        ctx.set_materialize_grads(False)
        ctx.dtype = _autocast_dtype(hidden)
        ctx.scale, ctx.execution, ctx.gather = (temperature, softcap, _IGNORED), (0, fast, "", 0), gather
        with_entropy = "entropy" in outputs
        ctx.with_slopes = not with_entropy and tuple(ctx.needs_input_grad[:5]) == (True,) + (False,) * 4
        h, w = _cast(hidden, ctx.dtype), _cast(weight, ctx.dtype)
        inputs = (h, w, labels, None, bias, None, low, up)
        slopes = more = None
        if {"log_sum_sq_probs", "mean_logits", "is_top1"} & set(outputs):
            ctx.with_slopes = False
            log_probs, entropy, row_max, log_sum, *more = statistics_ops.linear_token_statistics_fwd(
                *inputs, *ctx.scale, *ctx.execution
            )
        else:
            log_probs, entropy, row_max, log_sum, slopes = ops.linear_logprobs_fwd(
                *inputs, *ctx.scale, with_entropy, ctx.with_slopes, *ctx.execution
            )
        if ctx.with_slopes:
            ctx.save_for_backward(slopes)
            ctx.hidden_dtype = hidden.dtype
        else:
            results = log_probs.clone(), entropy.clone()  # the caller may write over what it gets
            ctx.save_for_backward(hidden, weight, bias, low, up, labels, *results, row_max, log_sum)
        wanted = dict(zip(("log_sum_sq_probs", "mean_logits", "is_top1"), more or (None,) * 3))
        wanted = [x if name in outputs else None for name, x in wanted.items()]
        ctx.mark_non_differentiable(*(x for x in wanted if x is not None))
        return log_probs, entropy if with_entropy else None, *wanted

    @staticmethod
    def backward(ctx, grad_log_probs, grad_entropy, *_):
        if grad_log_probs is None and grad_entropy is None:
            return (None,) * 11
        if ctx.with_slopes:
            (slopes,) = ctx.saved_tensors
            return (grad_log_probs.unsqueeze(-1) * slopes).to(ctx.hidden_dtype), *(None,) * 10
        hidden, weight, bias, low, up, labels, *results = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:5])
        with ctx.gather(weight, bias):
            found = ops.linear_logprobs_bwd(
                grad_log_probs, grad_entropy, _cast(hidden, ctx.dtype), _cast(weight, ctx.dtype), labels, None, bias,
                None, low, up, *results, *ctx.scale, *ctx.execution, needs, True,
            )  # fmt: skip
        sources = (hidden, weight, bias, low, up)
        return *(x.to(source.dtype) if need else None for x, source, need in zip(found, sources, needs)), *(None,) * 6


def _autocast_dtype(x):
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _cast(x, dtype):
    return x if dtype is None else x.to(dtype)


class _Head:
    """In the place of TRL's autograd function of the fused head: `apply` takes and gives what TRL's does."""

    def __init__(self, trl_utils):
        self.original, self.utils = trl_utils._ChunkedLogProbFunction, trl_utils

    def apply(
        self, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None, logit_scale=1.0,
        outputs=("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ):  # fmt: skip
        if not logit_scale > 0:  # all logits are 0, or change their sign: TRL's own head has these
            return self.original.apply(
                hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
            )
        softcap = None if final_logit_softcapping is None else final_logit_softcapping / logit_scale
        low, up = _adapter(hidden, weight)
        found = _Scores.apply(
            hidden, weight, bias, low, up, targets.long(), temperature / logit_scale, softcap, tuple(outputs),
            _options[-1][0] == "fast", self.utils.maybe_gather_lm_head_ctx,
        )  # fmt: skip
        if _options[-1][1] == "float32":
            return found
        return tuple(x.to(hidden.dtype) if x is not None and x.is_floating_point() else x for x in found)


def _adapter(hidden, weight):
    """(low, up) of the LoRA layer on the head whose weight this is, or (None, None)."""
    for model in list(_models):
        head = model.get_output_embeddings()
        own = getattr(head, "weight", None)
        if own is weight or (isinstance(own, DTensor) and own.shape == weight.shape):
            lora = active_lora(head)
            if lora is None:
                return None, None
            a, b, scaling = lora
            a, b = (x.full_tensor() if isinstance(x, DTensor) else x for x in (a, b))
            kept = torch.ones(hidden.shape[0], dtype=torch.bool, device=hidden.device)
            return check_lora((a, b, scaling), hidden, weight, kept, None)
    return None, None


def _as_results(x, like):
    return x if _options[-1][1] == "float32" else x.to(like.dtype)


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """TRL's function of this name on `logprobs_from_logits`: log-probs [..., K] or [...] of logits [..., V]."""
    return _as_results(logprobs_from_logits(logits, index, temperature=temperature, row_mask=_rows(row_mask)), logits)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """TRL's function of this name on `rlhf_kernels.entropy_from_logits`; the chunk size has nothing to say here."""
    return _as_results(our_entropy(logits), logits)


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """TRL's function of this name on `logprobs_and_entropy_from_logits`."""
    found = logprobs_and_entropy_from_logits(logits, index, temperature=temperature, row_mask=_rows(row_mask))
    log_probs, entropy = (_as_results(x, logits) for x in found)
    return log_probs, entropy if entropy_requires_grad else entropy.detach()


def _rows(row_mask):
    return None if row_mask is None else row_mask != 0


def _replacements():
    import trl.trainer.utils as trl_utils

    check_signatures(trl_utils, _SIGNATURES)
    fuse = trl_utils.add_fused_lm_head

    def add_fused_lm_head(model, *args, **kwargs):
        _models.add(model)
        return fuse(model, *args, **kwargs)

    add_fused_lm_head.__doc__, add_fused_lm_head.__wrapped__ = fuse.__doc__, fuse
    yield trl_utils, "_ChunkedLogProbFunction", _Head(trl_utils)
    yield trl_utils, "add_fused_lm_head", add_fused_lm_head
    for ours in (selective_log_softmax, entropy_from_logits, selective_log_softmax_and_entropy):
        yield trl_utils, ours.__name__, ours
    yield trl_utils, "_use_triton", _scores_labels_alone, False  # there it asks one thing; in TRL's kernels another

    for name in _TRAINERS:  # which refuse every adapter on the head
        module = importlib.import_module(f"trl.trainer.{name}_trainer")
        if hasattr(module, "BaseTunerLayer"):
            yield module, "BaseTunerLayer", _unserved(module.BaseTunerLayer), False

    from . import _trl_reward

    _trl_reward.check_reward_trainer()
    yield _trl_reward.RewardTrainer, "compute_loss", _trl_reward.pair_loss


def _unserved(layers: type) -> type:
    """Stands for peft's layers in `isinstance(head, ...)`: the head here takes theirs, or raises and says why not."""

    class Kind(type):
        def __instancecheck__(cls, layer):
            if isinstance(layer, layers):
                active_lora(layer)
            return False

    return Kind(layers.__name__, (), {})


def _scores_labels_alone(device):
    """Whether the head scores only positions that have a label: on every device."""
    return True


_patches = Patches("trl", TESTED, _replacements)


def enable(*, precision: str = "exact", results: str = "float32") -> None:
    """Let TRL score tokens with these kernels, until as many disable(); the last enable() in force has its options.

    Args:
        precision: "exact", the default, or "fast": products of bf16 inputs rounded to bf16, as TRL's are; see
            `linear_logprobs`.
        results: "float32", the default, or "input": rounded to the dtype of the logits or hidden states, as TRL's
            functions from logits do.
    Raises:
        ImportError: TRL is not installed.
        RuntimeError: TRL is another version than those tested, or a function of it takes other arguments.
        ValueError: precision or results is another.
    """
    check_in("precision", precision, PRECISIONS)
    check_in("results", results, RESULTS)
    _patches.enable()
    _options.append((precision, results))


def disable() -> None:
    """Take back one enable(); with the last one TRL has its own functions again."""
    _patches.disable()
    if len(_options) > 1:
        _options.pop()


@contextmanager
def patched(*, precision: str = "exact", results: str = "float32"):
    """TRL on these kernels inside a `with`; arguments and errors as `enable`."""
    enable(precision=precision, results=results)
    try:
        yield
    finally:
        disable()


class KernelsCallback(TrainerCallback):
    """For `callbacks=[KernelsCallback()]` of a TRL trainer: these kernels from the beginning of training to its end.

    transformers tells a callback nothing of a training that ends by an exception. Then TRL has its own functions again
    as soon as the callback is collected (which the trainer holds, and the exception's traceback the trainer), and at
    the latest at the end of the next training with such a callback, at whose beginning an earlier one's is over. Where
    that is too late, `with patched(): trainer.train()` puts them back at once.

    Args:
        precision, results: as `enable`.
    """

    _running = None  # what ends the last training that began; trainings do not overlap in a process

    def __init__(self, *, precision: str = "exact", results: str = "float32"):
        check_in("precision", precision, PRECISIONS)
        check_in("results", results, RESULTS)
        self.options = {"precision": precision, "results": results}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._end()
        enable(**self.options)
        KernelsCallback._running = weakref.finalize(self, disable)
        if model is not None:
            _models.add(model.get_base_model() if hasattr(model, "get_base_model") else model)

    def on_train_end(self, args, state, control, **kwargs):
        self._end()

    @staticmethod
    def _end():
        if KernelsCallback._running is not None:
            KernelsCallback._running()  # once; then it does nothing


def __getattr__(name):
    if name == "RankedRewardTrainer":  # a class of TRL's, which is imported with it
        from ._trl_reward import RankedRewardTrainer

        return RankedRewardTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
