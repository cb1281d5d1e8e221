"""Rewards that check a response instead of judging it: a math answer, a pattern, a JSON schema, a unit test.

Each is a reward function of `rlhf ppo --reward_function NAME` and of `PPOTrainer(reward_fn=...)`:

    f(prompts, completions, completion_ids, **columns) -> list of float or None

prompts (strings or lists of messages), completions (strings, without special tokens) and completion_ids (lists of ids,
stop token included) are lists of one entry a response; each further column of the data is a list like them. None means
that this function says nothing about that response. For other settings than the defaults use functools.partial.
"""

import importlib.util
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

from .sandbox import run_checks, run_python

__all__ = ["BUILT_IN", "json_schema", "math_answer", "regex", "unit_test"]

MAX_DIGITS = 200
"""A longer number is none: exact arithmetic on what a model can write must not take long."""

_VALUE = r"(?:\d{1,3}(?:,\d{3})+(?!,?\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w.)\]}}%])[-+])?(?:[$€£](?P<minus>-)?)?(?<![A-Za-z_\d.])"
    rf"(?:(?P<whole>\d+)[ ](?=\d+/\d))?(?P<top>{_VALUE})(?P<exponent>[eE][-+]?\d{{1,2}}(?!\d))?"
    rf"(?:[ ]?/[ ]?(?P<bottom>{_VALUE}))?"
)
_LATEX = ((r"\{,\}", ","), (r"\\[,!]", ""), (r"\\[ ;:]|\\quad", " "), (r"\\([$%])", r"\1"), ("−", "-"))
_FRACTION = re.compile(r"(\d?)\s*\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_WORDS = re.compile(r"\\(?:text|textbf|mathrm|mbox)\s*\{[^{}]*\}")


def math_answer(prompts, completions, completion_ids, *, answer=None, **columns):
    """1.0 for each completion whose final number equals the answer, else 0.0.

    The final number is what stands in the last \\boxed{...}; else the first number after the last ####, as in GSM8K;
    else the last number of the text. Commas between thousands, currency and percent signs and LaTeX spacing do not
    count (so 50% is 50, not 1/2); 3/4, \\frac{3}{4}, 1 1/2, 0.75, .75, 7.50e-1 are read as the exact numbers that they
    are, and compared so. A number in an identifier (x2, H2O), a sign after an operand (5-3), and a box that holds more
    than one number, perhaps with a unit (3\\sqrt{2}), do not count.

    Args:
        answer: column of numbers, or of strings that hold one by the same rules; None says nothing about that row.
    Returns:
        List of 1.0, 0.0 or None.
    Raises:
        ValueError: there is no column `answer`, or an entry of it is not a number.
    Example:
        >>> completions = ["6 * 7 = 42.", "So \\\\boxed{42.0}, not 41", "41"]
        >>> math_answer(["What is 6 * 7?"] * 3, completions, [[], [], []], answer=["42"] * 3)
        [1.0, 1.0, 0.0]
    """
    answers = _column("math_answer", "answer", answer, len(completions))
    expected = [None if entry is None else _expected(entry) for entry in answers]
    pairs = zip(completions, expected, strict=True)
    return [None if want is None else float(final_number(text) == want) for text, want in pairs]


def final_number(text):
    """The number that a text ends up with, by the rules of `math_answer`, as a Fraction; None if there is none.

    Example:
        >>> final_number("She pays $1,250.50."), final_number("x = -\\\\frac{3}{4}"), final_number("none")
        (Fraction(2501, 2), Fraction(-3, 4), None)
    """
    text = _plain(text)
    box = _last_box(text)
    if box is not None:
        return _only_number(box)
    _, mark, tail = text.rpartition("####")
    if mark:
        found = _NUMBER.search(tail)
        return None if found is None else _value(found)
    found = list(_NUMBER.finditer(text))
    return _value(found[-1]) if found else None


def _last_box(text):
    """What stands in the last \\boxed{...} or \\fbox{...} whose braces match; None if there is none."""
    for start in reversed([found.end() for found in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)]):
        depth = 1
        for end in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[start:end]
    return None


def _only_number(text):
    """The number that is all of a text but for a name before =, and a unit; None if there is anything else."""
    text = _WORDS.sub(" ", text).rpartition("=")[2].strip()
    found = _NUMBER.match(text)
    return _value(found) if found and re.fullmatch(r"\s*[%°]?\s*[A-Za-z ]*\.?", text[found.end() :]) else None


def _value(found):
    """The Fraction that a match of _NUMBER stands for; None for one over 0 or with too many digits."""
    if len(found[0]) > MAX_DIGITS:
        return None
    top, bottom = (Fraction((found[name] or "1").replace(",", "")) for name in ("top", "bottom"))
    if bottom == 0:
        return None
    if found["exponent"]:
        top *= Fraction(10) ** int(found["exponent"][1:])
    number = int(found["whole"] or 0) + top / bottom
    return -number if "-" in (found["sign"], found["minus"]) else number


def _expected(entry):
    text = str(entry)
    number = final_number(text) if "####" in text or "\\boxed" in text else _only_number(_plain(text))
    if isinstance(entry, bool) or number is None:
        raise ValueError(f"answer: got {entry!r}, want a number")
    return number


def _plain(text):
    """The text without LaTeX around its numbers; \\frac{a}{b} becomes a/b, and 1\\frac{a}{b} becomes 1 a/b."""
    for pattern, plain in _LATEX:
        text = re.sub(pattern, plain, text)
    return _FRACTION.sub(lambda found: f"{found[1] + ' ' if found[1] else ''}{found[2]}/{found[3]}", text)


def regex(prompts, completions, completion_ids, *, pattern=None, time_limit_s=1.0, **columns):
    """1.0 for each completion in which the pattern is found anywhere, else 0.0.

    The search runs in a process of its own; one that backtracks beyond the time limit is stopped and counts 0.0.

    Args:
        pattern: column of regular expressions of Python's `re` (flags inside, as in (?s)), or one string for all rows;
            None says nothing about that row.
        time_limit_s: > 0, seconds for a row.
    Returns:
        List of 1.0, 0.0 or None.
    Raises:
        ValueError: there is no column `pattern`, or an entry of it is not a regular expression.
        SandboxError: this machine cannot confine a process (`rlhf/rewards/sandbox.py`).
    Example:
        >>> regex(["Yes or no?"] * 2, ["Yes.", "Perhaps"], [[], []], pattern=r"^(Yes|No)\\b")
        [1.0, 0.0]
    """
    patterns = _column("regex", "pattern", pattern, len(completions))
    return _checked("regex", "pattern", completions, patterns, time_limit_s)


def json_schema(prompts, completions, completion_ids, *, schema=None, time_limit_s=1.0, **columns):
    """1.0 for each completion that is one JSON value, and nothing else but white space, which fits the schema.

    NaN and Infinity are not JSON. Parsing and checking run in a process of its own, without network: a schema can
    only refer to itself. A check beyond the time limit counts 0.0.

    Args:
        schema: column of JSON schemas (dicts, or strings of JSON), or one dict for all rows; None says nothing about
            that row. The schema's own `$schema` says which draft it follows.
        time_limit_s: > 0, seconds for a row.
    Returns:
        List of 1.0, 0.0 or None.
    Raises:
        ValueError: there is no column `schema`, or an entry of it is not a JSON schema; or the package jsonschema is
            missing.
        SandboxError: this machine cannot confine a process (`rlhf/rewards/sandbox.py`).
    Example:
        >>> schema = {"type": "object", "required": ["age"], "properties": {"age": {"type": "integer"}}}
        >>> json_schema(["Age?"] * 3, ['{"age": 7}', '{"age": "seven"}', "seven"], [[], [], []], schema=schema)
        [1.0, 0.0, 0.0]
    """
    if importlib.util.find_spec("jsonschema") is None:
        raise ValueError("json_schema: needs the package jsonschema (pip install 'rlhf-kernels[rewards]')")
    schemas = []
    for entry in _column("json_schema", "schema", schema, len(completions)):
        try:
            schemas.append(json.loads(entry) if isinstance(entry, str) else entry)
        except ValueError as error:
            raise ValueError(f"schema: got {entry!r}, which is not JSON ({error})") from None
    return _checked("json_schema", "schema", completions, schemas, time_limit_s)


def unit_test(
    prompts, completions, completion_ids, *, test=None, time_limit_s=5.0, memory_limit_mb=512, workers=None, **columns
):
    """1.0 for each completion whose Python code runs and passes the row's test, else 0.0.

    The code is that of the completion's last fenced block marked python, else of its last fenced block, else all of
    it. Code and test run one after the other in one namespace, each response in a confined process of its own
    (`rlhf/rewards/sandbox.py` says what it cannot do, and what is not guaranteed). The test passes if its last line is
    reached: use `assert`; sys.exit(0) does not pass. With unittest:
    `assert unittest.main(exit=False).result.wasSuccessful()`.

    Args:
        test: column of Python sources, or one string for all rows; None says nothing about that row.
        time_limit_s: > 0, seconds of wall-clock time for a row. A machine under load is slower: leave room.
        memory_limit_mb: > 0, MiB of address space for a row.
        workers: processes at a time; None = one for each CPU that this process may use.
    Returns:
        List of 1.0, 0.0 or None.
    Raises:
        ValueError: there is no column `test`, or a limit is not positive.
        SandboxError: this machine cannot confine a process.
    Example:
        >>> completions = ["```python\\ndef double(x):\\n    return 2 * x\\n```", "double = lambda x: x"]
        >>> unit_test(["Double a number."] * 2, completions, [[], []], test="assert double(4) == 8")
        [1.0, 0.0]
    """
    tests = _column("unit_test", "test", test, len(completions))

    def passes(text, source):
        if source is None:
            return None
        limits = {"time_limit_s": time_limit_s, "memory_limit_mb": memory_limit_mb}
        return float(run_python(python_code(text), source, **limits).passed)

    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(passes, completions, tests))


def python_code(text):
    """The code in a completion, by the rules of `unit_test`; a block that was never closed goes to the end.

    Example:
        >>> python_code("Try this:\\n```python\\nx = 1\\n```\\nIt prints\\n```\\n1\\n```")
        'x = 1\\n'
    """
    blocks = re.findall(r"^[ ]{0,3}```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ ]{0,3}```|\Z)", text, re.MULTILINE | re.DOTALL)
    marked = [code for language, code in blocks if language.lower() in ("python", "py", "python3")]
    return (marked or [code for _, code in blocks] or [text])[-1]


BUILT_IN = {function.__name__: function for function in (math_answer, regex, json_schema, unit_test)}
"""The rewards that `--reward_function` knows by name."""


def _column(function, name, entries, count):
    """A column of the data; where one value is given for all rows, that one `count` times."""
    if entries is None:
        raise ValueError(f"{function}: the data have no column `{name}`")
    return entries if isinstance(entries, (list, tuple)) else [entries] * count


def _checked(kind, name, completions, entries, time_limit_s):
    rows = [(text, entry) for text, entry in zip(completions, entries, strict=True) if entry is not None]
    results = iter(run_checks(kind, rows, row_time_limit_s=time_limit_s))
    scores = []
    for entry in entries:
        result = None if entry is None else next(results)
        if isinstance(result, str):
            raise ValueError(f"{name}: {result}")
        scores.append(None if entry is None else float(bool(result)))
    return scores
