"""Rows that cannot be used: all of them told by file and line, as one error, or left out and counted."""

import logging
import re

from .files import DataError

logger = logging.getLogger("rlhf")

SHOWN = 100


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
            raise DataError("\n".join([*self._listed(), f"bad_rows: skip leaves none of the {total} {name}"]))
        reasons = "\n".join(by_reason(self.found))
        logger.warning("left out %d of %d %s:\n%s", bad, total, name, reasons, extra={"bad_rows": bad})

    def _listed(self):
        lines = [f"{at}: {reason}" for at, reason in self.found[:SHOWN]]
        rest = self.found[SHOWN:]
        if rest:
            lines += [f"and {len(rest)} more:", *by_reason(rest)]
        return lines


def by_reason(found):
    """One line for each reason among (at, reason) pairs, with all its places; lines in a row as "file:3-7"."""
    groups = {}
    for at, reason in found:
        groups.setdefault(_NAMED.sub("*", reason), (reason, []))[1].append(at)
    return [f"{', '.join(_places(places))}: {reason}" for reason, places in groups.values()]


_NAMED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\d+(?:\.\d+)?")  # what differs from row to row
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
