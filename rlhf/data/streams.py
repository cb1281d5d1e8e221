"""The bytes and the text of a file, unpacked where it is compressed. A file that is cut short is an error."""

import bz2
import codecs
import gzip
import lzma
import re
import zlib
from pathlib import Path

from .chunks import DataError

BLOCK = 1 << 20
COMPRESSED = {
    ".gz": re.compile(rb"\x1f\x8b"),
    ".bz2": re.compile(rb"BZh[1-9]1AY"),
    ".xz": re.compile(rb"\xfd7zXZ\x00"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd"),
}
_POINTER = b"version https://git-lfs"
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def ending(path):
    """The lower-case ending of a file's name that tells its format: .jsonl of `a.JSONL.gz`."""
    path = Path(path)
    return Path(path.stem if path.suffix.lower() in COMPRESSED else path.name).suffix.lower()


def check_is_here(path):
    """Raise DataError for a file that stands for its content, as a clone without Git LFS leaves it."""
    try:
        with open(path, "rb") as file:
            start = file.read(len(_POINTER))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if start == _POINTER:
        raise DataError(f"{path}: is a pointer of Git LFS, not the data: fetch it with `git lfs pull`")


def blocks(path):
    """Yield the bytes of a file, about a MiB at a time. What it begins with tells how it is compressed, not its name.

    Raises:
        DataError: it cannot be read or unpacked, or ends before its end.
    """
    check_is_here(path)
    try:
        with open(path, "rb") as raw:
            start = raw.read(8)
            raw.seek(0)
            how = next((name for name, magic in COMPRESSED.items() if magic.match(start)), None)
            if not start and Path(path).suffix.lower() in COMPRESSED:
                raise EOFError("it is empty")
            if start.startswith(_UTF16):
                raise DataError(f"{path}:1: is UTF-16 text, wants UTF-8")
            with _unpacked(path, raw, how) as stream:
                while block := stream.read(BLOCK):
                    yield block
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path}: cannot be read to its end, it is cut short or damaged ({error})") from None


def _unpacked(path, raw, how):
    if how == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if how == ".bz2":
        return bz2.BZ2File(raw)
    if how == ".xz":
        return lzma.LZMAFile(raw)
    return raw if how is None else _zstd(path, raw)


def _zstd(path, raw):
    try:
        import pyarrow
    except ImportError:
        raise DataError(f"{path}: reading .zst needs the package pyarrow (pip install pyarrow)") from None
    return pyarrow.CompressedInputStream(raw, "zstd")


def texts(path):
    """Yield the text of a UTF-8 file block by block, without its byte order mark.

    Raises:
        DataError: as `blocks`, and for bytes that are not UTF-8, with their line.
    """
    decoder, line = codecs.getincrementaldecoder("utf-8-sig")(), 1
    try:
        for block in blocks(path):
            text = decoder.decode(block)
            line += text.count("\n")
            yield text
        yield decoder.decode(b"", True)
    except UnicodeDecodeError as error:
        line += error.object[: error.start].count(b"\n")
        raise DataError(f"{path}:{line}: is not UTF-8 text ({error.reason})") from None
