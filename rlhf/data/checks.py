"""Whether a tokenizer's chat template takes the user's conversations, all of them, before anything is trained."""

import sys

from . import parallel
from .chat import render_prompt
from .encoders import LARGE, SPAN
from .encoding import encode_row
from .files import Bad
from .problems import Problems
from .store import take

ANSWERS = {
    "completion": ("completion",),
    "completions": ("completions",),
    "chosen": ("chosen", "rejected"),
}


def check_chats(tokenizer, rows, bad_rows="error", *, what="", num_proc=None):
    """The rows that hold no conversation, or one that the chat template takes; the others are an error, or left out.

    Args:
        what: the name of these rows in messages.
        num_proc: processes for many rows; None = one for each core.
    Raises:
        DataError: what the template refuses, by file and line; under "skip" only if nothing else is left.
    """

    def refused(span):
        found = ((number, _refused(tokenizer, rows[number])) for number in span)
        return [(number, reason) for number, reason in found if reason]

    spans = [range(start, min(start + SPAN, len(rows))) for start in range(0, len(rows), SPAN)]
    count = parallel.processes(num_proc) if len(rows) >= LARGE else 1
    problems, bad = Problems(bad_rows), set()
    for found in parallel.in_order(refused, spans, count=count):
        for number, reason in found:
            problems.add(rows[number]["at"], reason)
            bad.add(number)
    problems.settle(len(rows), what)
    return take(rows, [number for number in range(len(rows)) if number not in bad]) if bad else rows


def _refused(tokenizer, row):
    """What the template has against a row; None: nothing."""
    prompt = row.get("prompt", "")
    if isinstance(prompt, str):
        return None
    names = next((names for field, names in ANSWERS.items() if field in row), None)
    try:
        if names is None:
            render_prompt(tokenizer, prompt, prompt)
        else:
            encode_row(tokenizer, row, names, max_length=sys.maxsize)
    except Bad as error:
        return str(error)
    return None
