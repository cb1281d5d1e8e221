"""The formats of files. A reader takes a file and yields its chunks, without holding the whole of a large one."""

import codecs
import itertools
import json

from .chunks import Chunk, DataError

CHUNK_BYTES = 1 << 20
CHUNK_ROWS = 1024
END_OF_TEXT = "<|endoftext|>"


def read_lines(path):
    """A JSON object a line."""
    number = 1
    with open(path, "rb") as file:
        start = file.read(len(codecs.BOM_UTF8))
        block = b"" if start == codecs.BOM_UTF8 else start
        while True:
            block += file.read(CHUNK_BYTES)
            if not block:
                return
            block += file.readline()
            yield Chunk(str(path), number, lines=block)
            number += block.count(b"\n")
            block = b""


def read_json(path):
    """A list of rows, one row, or a JSON object a line."""
    if _holds_lines(path):
        yield from read_lines(path)
        return
    try:
        rows = json.loads(_decode_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: is not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:1: is JSON that cannot be read ({error})") from None
    yield from _chunked(path, enumerate(rows if isinstance(rows, list) else [rows], start=1))


def _holds_lines(path):
    """Whether the first line that is not empty is a whole object and more follows."""
    with open(path, "rb") as file:
        lines = (line for line in file if line.removeprefix(codecs.BOM_UTF8).strip())
        first, second = next(lines, b""), next(lines, b"")
    try:
        return bool(second) and isinstance(json.loads(first.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def read_parquet(path):
    """Parquet, a batch of rows at a time."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}:1: reading .parquet needs the package pyarrow (pip install pyarrow)") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=CHUNK_ROWS))
            rows = map(_without_none, itertools.chain.from_iterable(batches))
            yield from _chunked(path, enumerate(rows, start=1))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}:1: is not a parquet file ({error})") from None


def read_text(path):
    """Plain text, cut at <|endoftext|> where that stands in it, else at empty lines."""
    text = _decode_text(path).replace("\r\n", "\n").replace("\r", "\n")
    mark = END_OF_TEXT if END_OF_TEXT in text else "\n\n"
    yield from _chunked(path, _pieces(text, mark))


def _pieces(text, mark):
    line = 1
    for piece in text.split(mark):
        lead = len(piece) - len(piece.lstrip())
        if piece.strip():
            yield line + piece[:lead].count("\n"), {"text": piece.strip()}
        line += piece.count("\n") + mark.count("\n")


def chunks_of_set(name, rows):
    """The rows of a set of the package `datasets`."""
    yield from _chunked(name, enumerate(map(_without_none, rows), start=1))


def _without_none(row):
    return {name: value for name, value in row.items() if value is not None}


def _chunked(path, numbered):
    """Chunks of (line number, row) pairs."""
    found = ((f"{path}:{number}", row) for number, row in numbered)
    while rows := tuple(itertools.islice(found, CHUNK_ROWS)):
        yield Chunk(str(path), found=rows)


def _decode_text(path):
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: is not UTF-8 text ({error.reason})") from None


READERS = {".parquet": read_parquet, ".json": read_json, ".jsonl": read_lines, ".txt": read_text}
