"""What kinds of rows a data set can be read as, found from its first rows."""

import contextlib
from itertools import chain, islice
from typing import NamedTuple

from . import formats
from .chunks import Bad, DataError
from .files import read_chunks
from .formats import own
from .formats.base import RANKING_KINDS
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
    """{kind: the first rows that can be used} of the kinds that a data set can be read as, those that say most first.

    Pairs come before rankings of two that say no more. Without --columns a kind fits where the rows have its fields,
    or are in a format that has it, whether or not they can be used.

    Args:
        sets: of `first_rows`.
    """
    found = {}
    for kind in ORDER:
        if kind != "text" and any(each.is_text for each in sets):
            continue
        parts = [_rows(each.raws, kind, column_map, data_format) for each in sets]
        if all(part is not None for part in parts):
            found[kind] = [row for part in parts for row in part]
    ranked, pairs = found.get("ranked"), found.get("preference")
    if pairs and all(len(row["ranks"]) == 2 and not row.keys() & set(OPTIONAL) for row in ranked or ()):
        made = [formats.conversion("preference", column_map, data_format, each.raws).note for each in sets]
        if RANKING_KINDS["preference"] not in made:
            found = {"preference": pairs, **found}
    return found


def _rows(raws, kind, column_map, data_format):
    """The rows that can be used; None where the kind does not fit."""
    raws = [raw for raw in raws if isinstance(raw, dict)]
    try:
        conversion = formats.conversion(kind, column_map, data_format, raws)
    except ValueError:
        return None
    pairs, each = conversion.prepared(("", raw) for raw in raws)
    found = []
    for _, raw in pairs:
        with contextlib.suppress(Bad):
            found += checked_rows("", raw, kind, each)
    held = found if column_map else raws if conversion.name else [raw for raw in raws if own.holds(raw, kind)]
    return found if held and 2 * len(held) >= len(raws) else None
