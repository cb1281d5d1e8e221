"""The language of `--columns`: which columns of a row hold what.

    prompt=instruction+input,completion=output
    completions=completions[].response,scores=completions[].overall_score
    prompt=turns[0].text,completion="Answer: "+`the.answer`

A field of ours, `=`, and where it is found. A path goes into nested rows by `.name`, `[number]` and `[]` (every entry
of a list; `.name` behind a list is taken of every entry too). Several columns are joined by `+` with one empty line
between them; those that are empty are left out. Text in double quotes goes with the column behind it (at the end: with
the one before it), without an empty line, and is left out with it. Names with other characters stand in backticks.
"""

import json
import re

from .files import Bad

FIELDS = (
    "prompt", "completion", "messages", "text", "completions", "ranks", "scores", "chosen", "rejected", "label",
    "weight", "margin", "margins", "labeler", "pairs", "tools", "chat_template_kwargs",
)  # fmt: skip
OPTIONAL = ("weight", "margin", "margins", "labeler", "pairs", "tools", "chat_template_kwargs")
_IN_PLACE_OF = {
    "prompt": ("messages",),
    "completion": ("messages", "text"),
    "messages": ("prompt", "completion", "text"),
    "text": ("prompt", "completion", "messages"),
    "completions": ("chosen", "rejected"),
    "chosen": ("completions",),
    "rejected": ("completions",),
    "ranks": ("scores",),
    "scores": ("ranks",),
}
_NAME = re.compile(r"[^\s.,+=\[\]`\"]+")
_QUOTED_NAME = re.compile(r"`([^`]+)`")
_TEXT = re.compile(r'"(?:[^"\\]|\\.)*"')
_INDEX = re.compile(r"\[\s*(-?\d+)?\s*\]")
_EVERY = object()


class Path:
    """A way into a row: names, numbers and "every entry"."""

    def __init__(self, text, steps):
        self.text, self.steps = text, steps

    @property
    def column(self):
        return self.steps[0]

    def of(self, raw):
        """What stands there in a row. Raises Bad where a row lacks it."""
        return self._follow(raw, 0)

    def _follow(self, value, done):
        for number in range(done, len(self.steps)):
            step = self.steps[number]
            if step is _EVERY or (isinstance(step, str) and isinstance(value, list)):
                rest = number + (step is _EVERY)
                return [self._follow(entry, rest) for entry in self._entries(value, number)]
            if isinstance(step, int):
                entries = self._entries(value, number)
                if not -len(entries) <= step < len(entries):
                    raise Bad(f"`{self._so_far(number)}` has no entry [{step}] (has {len(entries)})")
                value = entries[step]
            elif not isinstance(value, dict) or step not in value:
                raise Bad(self._lacks(value, number))
            else:
                value = value[step]
        return value

    def _entries(self, value, number):
        if isinstance(value, list):
            return value
        if isinstance(records(value), list):
            return records(value)
        raise Bad(f"`{self._so_far(number)}` must be a list, got {type(value).__name__}")

    def _lacks(self, value, number):
        where = f"`{self._so_far(number)}` lacks" if number else "lacks the column"
        held = ", ".join(map(repr, value)) or "no columns" if isinstance(value, dict) else type(value).__name__
        return f"{where} `{self.steps[number]}` of --columns (has {held})"

    def _so_far(self, number):
        text = ""
        for step in self.steps[:number]:
            text += "[]" if step is _EVERY else f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
        return text


def records(value):
    """A dict of equally long lists, as a list of dicts; any other value as it is."""
    columns = list(value.values()) if isinstance(value, dict) else []
    if columns and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return [dict(zip(value, entries)) for entries in zip(*columns)]
    return value


def parse(text, kind=None):
    """{field: [Path or text, ...]} of a --columns string, or of a dict {field: where}.

    Args:
        kind: "prompts" allows fields of any name: what reward functions read.
    Raises:
        ValueError: what is wrong, and where.
    """
    if isinstance(text, dict):
        text = ",".join(f"{name}={where}" for name, where in text.items())
    reader = _Reader(text)
    found = {}
    while True:
        at = reader.place
        name = reader.name("a field")
        if name not in FIELDS and kind != "prompts":
            raise reader.error(f"{name!r} is no field of ours; there are {', '.join(FIELDS)}", at)
        if name in found:
            raise reader.error(f"{name!r} is given twice", at)
        reader.wants("=")
        found[name] = [reader.part()]
        while reader.takes("+"):
            found[name].append(reader.part())
        if all(isinstance(part, str) for part in found[name]):
            raise reader.error(f"{name!r} names no column", at)
        if reader.ended():
            return found
        reader.wants(",")


class _Reader:
    def __init__(self, text):
        self.text, self.place = text, 0

    def error(self, reason, place=None):
        place = self.place if place is None else place
        return ValueError(f"columns: {reason} (character {place + 1} of {self.text!r})")

    def ended(self):
        self._skip_spaces()
        return self.place >= len(self.text)

    def takes(self, mark):
        self._skip_spaces()
        if not self.text.startswith(mark, self.place):
            return False
        self.place += len(mark)
        return True

    def wants(self, mark):
        if not self.takes(mark):
            raise self.error(f"wants {mark!r}, got {self._rest()}")

    def name(self, what):
        self._skip_spaces()
        found = _QUOTED_NAME.match(self.text, self.place)
        name = found and found[1]
        if not found:
            found = _NAME.match(self.text, self.place)
            name = found and found[0]
        if not found:
            raise self.error(f"wants {what}, got {self._rest()}")
        self.place = found.end()
        return name

    def part(self):
        self._skip_spaces()
        if self.text.startswith('"', self.place):
            found = _TEXT.match(self.text, self.place)
            try:
                text = json.loads(found[0]) if found else None
            except ValueError:
                text = None
            if text is None:
                raise self.error('wants text in double quotes, as JSON writes it ("Question:\\n")')
            self.place = found.end()
            return text
        start, steps = self.place, [self.name("a column")]
        while True:
            if self.takes("."):
                steps.append(self.name("a name behind the dot"))
            elif self.takes("["):
                self.place -= 1
                found = _INDEX.match(self.text, self.place)
                if not found:
                    raise self.error("wants [] or [number]")
                steps.append(_EVERY if found[1] is None else int(found[1]))
                self.place = found.end()
            else:
                return Path(self.text[start : self.place].strip(), steps)

    def _skip_spaces(self):
        while self.place < len(self.text) and self.text[self.place].isspace():
            self.place += 1

    def _rest(self):
        return repr(self.text[self.place : self.place + 12]) if self.place < len(self.text) else "the end"


def apply(parsed, raw):
    """A row with the fields that the map names; its other columns stay, but for those that would count instead.

    Raises:
        Bad: the row lacks what the map names.
    """
    found = {}
    for name, parts in parsed.items():
        value = parts[0].of(raw) if len(parts) == 1 and name not in OPTIONAL else _joined(name, parts, raw)
        if value is not None:
            found[name] = value
    gone = {other for name in parsed for other in _IN_PLACE_OF.get(name, ())}
    gone |= {part.column for parts in parsed.values() for part in parts if isinstance(part, Path)} & set(FIELDS)
    return {**{name: value for name, value in raw.items() if name not in gone | set(parsed)}, **found}


def _joined(name, parts, raw):
    """Columns joined; None where an optional field's column is missing."""
    values, missing = [], []
    for part in parts:
        if isinstance(part, str):
            values.append(part)
            continue
        try:
            values.append((part.of(raw),))
        except Bad as lacking:
            values.append((None,))
            missing.append(lacking)
    columns = [value for value in values if isinstance(value, tuple)]
    if len(missing) == len(columns):
        if name in OPTIONAL:
            return None
        raise missing[0]
    if len(parts) == 1:
        return columns[0][0]
    text, lead, follows = "", "", False
    for index, (part, value) in enumerate(zip(parts, values)):
        if isinstance(part, str):
            lead += part
            is_last = not any(isinstance(later, Path) for later in parts[index + 1 :])
            if is_last and follows:
                text, lead = text + lead, ""
            continue
        piece = _text_of(name, part, value[0])
        if piece.strip():
            text += (lead if lead or not text else "\n\n") + piece
        lead, follows = "", bool(piece.strip())
    return text


def _text_of(name, part, value):
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise Bad(f"`{part.text}` must be a text to be joined to `{name}`, got {type(value).__name__}")
    return str(value)
