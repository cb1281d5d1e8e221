"""Rows that cannot be used: all of them told by file and line, as one error, or left out and counted."""

import logging

from .files import DataError

logger = logging.getLogger("rlhf")


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

    def settle(self, total):
        """Raise, or tell, what was found among `total` rows."""
        lines = [f"{at}: {reason}" for at, reason in self.found]
        if lines and self.bad_rows == "error":
            raise DataError("\n".join(lines))
        if lines:
            logger.warning("left out %d of %d rows:\n%s", len(lines), total, "\n".join(lines))
