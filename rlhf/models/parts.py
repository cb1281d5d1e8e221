"""What a model is made of, wherever its class keeps it: its text config, its trunk, and what ids it reads."""

import contextlib
import itertools

import torch
import transformers
from torch import nn
from torch.distributed.tensor import DTensor

from rlhf_kernels.integrations.transformers import first_position, rope_limit
from rlhf_kernels.model_head import text_config, unwrapped

CONTEXTS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")


@contextlib.contextmanager
def quiet():
    """Keep back the table of missing weights and the progress bars of loading: what is missing is checked here."""
    loading = transformers.utils.logging
    level, bars = loading.get_verbosity(), loading.is_progress_bar_enabled()
    loading.set_verbosity_error()
    loading.disable_progress_bar()
    try:
        yield
    finally:
        loading.set_verbosity(level)
        if bars:
            loading.enable_progress_bar()


def without_weights(model_class, config):
    """A model on the meta device: its modules and their names, no numbers."""
    with torch.device("meta"), torch.random.fork_rng(), quiet():
        return model_class(config)


@contextlib.contextmanager
def use_cache_kept(model):
    """Leave `use_cache` of a model's config, which transformers' Trainer overwrites, as it is, or absent."""
    settings = vars(unwrapped(model).config)
    before = {name: value for name, value in settings.items() if name == "use_cache"}
    try:
        yield
    finally:
        settings.pop("use_cache", None)
        settings.update(before)


def refuse_compiled(model, name):
    """Raise ValueError for a model that torch.compile has wrapped: its parts would run past what was compiled."""
    inner = getattr(model, "_orig_mod", None)
    if isinstance(inner, nn.Module):
        raise ValueError(
            f"{name}: got a {type(inner).__name__} wrapped by torch.compile, wants the model itself "
            "(model.compile() compiles it in place; sft and dpo have --torch_compile true)"
        )


def brings_code(thing):
    """Whether a model or a config is of code that came with a checkpoint, which was trusted."""
    return type(thing).__module__.startswith("transformers_modules.")


def hidden_size(model):
    """The width of what the head of a model reads."""
    inner, width = unwrapped(model), getattr(text_config(model), "hidden_size", None)
    return width or (inner.get_output_embeddings() or inner.score).weight.shape[1]


def context_length(model):
    """Tokens that a text of the model may have, or None if its config does not say.

    As many as the model reads at once, but no more than its rotary embeddings turn alike whatever else is in a batch:
    beyond, log-probs would depend on the longest text beside (LongRoPE, dynamic NTK).
    """
    config, shift = text_config(model), first_position(model)
    context = next((value - shift for name in CONTEXTS if (value := getattr(config, name, None)) and value > 0), None)
    return min((length for length in (context, rope_limit(config)) if length), default=None)


def context_hint(model):
    """What an error that names the context adds where `context_length` is shorter than what the model can read."""
    if rope_limit(text_config(model)) is None:
        return ""
    return (
        "; the rotary embeddings of longer texts follow the longest of a batch (see 'Long texts' in docs/training.md)"
    )


def trunk_name(model):
    """The name of the child whose last hidden states the head of a transformers model reads."""
    name = model.base_model_prefix
    if isinstance(getattr(model, name, None), nn.Module):
        return name
    embeddings = model.get_input_embeddings()
    return next(name for name, child in model.named_children() if embeddings in child.modules())


def trunk(model):
    """The transformers model under the head of `model`, which has no wrapper but PEFT's."""
    inner = unwrapped(model)
    return getattr(inner, trunk_name(inner))


def embedded_ids(model):
    """How many token ids the model embeds, from 0 on: the rows of its table, which a tokenizer may not fill."""
    return unwrapped(model).get_input_embeddings().weight.shape[0]


def check_token_ids(model, tokenizer, ids, name="model"):
    """Raise where the model has no embedding for the largest of these token ids, or for the pad token.

    A tokenizer may have more tokens than that, as that of the small Gemma 3 for images, if nothing uses them.

    Args:
        ids: token ids that the model is to read.
        name: what the model is called in messages.
    Raises:
        ValueError: names the token, and says what to do.
    """
    rows, largest = embedded_ids(model), max(itertools.chain([tokenizer.pad_token_id], ids))
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ValueError(
            f"{name}: the token {token!r} has the id {largest}, but the model embeds ids 0 to {rows - 1}: the "
            "tokenizer is another model's, or tokens were added to it, for which "
            "model.resize_token_embeddings(len(tokenizer)) makes room"
        )


def all_finite(model):
    """Whether all weights of a model that train are finite numbers, on this process; a 0-d bool, or None without any.

    Of sharded weights the process looks at its own part.
    """
    flags = []
    for weight in model.parameters():
        if weight.requires_grad:
            own = getattr(weight, "ds_tensor", weight)  # of ZeRO-3
            own = own.to_local() if isinstance(own, DTensor) else own
            flags.append(own.detach().isfinite().all())
    return torch.stack(flags).all() if flags else None
