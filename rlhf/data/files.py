"""Where rows come from: jsonl, json, parquet and text files, folders of them, and sets of the `datasets` package."""

import json
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"


class DataError(ValueError):
    """A row of the user's data that cannot be used. The message starts with `file:line: reason`."""


class Bad(Exception):
    """What is wrong with one row; `load_rows` adds the place."""


def read(name, kind, split, config):
    """Yield ("file:line", row) pairs; a line that cannot be parsed yields a Bad in place of the row."""
    path = Path(name).expanduser()
    if path.is_dir():
        files = [path / f"{split}{end}" for end in (".jsonl", ".json", ".parquet", ".txt")]
        path = next((file for file in files if file.is_file()), None)
        if path is None:
            raise DataError(f"{name}:1: the folder holds no {split}.jsonl, .json, .parquet or .txt")
    if not path.is_file():
        yield from _read_named(name, split, config)
        return
    reader = READERS.get(path.suffix.lower())
    if reader is None or (reader is _read_txt and kind != "text"):
        raise DataError(f"{name}:1: {kind} data comes as .jsonl, .json or .parquet (plain text also as .txt)")
    yield from reader(path)


def _decode_text(path):
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: is not UTF-8 text ({error.reason})") from None


def _read_jsonl(path):
    for number, line in enumerate(_decode_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", json.loads(line)
        except json.JSONDecodeError as error:
            yield f"{path}:{number}", Bad(f"is not JSON ({error.msg} at column {error.colno})")
        except (ValueError, RecursionError) as error:  # a number of too many digits; too deep
            yield f"{path}:{number}", Bad(f"is JSON that cannot be read ({error})")


def _read_json(path):
    try:
        rows = json.loads(_decode_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: is not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:1: is JSON that cannot be read ({error})") from None
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        yield f"{path}:{number}", row


def _read_parquet(path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}:1: reading .parquet needs the package pyarrow (pip install pyarrow)") from None
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}:1: is not a parquet file ({error})") from None
    for number, row in enumerate(rows, start=1):
        yield f"{path}:{number}", {name: value for name, value in row.items() if value is not None}


def _read_txt(path):
    text = _decode_text(path).replace("\r\n", "\n").replace("\r", "\n")
    mark = END_OF_TEXT if END_OF_TEXT in text else "\n\n"
    line = 1
    for piece in text.split(mark):
        lead = len(piece) - len(piece.lstrip())
        if piece.strip():
            yield f"{path}:{line + piece[:lead].count(chr(10))}", {"text": piece.strip()}
        line += piece.count("\n") + mark.count("\n")


def _read_named(name, split, config):
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
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:
        raise DataError(f"{name}:1: no such file, and datasets.load_dataset says: {error}") from None
    for number, row in enumerate(rows, start=1):
        yield f"{name}:{number}", {key: value for key, value in row.items() if value is not None}


READERS = {".parquet": _read_parquet, ".json": _read_json, ".jsonl": _read_jsonl, ".txt": _read_txt}
