"""Texts that grow by a token a step, and the logits behind each: in the fastest way that is right for a model.

What a model keeps from step to step differs: keys and values, where padding can be masked; states of convolutions and
recurrences, which may read it; a cache of the model's own make, whose rows cannot be told apart; or nothing. So the
ways are tried, fastest first, on texts of a few tokens, against the logits of whole texts that stand alone.

States have no columns: once read, texts of several lengths go on together, their keys and values behind padding.
"""

import functools
import inspect
import itertools
import logging
from dataclasses import dataclass
from typing import Literal
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

from rlhf_kernels.integrations.transformers import WINDOWS, first_position, has_alibi
from rlhf_kernels.model_head import text_config, without_router_logits

from ..models import unwrapped

CACHES = ("cache", "past_key_values", "cache_params", "state")
"""Names under which models of transformers, by their age and kind, take the cache and give it back."""

WITH_KEYS = {"DynamicLayer", "LinearAttentionAndFullAttentionLayer"}
WITH_STATES = {"LinearAttentionLayer", "LinearAttentionAndFullAttentionLayer"}
JOINABLE = WITH_KEYS | WITH_STATES | {"DummyLayer"}
"""Layers of transformers' caches that can be joined: what they hold is known, and a subclass may hold more."""

STATES = ("conv_states", "recurrent_states")

REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, NotImplementedError)
"""What models raise that are run in a way that they do not know."""

logger = logging.getLogger("rlhf")


@dataclass(frozen=True)
class Way:
    """How a model is run on texts that grow."""

    lengths: Literal["padded", "joined", "one"]  # texts of several together, from the first token on or once read
    movable: bool  # rows of the cache can be repeated and dropped; else the rows stay from the first step to the last
    cached: bool  # a step reads the newest token; else the whole text


PADDED, JOINED, ONE_LENGTH = (Way(lengths, True, True) for lengths in ("padded", "joined", "one"))
STILL, WHOLE = Way("one", False, True), Way("one", True, False)
_found = WeakKeyDictionary()


@torch.no_grad()
def way_of(model) -> Way:
    """The fastest way that gives a model's texts the logits that they have whole and alone; the model is in eval mode.

    Args:
        model: a causal LM of transformers, possibly wrapped by PEFT.
    """
    inner = unwrapped(model)
    if inner not in _found:
        ways = [JOINED, ONE_LENGTH, STILL] if _reads_padding(inner) else [PADDED, ONE_LENGTH, STILL]
        _found[inner] = next((way for way in ways if cache_name(inner) and _holds(model, way)), WHOLE)
        if _found[inner] == WHOLE:
            logger.warning("%s keeps no cache that its texts can go on from: sampling is slow", type(inner).__name__)
    return _found[inner]


def chunks(prompts: list[list[int]], size: int, *, one_length: bool) -> list[list[int]]:
    """Which prompts go together, shortest first: at most `size`, of one length if so wanted."""
    cut, lengths = [], list(map(len, prompts))
    for text in sorted(range(len(prompts)), key=lengths.__getitem__):
        if not cut or len(cut[-1]) == size or (one_length and lengths[cut[-1][0]] != lengths[text]):
            cut.append([])
        cut[-1].append(text)
    return cut


def left_padded(model, prompts: list[list[int]]) -> dict:
    """input_ids, attention_mask and position_ids [P, T] of prompts whose last tokens stand in the last column."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    mask = (torch.arange(width, device=model.device) >= width - lengths[:, None]).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0) + first_position(model)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


class Texts:
    """Texts that grow by a token a step.

    Args:
        model: a causal LM in eval mode.
        prompts: P lists of token ids.
        repeats: K; each prompt begins K texts, which stand behind each other.
        way: that of the model; if it is of one length, so are the prompts, if it is joined, they are sorted by length.
    """

    logits = None  # [B, V] behind the texts; B = P * K until some are dropped

    def __init__(self, model, prompts, repeats: int, way: Way):
        self.model, self.way, self.cache = model, way, None
        inputs = left_padded(model, prompts)
        rows = torch.arange(len(prompts), device=model.device).repeat_interleave(repeats)
        if repeats > 1 and not way.movable:
            inputs = {name: tensor[rows] for name, tensor in inputs.items()}
        self.ids, self.mask, self.positions = inputs.values()
        if way.lengths == "joined":
            self._read_apart([len(list(group)) for _, group in itertools.groupby(prompts, key=len)])
        else:
            self._run()
        if repeats > 1 and way.movable:
            self.keep(rows)

    def keep(self, rows) -> None:
        """Go on with these rows [B'] only, in this order; one may come several times. For a way that is movable."""
        self.ids, self.mask, self.positions = self.ids[rows], self.mask[rows], self.positions[rows]
        self.logits = self.logits[rows]
        if self.cache is not None:
            self.cache.reorder_cache(rows)

    def append(self, tokens) -> None:
        """Put a token [B] behind each text."""
        tokens, following = tokens[:, None], self.positions[:, -1:] + 1
        if not self.way.cached:
            tokens, following = (torch.cat(x, dim=1) for x in ((self.ids, tokens), (self.positions, following)))
        self.ids, self.positions = tokens, following
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        self._run()

    def _read_apart(self, counts: list[int]) -> None:
        """Read the prompts of each length, so many of each, and join their caches."""
        pieces = []
        for ids, mask, positions in zip(*(x.split(counts) for x in (self.ids, self.mask, self.positions)), strict=True):
            start = ids.shape[1] - int(mask[0].sum())
            pieces.append(run(self.model, self.way, ids[:, start:], {"position_ids": positions[:, start:]}))
        logits, caches = zip(*pieces, strict=True)
        self.logits = torch.cat(logits)
        self.cache = _join(caches, behind_padding=_follows_positions(unwrapped(self.model)))

    def _run(self) -> None:
        inputs = {"attention_mask": self.mask, "position_ids": self.positions}
        self.logits, self.cache = run(self.model, self.way, self.ids, inputs, self.cache)


def run(model, way: Way, ids, inputs: dict, cache=None):
    """One forward over `ids`, new ones behind the cache or whole texts. -> (logits [B, V] of the last tokens, cache).

    Args:
        inputs: attention_mask and position_ids, of which the model gets what it takes.
    """
    inner = unwrapped(model)
    taken, kept = _parameters(inner), cache_name(inner)
    inputs = {**inputs, "use_cache": way.cached, "logits_to_keep": 1} | ({} if cache is None else {kept: cache})
    if way.lengths != "padded" and "position_ids" not in taken:
        inputs.pop("attention_mask", None)  # Mamba takes it for that of the newest token alone
    inputs = {name: value for name, value in inputs.items() if name in taken}
    output = model(input_ids=ids, **inputs, **without_router_logits(model))
    return output.logits[:, -1], getattr(output, kept) if way.cached else None


def _join(caches, *, behind_padding: bool):
    """One cache of the rows of several, whose keys and values move to the right end; all layers must be known.

    Args:
        behind_padding: whether keys and values may stand behind padding, as where positions are given.
    """
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        first, name = layers[0], type(layers[0]).__name__
        if name not in JOINABLE or (name in WITH_KEYS and not behind_padding):
            raise TypeError(f"{name}: not known to be joined")
        if name in WITH_KEYS:
            width = max(layer.keys.shape[-2] for layer in layers)
            for part in ("keys", "values"):
                padded = [F.pad(x, (0, 0, width - x.shape[-2], 0)) for x in (getattr(layer, part) for layer in layers)]
                setattr(first, part, torch.cat(padded))
        for part in STATES if name in WITH_STATES else ():
            states = getattr(first, part)
            for index in [index for index, state in states.items() if state is not None]:
                states[index] = torch.cat([getattr(layer, part)[index] for layer in layers])
    return caches[0]


def _parameters(inner) -> frozenset[str]:
    return _names(type(getattr(inner, "_orig_mod", inner)).forward)  # behind torch.compile


@functools.cache
def _names(forward) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def cache_name(inner) -> str | None:
    """The argument of a model that takes its cache, and the name under which it gives it back; None: it has none."""
    return next((name for name in CACHES if name in _parameters(inner)), None)


def _follows_positions(inner) -> bool:
    """Whether attention finds a token by its position_ids, wherever it stands; Llama 4 scales it by the index."""
    by_index = getattr(text_config(inner), "attn_temperature_tuning", False)
    return "position_ids" in _parameters(inner) and not by_index


def _reads_padding(inner) -> bool:
    """Whether padding on the left may change a text: what the layers carry along the row, or the index in it, counts.

    ALiBi biases need no positions: shifted, they grow by the same number for all keys of a query.
    """
    config = text_config(inner)
    carried = set(getattr(config, "layer_types", None) or []) - {"full_attention", *WINDOWS}
    stateful = bool(carried) or getattr(inner, "_is_stateful", False)
    return stateful or not (_follows_positions(inner) or has_alibi(config))


def reads_positions(model) -> bool:
    """Whether texts may stand anywhere in a row, as in continuous batching: told apart by position_ids, from 0 on."""
    config = text_config(model)
    return way_of(model) == PADDED and not has_alibi(config) and first_position(model) == 0


def _holds(model, way: Way) -> bool:
    """Whether texts of two prompts of a few tokens, moved and dropped, have the logits that they have alone."""
    size = text_config(model).vocab_size
    short, long = [[(7 * i + 3) % size for i in range(start, start + 5)] for start in (0, 11)]
    prompts = [short[: 5 if way.lengths == "one" else 2], long]
    following = torch.tensor([(5 * i + 2) % size for i in range(2)], device=model.device)
    try:
        texts, rows = Texts(model, prompts, 2, way), [2, 1]  # one of each prompt, the second prompt's first
        if way.movable:
            texts.keep(torch.tensor(rows, device=model.device))
            rows = [0, 1]
        found = [texts.logits[rows]]
        for token in following:
            texts.append(token.expand(len(texts.logits)))
            found.append(texts.logits[rows])
    except REFUSALS:
        return False
    behind = [following[:count].tolist() for count in range(len(found))]
    wanted = torch.cat([Texts(model, [[*prompt, *ids]], 1, WHOLE).logits for ids in behind for prompt in prompts[::-1]])
    finite = wanted[wanted.isfinite()]
    bound = 8 * _epsilon(model, wanted.dtype) ** 0.5 * finite.abs().max() if finite.numel() else 0.0
    return torch.allclose(torch.cat(found), wanted, rtol=0, atol=float(bound), equal_nan=True)


def _epsilon(model, dtype) -> float:
    """That of the coarsest type in which the model computes; its logits, of `dtype`, may be rounded less than that."""
    kind, dtypes = model.device.type, {dtype, model.dtype}
    if torch.is_autocast_enabled(kind):
        dtypes.add(torch.get_autocast_dtype(kind))
    if hasattr(unwrapped(model), "_original_forward"):  # accelerate's forward under autocast
        dtypes.add(torch.bfloat16)
    if kind == "cuda" and torch.get_float32_matmul_precision() != "highest":
        dtypes.add(torch.float16)  # as many binary digits as TF32
    return max(torch.finfo(dtype).eps for dtype in dtypes)
