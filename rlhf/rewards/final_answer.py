"""What a text of mathematics ends up with: the part that is its answer, and the number that it is, if it is one."""

import re
from fractions import Fraction
from typing import NamedTuple

from ..data.formats.maths import boxed

MAX_DIGITS = 200
"""A longer number is none: exact arithmetic on what a model can write must not take long."""

_VALUE = r"(?:\d{1,3}(?:,\d{3})+(?!,?\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w.)\]}}%])[-+])?(?:[$€£](?P<minus>-)?)?(?<![A-Za-z_\d.])"
    rf"(?:(?P<whole>\d+)[ ](?=\d+/\d))?(?P<top>{_VALUE})(?P<exponent>[eE][-+]?\d{{1,2}}(?!\d))?"
    rf"(?:[ ]?/[ ]?(?P<bottom>{_VALUE}))?(?P<percent>[ ]?%|[ ]?[Pp]ercent\b)?"
)
_LATEX = (
    (r"\{,\}", ","), (r"\\[,!]", ""), (r"\\[ ;:]|\\quad", " "), (r"\\([$%])", r"\1"), ("−", "-"),
    (r"(?<=\d)\s*(?:\\times|\\cdot|×|·)\s*10\s*\^\s*(?:\{\s*([-+−]?\d{1,2})\s*\}|(\d))(?!\d)", r"e\1\2"),
    (r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{\s*([-$\d.,/ ]*\d[\d.,/ %]*)\}", r"\1"),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ\b)", "°"),
)  # fmt: skip
_FRACTION = re.compile(r"(?:(\d)\s*)?\\[dt]?frac\s*(?:\{([^{}]*)\}\s*\{([^{}]*)\}|(\d)\s*(\d))")
_WORDS = re.compile(r"\\(?:text|textbf|mathrm|mbox)\s*\{[^{}]*\}")
_MARK = re.compile(r"####|\b(?i:answers?)\b\**(?:[^.\n:=]{0,60}?\bis\b|[ ]?[:=])")
_SENTENCE = re.compile(r"\.(?=\s|\**$)|[\n;]")
_FORMULA = re.compile(  # as in Markdown: a dollar beside a space, or before a digit, is money
    r"\$\$(.+?)\$\$|(?<![\\$\w])\$(?=[^\s$])((?:\\.|[^$\\\n])*?[^\s\\])\$(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL
)
_LINK = re.compile(r"\s*(?:,\s*)?(?:and|or)?\s*")
_TAIL = 4000
"""Characters at the end of a text in which a formula or a mark is looked for."""


class Number(NamedTuple):
    """A number as it stands in a text; 50 % is 50."""

    value: Fraction
    percent: bool

    def same(self, other):
        """Whether both are one number, where 50 % may stand for 50 and for 1/2."""
        if self.percent == other.percent:
            return self.value == other.value
        share, number = (self, other) if self.percent else (other, self)
        return number.value in (share.value, share.value / 100)


def final_part(text):
    """(part, number): the part of a text that is its answer, and the Number that it is; None for what there is not.

    The rules are those of `math_answer`.
    """
    box = boxed(text)
    if box is not None:
        return box, only_number(box)
    text = text[-_TAIL:]
    for mark in reversed(list(_MARK.finditer(text))):
        said = _said(text[mark.end() :])
        if said:
            return said, only_number(said) or _leading_number(said)
    formula = next(reversed([found for found in _FORMULA.finditer(text) if _is_formula(found)]), None)
    if formula and not _NUMBER.search(plain(text[formula.end() :])):
        return _inside(formula), only_number(_inside(formula))
    found = list(_NUMBER.finditer(plain(text)))
    return (found[-1][0], _value(found[-1])) if found else (None, None)


def final_number(text):
    """The number that a text ends up with, by the rules of `math_answer`, as a Fraction; None if there is none.

    Example:
        >>> final_number("She pays $1,250.50."), final_number("x = -\\\\frac{3}{4}"), final_number("none")
        (Fraction(2501, 2), Fraction(-3, 4), None)
    """
    number = final_part(text)[1]
    return None if number is None else number.value


def is_marked(text):
    """Whether a text says which part of it is its answer."""
    return boxed(text) is not None or _MARK.search(text) is not None


def _said(tail):
    """What stands behind a mark to the end of its sentence, without Markdown's stars.

    Of a formula, what is in it, and of formulas with "and", "or" or a comma between them; unless a number comes first.
    """
    tail = tail.lstrip(" \t\n:*=")
    end = _SENTENCE.search(tail)
    formula = _FORMULA.search(tail)
    if formula and (end is None or formula.start() < end.start()) and not _NUMBER.search(tail[: formula.start()]):
        parts = [_inside(formula)]
        while link := _LINK.match(tail, formula.end()):
            formula = _FORMULA.match(tail, link.end())
            if formula is None:
                break
            parts.append(_inside(formula))
        return ", ".join(parts)
    return tail[: end and end.start()].strip().rstrip("*.,;!? ")


def _inside(formula):
    return next(filter(None, formula.groups())).strip()


def _is_formula(found):
    return re.search(r"\d|\\[A-Za-z]|[-+*/=<>]", _inside(found)) is not None


def only_number(text):
    """The Number that is all of a text but for a name before =, and a unit; None if there is anything else."""
    text = _WORDS.sub(" ", plain(without_dollars(text))).rpartition("=")[2].strip()
    found = _NUMBER.match(text)
    return _value(found) if found and re.fullmatch(r"\s*°?\s*[A-Za-z ]*\.?", text[found.end() :]) else None


def _leading_number(text):
    """The first number of a sentence such as "12 apples, as 3 * 4 is 12", unless it is part of an expression."""
    text = plain(text)
    found = _NUMBER.search(text)
    if found is None or re.search(r"[^\w\s,:'$€£~*]", text[: found.start()]):
        return None
    return None if re.match(r"\w|\s*([-+*/^\\(=]|,\s*[-\d])", text[found.end() :]) else _value(found)


def _value(found):
    """The Number that a match of _NUMBER stands for; None for one over 0 or with too many digits."""
    if len(found[0]) > MAX_DIGITS:
        return None
    top, bottom = (Fraction((found[name] or "1").replace(",", "")) for name in ("top", "bottom"))
    if bottom == 0:
        return None
    if found["exponent"]:
        top *= Fraction(10) ** int(found["exponent"][1:])
    number = int(found["whole"] or 0) + top / bottom
    number = -number if "-" in (found["sign"], found["minus"]) else number
    return Number(number, found["percent"] is not None)


def without_dollars(text):
    """A formula without what stands around it."""
    text = text.strip()
    found = _FORMULA.fullmatch(text)
    return _inside(found) if found else text


def plain(text):
    """The text without LaTeX around its numbers; \\frac{a}{b} becomes a/b, and 1\\frac{a}{b} becomes 1 a/b."""
    for pattern, there in _LATEX:
        text = re.sub(pattern, there, text)

    def slash(found):
        top, bottom = (found[2], found[3]) if found[4] is None else (found[4], found[5])
        return f"{found[1] + ' ' if found[1] else ''}{top}/{bottom}"

    return _FRACTION.sub(slash, text)
