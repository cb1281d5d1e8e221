"""Which format rows are in, and the conversion of them into our fields."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from .. import columns
from ..cells import typed
from ..files import Bad, DataError
from . import arena, chats, dialogues, instructions, maths, own, pairs, ranked, trees
from .base import system_of, user

logger = logging.getLogger("rlhf")

_ROOMS = (ranked, pairs, arena, trees, maths, chats, instructions, own)
FORMATS = {format.name: format for room in _ROOMS for format in room.FORMATS}
_NAMES = {name: format for format in FORMATS.values() for name in (format.name, *format.aliases)}
OWN, CHAT = "own", ":chat"


@dataclass(frozen=True)
class Conversion:
    """How raw rows become rows in our fields.

    Args:
        name: of the format; None: our own fields, or those that --columns names.
        note: what is made of the rows, for people; "" if there is nothing to say.
        each: raw row -> rows in our fields, none or several; raises Bad.
        whole: in place of `each` where rows belong together: iterator of (at, raw row) -> iterator of (at, row), a Bad
            in place of a row that cannot be used; else None.
    """

    name: str | None
    note: str
    each: Callable
    whole: Callable | None = None

    def prepared(self, found):
        """(pairs, each) of (at, raw row) pairs of a source: those to go on with, and what makes our rows of each."""
        return (found, self.each) if self.whole is None else (self.whole(found), as_it_is)


def as_it_is(raw):
    return [raw]


def conversion(kind, column_map, data_format, first_rows):
    """The conversion of rows into our fields for a kind of rows.

    Args:
        kind: as in `load_rows`.
        column_map: a --columns string, or a dict {field: where}; None: none.
        data_format: the name of a format, "own" (our own fields), or "auto": our own fields where the first rows have
            them, else the format that they are in. With ":chat" behind it, prompts in text become messages.
        first_rows: some raw rows, from the beginning.
    Raises:
        ValueError: column_map or data_format cannot be read.
        DataError: the format does not hold rows of that kind; the first rows are in different formats.
    """
    name, chat, rest = data_format.partition(CHAT)
    if rest:
        raise ValueError(f"data_format: got {data_format!r}, wants the name of a format, or the name and {CHAT!r}")
    first_rows = [typed(raw) for raw in first_rows if isinstance(raw, dict)]
    if column_map:
        if name not in ("auto", OWN):
            raise ValueError(f"data_format: got {data_format!r} beside columns, which say the same thing; give one")
        made = _mapped(columns.parse(column_map, kind), first_rows)
    else:
        is_found = name == "auto"
        found = _recognised(kind, first_rows) if is_found else _named(name, kind)
        made = _made(found, kind, is_found) if found else _own(kind, first_rows if is_found else ())
        if name != OWN and kind != "text" and any(map(_has_lead, first_rows)):
            made = _with_each(made, _asked)
    return _as_chat(made) if chat else made


def _own(kind, first_rows):
    if not first_rows:
        return Conversion(None, "", as_it_is)
    if kind != "text" and any(system_of(raw) and own.holds(raw, kind) for raw in first_rows):
        logger.warning("data_format: what the column of the system prompt holds goes before the messages")
    return Conversion(None, "", lambda raw: [own.completed(raw, kind)])


def _mapped(parsed, first_rows):
    held = {name for raw in first_rows for name in raw}
    for parts in parsed.values():
        for part in parts:
            if first_rows and isinstance(part, columns.Path) and part.column not in held:
                logger.warning("columns: none of the first %d rows has %r", len(first_rows), part.column)
    return Conversion(None, "", lambda raw: [columns.apply(parsed, raw)])


def _named(name, kind):
    wanted = name.rpartition("/")[2].lower().replace("_", "-")
    if wanted == OWN:
        return None
    if wanted not in _NAMES:
        raise ValueError(f"data_format: got {name!r}, wants auto, {OWN}, {', '.join(FORMATS)}")
    if kind not in _NAMES[wanted].kinds:
        raise DataError(_holds_others(_NAMES[wanted], kind))
    return _NAMES[wanted]


def _holds_others(format, kind):
    return f"data_format: the format {format.name} holds rows of the kind {', '.join(format.kinds)}, not {kind}"


def _recognised(kind, first_rows):
    """The format of the first rows; None: our own, or one that is not known."""
    found = {}
    for raw in first_rows:
        names = _formats_of(raw, kind)
        if names:
            found.setdefault(names[0], raw)
    if OWN in found and any(name != OWN and own.holds(raw, kind) for name, raw in found.items()):
        del found[OWN]  # these say more than the fields of our own that all rows hold
    ours = [name for name in found if name == OWN or FORMATS[name] in own.FORMATS]
    if len(found) > 1 and len(ours) < len(found):
        looks = "; ".join(f"{name} ({', '.join(map(repr, raw))})" for name, raw in found.items())
        raise DataError(f"data_format: the first rows are in different formats: {looks}; say which it is")
    if found:
        return next((FORMATS[name] for name in found if name != OWN), None)
    for format in FORMATS.values():
        if format.auto and any(map(format.detect, first_rows)):
            raise DataError(f"{_holds_others(format, kind)} (so the rows look; --columns can say otherwise)")
    if first_rows and not (kind == "sft" and any("text" in raw and "prompt" not in raw for raw in first_rows)):
        logger.warning("data_format: no known format; --columns can say which columns hold what of %s rows", kind)
    return None


def _formats_of(raw, kind):
    """Names of the formats that a row is in, the likeliest first."""
    fitting = [format for format in FORMATS.values() if format.auto and kind in format.kinds and format.detect(raw)]
    is_own = own.holds(raw, kind)
    if is_own:
        fitting = [format for format in fitting if kind in format.over_own]
    return [format.name for format in fitting] + [OWN] * is_own


def _made(format, kind, is_found):
    note = format.kinds[kind]
    if format.group is None:
        return Conversion(format.name, note, lambda raw: _converted(format, raw, kind, is_found))
    return Conversion(format.name, note, lambda raw: _converted(format, [raw], kind), _grouped(format, kind))


def _converted(format, raw, kind, is_found=False):
    name = format.left_out(raw, kind) if is_found and format.left_out else None
    if name:
        raise Bad(
            f"holds `{name}`, which the format {format.name} leaves out: --columns can say what is learned, "
            f"--data_format {format.name} that it is what remains"
        )
    try:
        return format.convert(raw, kind)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise Bad(f"is not in the format {format.name} ({type(error).__name__}: {reason})") from error


def _grouped(format, kind):
    def whole(found):
        groups = {}
        for at, raw in found:
            if not isinstance(raw, dict):
                yield at, raw
                continue
            try:
                groups.setdefault(format.group(raw), (at, []))[1].append(raw)
            except Bad as error:
                yield at, error
        for at, raws in groups.values():
            try:
                yield from [(at, row) for row in _converted(format, raws, kind)]
            except Bad as error:
                yield at, error

    return whole


def _as_chat(made):
    note = "; ".join(filter(None, (made.note, "prompts in text become messages")))
    return _with_each(replace(made, note=note), dialogues.as_chat)


def _has_lead(raw):
    return system_of(raw) or (isinstance(raw.get("history"), list) and raw["history"])


def _asked(row):
    """A row whose prompt is messages, as are those of the other rows, which go behind a system prompt."""
    return {**row, "prompt": user(row["prompt"])} if isinstance(row.get("prompt"), str) else row


def _with_each(made, change):
    """A conversion whose rows are changed."""

    def each(raw):
        return [change(row) for row in made.each(raw)]

    def whole(found):
        for at, row in made.whole(found):
            yield at, change(row) if isinstance(row, dict) else row

    return replace(made, each=each, whole=whole if made.whole else None)
