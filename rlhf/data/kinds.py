"""What kinds of rows a data set can be read as, found from its first rows."""

from itertools import chain, islice
from typing import NamedTuple

from . import formats
from .chunks import Bad, DataError
from .files import read_chunks
from .mixtures import named_sets
from .rankings import OPTIONAL
from .readers import read_text
from .rows import FIRST, checked_rows
from .sources import FORMATS, files_of
from .streams import ending

ORDER = ("ranked", "preference", "unpaired", "sft", "prompts", "text")
"""The more a kind says of a row, the earlier it comes."""


class First(NamedTuple):
    """The first rows of a set as they are, a Bad in place of one that cannot be parsed; `is_text`: plain text."""

    name: str
    raws: list
    is_text: bool


def first_rows(name, split, config):
    """A First of each set that a name lists."""
    found = []
    for each, _ in named_sets(name):
        pairs = chain.from_iterable(chunk.rows() for chunk in read_chunks(each, "text", split, config))
        raws = [raw for _, raw in islice(pairs, FIRST)]
        if not raws:
            raise DataError(f"{each}:1: holds no rows")
        files = files_of(each, split, config) or ()
        found.append(First(each, raws, any(FORMATS[ending(file)] is read_text for file in files)))
    return found


def fitting(sets, column_map, data_format):
    """{kind: checked rows} of the kinds that the first rows of every set can be read as, those that say most first.

    A kind fits where at least half of the rows can be read. Pairs come before rankings of two that say no more.

    Args:
        sets: of `first_rows`.
    """
    found = {}
    for kind in ORDER:
        if kind != "text" and any(each.is_text for each in sets):
            continue
        parts = [_rows(each.raws, kind, column_map, data_format) for each in sets]
        if all(parts):
            found[kind] = [row for part in parts for row in part]
    ranked = found.get("ranked", ())
    if "preference" in found and all(len(row["ranks"]) == 2 and not row.keys() & set(OPTIONAL) for row in ranked):
        found = {"preference": found["preference"], **found}
    return found


def _rows(raws, kind, column_map, data_format):
    try:
        conversion = formats.conversion(kind, column_map, data_format, raws)
    except ValueError:
        return []
    if conversion.whole:
        each, raws = (lambda raw: [raw]), [raw for _, raw in conversion.whole(("", raw) for raw in raws)]
    else:
        each = conversion.each
    found = []
    for raw in raws:
        try:
            found.append(checked_rows("", raw, kind, each))
        except Bad:
            found.append([])
    return list(chain.from_iterable(found)) if 2 * sum(map(bool, found)) >= len(found) else []
