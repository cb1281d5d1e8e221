"""Where rows come from: jsonl, json, parquet and text files, folders of them, and sets of the `datasets` package."""

from pathlib import Path

from .chunks import Bad, Chunk, DataError
from .readers import READERS, chunks_of_set, read_text

__all__ = ["Bad", "Chunk", "DataError", "fingerprint", "read", "read_chunks", "size"]


def read(name, kind, split, config):
    """Yield ("file:line", row) pairs; a line that cannot be parsed yields a Bad in place of the row."""
    for chunk in read_chunks(name, kind, split, config):
        yield from chunk.rows()


def read_chunks(name, kind, split, config):
    """Yield the chunks that `name` holds, in order; those of a file of lines are not parsed yet.

    Args:
        name: a file, a folder, or a name that `datasets.load_dataset` knows.
        kind: of the rows, as in `load_rows`; plain text is read for "text" alone.
        split, config: which split of a folder or a named set, and which configuration of the latter.
    Raises:
        DataError: nothing of that name, or it cannot be read; what is wrong with one row stands in its place.
    """
    path = _file(name, split)
    if path is None:
        yield from chunks_of_set(name, _named(name, split, config))
        return
    reader = READERS.get(path.suffix.lower())
    if reader is None or (reader is read_text and kind != "text"):
        raise DataError(f"{name}:1: {kind} data comes as .jsonl, .json or .parquet (plain text also as .txt)")
    yield from reader(path)


def fingerprint(name, split, config):
    """What would be read, as JSON values: files with their sizes and times, or a named set as `datasets` knows it."""
    path = _file(name, split)
    if path is None:
        return [["datasets", str(name), config, split, _named(name, split, config)._fingerprint]]
    state = path.stat()
    return [[str(path.resolve()), state.st_size, state.st_mtime_ns]]


def size(name, split, config):
    """Bytes of what would be read."""
    path = _file(name, split)
    return _named(name, split, config).data.nbytes if path is None else path.stat().st_size


def _file(name, split):
    """The file that a name and a split mean; None where there is none of that name."""
    path = Path(name).expanduser()
    if path.is_dir():
        files = [path / f"{split}{end}" for end in (".jsonl", ".json", ".parquet", ".txt")]
        path = next((file for file in files if file.is_file()), None)
        if path is None:
            raise DataError(f"{name}:1: the folder holds no {split}.jsonl, .json, .parquet or .txt")
    return path if path.is_file() else None


def _named(name, split, config):
    if Path(name).suffix.lower() in READERS:
        raise DataError(f"{name}: no such file")
    try:
        import datasets
    except ImportError:
        if Path(name).suffix or "/" not in name:
            raise DataError(f"{name}: no such file") from None
        hint = "and the package `datasets`, which could know the name, is not installed"
        raise DataError(f"{name}: no such file ({hint})") from None
    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:
        raise DataError(f"{name}:1: no such file, and datasets.load_dataset says: {error}") from None
