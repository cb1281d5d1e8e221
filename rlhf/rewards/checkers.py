"""Rewards that check a response instead of judging it: a math answer, a pattern, a JSON schema, a unit test.

Each is a reward function of `rlhf ppo --reward_function NAME` and of `PPOTrainer(reward_fn=...)`:

    f(prompts, completions, completion_ids, **columns) -> list of float or None

prompts (strings or lists of messages), completions (strings, without special tokens) and completion_ids (lists of ids,
stop token included) are lists of one entry a response; each further column of the data is a list like them. None means
that this function says nothing about that response. For other settings than the defaults use functools.partial. What
each has as `check` looks at a row's columns before anything is trained (`rlhf/rewards/row_checks.py`).
"""

import functools
import importlib.util
import json
import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor

from . import expressions
from .row_checks import NoColumn, NoReward
from .sandbox import run_checks, run_python

__all__ = ["BUILT_IN", "json_schema", "math_answer", "regex", "unit_test"]

_INSTALL = "(pip install 'rlhf-kernels[rewards]')"


def math_answer(prompts, completions, completion_ids, *, answer=None, solution=None, **columns):
    """1.0 for each completion whose final answer equals the row's, else 0.0.

    Of a completion counts what stands in the last \\boxed{...}; else what follows the last ####, "answer is" or
    "Answer:", to the end of its sentence; else the last number, or the formula between $ or \\( \\) around or after it.
    What was said or boxed before that does not count.

    Numbers are compared exactly: 3/4, \\frac{3}{4}, 1 1/2, 0.75, .75, 7.50e-1, 2 \\times 10^3 are read as the exact
    numbers that they are, so 0.333 is not 1/3. Commas between thousands, currency, degrees, units and LaTeX spacing do
    not count; 50 % is 50 and 1/2. A number in an identifier (x2, H2O) and a sign after an operand (5-3) are none.
    Expressions, equations, sets, intervals and matrices are compared by the package math-verify: x + 1 is 1 + x,
    2^{1/2} is \\sqrt{2}, decimals count to six places; more than 5 s of computing is 0.0. Words are answers in
    \\text{...}, a single letter (C) as it stands.

    Args:
        answer: column of numbers, or of strings: an answer, or a text that ends up with one by the same rules, as in
            GSM8K. None, and what cannot be read, says nothing about that row.
        solution: the same for rows without an answer, as MATH's solutions with their \\boxed{...}.
    Returns:
        List of 1.0, 0.0 or None.
    Raises:
        ValueError: there is neither column; or an answer is an expression, and math-verify is not installed.
        SandboxError: an answer is an expression, and this machine cannot confine a process (`rlhf/rewards/sandbox.py`).
    Example:
        >>> completions = ["6 * 7 = 42.", "So \\\\boxed{42.0}, not 41", "41"]
        >>> math_answer(["What is 6 * 7?"] * 3, completions, [[], [], []], answer=["42"] * 3)
        [1.0, 1.0, 0.0]
    """
    count = len(completions)
    if answer is None and solution is None:
        raise ValueError("math_answer: the data have no column `answer` or `solution`")
    given = [[None] * count if column is None else _spread(column, count) for column in (answer, solution)]
    truths = _truths([{"answer": first, "solution": second} for first, second in zip(*given, strict=True)])
    for truth in truths:
        if isinstance(truth, ValueError) and not isinstance(truth, NoReward):
            raise truth
    known = [isinstance(truth, expressions.Truth) for truth in truths]
    pairs = [pair for pair, is_known in zip(zip(truths, completions, strict=True), known) if is_known]
    equal = iter(expressions.equal(pairs))
    return [float(next(equal)) if is_known else None for is_known in known]


def _truths(rows):
    """Of each row what its answer is held against, or the exception that says why there is no such."""
    truths = []
    for row in rows:
        name = next((name for name in ("answer", "solution") if row.get(name) is not None), None)
        truth = expressions.truth_of(row[name]) if name else NoColumn("`answer` or `solution`")
        if truth is None:
            truth = _not_read(row, name)
        elif name and truth.is_expression and not expressions.available():
            what = f"{name}: got {_short(row[name])}, which is no number, and expressions need the package math-verify"
            truth = ValueError(f"{what} {_INSTALL}")
        truths.append(truth)
    asked = [index for index, truth in enumerate(truths) if getattr(truth, "is_expression", False)]
    for index, is_read in zip(asked, expressions.readable([truths[index] for index in asked]), strict=True):
        if not is_read:
            truths[index] = _not_read(rows[index], "answer" if rows[index].get("answer") is not None else "solution")
    return truths


def _not_read(row, name):
    return NoReward(f"{name}: got {_short(row[name])}, which cannot be read as a number or an expression")


def _short(value):
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-17:]}"


def _check_answers(rows):
    rows = [{name: row.get(name) for name in ("answer", "solution")} for row in rows]
    return [truth if isinstance(truth, ValueError) else None for truth in _truths(rows)]


math_answer.check_rows = _check_answers


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


def _check_pattern(row):
    pattern = _string(row, "pattern")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"pattern: {_short(pattern)} is not a regular expression ({error})") from None


regex.check = _check_pattern


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
    _needs_jsonschema()
    schemas = [_schema(entry) for entry in _column("json_schema", "schema", schema, len(completions))]
    return _checked("json_schema", "schema", completions, schemas, time_limit_s)


def _needs_jsonschema():
    if importlib.util.find_spec("jsonschema") is None:
        raise ValueError(f"json_schema: needs the package jsonschema {_INSTALL}")


def _schema(entry):
    try:
        return json.loads(entry) if isinstance(entry, str) else entry
    except (ValueError, RecursionError) as error:
        raise ValueError(f"schema: got {_short(entry)}, which is not JSON ({error})") from None


def _check_schema(row):
    _needs_jsonschema()
    schema = _schema(_given(row, "schema"))
    if not isinstance(schema, (dict, bool)):
        raise ValueError(f"schema: got {_short(schema)}, wants a JSON schema, which is an object, true or false")
    reason = _wrong_with_schema(json.dumps(schema))
    if reason:
        raise ValueError(f"schema: {reason}")


@functools.lru_cache(maxsize=1024)
def _wrong_with_schema(text):
    """What is wrong with a JSON schema, or None."""
    import jsonschema_specifications
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012, specification_with

    schema = json.loads(text)
    validator = validator_for(schema)
    try:
        validator.check_schema(schema)
        if isinstance(schema, dict):
            draft = validator.META_SCHEMA.get("$schema")
            resource = specification_with(draft, default=DRAFT202012).create_resource(schema)
            _resolve_references(resource, jsonschema_specifications.REGISTRY.resolver_with_root(resource))
    except (SchemaError, re.error, RecursionError) as error:
        return f"is not a JSON schema ({getattr(error, 'message', error)})"
    except Unresolvable as error:
        return f"refers to a schema that is not in it ({error})"
    return None


def _resolve_references(resource, resolver):
    """Raise Unresolvable for the first reference of a schema, or of one inside it, to what is not there."""
    if isinstance(resource.contents, dict) and isinstance(resource.contents.get("$ref"), str):
        resolver.lookup(resource.contents["$ref"])
    for inside in resource.subresources():
        _resolve_references(inside, resolver.in_subresource(inside))


json_schema.check = _check_schema


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


def _check_test(row):
    test = _string(row, "test")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(test, "test", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"test: is not Python ({type(error).__name__}: {error})") from None


unit_test.check = _check_test


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
    if entries is None:
        raise ValueError(f"{function}: the data have no column `{name}`")
    return _spread(entries, count)


def _spread(entries, count):
    """A column of the data; where one value is given for all rows, that one `count` times."""
    return entries if isinstance(entries, (list, tuple)) else [entries] * count


def _given(row, name):
    if row.get(name) is None:
        raise NoColumn(f"`{name}`")
    return row[name]


def _string(row, name):
    value = _given(row, name)
    if not isinstance(value, str):
        raise ValueError(f"{name}: got {_short(value)}, wants a string")
    return value


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
