"""What a run takes for granted of its model, tried before the training on the longest of its own rows.

Train mode computes what eval mode computes; a row's numbers do not depend on the rows beside it, padded or packed; and
what is sampled from is what is scored. A few forwards tell, before any step is made from wrong numbers.
"""

import logging

import numpy
import torch

from .. import models
from ..data.examples import Examples
from ..models.sequences import join, response_log_probs
from ..rollouts.decoding import Texts, way_of
from .batches import batch_values, make_batch

logger = logging.getLogger("rlhf")

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
"""Largest difference by dtype; 2e-2 for half precision, where a batch of another shape rounds anew."""
ROWS, RESPONSES = 2, 3
"""Rows that are tried, and responses of each."""


def rounding(dtype) -> float:
    """What two forwards of one batch may differ by, in nats or in points of a score; other batches: ten times that."""
    return TOLERANCE.get(dtype, 2e-2)


def gap(first, second, dtype) -> float:
    """How far numbers lie apart: the largest difference, in half precision the mean, as single tokens may round far."""
    apart = (first - second).detach().abs()
    return float(apart.max() if dtype in TOLERANCE else apart.mean())


def longest(examples) -> list[dict]:
    """A few of the longest examples, each with a few of its responses, of which all tokens are looked at."""
    examples = Examples.of(examples)
    order = numpy.argsort(-examples.lengths, kind="stable")[:ROWS]
    rows = [examples[number] for number in order]
    return [
        {"prompt": row["prompt"], "responses": sorted(row["responses"], key=len)[-RESPONSES:], "row": row["row"]}
        for row in rows
    ]


@torch.no_grad()
def try_model(model, examples, *, packing: str, samples: bool) -> bool:
    """Try a stage's model, which is in train mode, on its longest rows; return whether its rows may be packed.

    Args:
        examples: of `encode_rows`.
        packing: "true" (they must be), "auto" (they may be), or "false" (they are not).
        samples: whether the run samples behind prompts.
    Raises:
        ValueError: something does not hold; the message says what, by how much, and what to do.
    """
    rows, limit = longest(examples), rounding(model.dtype)
    kind = "scores" if models.is_classifier(model) else "log-probs"
    name = type(models.unwrapped(model)).__name__

    def values(examples, packed=False):
        batch = make_batch(examples, 0, packed=packed, hidden_size=models.hidden_size(model))
        return batch_values(model, {field: tensor.to(model.device) for field, tensor in batch.items()})

    padded, again = values(rows), values(rows)
    model.eval()
    still = values(rows)
    alone = torch.cat([values([{**row, "responses": [ids]}]) for row in rows for ids in row["responses"]])
    packed = None if packing == "false" else values(rows, packed=True)
    beside = gap(padded, alone, model.dtype)
    apart = {"train mode is random": gap(padded, again, model.dtype)}
    apart["train mode computes something else than eval mode"] = gap(padded, still, model.dtype)
    for what, found in apart.items():
        if not found <= limit:
            raise ValueError(
                f"{what}: the {kind} of {name} for the same rows differ by {found:.3g} (at most {limit:g} is "
                "rounding); switch off in its config.json what it draws, as dropout, jitter or sampled experts"
            )
    if not beside <= 1000 * limit:
        raise ValueError(
            f"rows depend on each other: the {kind} of {name} differ by {beside:.3g} between a batch and its rows "
            "alone; use --per_device_train_batch_size 1 --per_device_eval_batch_size 1 --packing false"
        )
    most = max(10 * limit, 4 * beside)
    if samples:
        off = _sampling_gap(model, examples)
        if not off <= most:
            raise ValueError(
                f"samples come from another distribution than the one that is scored: log-probs of {name} behind "
                f"prompts differ by {off:.3g} (at most {most:.2g} is rounding); use --num_samples 0"
            )
    model.train()
    return packed is not None and packs(gap(packed, alone, model.dtype), most, f"{kind} of {name}", packing)


def packs(off: float, most: float, what: str, packing: str) -> bool:
    """Whether rows that differ by `off` when they are packed may be; where they must (packing "true"), an error."""
    if off <= most:
        return True
    message = (
        f"packing: the {what} of packed rows and of rows alone differ by {off:.3g} (at most {most:.2g} is rounding)"
    )
    if packing == "true":
        raise ValueError(f"{message}; use --packing false")
    logger.warning("%s; rows are not packed", message)
    return False


def _sampling_gap(model, examples) -> float:
    examples = Examples.of(examples)
    asked = numpy.flatnonzero(~examples.is_text)
    if not len(asked):
        return 0.0
    order = asked[numpy.argsort(examples.prompt_lengths[asked], kind="stable")]
    ends = [examples[order[0]], examples[order[-1]]]
    prompts, tokens = [row["prompt"] for row in ends], [row["responses"][0][0] for row in ends]
    scored, _ = response_log_probs(model, join(prompts, [[token] for token in tokens], model.device), temperature=1.0)
    return gap(sampler_log_probs(model, prompts, tokens), scored, model.dtype)


@torch.no_grad()
def sampler_log_probs(model, prompts, tokens, *, temperature=1.0) -> torch.Tensor:
    """log p [P] fp64 of a token behind each prompt, in nats, as the built-in sampler computes it; in eval mode.

    Args:
        prompts, tokens: P lists of ids, by length; P ids.
    """
    training = model.training
    way = way_of(model.eval())
    groups = [[prompt] for prompt in prompts] if way.lengths == "one" else [prompts]
    logits = torch.cat([Texts(model, group, 1, way).logits for group in groups])
    model.train(training)
    labels = torch.tensor(tokens, device=logits.device)[:, None]
    return (logits.double() / temperature).log_softmax(-1).gather(-1, labels).squeeze(-1)
