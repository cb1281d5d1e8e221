"""Whether a tokenizer's chat template takes the user's conversations, all of them, before anything is trained."""

import sys

from .chat import render_prompt
from .encoding import encode_row
from .files import Bad
from .problems import Problems
from .store import take

ANSWERS = {
    "completion": ("completion",),
    "completions": ("completions",),
    "chosen": ("chosen", "rejected"),
}


def check_chats(tokenizer, rows, bad_rows="error"):
    """The rows that hold no conversation, or one that the chat template takes; the others are an error, or left out.

    Raises:
        DataError: what the template refuses, by file and line; under "skip" only if nothing else is left.
    """
    problems, kept = Problems(bad_rows), []
    for number, row in enumerate(rows):
        try:
            _encode(tokenizer, row)
            kept.append(number)
        except Bad as error:
            problems.add(row["at"], error)
    problems.settle(len(rows))
    return take(rows, kept) if len(kept) < len(rows) else rows


def _encode(tokenizer, row):
    prompt = row.get("prompt", "")
    if isinstance(prompt, str):
        return
    names = next((names for field, names in ANSWERS.items() if field in row), None)
    if names is None:
        render_prompt(tokenizer, prompt, prompt)
    else:
        encode_row(tokenizer, row, names, max_length=sys.maxsize)
