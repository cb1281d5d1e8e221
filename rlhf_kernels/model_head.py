"""The LM head of a Hugging Face causal language model: where it is, what becomes of its logits, and calls in its place.

What a model does to its logits after the head (nothing; a factor; a soft cap) is not read off its name: `find_head`
puts known numbers in the logits' place and looks at what the model returns.

A function called in the head's place runs inside the model's own forward. There the weights of FSDP and DeepSpeed are
whole, the hooks of every wrapper have run, and the hidden states are exactly those that the head would have read.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ._checks import check_dtype, check_shape, check_tensor
from .linear import linear_logprobs

# What stands in the columns of the probe, over and over; the first two give the factor and the soft cap.
_PROBE = (1e-3, 1e6, 0.0, -1e-3, 0.5, -0.5, 2.0, -3.0, 10.0, 40.0, -100.0, 1e3)


class _Found(NamedTuple):
    numbers: list  # of the config and the model, when the probe was made
    after: tuple[float, float | None] | str  # scale and soft cap; or why there are none


_found: weakref.WeakKeyDictionary[nn.Module, _Found] = weakref.WeakKeyDictionary()

_turns: weakref.WeakKeyDictionary[nn.Module, contextlib.AbstractContextManager] = weakref.WeakKeyDictionary()
_probing = threading.RLock()  # torch's random generators, which a probe puts back, belong to all threads


class ModelHead(NamedTuple):
    """logits = scaled(hidden_states weight^T + bias), scaled(x) = softcap tanh(scale x / softcap), or scale x.

    `linear_*(..., bias=head.bias, **head.options(temperature))` take the same softmax as the model's own logits. Of
    a head with a LoRA adapter of peft, weight and bias are the layer's beneath, and the options hold the adapter.
    """

    module: nn.Module
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

    @property
    def lora(self) -> tuple[Tensor, Tensor, float] | None:
        """(A [r, H], B [V, r], scaling) of the adapter that is active now, or None."""
        return None if _adapters(self.module) is None else active_lora(self.module)

    def options(self, temperature: float | Tensor = 1.0) -> dict:
        """Keyword arguments temperature and softcap of the `linear_*` functions, with the scale folded in; and lora.

        lora is there if the head has an adapter: a function that takes none then fails, and loses nothing in silence.
        """
        cap = None if self.softcap is None else self.softcap / self.scale
        lora = self.lora
        return {"temperature": temperature / self.scale, "softcap": cap, **({} if lora is None else {"lora": lora})}


def _is_plain(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward


def _is_bare(layer: nn.Module) -> bool:
    """Whether a linear layer's weight says all: no hook gathers it first, nobody has replaced the forward."""
    return _is_plain(layer) and "forward" not in vars(layer) and not (layer._forward_pre_hooks or layer._forward_hooks)


def _is_lora(layer: nn.Module) -> bool:
    """Whether a layer's forward is that of peft's LoRA on a linear one; FSDP2 makes a subclass of its class."""
    name = ("peft.tuners.lora.layer", "Linear")
    return any(
        (kind.__module__, kind.__qualname__) == name and type(layer).forward is kind.forward
        for kind in type(layer).__mro__
    )


def _adapters(layer: nn.Module) -> list[str] | None:
    """Names of the LoRA adapters, at most one, that a layer adds to a linear one; None if it does something else."""
    if _is_plain(layer):
        return []
    if not _is_lora(layer) or layer.merged or not _is_bare(layer.base_layer):
        return None
    if layer.disable_adapters:
        return []
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    fits = not names or (len(names) == 1 and _is_product(layer, names[0]))
    return names if fits else None


def has_lora(layer: nn.Module) -> bool:
    """Whether a layer has adapters of peft's LoRA, of which now none or one counts, as `active_lora` takes them."""
    return _is_lora(layer) and _adapters(layer) is not None


def active_lora(head: nn.Module) -> tuple[Tensor, Tensor, float] | None:
    """(A [r, H], B [V, r], scaling) of the LoRA adapter that a head has now, or None; raise if it has another thing."""
    names = _adapters(head)
    if names is None:
        raise NotImplementedError(
            f"the LM head is {type(head).__name__} with something else on it than one LoRA adapter of peft without "
            "dropout, bias or DoRA; leave the head out of the adapter's target_modules, or set its dropout to 0"
        )
    return (head.lora_A[names[0]].weight, head.lora_B[names[0]].weight, head.scaling[names[0]]) if names else None


def _is_product(layer: nn.Module, name: str) -> bool:
    """Whether an adapter of peft's layer adds scaling (x A^T) B^T: no dropout, no bias, no DoRA or other variant."""
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    silent = isinstance(dropout, nn.Identity) or not dropout.training or dropout.p == 0
    varied = name in getattr(layer, "lora_variant", {}) or layer.use_dora.get(name, False)
    return _is_bare(a) and _is_bare(b) and a.bias is None and b.bias is None and silent and not varied


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside DDP and PEFT wrappers (adapters sit in its modules, so they still take part)."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _head_of(model: nn.Module) -> nn.Module:
    name = type(model).__name__
    if not hasattr(model, "get_output_embeddings"):
        raise ValueError(f"model is a {name}, expected a causal language model of transformers")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"model is a {name}, an encoder and a decoder, expected a causal language model")
    head = model.get_output_embeddings()
    if _adapters(head) is None:
        kind = type(head).__module__.removeprefix("builtins") + "." + type(head).__qualname__
        why = ", which adapters put in its place" if kind.startswith("peft.") else ""
        raise ValueError(
            f"the LM head of {name} is a {kind.lstrip('.')}{why}, expected a torch.nn.Linear, or one with a single "
            "active LoRA adapter of peft, which is not merged and has no dropout, bias, DoRA or hooks inside"
        )
    return head


def _turn(head: nn.Module) -> contextlib.AbstractContextManager:
    """The lock of those who replace this head's forward; a thread that has it may take it again."""
    return _turns.setdefault(head, threading.RLock())  # in one step, so that all threads get the same


def _for_this_thread(replacement: Callable[[Tensor], Tensor], otherwise: Callable) -> Callable:
    """A forward that computes the replacement in the thread that asks for it, and in all others what it was."""
    thread = threading.get_ident()

    def forward(*args, **kwargs):
        # torch.compile knows no threads: a compiled model computes the replacement.
        if torch.compiler.is_dynamo_compiling() or threading.get_ident() == thread:
            return replacement(*args, **kwargs)
        return otherwise(*args, **kwargs)

    return forward


@contextlib.contextmanager
def _replaced(head: nn.Module, forward: Callable[[Tensor], Tensor]):
    """head(x) computes forward(x) inside the block, between the hooks that others have put on it.

    Only in this thread: others compute the head meanwhile, or wait for their turn to replace it.

    accelerate keeps the forward that it has wrapped as _old_forward, and has the weights at hand while that runs.
    Through the instance's dict, torch.compile sees that in the end nothing has changed.
    """
    # Not is_compiling(), which is True in every thread while one of them compiles.
    traced = torch.compiler.is_dynamo_compiling()
    with contextlib.nullcontext() if traced else _turn(head):
        own = vars(head)
        name = "_old_forward" if "_old_forward" in own and "_hf_hook" in own else "forward"
        before = own.get(name)
        if not traced:
            forward = _for_this_thread(forward, before or functools.partial(type(head).forward, head))
        own[name] = forward
        try:
            yield
        finally:
            if before is None:
                del own[name]
            else:
                own[name] = before


def text_config(model: nn.Module):
    """The config of a model's text decoder: the model's own, or the part for text of one that takes images too."""
    config = unwrapped(model).config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def without_router_logits(model: nn.Module) -> dict:
    """Keyword arguments of a forward whose router losses nobody reads: output_router_logits=False where it is on.

    Mixture-of-experts models with `output_router_logits: true` in their config compute a loss of their routers in each
    forward, and fail in it with the 4-D masks of packed rows.
    """
    inner = unwrapped(model)
    if not getattr(text_config(inner), "output_router_logits", False):
        return {}
    parameters = inspect.signature(inner.forward).parameters
    takes = "output_router_logits" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {"output_router_logits": False} if takes else {}


def _token_device(model: nn.Module) -> torch.device:
    """Where a model's input_ids may lie: accelerate's offload leaves the weights on no device at all."""
    embeddings = model.get_input_embeddings()
    offloaded = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
    return embeddings.weight.device if offloaded is None else torch.device(offloaded)


def _probed(model: nn.Module, head: nn.Module) -> tuple[Tensor, Tensor, list]:
    """(probe [V], what the model makes of it, the shapes of hidden states that its head read), from one token."""
    probes, shapes = [], []

    def forward(hidden):
        columns = torch.arange(head.weight.shape[0], dtype=torch.int64, device="cpu")
        # Each column has a number of its own, so that columns which change places are seen too.
        probe = torch.tensor(_PROBE, dtype=torch.float32, device="cpu")[columns % len(_PROBE)]
        probe = probe * (1 + columns.float() / len(columns))
        probes.append(probe)
        shapes.append(list(hidden.shape))
        torch.set_grad_enabled(True)  # from here on to the end of no_grad below: a factor that is trained shows itself
        return probe.to(hidden.device).expand(*hidden.shape[:-1], -1).clone()

    with _replaced(head, forward), _probing, torch.random.fork_rng(), torch.no_grad():
        token = torch.zeros(1, 1, dtype=torch.int64, device=_token_device(model))
        logits = model(input_ids=token, use_cache=False, **without_router_logits(model)).logits
    return probes[0], logits, shapes


def _after_head(model: nn.Module, head: nn.Module) -> tuple[float, float | None] | str:
    """(scale, softcap) that the model applies to what its head returns; or why it is not just these."""
    name = type(model).__name__
    try:
        probe, logits, shapes = _probed(model, head)
        values, exact = logits.detach().flatten().double().cpu(), probe.double()
    except Exception as error:  # whatever a model's own code may raise at numbers that are not its own
        raise ValueError(
            f"{name} fails on one token with numbers in the place of its logits ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}); use its logits"
        ) from error
    if [shape[:-1] for shape in shapes] != [[1, 1]]:
        read = " and ".join(map(str, shapes))
        return f"the head of {name} reads hidden states of shape {read} for one token, not [1, 1, H]; use its logits"
    strange = f"{name} does something else to its logits than a factor and a soft cap: it"
    if logits.requires_grad:
        return f"{strange} changes them by weights that are trained; use its logits"
    if values.shape != exact.shape:
        return f"{strange} returns {len(values)} for the {len(exact)} columns of its head; use its logits"
    kinds = torch.arange(len(exact), dtype=torch.int64, device="cpu") % len(_PROBE)
    scale = float((values[kinds == 0] / exact[kinds == 0]).median())
    cap = float(values[kinds == 1].median())
    tolerance = 1e-2 if logits.dtype in (torch.bfloat16, torch.float16) else 1e-5
    fits = []
    for softcap in (None, cap):
        guess = exact * scale if softcap is None else softcap * torch.tanh(exact * scale / softcap)
        fits.append(torch.isclose(values, guess, rtol=tolerance, atol=0.0))
        if scale > 0 and cap > 0 and bool(fits[-1].all()):
            return _plain(scale), softcap
    wrong = (~max(fits, key=torch.sum)).nonzero().flatten().tolist() or [0]
    column = wrong[0]
    return (
        f"{strange} turns {exact[column]:.4g} into {values[column]:.4g} in column {column}, the first of {len(wrong)} "
        f"such columns among {len(exact)}; use its logits"
    )


def _plain(scale: float) -> float:
    """1.0 where the probe's own rounding is all that speaks against it."""
    return 1.0 if abs(scale - 1.0) < 1e-6 else scale


def _numbers(model: nn.Module) -> list:
    """The numbers of the config and the factors of the model itself, by which what follows its head may change."""
    places = ((model.config, (int, float)), (text_config(model), (int, float)), (model, (float,)))
    # Another thread's forward may write into the dicts meanwhile: they are copied first.
    return [[(name, x) for name, x in list(vars(place).items()) if type(x) in types] for place, types in places]


def _known(model: nn.Module) -> _Found:
    """What `_after_head` says, measured once for the numbers that there are now."""
    known, numbers = _found.get(model), _numbers(model)
    if known is None or known.numbers != numbers:
        head = _head_of(model)
        with _turn(head):
            known = _found.get(model)  # by now another thread may have measured it
            if known is None or known.numbers != numbers:
                known = _found[model] = _Found(numbers, _after_head(model, head))
    return known


# torch.compile calls it while it traces. The decorator that says so would import the compiler with this file.
_known._dynamo_marked_constant = True


def find_head(model: nn.Module) -> ModelHead:
    """Find the LM head of a causal language model, and what the model does to the logits that it returns.

    Args:
        model: a causal language model of transformers, possibly wrapped by DistributedDataParallel or PEFT, or sharded
            by FSDP2; then all ranks must call. It runs once, on one token, the first time that it is asked about, and
            again when a number of its config has changed.
    Returns:
        ModelHead(module, scale, softcap), whose weight, bias and options(temperature) suit the `linear_*` functions.
        Of a head with a LoRA adapter the options hold `lora`, which all but the divergences take.
    Raises:
        ValueError: not a causal language model; the head is not a torch.nn.Linear (it is quantised), with or without
            one LoRA adapter of peft (not merged; no dropout while training, no bias, no DoRA, no hooks on the layers
            inside, as DeepSpeed's ZeRO-3 and accelerate's offload put there); the model does something else to its
            logits than a factor and a soft cap: masks or cuts columns, adds a bias, multiplies by a weight that is
            trained; it fails on the token.
        RuntimeError: torch.compile traces the call, and the model was not asked about before.
    Cost: one forward on one token at the first call, kept as long as the model lives and its config stays.
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
    known = _known(inner)
    if torch.compiler.is_compiling() and known.numbers != _numbers(inner):  # never; but read here, they are guarded
        raise RuntimeError(f"the config of {type(inner).__name__} changes while torch.compile reads it")
    if isinstance(known.after, str):
        raise ValueError(known.after)
    return ModelHead(head, *known.after)


def _hung_on(value: Tensor, other: Tensor) -> Tensor:
    """value, in the graph also of `other`, whose numbers reach neither the result nor any gradient."""
    return torch.where(torch.ones((), dtype=torch.bool, device=other.device), value, other)


def call_with_head(model: nn.Module, function: Callable[[Tensor, ModelHead], Tensor | tuple], **inputs):
    """Run a causal language model with a function of the hidden states in the place of its LM head.

    Gradients flow through the function and the model as they would through logits, also under DDP, FSDP2 and gradient
    checkpointing. Calls on one model from several threads take turns, and the model's own forward may run beside them;
    but run a model that is compiled, or a compiled function that makes the call, in one thread at a time.

    Args:
        model: as in `find_head`.
        function: called as function(hidden_states [B, T, H], head: ModelHead); returns a floating tensor, or a tuple of
            them.
        inputs: keyword arguments of the model's forward: input_ids, attention_mask, position_ids, ...; without
            use_cache=True no cache is kept, without output_router_logits=True no loss of routers computed.
    Returns:
        What the function returned.
    Raises:
        ValueError: as `find_head`; inputs hold labels or logits_to_keep; the head reads other positions than those of
            input_ids, as under prompt tuning.
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
    head, ids, made = find_head(model), inputs.get("input_ids"), []

    def forward(hidden):
        if ids is not None and hidden.shape[:-1] != ids.shape:
            raise ValueError(
                f"the head of {type(unwrapped(model)).__name__} reads hidden states of shape {list(hidden.shape)} for "
                f"input_ids of shape {list(ids.shape)}, expected one for each token; adapters that put tokens of their "
                "own before the text, as prompt tuning does, cannot be used here"
            )
        made.append(function(hidden, head))
        tensors = made[0] if isinstance(made[0], tuple) else (made[0],)
        # The model returns zeros that hang on every result, so that hooks on its output see the backward begin.
        zeros = [_hung_on(x.new_zeros(()), x) for x in tensors]
        return torch.cat([zero.reshape(1, 1, -1).float() for zero in zeros], dim=-1)

    options = {"use_cache": False, **without_router_logits(model), **inputs}
    with _replaced(head.module, forward):
        zeros = model(**options).logits.flatten()
    results = made[0] if isinstance(made[0], tuple) else (made[0],)
    parts = zeros.split([x.numel() for x in results])
    hung = [_hung_on(x, zero.to(x.dtype).view(x.shape)) for x, zero in zip(results, parts, strict=True)]
    return tuple(hung) if isinstance(made[0], tuple) else hung[0]


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
    the head's weight, bias, LoRA adapter, soft cap and logit scale.

    Args:
        model: as in `find_head`.
        input_ids: [B, T] int64.
        labels: [B, T] int64|int32, not shifted: position t predicts labels[:, t]; [M] with rows. None, the default:
            each position predicts the next of input_ids; a token, or a position, under attention_mask 0 does not count.
        attention_mask: [B, T], 1 = token, or whatever else the model takes; None, the default: the model's own way.
        position_ids: [B, T] int64; None, the default: the model's own way.
        rows: [M] int64|int32 in [0, B T), the position b T + t that predicts each label; default None.
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
