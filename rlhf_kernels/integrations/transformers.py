"""Packed responses through the models of transformers, and which of those models can take them.

    use_shared_prefix_attention(model)
    hidden = model.model(**packed_inputs(model, pack_responses(prompts, responses))).last_hidden_state

Importing this module registers the attention "rlhf_shared_prefix" with transformers. It is SDPA, until the attention
mask is the layout [B, 1, 2, L] of `pack_responses`: then it is `shared_prefix_attention`. The layout comes as an
argument of the forward, like any mask, so it goes along where masks go: through DDP, FSDP and gradient checkpointing,
and there is no state to leak. An attention that does not know it refuses it.
"""

import inspect

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .._checks import check_in
from .._packing_attention import longest_text
from ..model_head import unwrapped
from ..packing import PackedResponses, shared_prefix_attention
from ..reference.packing import shared_prefix_mask

ATTENTION = "rlhf_shared_prefix"
WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
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


def packing_obstacle(model, longest=None) -> str | None:
    """Why `model` cannot give each packed response what a row of its own gives it; None: nothing is known against it.

    Told from the config and the class; nothing is computed. A model of one's own may still read the index in the row.

    Args:
        model: a model of transformers, possibly wrapped by DDP or PEFT.
        longest: tokens of the longest prompt with its response; None = as many as the model takes.
    """
    model = unwrapped(model)
    config = model.config.get_text_config(decoder=True)
    longest = longest or getattr(config, "max_position_embeddings", None)
    return (
        _carries_state(model, config)
        or _reads_the_index(model, config)
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
    for module in unwrapped(model).base_model.modules():
        if hasattr(type(module), "create_position_ids_from_input_ids"):
            return module.padding_idx + 1
    return 0


def check_packing(model, longest=None) -> None:
    """Raise where `packing_obstacle` finds one.

    Raises:
        ValueError: the model carries a state along the row (recurrent, state-space, convolution, linear attention);
            finds positions by the index in the row (ALiBi, no position_ids); has rotary embeddings or windows that
            change below `longest`; or has an attention that takes no mask of this kind.
    """
    reason = packing_obstacle(model, longest)
    if reason:
        raise ValueError(f"{type(unwrapped(model)).__name__} cannot take packed responses: {reason}")


def _reads_the_index(model, config):
    alibi = getattr(config, "alibi", False) or getattr(getattr(config, "attn_config", None), "alibi", False)
    if alibi or config.model_type == "bloom":
        return "its ALiBi biases follow the index in the row, and a response does not stand behind its prompt"
    if config.is_encoder_decoder:
        return "it is an encoder-decoder, whose encoder has no responses"
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        return "it takes no position_ids, so it finds positions by the index in the row"
    return None


def _carries_state(model, config):
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention", *WINDOWS}
    if kinds or getattr(model, "_is_stateful", False):
        kind = f" ({', '.join(sorted(kinds))})" if kinds else ""
        return f"its layers{kind} carry a state along the row, from one response to the next"
    if "local" in (getattr(config, "attention_layers", None) or []):
        return "its local attention looks back by the index in the row"
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


def use_shared_prefix_attention(model, longest=None):
    """Switch `model` to "rlhf_shared_prefix" for good, and return it. Other masks than layouts go on through SDPA.

    Args:
        model: a model of transformers with attn_implementation="sdpa", possibly wrapped by DDP or PEFT.
        longest: as in `check_packing`.
    Raises:
        ValueError: as `check_packing`; another attention than SDPA; a model whose attention cannot be changed.
    """
    check_packing(model, longest)
    inner = unwrapped(model)
    implementation = inner.config._attn_implementation
    if implementation not in ("sdpa", ATTENTION):
        raise ValueError(
            f"model has the attention {implementation!r}, expected 'sdpa', in whose place {ATTENTION!r} comes"
        )
    if not takes_shared_prefix(inner):
        raise ValueError(f"{type(inner).__name__} has an attention of its own that transformers cannot change")
    inner.set_attn_implementation(ATTENTION)
    return model


def takes_shared_prefix(model) -> bool:
    """Whether the attention of a model's class can be changed at all."""
    return type(unwrapped(model))._can_set_attn_implementation()


def mask_for(model, mask):
    """The attention mask of a batch as `model` takes it: a layout stays one where the two-part attention serves it.

    Args:
        model: a model of transformers, possibly wrapped by DDP or PEFT.
        mask: the layout [B, 1, 2, L] int64, of which the dense mask [B, 1, L, L] bool is made on its device if the
            model has another attention or the device is not a CPU; anything else is returned as it is.
    """
    model = unwrapped(model)
    if not is_layout(mask) or (model.config._attn_implementation == ATTENTION and mask.device.type == "cpu"):
        return mask
    return shared_prefix_mask(mask[:, 0, 0], mask[:, 0, 1])


def packed_inputs(model, packed: PackedResponses, *, attention="auto") -> dict:
    """input_ids, position_ids and attention_mask for `model(**packed_inputs(model, packed))`.

    The mask is what the model's attn_implementation takes: for "rlhf_shared_prefix" the layout or the dense mask, for
    "sdpa" the dense mask, for "eager" an additive one, for "flex_attention" a BlockMask.

    Args:
        model: a model of transformers, possibly wrapped by DDP or PEFT.
        packed: from `pack_responses`, on the model's device.
        attention: with "rlhf_shared_prefix": "two_part", "dense", or "auto", which takes two parts on a CPU where
            `packed.two_part_is_faster(hidden_size)`.
    Raises:
        ValueError: as `check_packing`; "two_part" for another attention or device.
    """
    check_in("attention", attention, ("auto", "two_part", "dense"))
    check_packing(model, int(packed.position_ids.max()) + 1 if packed.position_ids.numel() else None)
    first, model = first_position(model), unwrapped(model)
    implementation, width = model.config._attn_implementation, model.config.get_text_config(decoder=True).hidden_size
    possible = implementation == ATTENTION and packed.layout.device.type == "cpu"
    if attention == "two_part" and not possible:
        raise ValueError(
            f"attention is 'two_part', but the model has {implementation!r} and the tokens are on "
            f"{packed.layout.device}; it needs use_shared_prefix_attention(model) and a CPU"
        )
    if implementation == "flex_attention" and attention != "dense":
        mask = packed.block_mask()
    elif attention == "two_part" or (attention == "auto" and possible and packed.two_part_is_faster(width)):
        mask = packed.layout
    else:
        mask = packed.attention_mask
    if implementation == "eager":
        mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
    positions = packed.position_ids + first if first else packed.position_ids
    return {"input_ids": packed.input_ids, "position_ids": positions, "attention_mask": mask}
