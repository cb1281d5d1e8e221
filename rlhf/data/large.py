"""Files too large to hold in memory as rows: read by several processes, once, after which the rows are in the cache."""

import contextlib
import itertools

from . import cache, parallel, store
from .files import Bad, DataError, fingerprint, read_chunks

BYTES = 8 << 20
"""Size from which on files are read this way."""
TOGETHER = 1024
"""Rows that are written at a time where only this process can read them."""


def load(name, kind, split, config, options, *, convert, check, first, num_proc=None):
    """The rows of a file as `store.Rows`, and what was said of them: {"total", "problems", "format", "note"}.

    Args:
        options: JSON value, what `convert` and `check` depend on besides the kind.
        convert: gets the first raw rows, gives a `formats.Conversion`.
        check: (place, raw row or Bad, conversion's `each`) -> rows; raises Bad.
        first: how many raw rows `convert` gets.
    Raises:
        DataError: the file cannot be read, or holds nothing.
    """

    def make(folder):
        chunks, begun, seen = read_chunks(name, kind, split, config), [], []
        while len(seen) < first and (chunk := next(chunks, None)) is not None:
            begun.append(chunk)
            seen += itertools.islice(chunk.rows(), first - len(seen))
        if not seen:
            raise DataError(f"{name}:1: holds no rows")
        conversion = convert([raw for _, raw in seen])
        chunks = itertools.chain(begun, chunks)
        with (
            parallel.progress(None, f"reading {name}", " rows") as done,
            contextlib.closing(_packed(chunks, conversion, check, parallel.processes(num_proc))) as parts,
        ):
            said = store.write(folder, _counted(parts, done))
        if fingerprint(name, split, config) != source:
            raise DataError(f"{name}: was written to while it was read")
        return {**said, "format": conversion.name, "note": conversion.note}

    source = fingerprint(name, split, config)
    key = [str(name), kind, split, config, options, source, cache.made_by()]
    folder, said = cache.entry("rows", key, make)
    return store.Rows(folder, kind), said


def _packed(chunks, conversion, check, count):
    if conversion.whole is None:
        yield from parallel.in_order(lambda chunk: _pack(chunk.rows(), conversion.each, check), chunks, count=count)
        return
    found, each = conversion.prepared(itertools.chain.from_iterable(chunk.rows() for chunk in chunks))
    while together := list(itertools.islice(found, TOGETHER)):
        yield _pack(together, each, check)


def _counted(parts, done):
    for part in parts:
        yield part
        done(part.total)


def _pack(found, each, check):
    return store.packed((at, _checked(at, raw, each, check)) for at, raw in found)


def _checked(at, raw, each, check):
    try:
        return check(at, raw, each)
    except Bad as error:
        return error
