"""Responses behind prompts that they do not answer, from which KTO estimates the KL of policy and reference."""

import numpy

from .examples import Examples
from .files import DataError


def mismatched(examples, max_length, spare=None):
    """Examples of one response each, as examples of two: the second is the response of the next other prompt.

    The next example with another prompt, in the order of the data, gives it, and behind the last one comes the first.
    It is cut where it would not fit behind the prompt. The ids are shared, not copied.

    Args:
        spare: such examples of two responses, of other data: the first that helps gives a response where all prompts of
            `examples` are the same one.
    Raises:
        DataError: there is no other prompt.
    """
    arrays, count = examples.arrays, len(examples)
    prompts, tokens = arrays.first[:-1], arrays.tokens
    others, starts, sizes = _following(arrays), arrays.starts, arrays.sizes
    if count and others is None:
        stranger = _stranger(_ids(arrays, prompts[0]), spare.arrays) if spare else None
        if stranger is None:
            raise DataError("all rows have one prompt, and KTO needs two: it reads responses behind other prompts")
        others = numpy.full(count, len(starts))
        starts, sizes = numpy.append(starts, len(tokens)), numpy.append(sizes, len(stranger))
        tokens = tokens.with_more(stranger)
    elif count:
        others = prompts[others] + 1
    picked = numpy.stack([prompts, prompts + 1, others], axis=1).ravel() if count else prompts
    sizes = sizes[picked]
    sizes[2::3] = numpy.minimum(sizes[2::3], max_length - sizes[::3])
    first = numpy.arange(0, 3 * count + 1, 3)
    return Examples(
        examples.rows, arrays._replace(tokens=tokens, starts=starts[picked], sizes=sizes, first=first, places=None)
    )


def _stranger(prompt, arrays):
    """The ids, as they are stored, of the first response to another prompt; None without one."""
    others = (first for first in arrays.first[:-1] if not numpy.array_equal(_ids(arrays, first), prompt))
    first = next(others, None)
    return None if first is None else _ids(arrays, first + 1)


def _following(arrays):
    """[E] int64: for each example the number of the next one with another prompt; None where all have one prompt."""
    prompts, begins = arrays.first[:-1], []
    before = _ids(arrays, prompts[-1]) if len(prompts) else ()
    for index, sequence in enumerate(prompts):
        ids = _ids(arrays, sequence)
        if not numpy.array_equal(ids, before):
            begins.append(index)
        before = ids
    after = numpy.searchsorted(begins, numpy.arange(len(prompts)), side="right")
    return numpy.asarray(begins)[after % len(begins)] if begins else None


def _ids(arrays, sequence):
    return arrays.tokens.read(arrays.starts[sequence], arrays.starts[sequence] + arrays.sizes[sequence])
