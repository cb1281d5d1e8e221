"""The formats of text files. A reader takes a file and yields its chunks, without holding the whole of a large one."""

import codecs
import csv
import io
import itertools
import json
import sys

from .chunks import Bad, Chunk, DataError
from .json_text import Document
from .streams import blocks, texts

CHUNK_ROWS = 256
END_OF_TEXT = "<|endoftext|>"
LOOK_AHEAD = 1 << 24  # characters of a text file within which <|endoftext|> must stand, if it is what parts the texts


def chunked(path, numbered):
    """Chunks of (line number, row) pairs."""
    found = ((f"{path}:{number}", row) for number, row in numbered)
    while rows := tuple(itertools.islice(found, CHUNK_ROWS)):
        yield Chunk(str(path), found=rows)


def read_lines(path, split):
    """A JSON object a line."""
    number, kept = 1, []
    for block in blocks(path):
        if number == 1 and not kept:
            block = block.removeprefix(codecs.BOM_UTF8)
        whole, newline, rest = block.rpartition(b"\n")
        if newline:
            lines = b"".join([*kept, whole, newline])
            yield Chunk(str(path), number, lines)
            number += lines.count(b"\n")
            kept = []
        kept.append(rest)
    if any(kept):
        yield Chunk(str(path), number, b"".join(kept))


def read_json(path, split):
    """A list of rows, one row, rows under the name `data` or that of the split, or a JSON object a line."""
    begun, text = _peeked(texts(path))
    first, more, _ = begun.partition("\n")
    if more and _is_object(first):
        yield from read_lines(path, split)
    else:
        yield from chunked(path, Document(path, text).rows(split))


def _peeked(blocks_of_text):
    """The beginning of a text up to the start of a second line, if the first that is not empty begins an object; and
    all of the text, as an iterator.
    """
    begun, rest = "", iter(blocks_of_text)
    while begun.lstrip()[:1] in ("", "{") and not begun.lstrip().partition("\n")[2].strip():
        block = next(rest, None)
        if block is None:
            break
        begun += block
    return begun.lstrip(), itertools.chain([begun], rest)


def _is_object(line):
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def read_csv(path, split):
    """Cells between commas, as text, under the names of the first row."""
    yield from chunked(path, _table(path, ","))


def read_tsv(path, split):
    """The same with tabs."""
    yield from chunked(path, _table(path, "\t"))


def _table(path, delimiter):
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(_lines(texts(path)), delimiter=delimiter, strict=True)
    names, line = None, 1
    try:
        for cells in reader:
            if names is None:
                names = _column_names(path, cells, delimiter) if cells else None
            elif len(cells) == len(names):
                yield line, {name: cell for name, cell in zip(names, cells, strict=True) if name}
            elif cells:
                yield line, Bad(f"has {len(cells)} cells, the first row has {len(names)}")
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: is not a row of cells ({error})") from None


def _column_names(path, cells, delimiter):
    """The names of columns; an empty one is the number of the row, as other programs write it."""
    names = [cell.strip() for cell in cells]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice or not any(names):
        what = f"names {', '.join(map(repr, twice))} twice" if twice else "names no column"
        raise DataError(f"{path}:1: the first row {what}, wants a name for each column")
    others = {",", ";", "\t"} - {delimiter}
    if len(names) == 1 and any(mark in names[0] for mark in others):
        raise DataError(f"{path}:1: got {names[0]!r} as the only column, wants {delimiter!r} between columns")
    return names


def _lines(blocks_of_text):
    rest = ""
    for text in blocks_of_text:
        *lines, rest = (rest + text).split("\n")
        yield from (line + "\n" for line in lines)
    if rest:
        yield rest


def read_text(path, split):
    """Plain text, parted at <|endoftext|> where that stands in it, else at empty lines."""
    yield from chunked(path, _pieces(path, texts(path)))


def _pieces(path, blocks_of_text):
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    source = (newlines.decode(text) for text in blocks_of_text)
    rest = ""
    for text in source:
        rest += text
        if len(rest) >= LOOK_AHEAD or END_OF_TEXT in rest:
            break
    mark = END_OF_TEXT if END_OF_TEXT in rest else "\n\n"
    line = 1
    for text in itertools.chain([""], source, [None]):
        *pieces, rest = (rest + text).split(mark) if text is not None else (rest, "")
        for piece in pieces:
            lead = len(piece) - len(piece.lstrip())
            start = line + piece[:lead].count("\n")
            if mark != END_OF_TEXT and END_OF_TEXT in piece:
                raise DataError(
                    f"{path}:{start}: holds {END_OF_TEXT}, which stands nowhere before: the texts up to here were "
                    "parted at empty lines; wants it behind each text, or nowhere"
                )
            if piece.strip():
                yield start, {"text": piece.strip()}
            line += piece.count("\n") + mark.count("\n")


READERS = {
    ".jsonl": read_lines,
    ".ndjson": read_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".txt": read_text,
}
