"""The rows of a JSON document, one after another, so that a long list is never held whole."""

import json
import re

from .chunks import DataError

_SPACE = re.compile(r"[ \t\n\r]*")
_LONGEST_WORD = len("-Infinity")


class Document:
    """A JSON document that is read block by block; what has been used is forgotten.

    Args:
        path: the file, for messages.
        blocks: its text, in pieces.
    """

    def __init__(self, path, blocks):
        self.path, self.blocks, self.decode = path, iter(blocks), json.JSONDecoder().raw_decode
        self.text, self.at, self.line, self.column = "", 0, 1, 1  # line and column are those of text[at]

    def rows(self, split):
        """Yield (place, row) pairs: a row stands on its line, or is told by its number where several share a line.

        The document is a list of rows; an object with such a list under the name `data` or that of the split; or a row.
        """
        if self._next() == "[":
            yield from self._list()
        elif self.text:
            yield from self._object({split, "data"})
        if self._next():
            self._fail("Extra data")

    def _list(self):
        self._take("[")
        last, count = None, 0
        while count or self._next() != "]":
            self._next()
            line, count = self.line, count + 1
            yield (line if line != last else f"{line} (row {count})"), self._value()
            last = line
            if self._next() == "]":
                break
            self._take(",")
        self._take("]")

    def _object(self, names):
        """The rows of the list under one of `names`, else the object itself as the only row."""
        line, row, found = self.line, {}, False
        if self._next() != "{":
            yield line, self._value()
            return
        self._take("{")
        while row or found or self._next() != "}":
            self._next()
            name = self._value()
            self._take(":")
            if name in names and not found and self._begins_rows():
                found = True
                yield from self._list()
            else:
                row[name] = self._value()
            if self._next() == "}":
                break
            self._take(",")
        self._take("}")
        if not found:
            yield line, row

    def _begins_rows(self):
        if self._next() != "[":
            return False
        while not (start := re.match(r"\[\s*(\S)", self.text[self.at : self.at + 1000])) and self._more():
            pass
        return bool(start) and start[1] == "{"

    def _next(self):
        """The next character that is no white space; empty at the end."""
        while True:
            self._move(_SPACE.match(self.text, self.at).end())
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def _take(self, character):
        if self._next() != character:
            self._fail(f"Expecting {character!r}")
        self._move(self.at + 1)

    def _value(self):
        """The value that starts at the next character."""
        self._next()
        while True:
            try:
                value, end = self.decode(self.text, self.at)
                if end < len(self.text) or not self._more():  # else a number may go on
                    self._move(end)
                    return value
            except json.JSONDecodeError as error:
                unfinished = error.pos > len(self.text) - _LONGEST_WORD or error.msg.startswith("Unterminated")
                if not (unfinished and self._more()):
                    self._move(error.pos)
                    self._fail(error.msg)
            except (ValueError, RecursionError) as error:  # a number of too many digits; too deep
                raise DataError(f"{self.path}:{self.line}: is JSON that cannot be read ({error})") from None

    def _move(self, to):
        newline = self.text.rfind("\n", self.at, to)
        self.line += self.text.count("\n", self.at, to)
        self.column = to - newline if newline >= 0 else self.column + to - self.at
        self.at = to

    def _more(self):
        block = next(self.blocks, None)
        if block is not None:
            self.text, self.at = self.text[self.at :] + block, 0
        return block is not None

    def _fail(self, reason):
        raise DataError(f"{self.path}:{self.line}: is not JSON ({reason} at column {self.column})")
