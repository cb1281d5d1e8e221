"""Rows as files hold them, each with its place, in chunks that another process may parse."""

import json
from collections.abc import Iterator
from dataclasses import dataclass


class DataError(ValueError):
    """A row of the user's data that cannot be used. The message starts with `file:line: reason`."""


class Bad(Exception):
    """What is wrong with one row; `load_rows` adds the place."""


@dataclass(frozen=True)
class Chunk:
    """Rows that follow each other in one file: whole lines of JSON that nobody has parsed yet, or (place, row) pairs.

    A chunk can be sent to another process; `rows` is where the work of parsing is done.
    """

    path: str
    first: int = 1  # number of the first line
    lines: bytes = b""
    found: tuple = ()

    def rows(self) -> Iterator[tuple]:
        """Yield ("file:line", row) pairs; a line that cannot be parsed gives a Bad in place of the row."""
        yield from self.found
        try:
            lines = self.lines.decode("utf-8").split("\n")
        except UnicodeDecodeError:
            lines = self.lines.split(b"\n")
        for number, line in enumerate(lines, start=self.first):
            if line.strip():
                yield f"{self.path}:{number}", _parsed(line)


def _parsed(line):
    try:
        return json.loads(line if isinstance(line, str) else line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Bad(f"is not UTF-8 text ({error.reason})")
    except json.JSONDecodeError as error:
        return Bad(f"is not JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number of too many digits; too deep
        return Bad(f"is JSON that cannot be read ({error})")
