"""Parquet and Arrow files, read a batch of rows at a time. `at` counts the rows of a file from 1."""

import itertools

from .chunks import DataError
from .readers import CHUNK_ROWS, chunked
from .streams import check_is_here

_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


def read_parquet(path, split):
    """Parquet."""
    yield from _table(path, "parquet", _parquet_batches)


def read_arrow(path, split):
    """Arrow's file format (also called Feather), or its stream format, which `datasets` writes."""
    yield from _table(path, "Arrow", _arrow_batches)


def _table(path, what, batches):
    check_is_here(path)
    try:
        import pyarrow
    except ImportError:
        raise DataError(f"{path}: reading {what} files needs the package pyarrow (pip install pyarrow)") from None
    try:
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches(path))
        yield from chunked(path, enumerate(map(unpadded, rows), start=1))
    except (OSError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: is not a whole {what} file ({reason})") from None


def _parquet_batches(path):
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=CHUNK_ROWS)


def _arrow_batches(path):
    import pyarrow.ipc

    with pyarrow.memory_map(str(path)) as file:
        if file.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(file)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:
            if file.size() >= 8:
                file.seek(file.size() - 8)
            if file.read(8) != _END_OF_STREAM:
                raise OSError("the end of the stream is missing")
            file.seek(0)
            batches = pyarrow.ipc.open_stream(file)
        for batch in batches:
            for start in range(0, batch.num_rows, CHUNK_ROWS):
                yield batch.slice(start, CHUNK_ROWS)


def chunks_of_set(name, rows):
    """The rows of a set of the package `datasets`."""
    yield from chunked(name, enumerate(map(unpadded, rows), start=1))


CALLS = ("tools", "tool_calls", "function_call", "chat_template_kwargs")


def unpadded(row):
    """A row without the fields that are None, and without those in calls and descriptions of tools.

    All rows of a table have all fields of a struct: what only the call of another row says is None here.
    """
    return {name: _unpadded(name, value) for name, value in row.items() if value is not None}


def _unpadded(name, value):
    if isinstance(value, (dict, list)):
        if name in CALLS:
            return _without_none(value)
        if isinstance(value, list):
            return [_unpadded(None, item) for item in value]
        return {key: _unpadded(key, item) for key, item in value.items()}
    return value


def _without_none(value):
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value


TABLES = {".parquet": read_parquet, ".arrow": read_arrow, ".feather": read_arrow}
