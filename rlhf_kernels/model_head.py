"""The LM head of a Hugging Face causal language model: where it is, what becomes of its logits, and calls in its place.

What a model does to its logits after the head (nothing; a factor; a soft cap) is not read off its name: `find_head`
puts known numbers in the logits' place and looks at what the model returns.

A function called in the head's place runs inside the model's own forward. There the weights of FSDP and DeepSpeed are
whole, the hooks of every wrapper have run, and the hidden states are exactly those that the head would have read.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ._checks import check_dtype, check_shape, check_tensor
from .linear import linear_logprobs

_PROBE = (0.0, 1e-3, -1e-3, 0.5, -0.5, 2.0, -3.0, 10.0, 40.0, -100.0, 1e3, 1e6)
_found: weakref.WeakKeyDictionary[nn.Module, tuple[float, float | None]] = weakref.WeakKeyDictionary()


class ModelHead(NamedTuple):
    """logits = scaled(hidden_states weight^T + bias), scaled(x) = softcap tanh(scale x / softcap), or scale x.

    `linear_*(..., bias=head.bias, **head.options(temperature))` take the same softmax as the model's own logits.
    """

    module: nn.Linear
    scale: float
    softcap: float | None

    @property
    def weight(self) -> Tensor:
        """[V, H], as it is now: inside the model's forward whole, outside maybe sharded."""
        return self.module.weight

    @property
    def bias(self) -> Tensor | None:
        """[V], or None."""
        return self.module.bias

    def options(self, temperature: float | Tensor = 1.0) -> dict:
        """Keyword arguments temperature and softcap of the `linear_*` functions, with the scale folded in."""
        cap = None if self.softcap is None else self.softcap / self.scale
        return {"temperature": temperature / self.scale, "softcap": cap}


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside DDP and PEFT wrappers (adapters sit in its modules, so they still take part)."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _head_of(model: nn.Module) -> nn.Linear:
    name = type(model).__name__
    if not hasattr(model, "get_output_embeddings"):
        raise ValueError(f"model is a {name}, expected a causal language model of transformers")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"model is a {name}, an encoder and a decoder, expected a causal language model")
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise ValueError(f"the LM head of {name} is a {type(head).__name__}, expected a torch.nn.Linear")
    return head


@contextlib.contextmanager
def _replaced(head: nn.Linear, forward: Callable[[Tensor], Tensor]):
    """head(x) computes forward(x) inside the block, between the hooks that others have put on it."""
    before = head.__dict__.get("forward")
    head.forward = forward
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before


def _after_head(model: nn.Module, head: nn.Linear) -> tuple[float, float | None]:
    """(scale, softcap) that the model applies to what its head returns, from known numbers put in the head's place."""
    probe = torch.tensor(_PROBE, dtype=torch.float32)

    def forward(hidden):
        return probe.to(hidden.device).expand(*hidden.shape[:-1], -1)

    with torch.no_grad(), torch.random.fork_rng(), _replaced(head, forward):
        token = torch.zeros(1, 1, dtype=torch.int64, device=head.weight.device)
        logits = model(input_ids=token, use_cache=False).logits
    values, exact = logits.flatten().double().cpu(), probe.double()
    if values.shape == exact.shape:
        scale = float(values[1] / exact[1])
        cap = float(values[-1])
        tolerance = 1e-2 if logits.dtype in (torch.bfloat16, torch.float16) else 1e-5
        for softcap in (None, cap):
            guess = exact * scale if softcap is None else softcap * torch.tanh(exact * scale / softcap)
            if scale > 0 and cap > 0 and torch.allclose(values, guess, rtol=tolerance, atol=0.0):
                return _plain(scale), softcap
    raise ValueError(
        f"{type(model).__name__} does something else to its logits than a factor and a soft cap: it turns "
        f"{[round(x, 3) for x in _PROBE]} into {[round(x, 3) for x in values.tolist()[: len(_PROBE)]]}; use its logits"
    )


def _plain(scale: float) -> float:
    """1.0 where the probe's own rounding is all that speaks against it."""
    return 1.0 if abs(scale - 1.0) < 1e-6 else scale


def find_head(model: nn.Module) -> ModelHead:
    """Find the LM head of a causal language model, and what the model does to the logits that it returns.

    Args:
        model: a causal language model of transformers, possibly wrapped by DistributedDataParallel or PEFT, or sharded
            by FSDP2; then all ranks must call. It runs once, on one token, the first time that it is asked about.
    Returns:
        ModelHead(module, scale, softcap), whose weight, bias and options(temperature) suit the `linear_*` functions.
    Raises:
        ValueError: not a causal language model; the head is not a torch.nn.Linear (it is quantised or has adapters);
            the model does something else to its logits than a factor and a soft cap.
    Cost: one forward on one token at the first call, kept as long as the model lives.
    Example:
        >>> from transformers import GraniteConfig, GraniteForCausalLM
        >>> size = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        >>> heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        >>> head = find_head(GraniteForCausalLM(GraniteConfig(**size, **heads, logits_scaling=4.0)))
        >>> head.weight.shape, head.bias, head.scale, head.softcap
        (torch.Size([50, 8]), None, 0.25, None)
    """
    inner = unwrapped(model)
    head = _head_of(inner)
    if inner not in _found:
        _found[inner] = _after_head(inner, head)
    return ModelHead(head, *_found[inner])


def call_with_head(model: nn.Module, function: Callable[[Tensor, ModelHead], Tensor | tuple], **inputs):
    """Run a causal language model with a function of the hidden states in the place of its LM head.

    Gradients flow through the function and the model as they would through logits, also under DDP, FSDP2 and gradient
    checkpointing. While the call runs, the head is replaced: do not run the model in another thread meanwhile.

    Args:
        model: as in `find_head`.
        function: called as function(hidden_states [B, T, H], head: ModelHead); returns a floating tensor, or a tuple of
            them.
        inputs: keyword arguments of the model's forward: input_ids, attention_mask, position_ids, ...; without
            use_cache=True no cache is kept.
    Returns:
        What the function returned.
    Raises:
        ValueError: as `find_head`; inputs hold labels or logits_to_keep.
    Cost: the model's layers and the function; no logits.
    Example:
        >>> import torch, transformers
        >>> config = transformers.GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2)
        >>> model = transformers.GPT2LMHeadModel(config).eval()
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> hidden = call_with_head(model, lambda hidden, head: hidden, input_ids=ids)
        >>> bool(torch.equal(hidden, model.transformer(ids).last_hidden_state))
        True
    """
    for name in ("labels", "logits_to_keep"):
        if inputs.get(name) is not None:
            raise ValueError(f"{name} cannot be given: the model makes no logits here")
    head, made = find_head(model), []

    def forward(hidden):
        made.append(function(hidden, head))
        tensors = made[0] if isinstance(made[0], tuple) else (made[0],)
        # The model returns zeros that hang on every result, so that hooks on its output see the backward begin.
        return torch.cat([0.0 * x.clamp(-1.0, 1.0).reshape(1, 1, -1).float() for x in tensors], dim=-1)

    with _replaced(head.module, forward):
        zeros = model(**{"use_cache": False, **inputs}).logits.flatten()
    if not isinstance(made[0], tuple):
        return made[0] + zeros.to(made[0].dtype).view(made[0].shape)
    parts = zeros.split([x.numel() for x in made[0]])
    return tuple(x + zero.to(x.dtype).view(x.shape) for x, zero in zip(made[0], parts, strict=True))


def linear_logprobs_from_model(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    rows: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    chunk_size: int | None = None,
    precision: str = "exact",
    **model_inputs,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probs of a causal language model, without its logits.

    What `logprobs_from_logits(model(...).logits, labels)` gives, by `linear_logprobs` in the place of the LM head, with
    the head's weight, bias, soft cap and logit scale.

    Args:
        model: as in `find_head`.
        input_ids: [B, T] int64.
        labels: [B, T] int64, not shifted: position t predicts labels[:, t]; [M] with rows. None, the default: each
            position predicts the next of input_ids; a token, or a position, under attention_mask 0 does not count.
        attention_mask: [B, T], 1 = token, or whatever else the model takes; None, the default: the model's own way.
        position_ids: [B, T] int64; None, the default: the model's own way.
        rows: [M] int64 in [0, B T), the position b T + t that predicts each label; default None.
        temperature: > 0, default 1.0; or a tensor in the shape of labels.
        ignore_index: label of positions that do not count, default -100.
        return_entropy: return the entropy too, default False.
        chunk_size: tokens handled at a time; default None: the backend chooses.
        precision: "exact", the default, or "fast", as in `linear_logprobs`.
        model_inputs: further arguments of the model's forward.
    Returns:
        log-probs in the shape of labels ([B, T-1] where labels is None), fp32, in nats; with return_entropy (log-probs,
        entropy). Differentiable in the model's parameters.
    Raises:
        ValueError: as `find_head` and `linear_logprobs`; rows without labels.
    Cost: as `linear_logprobs`, beside the model's layers; the logits are never made.
    Example:
        >>> import torch, transformers
        >>> config = transformers.GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2)
        >>> model, ids = transformers.GPT2LMHeadModel(config).eval(), torch.tensor([[1, 2, 3]])
        >>> log_probs = linear_logprobs_from_model(model, ids)
        >>> full = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        >>> log_probs.shape, bool(torch.allclose(log_probs, full, atol=1e-5))
        (torch.Size([1, 2]), True)
    """
    check_dtype("input_ids", input_ids, torch.int64)
    check_shape("input_ids", input_ids, (None, None), "[B, T]")
    if labels is None and rows is not None:
        raise ValueError("rows is given without labels, expected a label [M] for each row")
    following = labels is None
    if following:
        labels = input_ids[:, 1:]
        if attention_mask is not None and attention_mask.dim() == 2:
            check_shape("attention_mask", attention_mask, tuple(input_ids.shape), "the shape of input_ids")
            kept = attention_mask.bool()
            labels = torch.where(kept[:, 1:] & kept[:, :-1], labels, ignore_index)
    check_tensor("labels", labels)
    if not following and rows is None:
        check_shape("labels", labels, tuple(input_ids.shape), "the shape of input_ids; or give rows")
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, **model_inputs}

    def log_probs(hidden, head):
        hidden = hidden[:, :-1] if following else hidden
        return linear_logprobs(
            hidden if rows is None else hidden.flatten(0, 1), head.weight, labels, rows=rows, bias=head.bias,
            ignore_index=ignore_index, return_entropy=return_entropy, chunk_size=chunk_size, precision=precision,
            **head.options(temperature),
        )  # fmt: skip

    return call_with_head(model, log_probs, **{name: x for name, x in inputs.items() if x is not None})
