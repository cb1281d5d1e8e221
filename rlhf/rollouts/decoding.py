"""Texts that grow by a token a step, and the logits behind each: in the fastest way that is right for a model.

What a model keeps from step to step differs: keys and values, where padding can be masked; states of convolutions and
recurrences, which may read it; a cache of the model's own make, whose rows cannot be told apart; or nothing. So the
ways are tried, fastest first, on texts of a few tokens, against the logits of whole texts that stand alone.
"""

import inspect
import logging
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from rlhf_kernels.integrations.transformers import WINDOWS, first_position

from ..models import unwrapped
from ..models.forward import without_router_loss

CACHES = ("cache", "past_key_values", "cache_params", "state")
"""Names under which models of transformers, by their age and kind, take the cache and give it back."""

logger = logging.getLogger("rlhf")

REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, NotImplementedError)
"""What models raise that are run in a way that they do not know."""


@dataclass(frozen=True)
class Way:
    """How a model is run on texts that grow."""

    padded: bool  # texts of several lengths together, padded on the left; else texts of one length
    movable: bool  # rows of the cache can be repeated and dropped; else the rows stay from the first step to the last
    cached: bool  # a step reads the newest token; else the whole text


WAYS = (Way(True, True, True), Way(False, True, True), Way(False, False, True))
WHOLE = Way(False, True, False)
_found = WeakKeyDictionary()


@torch.no_grad()
def way_of(model) -> Way:
    """The fastest way that gives a model's texts the logits that they have whole and alone; the model is in eval mode.

    Args:
        model: a causal LM of transformers, possibly wrapped by PEFT.
    """
    inner = unwrapped(model)
    if inner not in _found:
        ways = [way for way in WAYS if cache_name(inner) and not (way.padded and _reads_padding(inner))]
        _found[inner] = next((way for way in ways if _holds(model, way)), WHOLE)
        if _found[inner] == WHOLE:
            logger.warning("%s keeps no cache that its texts can go on from: sampling is slow", type(inner).__name__)
    return _found[inner]


def chunks(order: list[int], lengths: list[int], size: int, way: Way) -> list[list[int]]:
    """Cut texts, sorted by length, into chunks of at most `size`; of one length each, where the way wants that."""
    cut = []
    for text in order:
        if not cut or len(cut[-1]) == size or (not way.padded and lengths[cut[-1][0]] != lengths[text]):
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
        way: that of the model; unless it is padded, the prompts are of one length.
    """

    logits = None  # [B, V] behind the texts; B = P * K until some are dropped

    def __init__(self, model, prompts, repeats: int, way: Way):
        self.model, self.way, self.cache = model, way, None
        inputs = left_padded(model, prompts)
        rows = torch.arange(len(prompts), device=model.device).repeat_interleave(repeats)
        if repeats > 1 and not way.movable:
            inputs = {name: tensor[rows] for name, tensor in inputs.items()}
        self.ids, self.mask, self.positions = inputs.values()
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

    def _run(self) -> None:
        inputs = {"attention_mask": self.mask, "position_ids": self.positions}
        self.logits, self.cache = run(self.model, self.way, self.ids, inputs, self.cache)


def run(model, way: Way, ids, inputs: dict, cache=None):
    """One forward over `ids`, new ones behind the cache or whole texts. -> (logits [B, V] of the last tokens, cache).

    Args:
        inputs: attention_mask and position_ids, of which the model gets what it takes.
    """
    inner = unwrapped(model)
    taken, name = _parameters(inner), cache_name(inner)
    inputs = {**inputs, "use_cache": way.cached, "logits_to_keep": 1} | ({} if cache is None else {name: cache})
    if not way.padded:
        inputs.pop("attention_mask", None)  # Mamba takes it for that of the newest token alone
    inputs = {name: value for name, value in inputs.items() if name in taken}
    output = model(input_ids=ids, **inputs, **without_router_loss(model))
    return output.logits[:, -1], getattr(output, name) if way.cached else None


def _parameters(inner) -> set[str]:
    return set(inspect.signature(type(inner).forward).parameters)


def cache_name(inner) -> str | None:
    """The argument of a model that takes its cache, and the name under which it gives it back; None: it has none."""
    return next((name for name in CACHES if name in _parameters(inner)), None)


def _has_alibi(config) -> bool:
    of_attention = getattr(config, "attn_config", None)
    return bool(
        getattr(config, "alibi", False) or getattr(of_attention, "alibi", False) or config.model_type == "bloom"
    )


def _reads_padding(inner) -> bool:
    """Whether padding on the left may change a text: what the layers carry along the row, or the index in it, counts.

    ALiBi biases need no positions: shifted, they grow by the same number for all keys of a query.
    """
    config = inner.config.get_text_config(decoder=True)
    carried = set(getattr(config, "layer_types", None) or []) - {"full_attention", *WINDOWS}
    by_index = getattr(config, "attn_temperature_tuning", False)  # Llama 4
    has_positions = "position_ids" in _parameters(inner) or _has_alibi(config)
    return bool(carried or getattr(inner, "_is_stateful", False) or by_index or not has_positions)


def reads_positions(model) -> bool:
    """Whether texts may stand anywhere in a row, as in continuous batching: told apart by position_ids, from 0 on."""
    config = unwrapped(model).config.get_text_config(decoder=True)
    return way_of(model).padded and not _has_alibi(config) and first_position(model) == 0


def _holds(model, way: Way) -> bool:
    """Whether two texts of a few tokens, of which one is dropped on the way, have the logits that they have alone."""
    size = model.config.get_text_config(decoder=True).vocab_size
    first, second = [[(7 * i + 3) % size for i in range(start, start + 5)] for start in (0, 11)]
    prompts = [first, second[: 2 if way.padded else 5]]
    following = torch.tensor([(5 * i + 2) % size for i in range(2)], device=model.device)
    try:
        texts = Texts(model, prompts, 2, way)
        found = [texts.logits[1], texts.logits[2]]
        if way.movable:
            texts.keep(torch.tensor([2], device=model.device))
        for token in following:
            texts.append(token.expand(len(texts.logits)))
            found.append(texts.logits[2 % len(texts.logits)])
    except REFUSALS:
        return False
    wholes = [*prompts, [*prompts[1], int(following[0])], [*prompts[1], *following.tolist()]]
    wanted = torch.stack([Texts(model, [ids], 1, WHOLE).logits[0] for ids in wholes])
    finite = wanted[wanted.isfinite()]
    bound = 8 * torch.finfo(wanted.dtype).eps ** 0.5 * finite.abs().max() if finite.numel() else 0.0
    return torch.allclose(torch.stack(found), wanted, rtol=0, atol=float(bound), equal_nan=True)
