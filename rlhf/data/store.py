"""Rows that are not all in memory: made from others, or read, when they are asked for."""

import hashlib
import json
from collections.abc import Sequence


class Mapped(Sequence):
    """`make(item)` of each of `items`, made when it is asked for."""

    def __init__(self, make, items):
        self.make, self.items = make, items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self.make(item) for item in self.items[index]]
        return self.make(self.items[index])


def take(rows, numbers):
    """The rows of these numbers: a list of those of a list, else what `rows.take` gives."""
    return rows.take(numbers) if hasattr(rows, "take") else [rows[number] for number in numbers]


def content_digest(row) -> bytes:
    """16 bytes that name what a row says, wherever it lies."""
    fields = {name: value for name, value in row.items() if name != "at"}
    return hashlib.blake2b(json.dumps(fields, default=str).encode(), digest_size=16).digest()


def digest(rows) -> bytes:
    """A name of the content of rows in their order; where they lie does not count."""
    if hasattr(rows, "digest"):
        return rows.digest()
    found = hashlib.sha256()
    for row in rows:
        found.update(content_digest(row))
    return found.digest()
