"""Rows of files, of folders of files and of sets of the `datasets` package, with their places."""

from functools import lru_cache
from pathlib import Path

from .chunks import Bad, Chunk, DataError
from .readers import read_text
from .sources import FORMATS, files_of
from .streams import COMPRESSED, ending
from .tables import chunks_of_set

__all__ = ["Bad", "Chunk", "DataError", "fingerprint", "read", "read_chunks", "size"]


def read(name, kind, split, config, *, streaming=False):
    """Yield ("file:line", row) pairs; a line that cannot be parsed yields a Bad in place of the row."""
    for chunk in read_chunks(name, kind, split, config, streaming=streaming):
        yield from chunk.rows()


def read_chunks(name, kind, split, config, *, streaming=False):
    """Yield the chunks that `name` holds, in order; those of a file of lines are not parsed yet.

    Args:
        name: a file, a folder, a pattern of names (`shards/*.jsonl`), or a name that `datasets.load_dataset` knows.
        kind: of the rows, as in `load_rows`; plain text is read for "text" alone.
        split, config: which split of a folder or a named set, and which configuration of it.
        streaming: fetch a named set as it is read.
    Raises:
        DataError: nothing of that name, or it cannot be read; what is wrong with one row stands in its place.
    """
    files = files_of(name, split, config)
    if files is not None and "[" in split:
        raise DataError(f"{name}: got the split {split!r}, wants a whole split: parts are of named sets only")
    if files is None:
        yield from chunks_of_set(name, _named(str(name), split, config, streaming))
        return
    for path in files:
        reader = FORMATS.get(ending(path))
        if reader is None or (reader is read_text and kind != "text"):
            known = ", ".join(form for form in FORMATS if form != ".txt")
            raise DataError(
                f"{path}: {kind} data comes as {known} (plain text also as .txt), all but the tables also packed as "
                f"{', '.join(COMPRESSED)}"
            )
        yield from reader(path, split)


def fingerprint(name, split, config):
    """What would be read, as JSON values: files with their sizes and times, or a named set as `datasets` knows it."""
    files = files_of(name, split, config)
    if files is None:
        return [["datasets", str(name), config, split, _named(str(name), split, config, False)._fingerprint]]
    states = [(path.resolve(), path.stat()) for path in files]
    return [[str(path), split, state.st_size, state.st_mtime_ns] for path, state in states]


def size(name, split, config):
    """Bytes of what would be read."""
    files = files_of(name, split, config)
    return (
        _named(str(name), split, config, False).data.nbytes
        if files is None
        else sum(path.stat().st_size for path in files)
    )


@lru_cache(maxsize=4)
def _named(name, split, config, streaming):
    """The set that the package `datasets` has under a name."""
    if ending(name) in FORMATS or str(name).startswith(("/", "./", "../", "~")):
        raise DataError(f"{name}: no such file")
    try:
        import datasets
    except ImportError:
        if Path(name).suffix or "/" not in name:
            raise DataError(f"{name}: no such file") from None
        hint = "and the package `datasets`, which could know the name, is not installed"
        raise DataError(f"{name}: no such file ({hint})") from None
    try:
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{name}: no such file, and datasets.load_dataset says: {reason}") from None
