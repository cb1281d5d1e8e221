"""Packed responses through the models of transformers, and which of those models can take them.

    use_shared_prefix_attention(model)
    hidden = model.model(**packed_inputs(model, pack_responses(prompts, responses))).last_hidden_state

Importing this module registers the attention "rlhf_shared_prefix" with transformers. It is SDPA, until the attention
mask is the layout [B, 1, 2, L] of `pack_responses`: then it is `shared_prefix_attention`. The layout comes as an
argument of the forward, like any mask, so it goes along where masks go: through DDP, FSDP and gradient checkpointing,
and there is no state to leak. An attention that does not know it refuses it.
"""

import inspect
import itertools

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .._checks import check_in
from .._packing_attention import longest_text
from ..model_head import text_config, unwrapped, without_router_logits
from ..packing import PackedResponses, block_mask, shared_prefix_attention
from ..reference.packing import shared_prefix_mask

ATTENTION = "rlhf_shared_prefix"
WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
STATES = ("linear_attention", "conv", "hybrid", "hybrid_sliding")
TOKENWISE = ("full_attention", "mlp", "moe", "dense", "sparse")  # layers that read nothing of the row but by the mask
# Nothing in the class or the config of these says so; it came out when all architectures of transformers were tried.
OTHERS = {
    "blt": "it joins the bytes of a row to patches, across the ends of texts",
    "diffusion_gemma": "it denoises blocks of tokens, and is no causal language model",
    "openai-gpt": "its attention takes masks of two dimensions alone",
    "reformer": "its attention hashes and chunks the row, whichever text a token belongs to",
    "xlm": "its attention takes masks of two dimensions alone",
}
OWN_MASKS = ("doge",)  # their attention makes a mask of its own of the one that it gets, which must be dense
NOT_PLAIN = ("softcap", "position_bias", "s_aux")  # what models hand to an attention that is more than softmax(QK^T)V


def attention_forward(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """The attention "rlhf_shared_prefix": transformers' SDPA, or `shared_prefix_attention` if the mask is a layout.

    Args:
        module, query, key, value, attention_mask, dropout, scaling, kwargs: as transformers calls its attentions, query
            [B, H, L, D]; attention_mask may be the layout [B, 1, 2, L] int64 of `pack_responses`.
    Returns:
        ([B, L, H, D], None).
    Raises:
        ValueError: a layout with dropout, a soft cap, a bias or sinks, or with a text longer than a sliding window.
    """
    if not is_layout(attention_mask):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise ValueError(f"dropout: got {dropout}, but the attention of packed responses has none; set it to 0")
    for name in NOT_PLAIN:
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: {type(module).__name__} wants it, the attention of packed responses has none")
    window = kwargs.get("sliding_window")
    if window is not None and query.shape[2] > window and longest_text(attention_mask) > window:
        raise ValueError(
            f"sliding_window is {window}, but a prompt with its response is longer; packed, it sees it all"
        )
    out = shared_prefix_attention(query, key, value, attention_mask, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def is_layout(mask) -> bool:
    """Whether an attention mask is the layout [B, 1, 2, L] int64 of `pack_responses`."""
    return isinstance(mask, Tensor) and mask.dim() == 4 and mask.dtype == torch.int64


def packing_obstacle(model, longest=None, row=None) -> str | None:
    """Why `model` cannot give each packed response what a row of its own gives it; None: nothing is known against it.

    Told from the config and the class; nothing is computed. A model of one's own may still read the index in the row.

    Args:
        model: a model of transformers, possibly wrapped by DDP or PEFT.
        longest: tokens of the longest prompt with its response; None = as many as the model takes.
        row: tokens of a packed row; None = any number.
    """
    model = unwrapped(model)
    config = text_config(model)
    longest = longest or getattr(config, "max_position_embeddings", None)
    return (
        OTHERS.get(model.config.model_type)
        or _layers(model, config)
        or _reads_the_index(model, config, row)
        or _not_causal(model, config)
        or _rope(config, longest)
        or _window(config, longest)
        or _attention(model.config._attn_implementation, config)
    )


def rope_limit(config) -> int | None:
    """Tokens up to which rotary embeddings turn a text alike, whatever other texts the forward holds.

    LongRoPE and dynamic NTK choose the frequencies for all texts of a forward by the longest of them, so a text's
    log-probs depend on its neighbours as soon as one of them is longer than this.

    Args:
        config: of a model of transformers.
    Returns:
        The limit; None: the frequencies are always the same.
    """
    config = config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer = [entry for entry in parameters.values() if isinstance(entry, dict)]
    limits = [_rope_limit(entry, config) for entry in by_layer or [parameters]]
    return min((limit for limit in limits if limit is not None), default=None)


def _rope_limit(parameters, config):
    kind = parameters.get("rope_type") or "default"
    if kind == "longrope":
        if parameters.get("short_factor") == parameters.get("long_factor"):
            return None
        return parameters.get("original_max_position_embeddings") or config.max_position_embeddings
    # Behind a longer text, one of exactly max_position_embeddings tokens still gets the longer one's frequencies.
    return config.max_position_embeddings - 1 if "dynamic" in kind else None


def first_position(model) -> int:
    """The position of a text's first token: 0, but padding_idx + 1 in RoBERTa and its kin.

    Positions given to a model must start there to be those that it finds by itself when none are given.

    Args:
        model: a model of transformers, possibly wrapped by DDP or PEFT.
    """
    for module in _parts(_decoder(unwrapped(model))):
        if hasattr(type(module), "create_position_ids_from_input_ids"):
            return module.padding_idx + 1
    return 0


def _decoder(model):
    """The part of a model that reads texts, without towers for images or sounds."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model.base_model


def _parts(module):
    """The module and what it consists of, of a list of layers the first alone: a walk over all takes milliseconds."""
    yield module
    for child in itertools.islice(module.children(), 1 if isinstance(module, torch.nn.ModuleList) else None):
        yield from _parts(child)


def check_packing(model, longest=None, row=None) -> None:
    """Raise where `packing_obstacle` finds one.

    Raises:
        ValueError: the model carries a state along the row (recurrent, state-space, convolution, linear attention);
            chooses keys by the row; finds positions by the index in the row (ALiBi, no position_ids, Llama 4's scaled
            queries in long rows); attends both ways; has rotary embeddings or windows that change below `longest`; or
            has an attention that takes no mask of this kind.
    """
    reason = packing_obstacle(model, longest, row)
    if reason:
        raise ValueError(f"{type(unwrapped(model)).__name__} cannot take packed responses: {reason}")


def _layers(model, config):
    kinds = set(getattr(config, "layer_types", None) or [])
    states = sorted(kinds & set(STATES))
    if states or (not kinds and getattr(model, "_is_stateful", False)):
        kind = f" ({', '.join(states)})" if states else ""
        return f"its layers{kind} carry a state along the row, from one response to the next"
    others = sorted(kinds - {*TOKENWISE, *WINDOWS})
    if others:
        return f"its layers ({', '.join(others)}) choose or compress keys by the row, whichever response they belong to"
    if "local" in (getattr(config, "attention_layers", None) or []):
        return "its local attention looks back by the index in the row"
    return None


def has_alibi(config) -> bool:
    """Whether the attention of a text config has ALiBi biases, which grow with the distance in the row."""
    of_attention = getattr(config, "attn_config", None)
    return bool(
        getattr(config, "alibi", False) or getattr(of_attention, "alibi", False) or config.model_type == "bloom"
    )


def _reads_the_index(model, config, row):
    if has_alibi(config):
        return "its ALiBi biases follow the index in the row, and a response does not stand behind its prompt"
    if config.is_encoder_decoder:
        return "it is an encoder-decoder, whose encoder has no responses"
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        return "it takes no position_ids, so it finds positions by the index in the row"
    tuned = getattr(config, "attn_temperature_tuning", False) and not all(getattr(config, "no_rope_layers", [False]))
    if tuned and (row is None or row >= config.floor_scale):
        return (
            f"it scales queries by their index in the row from {config.floor_scale} on (attn_temperature_tuning), and "
            f"a packed row may have {row or 'any number of'} tokens"
        )
    return None


def _not_causal(model, config):
    """BERT and its kin say in their layers whether they are decoders; Gemma's say in the config."""
    encoder = any(vars(module).get("is_decoder") is False for module in _parts(_decoder(model)))
    if encoder or getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        what_to_do = "; is_decoder=True in its config makes it causal" if encoder else ""
        return f"it attends both ways, and a token sees those behind it{what_to_do}"
    return None


def _rope(config, longest):
    limit = rope_limit(config)
    if limit is None or (longest is not None and longest <= limit):
        return None
    return (
        f"its rotary embeddings follow the longest text of a forward where that has more than {limit} tokens, and a "
        f"prompt with its response may have {longest or 'any number'}"
    )


def _window(config, longest):
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        used = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        kinds = ["sliding_attention"] if used else []
    for kind in WINDOWS.keys() & set(kinds):
        window = getattr(config, WINDOWS[kind], None)
        if window and (longest is None or window < longest):
            return (
                f"it looks through windows of {window} tokens ({WINDOWS[kind]}), and a prompt with its response may "
                f"have {longest or 'any number'}; packed, a response sees all of them"
            )
    return None


def _attention(implementation, config):
    if implementation not in ("sdpa", "eager", "flex_attention", ATTENTION):
        return f"its attention {implementation!r} takes no mask of this kind; load it with attn_implementation='sdpa'"
    if implementation in ("sdpa", ATTENTION) and getattr(config, "attn_logit_softcapping", None):
        return f"it caps its attention scores, which {implementation!r} does not; load it with 'eager'"
    return None


def use_shared_prefix_attention(model, longest=None, row=None):
    """Switch `model` to "rlhf_shared_prefix" for good, and return it. Other masks than layouts go on through SDPA.

    Args:
        model: a model of transformers with attn_implementation="sdpa", possibly wrapped by DDP or PEFT.
        longest, row: as in `check_packing`.
    Raises:
        ValueError: as `check_packing`; another attention than SDPA; a model whose attention cannot be changed.
    """
    check_packing(model, longest, row)
    inner = unwrapped(model)
    implementation = inner.config._attn_implementation
    if implementation not in ("sdpa", ATTENTION):
        raise ValueError(
            f"model has the attention {implementation!r}, expected 'sdpa', in whose place {ATTENTION!r} comes"
        )
    if not takes_shared_prefix(inner):
        raise ValueError(
            f"{type(inner).__name__} has an attention of its own, which transformers cannot change or which makes its "
            "own mask; leave it as it is: packed_inputs gives it the dense mask"
        )
    inner.set_attn_implementation(ATTENTION)
    return model


def takes_shared_prefix(model) -> bool:
    """Whether the attention of a model can be changed at all, and hands its mask on as it came."""
    inner = unwrapped(model)
    return text_config(inner).model_type not in OWN_MASKS and type(inner)._can_set_attn_implementation()


def _serves_layout(model, device):
    return model.config._attn_implementation == ATTENTION and device.type == "cpu" and takes_shared_prefix(model)


def mask_for(model, mask):
    """The attention mask of a batch as `model` takes it: a layout stays one where the two-part attention serves it.

    Args:
        model: a model of transformers, possibly wrapped by DDP or PEFT.
        mask: the layout [B, 1, 2, L] int64, or the dense mask [B, 1, L, L] bool, 1 = sees; anything else is returned
            as it is.
    Returns:
        The layout on a CPU for "rlhf_shared_prefix"; a BlockMask for "flex_attention", an additive mask for "eager",
        made on the mask's device; else the dense mask.
    """
    model = unwrapped(model)
    if is_layout(mask):
        if _serves_layout(model, mask.device):
            return mask
        if model.config._attn_implementation == "flex_attention":
            return block_mask(mask)
        mask = shared_prefix_mask(mask[:, 0, 0], mask[:, 0, 1])
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.dtype != torch.bool:
        return mask
    if model.config._attn_implementation == "flex_attention":  # would add the mask to the scores as 0 and 1
        return _block_mask_of(mask)
    if model.config._attn_implementation == "eager":
        return torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
    return mask


def _block_mask_of(mask):
    from torch.nn.attention.flex_attention import create_block_mask

    rows, _, queries, keys = mask.shape
    return create_block_mask(
        lambda b, h, query, key: mask[b, 0, query, key], rows, None, queries, keys, device=mask.device
    )


def packed_inputs(model, packed: PackedResponses, *, attention="auto") -> dict:
    """What a model takes of packed responses: `model(**packed_inputs(model, packed))`.

    input_ids, position_ids and the attention_mask that the model's attn_implementation takes: for "rlhf_shared_prefix"
    the layout or the dense mask, for "sdpa" the dense mask, for "eager" an additive one, for "flex_attention" a
    BlockMask. For a mixture of experts with `output_router_logits: true` also output_router_logits=False: the loss of
    its routers takes no mask of this kind.

    Args:
        model: a model of transformers, possibly wrapped by DDP or PEFT.
        packed: from `pack_responses`, on the model's device.
        attention: with "rlhf_shared_prefix": "two_part", "dense", or "auto", which takes two parts on a CPU where
            `packed.two_part_is_faster(hidden_size)`.
    Raises:
        ValueError: as `check_packing`; "two_part" for another attention or device.
    """
    check_in("attention", attention, ("auto", "two_part", "dense"))
    longest = int(packed.position_ids.max()) + 1 if packed.position_ids.numel() else None
    check_packing(model, longest, packed.input_ids.shape[1])
    first, model = first_position(model), unwrapped(model)
    possible = _serves_layout(model, packed.layout.device)
    if attention == "two_part" and not possible:
        raise ValueError(
            f"attention is 'two_part', but the model has {model.config._attn_implementation!r} and the tokens are on "
            f"{packed.layout.device}; it needs use_shared_prefix_attention(model) and a CPU"
        )
    auto = attention == "auto" and possible and packed.two_part_is_faster(text_config(model).hidden_size)
    if attention == "two_part" or auto or model.config._attn_implementation == "flex_attention":
        mask = packed.layout
    else:
        mask = packed.attention_mask
    return {
        "input_ids": packed.input_ids,
        "position_ids": packed.position_ids + first if first else packed.position_ids,
        "attention_mask": mask_for(model, mask),
        **without_router_logits(model),
    }
