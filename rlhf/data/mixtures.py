"""Several sets as one: `a.jsonl,b.jsonl` are all rows of both, `a.jsonl:0.7,b.jsonl:0.3` a mixture of these shares."""

import hashlib
import itertools
import logging
import math
import os
from bisect import bisect_right
from collections.abc import Sequence

import numpy

from .chunks import DataError
from .store import DIGEST_BYTES, contents_of, digest, digests_of, key_of, take

logger = logging.getLogger("rlhf")


def named_sets(name):
    """The (name, weight or None) pairs that the name of several sets lists; what lies under the whole name is one set.

    Raises:
        DataError: a set without a name, a weight that is no positive number, weights for some sets only.
    """
    pieces, sets = str(name).split(","), []
    while pieces:
        starts = (",".join(pieces[:count]) for count in range(len(pieces), 1, -1))
        chosen = next((start for start in starts if _exists(start) or _exists(_weighted(start)[0])), pieces[0])
        sets.append((chosen, None) if _exists(chosen) else _weighted(chosen))
        pieces = pieces[chosen.count(",") + 1 :]
    if len(sets) == 1:
        return [(str(name), None)]
    if not all(name for name, _ in sets):
        raise DataError(f"{name}: names several sets, one of them by nothing between two commas")
    wrong = [
        f"{one}:{weight:g}" if weight is not None else one
        for one, weight in sets
        if not (0 < weight < math.inf if weight is not None else _exists(one) or ":" not in one or "://" in one)
    ]
    if wrong:
        raise DataError(f"{name}: got {', '.join(wrong)}, wants weights above 0, as in a.jsonl:0.7,b.jsonl:0.3")
    if len({weight is None for _, weight in sets}) > 1:
        raise DataError(f"{name}: gives some sets a weight and some none, wants one for each or none at all")
    return sets


def _exists(name):
    return os.path.exists(os.path.expanduser(name))  # False also of a name that is too long


def _weighted(piece):
    """A name and its weight, where what stands behind the last colon is a number."""
    piece = piece.strip()
    name, colon, weight = piece.rpartition(":")
    try:
        return (name, float(weight)) if colon else (piece, None)
    except ValueError:
        return piece, None


def mixed(parts, names, weights):
    """The rows of several sets, one set behind the other.

    Args:
        parts: sequences of rows.
        names: of the sets, for the log.
        weights: the shares of the sets, in any unit, or a None for each: all rows. With shares it is the largest
            mixture in which no row stands twice; the rows of a set are taken at even distances.
    """
    sizes = [len(part) for part in parts]
    counts = sizes if None in weights else largest_mixture(sizes, weights)
    told = [f"{count} of {size} rows of {name}" for count, size, name in zip(counts, sizes, names, strict=True)]
    logger.warning("data: %s", ", ".join(told))
    chosen = [
        part if count == size else take(part, [number * size // count for number in range(count)])
        for part, count, size in zip(parts, counts, sizes, strict=True)
    ]
    return [row for part in chosen for row in part] if all(isinstance(x, list) for x in chosen) else Joined(chosen)


def largest_mixture(sizes, weights):
    """How many rows of each set make the largest mixture with these shares, at least one of each."""
    rows_a_weight = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    return [min(size, max(1, round(rows_a_weight * weight))) for size, weight in zip(sizes, weights, strict=True)]


class Joined(Sequence):
    """Sequences one behind the other."""

    def __init__(self, parts):
        self.parts, self.ends = parts, list(itertools.accumulate(map(len, parts)))

    def __len__(self):
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.take(range(len(self))[index])
        part, number = self._place(range(len(self))[index])
        return self.parts[part][number]

    @property
    def digests(self):
        """[n, 16] bytes: the digests of all rows' prompts."""
        return self._of_parts(digests_of)

    @property
    def contents(self):
        """[n, 16] bytes that name what each row says."""
        return self._of_parts(contents_of)

    def _of_parts(self, named):
        return numpy.concatenate([numpy.zeros((0, DIGEST_BYTES), numpy.uint8), *map(named, self.parts)])

    @property
    def key(self):
        """A JSON value that names these rows, and what they were read from; None where nothing names a part's."""
        found = [_key_in_memory(part) if isinstance(part, list) else key_of(part) for part in self.parts]
        return None if any(part is None for part in found) else found

    def take(self, numbers):
        """The rows of these numbers."""
        places = map(self._place, numbers)
        runs = itertools.groupby(places, key=lambda place: place[0])
        return Joined([take(self.parts[part], [number for _, number in run]) for part, run in runs])

    def _place(self, index):
        part = bisect_right(self.ends, index)
        return part, index - (self.ends[part - 1] if part else 0)


def _key_in_memory(rows):
    places = hashlib.sha256("\n".join(str(row.get("at")) for row in rows).encode("utf-8", "surrogatepass"))
    return [digest(rows).hex(), places.hexdigest()]
