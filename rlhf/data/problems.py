"""Rows that cannot be used: all of them told by file and line, as one error, or left out and counted."""

import logging
import re
from collections import Counter

from .files import DataError

logger = logging.getLogger("rlhf")

SHOWN, OFTEN = 100, 30
"""Bad rows that are listed one by one; a reason of more rows than `OFTEN` is told once, with all its places."""


class Problems:
    """Collects what is wrong with rows.

    Args:
        bad_rows: "error": `settle` raises a DataError with all of them; "skip": it tells how many it leaves out, why.
    """

    def __init__(self, bad_rows="error"):
        if bad_rows not in ("error", "skip"):
            raise ValueError(f"bad_rows: got {bad_rows!r}, wants error or skip")
        self.bad_rows, self.found = bad_rows, []

    def add(self, at, reason):
        self.found.append((at, str(reason)))

    def settle(self, total, what=""):
        """Raise, or tell, what was found among `total` rows; where all of them are bad it raises in any case.

        Args:
            what: the name of these rows in messages, such as "held-out".
        """
        if not self.found:
            return
        bad, name = len({at for at, _ in self.found}), f"{what} rows" if what else "rows"
        if self.bad_rows == "error":
            raise DataError("\n".join(self._listed()))
        if bad >= total:
            raise DataError("\n".join([*self._listed(), f"none of the {total} {name} can be used"]))
        reasons = "\n".join(by_reason(self.found))
        logger.warning("left out %d of %d %s:\n%s", bad, total, name, reasons, extra={"bad_rows": bad})

    def _listed(self):
        rows_of = Counter(reason for _, reason in self.found)
        lines = by_reason([pair for pair in self.found if rows_of[pair[1]] > OFTEN], key=str)
        seldom = [pair for pair in self.found if rows_of[pair[1]] <= OFTEN]
        lines += [f"{at}: {reason}" for at, reason in seldom[:SHOWN]]
        rest = seldom[SHOWN:]
        if rest:
            lines += [f"and {len(rest)} more:", *by_reason(rest)]
        return lines


_NAMED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\d+(?:\.\d+)?")  # what differs from row to row


def _alike(reason):
    return _NAMED.sub("*", reason)


def by_reason(found, key=_alike):
    """One line for each reason among (at, reason) pairs, with all its places; lines in a row as "file:3-7".

    Args:
        key: reasons of one key are one reason; by default those that differ in numbers and names alone.
    """
    groups = {}
    for at, reason in found:
        groups.setdefault(key(reason), (reason, []))[1].append(at)
    return [f"{', '.join(_places(places))}: {reason}" for reason, places in groups.values()]


_PLACE = re.compile(r"(.*?[:\[])(\d+)(\]?)", re.DOTALL)


def _places(places):
    """Lines in a row as one place: file:3, file:4, file:5, file:9 as file:3-5,9; places of another form as they are."""
    spans = []
    for at in places:
        found = _PLACE.fullmatch(at)
        start, number, end = (found[1], int(found[2]), found[3]) if found else (at, None, "")
        last = spans[-1] if spans else None
        if last is None or number is None or last["of"] != (start, end):
            spans.append({"of": (start, end), "runs": [] if number is None else [[number, number]]})
        elif last["runs"] and number == last["runs"][-1][1] + 1:
            last["runs"][-1][1] = number
        else:
            last["runs"].append([number, number])
    for span in spans:
        runs = ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in span["runs"])
        yield f"{span['of'][0]}{runs}{span['of'][1]}"
