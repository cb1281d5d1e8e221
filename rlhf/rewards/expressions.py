"""Answers that may be numbers, words or expressions: what a truth is, and whether answers equal it.

Numbers are compared exactly, here. Expressions are compared by math-verify, in confined processes that stay
(`rlhf/rewards/workers.py`): its own time limits are signals, which only a main thread may set.
"""

import functools
import importlib.util
import math
import numbers
import re
from decimal import Decimal
from typing import NamedTuple

from .final_answer import Number, final_part, is_marked, only_number, without_dollars
from .workers import Workers

MAX_CHARACTERS = 500
"""A longer answer is none: parsers of LaTeX can be slow."""
KEPT = 1 << 16
"""Comparisons that are remembered; a policy says the same again and again."""

_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox)\s*\{([^{}]*)\}")
_FUNCTIONS = "arcsin|arccos|arctan|sqrt|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|pi|infty|infinity|theta"
_WAYS_TO_WRITE = (
    (r"\*\*", "^"), (r"(?<!\\)\*", r"\\cdot "), ("−", "-"), ("×", r"\\times "), ("·", r"\\cdot "), ("÷", r"\\div "),
    ("∞", r"\\infty "), ("π", r"\\pi "), ("≤", r"\\le "), ("≥", r"\\ge "), ("∪", r"\\cup "), ("∩", r"\\cap "),
    (r"√\s*\(([^()]*)\)|√\s*(\w+)", r"\\sqrt{\1\2}"), (r"\\?(?<![A-Za-z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\^\s*(-\d+|\d\d+)", r"^{\1}"), (r"(?<![\\A-Za-z])(?:infinity|inf|oo)(?![A-Za-z])", r"\\infty "),
    (rf"(?<![\\A-Za-z])({_FUNCTIONS})(?![A-Za-z])", r"\\\1 "), (r",?\s+(?:and|or)\s+", ", "),
)  # fmt: skip
_UNIT = re.compile(r"(?<=[\d})!])\s+[A-Za-z][A-Za-z ]{3,}$")
_NO_WORDS = re.compile(rf"\\(?:begin|end|operatorname)\{{\w+\*?\}}|(?<![A-Za-z])(?:{_FUNCTIONS})(?![A-Za-z])")
_WORD = re.compile(r"(?<![\\A-Za-z])(?=[A-Z]*[a-z])[A-Za-z]{4,}")

_workers = Workers("math")
_known = {}


class Truth(NamedTuple):
    """What an answer is held against: a number, or words, and as LaTeX; None for what it is not."""

    number: Number | None
    words: str | None
    latex: str | None

    @property
    def is_expression(self):
        """Whether only math-verify can read it."""
        return self.number is None and self.words is None


def available():
    """Whether expressions can be compared."""
    return importlib.util.find_spec("math_verify") is not None


def truth_of(entry):
    """The Truth in an entry of a column: a number, or a string that is an answer, or a solution that holds one.

    Returns:
        Truth; None where there is nothing that could be read. Whether its LaTeX can be, `readable` tells.
    """
    if isinstance(entry, bool) or not isinstance(entry, (str, numbers.Real, Decimal)):
        return None
    if not isinstance(entry, str) and not math.isfinite(entry):
        return None
    return _truth(str(entry))


@functools.lru_cache(maxsize=KEPT // 4)
def _truth(text):
    part, number = final_part(text) if is_marked(text) else (text, only_number(text))
    part = without_dollars(part or "")
    if number is not None:
        return Truth(number, None, _latex_of(number))
    inside = _TEXT.fullmatch(part.strip("() ."))
    if (inside or re.fullmatch(r"\(?[A-Za-z]\)?", part)) and _words(part):
        return Truth(None, _words(part), None if inside else part)
    return Truth(None, None, _latex(part)) if _may_be_read(part) else None


def _latex_of(number):
    top, bottom = number.value.as_integer_ratio()
    return (str(top) if bottom == 1 else rf"\frac{{{top}}}{{{bottom}}}") + (r"\%" if number.percent else "")


def _words(text):
    """The words that are all of a text, without case and punctuation; None where it is anything else."""
    text = " ".join(_TEXT.sub(r"\1", text).casefold().split()).strip(" .,;:!?()'\"*")
    return text if re.fullmatch(r"[^\W\d_][^\d_\\^{}$=+*/<>|]*", text) else None


def _may_be_read(text):
    bare = _NO_WORDS.sub("", _UNIT.sub("", _TEXT.sub("", text)))
    return 0 < len(text.strip()) <= MAX_CHARACTERS and re.search(r"\w", text) is not None and not _WORD.search(bare)


def _latex(text):
    """An expression as LaTeX has it, where it is written as in a program or with signs that LaTeX has names for."""
    text = _UNIT.sub("", text.strip())
    for pattern, there in _WAYS_TO_WRITE:
        text = re.sub(pattern, there, text)
    return text


def readable(truths):
    """Whether math-verify can read each Truth, which is an expression."""
    answers = _ask([(truth.latex, None) for truth in truths])
    return [answers[truth.latex, None] for truth in truths]


def equal(pairs):
    """Whether the answer of each text equals the Truth beside it.

    Args:
        pairs: (Truth, text).
    Returns:
        List of True and False.
    """
    found, asked = [], {}
    for index, (truth, text) in enumerate(pairs):
        part, number = final_part(text)
        if part is None:
            found.append(False)
        elif number is not None and truth.number is not None:
            found.append(number.same(truth.number))
        else:
            found.append(truth.words is not None and _words(part) == truth.words)
            if not found[-1] and truth.latex is not None and _may_be_read(part):
                asked[index] = truth.latex, _latex_of(number) if number else _latex(without_dollars(part))
    if asked and available():
        answers = _ask(asked.values())
        for index, question in asked.items():
            found[index] = answers[question]
    return found


def _ask(questions):
    """{(truth, answer or None): what math-verify says, as True or False}; False where it took too long."""
    if len(_known) > KEPT:
        _known.clear()
    new = [question for question in dict.fromkeys(questions) if question not in _known]
    if new:
        _known.update(zip(new, map(bool, _workers.ask(new)), strict=True))
    return _known
