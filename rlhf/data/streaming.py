"""Rows one after another, for data that are larger than memory and of which a run needs some."""

import logging
from itertools import chain, islice

from . import formats
from .chunks import Bad, DataError
from .files import read
from .mixtures import named_sets
from .rows import FIRST, checked_rows, tell_format
from .sources import files_of

logger = logging.getLogger("rlhf")
_SHOWN = 10


def stream_rows(
    name, kind, *, split="train", config=None, column_map=None, data_format="auto", bad_rows="error", tell=False
):
    """Yield the rows that `load_rows` gives, each when it is asked for: nothing is read far ahead, nothing kept.

    Of several sets with shares the next row comes from the set that is farthest behind its share; the rows end with
    the first set that has no more. Of several sets without shares, all rows of one come before any of the next.

    Args:
        tell: say which format is recognised, as `load_rows` does.
        split, config, column_map, data_format, bad_rows: as in `load_rows`.
    Raises:
        DataError: at a row that cannot be used, when it is reached; `bad_rows="skip"` leaves it out and tells.
    """
    names, weights = zip(*named_sets(name), strict=True)
    options = (kind, split, config, column_map, data_format, bad_rows, tell)
    sets = [_one_set(one, *options) for one in names]
    yield from chain.from_iterable(sets) if None in weights else _shared(sets, weights)


def stream_identity(name, *, split="train", config=None):
    """What a stream reads, as JSON values, wherever it lies: names and sizes of files, and the sets' shares."""
    found = []
    for one, weight in named_sets(name):
        files = files_of(one, split, config)
        files = [(file.name, file.stat().st_size) for file in files] if files is not None else [(one, split, config)]
        found += [[weight, *file] for file in files]
    return found


def shuffled(rows, size, generator):
    """Yield rows in an order that `generator` draws, from `size` of them that are held at a time."""
    held = []
    for row in rows:
        if len(held) < size:
            held.append(row)
            continue
        index = generator.randrange(size)
        yield held[index]
        held[index] = row
    generator.shuffle(held)
    yield from held


def _one_set(name, kind, split, config, column_map, data_format, bad_rows, tell):
    found = read(name, kind, split, config, streaming=True)
    first = list(islice(found, FIRST))
    if not first:
        raise DataError(f"{name}: holds no rows")
    conversion = formats.conversion(kind, column_map, data_format, [raw for _, raw in first])
    if tell:
        tell_format(name, conversion.name, conversion.note)
    found, each = conversion.prepared(chain(first, found))
    left_out = 0
    for at, raw in found:
        try:
            yield from checked_rows(at, raw, kind, each)
        except Bad as error:
            if bad_rows != "skip":
                raise DataError(f"{at}: {error}") from None
            left_out += 1
            if left_out <= _SHOWN:
                logger.warning("left out %s: %s", at, error)
    if left_out > _SHOWN:
        logger.warning("left out %d rows of %s", left_out, name)


def _shared(sets, weights):
    given = [0] * len(sets)
    while True:
        behind = min(range(len(sets)), key=lambda index: (given[index] + 1) / weights[index])
        row = next(sets[behind], None)
        if row is None:
            return
        given[behind] += 1
        yield row
