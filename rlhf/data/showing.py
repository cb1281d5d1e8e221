"""What a model reads of a row, for a person to look at: the text of its ids, with what is learned in marks."""

import itertools
import logging
import sys

from .chat import answer_is_ended
from .encoding import THOUGHTS

logger = logging.getLogger("rlhf")
MARKS, SHOWN, LOOKED_AT = "⟦⟧", 1000, 100
"""Around what is learned; characters of an example; rows that are looked at for what their template does not read."""


def marked(tokenizer, prompt, responses, learned=None):
    """The text of a prompt and its responses, as ids, with what is learned in marks; the responses on lines.

    Args:
        learned: as in `data.Encoded`.
    """
    parts = [tokenizer.decode(prompt)]
    for number, ids in enumerate(responses):
        mask = (learned and learned[number]) or [True] * len(ids)
        for known, run in itertools.groupby(zip(mask, ids), key=lambda pair: pair[0]):
            text = tokenizer.decode([token for _, token in run])
            parts.append(f"{MARKS[0]}{text}{MARKS[1]}" if known else text)
        parts.append("\n" if number + 1 < len(responses) else "")
    return "".join(parts)


def shortened(text, most):
    """A text; of a longer one than `most` characters its beginning and end."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}\n[... {len(text) - most // 2 * 2} characters ...]\n{text[-(most // 2) :]}"


def show(title, text):
    """Print a text, shortened, below a line that says what it is; characters that the terminal lacks as ?."""
    print(printable(f"{title}\n{shortened(text, SHOWN)}\n"), flush=True)


def printable(text):
    """A text in characters that the terminal has, others as ?."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def warn_of_template(tokenizer, rows):
    """Tell what the chat template does that a user would want to know, of some rows of theirs."""
    rows = [rows[number] for number in range(min(len(rows), LOOKED_AT))]
    chats = [row for row in rows if not isinstance(row.get("prompt", ""), str)]
    if not chats:
        return
    template = repr(tokenizer.chat_template)
    if not answer_is_ended(tokenizer):
        logger.warning(
            "chat_template: the model's template writes no token behind an answer, so no end of an answer is learned "
            "(--chat_template gives it another template)"
        )
    if "tools" not in template and any(getattr(row["prompt"], "tools", None) for row in chats):
        logger.warning("chat_template: the model's template does not read the rows' tools (--chat_template FILE)")
    if not any(name in template for name in THOUGHTS) and any(map(_has_thoughts, chats)):
        logger.warning("chat_template: the model's template does not write reasoning_content (--chat_template FILE)")


def _has_thoughts(row):
    answers = [row.get(name) or [] for name in ("completion", "chosen", "rejected")] + [*row.get("completions", ())]
    messages = itertools.chain(*(answer for answer in answers if not isinstance(answer, str)))
    return any(message.get(name) for message in messages for name in THOUGHTS)
