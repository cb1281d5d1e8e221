"""Rows that are not all in memory: in a file, or made from others, when they are asked for.

A row in the file is a line of JSON: its fields and what a Chat has besides its messages; behind it stands its place.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy

from ..disk import write_all, writing
from .files import Bad, DataError
from .messages import Chat

DIGEST_BYTES = 16
DATA, STARTS, PROMPTS, CONTENTS = "rows.bin", "starts.npy", "prompts.npy", "contents.npy"


class Blob:
    """A file whose parts are read when they are asked for; they take no memory before."""

    def __init__(self, path):
        self.path = Path(path)
        self.file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self, close=os.close):  # bound here: at exit the module may be empty already
        if hasattr(self, "file"):
            close(self.file)

    def __reduce__(self):
        return Blob, (self.path,)

    def read(self, start, end):
        """The bytes from `start` up to `end`.

        Raises:
            DataError: the file is shorter.
        """
        found = os.pread(self.file, end - start, start)
        while len(found) < end - start:
            more = os.pread(self.file, end - start - len(found), start + len(found))
            if not more:
                raise DataError(f"{self.path}: is shorter than when it was written; remove its folder")
            found += more
        return found


class Rows(Sequence):
    """Checked rows in a file, each read when it is asked for: the dicts that `load_rows` gives.

    Args:
        folder: of `write`.
        kind: of the rows, as in `load_rows`.
        numbers: [n] int64, the rows that are meant, in this order; None = all. Slices and `take` give such a view.
    """

    def __init__(self, folder, kind=None, numbers=None):
        self.folder, self.kind, self.numbers = Path(folder), kind, numbers
        self.data = Blob(self.folder / DATA)
        self._starts, self._prompts, self._contents = (
            numpy.load(self.folder / name, mmap_mode="r") for name in (STARTS, PROMPTS, CONTENTS)
        )

    def __len__(self):
        return len(self._contents) if self.numbers is None else len(self.numbers)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.take(range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index = int(index) % len(self)
        number = index if self.numbers is None else self.numbers[index]
        return unpacked(self.data.read(*self._starts[number : number + 2].tolist()))

    def take(self, numbers):
        """The rows of these numbers, in their order; none of them is read yet."""
        view = object.__new__(Rows)
        view.__dict__.update(self.__dict__)
        view.numbers = numpy.fromiter(numbers, numpy.int64, len(numbers))
        if self.numbers is not None:
            view.numbers = self.numbers[view.numbers]
        return view

    def __reduce__(self):
        return Rows, (self.folder, self.kind, self.numbers)

    @property
    def digests(self):
        """[n, 16] bytes: `prompt_digest` of each row."""
        return self._chosen(self._prompts)

    def _chosen(self, values):
        return numpy.asarray(values if self.numbers is None else values[self.numbers])

    @property
    def contents(self):
        """[n, 16] bytes: what each row says, wherever it lies."""
        return self._chosen(self._contents)

    @property
    def key(self):
        """A JSON value that names these rows, and what they were read from."""
        return [self.folder.name, None if self.numbers is None else hashlib.sha256(self.numbers).hexdigest()]


class Mapped(Sequence):
    """`make(item)` of each of `items`, made when it is asked for."""

    def __init__(self, make, items):
        self.make, self.items = make, items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Mapped(self.make, self.items[index])
        return self.make(self.items[index])

    def take(self, numbers):
        return Mapped(self.make, take(self.items, numbers))

    def digest(self):
        """A name of the content; `make` must be a function of a module."""
        return hashlib.sha256(self._name().encode() + digest(self.items)).digest()

    @property
    def key(self):
        """A JSON value that names these rows; None where nothing names the items.

        Of `make` it holds the name alone, so ids of such rows are kept right only if its code is one that `made_by` of
        the cache looks at.
        """
        inner = key_of(self.items)
        return None if inner is None else [self._name(), inner]

    def _name(self):
        return f"{self.make.__module__}.{self.make.__qualname__}"


def take(rows, numbers):
    """The rows of these numbers: a list of those of a list, else what `rows.take` gives."""
    return rows.take(numbers) if hasattr(rows, "take") else [rows[number] for number in numbers]


def key_of(rows):
    """A JSON value that names rows and what they were read from; None for those in memory."""
    return getattr(rows, "key", None)


def digest(rows) -> bytes:
    """A name of the content of rows in their order; where they lie does not count."""
    return rows.digest() if hasattr(rows, "digest") else hashlib.sha256(contents_of(rows)).digest()


def contents_of(rows):
    """[n, 16] bytes that name what each row says, wherever it lies."""
    return rows.contents if hasattr(rows, "contents") else _digests(b"".join(_name(_body(row)) for row in rows))


def digests_of(rows):
    """[n, 16] bytes: `prompt_digest` of each row."""
    return rows.digests if hasattr(rows, "digests") else _digests(b"".join(map(prompt_digest, rows)))


def _body(row) -> bytes:
    fields = {name: value for name, value in row.items() if name != "at"}
    prompt = row.get("prompt")
    besides = [prompt.tools, prompt.template_kwargs] if isinstance(prompt, Chat) else None
    text = json.dumps([fields, besides], ensure_ascii=False, separators=(",", ":"), default=str)
    return text.encode("utf-8", "surrogatepass")


def _name(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=DIGEST_BYTES).digest()


def prompt_digest(row):
    """16 bytes that stand for a row's prompt with its tools and chat_template_kwargs (or for its text)."""
    prompt = row["prompt"] if "prompt" in row else row["text"]
    inputs = [prompt.tools, prompt.template_kwargs] if isinstance(prompt, Chat) else [None, None]
    return _name(json.dumps([prompt, *inputs], sort_keys=True).encode())


def unpacked(line: bytes) -> dict:
    """The row that a line of the file holds."""
    body, _, at = line.decode("utf-8", "surrogatepass").partition("\n")
    row, besides = json.loads(body)
    if besides is not None:
        row["prompt"] = Chat(row["prompt"], *besides)
    row["at"] = at
    return row


class Packed(NamedTuple):
    """Some rows on their way into a file, the problems of others, and how many there were together."""

    data: bytes
    sizes: array
    prompts: bytes
    contents: bytes
    problems: list
    total: int


def packed(found) -> Packed:
    """Rows for `write`.

    Args:
        found: (place, rows or Bad) pairs, one for each row of the source.
    """
    data, sizes, prompts, contents, problems, total = bytearray(), array("q"), bytearray(), bytearray(), [], 0
    for total, (at, rows) in enumerate(found, start=1):  # noqa: B007
        if isinstance(rows, Bad):
            problems.append((at, str(rows)))
            continue
        for row in rows:
            body = _body(row)
            line = body + b"\n" + at.encode("utf-8", "surrogatepass")
            data += line
            sizes.append(len(line))
            prompts += prompt_digest(row)
            contents += _name(body)
    return Packed(bytes(data), sizes, bytes(prompts), bytes(contents), problems, total)


def write(folder, parts) -> dict:
    """Write rows into a folder for `Rows`.

    Args:
        parts: of `packed`, in order.
    Returns:
        {"rows", "total", "problems"}: rows written; rows of the source; [place, reason] of those that are left out.
    Raises:
        WriteError: names the file.
    """
    sizes, prompts, contents, problems, total = array("q"), bytearray(), bytearray(), [], 0
    path = Path(folder) / DATA
    with writing(path):
        file = open(path, "wb", buffering=0)  # noqa: SIM115 - an error of the parts, below, is none of the file
    with file:
        for part in parts:
            with writing(path):
                write_all(file, part.data)
            sizes.extend(part.sizes)
            prompts += part.prompts
            contents += part.contents
            problems += part.problems
            total += part.total
    starts = numpy.concatenate([[0], sizes]).astype(numpy.int64).cumsum()
    named = {STARTS: starts, PROMPTS: _digests(prompts), CONTENTS: _digests(contents)}
    for name, values in named.items():
        with writing(Path(folder) / name):
            numpy.save(Path(folder) / name, values)
    return {"rows": len(sizes), "total": total, "problems": problems}


def _digests(joined):
    return numpy.frombuffer(joined, numpy.uint8).reshape(-1, DIGEST_BYTES)
