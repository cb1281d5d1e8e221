"""Room in a model's embeddings for tokens that were added to its tokenizer."""

import torch

from ..data.templates import TURN_TOKENS
from .parts import embedded_ids, quiet, unwrapped

SPREAD = 0.02


def tokens_without_room(model, tokenizer):
    """The tokens of chatml that a tokenizer has and its model does not embed."""
    old, vocabulary = embedded_ids(model), tokenizer.get_vocab()
    return [token for token in TURN_TOKENS if vocabulary.get(token, -1) >= old]


def make_room(model, tokenizer, seed, name="model", *, adapters=False):
    """Grow a model's embeddings, and its head, so that they have the tokens of chatml; the same seed: the same rows.

    Other tokens that a tokenizer has beyond its model may stay beyond it: nothing uses them. A new row is the mean of
    the old ones, with noise of 0.02 of their standard deviation, which tells it from others.

    Args:
        adapters: the embeddings do not train, so a model that lacks room is an error.
    Returns:
        How many ids were added.
    Raises:
        ValueError: the model has adapters, or will get them.
    """
    inner, old, vocabulary = unwrapped(model), embedded_ids(model), tokenizer.get_vocab()
    missing = tokens_without_room(model, tokenizer)
    if not missing:
        return 0
    size = max(vocabulary[token] for token in missing) + 1
    if adapters or hasattr(model, "get_base_model"):
        raise ValueError(
            f"chat_template: the {name} has no embeddings for {', '.join(missing)}, and adapters (use_peft) would not "
            "train new ones; train without use_peft, or take a template whose tokens the model has"
        )
    with torch.random.fork_rng(), quiet():
        inner.resize_token_embeddings(size, mean_resizing=False)
    tables = [inner.get_input_embeddings(), inner.get_output_embeddings()]
    tables = {table.weight.data_ptr(): table for table in tables if table is not None}
    generator = torch.Generator().manual_seed(seed)
    for table in tables.values():
        _fill(table.weight.data, old, generator)
        if getattr(table, "bias", None) is not None:
            table.bias.data[old:] = table.bias.data[:old].mean()
    return size - old


def _fill(weight, old, generator):
    known = weight[:old].float()
    shape = (len(weight) - old, weight.shape[1])
    noise = torch.randn(shape, dtype=torch.float32, generator=generator).to(known.device)
    weight[old:] = (known.mean(0) + SPREAD * known.std(0) * noise).to(weight.dtype)
