"""Before anything is trained: which rows of the data the reward functions can use.

A reward function may offer `check(row)`, as an attribute or a method, called once for each row of the data, a dict of
its columns and `prompt`. It raises a ValueError that says why the function cannot use the row, which is then an error
by file and line or, with `--bad_rows skip`, left out; or NoReward where it will give None for the row, so that another
function must reward it. `functools.partial` is looked through.
"""

import functools
import logging

from ..data.problems import Problems, by_reason

logger = logging.getLogger("rlhf")


class NoReward(ValueError):
    """A function will give None for a row, and why."""


class NoColumn(NoReward):
    """The same, for want of a column."""


def results(functions, rows):
    """What the `check` of each function that has one says of each row: {name: list of None or the exception}."""
    found = {name: _checked(function, rows) for name, function in functions.items()}
    return {name: said for name, said in found.items() if said is not None}


def _checked(function, rows):
    fixed = {}
    while isinstance(function, functools.partial):
        function, fixed = function.func, {**function.keywords, **fixed}
    rows = ({**fixed, **row} for row in rows)
    if hasattr(function, "check_rows"):
        return function.check_rows(rows)
    check = getattr(function, "check", None)
    return [_outcome(check, row) for row in rows] if callable(check) else None


def _outcome(check, row):
    """None where `check(row)` has nothing to say against the row, else its exception."""
    try:
        check(row)
    except ValueError as error:
        return error
    except Exception as error:
        return ValueError(f"its check raised {type(error).__name__}: {error}")
    return None


def unusable(functions, found, rows, *, has_reward_model=False):
    """Which rows cannot be used, as {index: reason}; tells in which others a function says nothing.

    Args:
        functions: {name: function}.
        found: their `results`.
        rows: dicts with `at`.
        has_reward_model: whether a reward model scores each row.
    Raises:
        ValueError: no row at all has the column that a function reads.
    """
    for name, said in found.items():
        if said and all(isinstance(error, NoColumn) for error in said):
            raise ValueError(f"{name}: the data have no column {said[0]}")
    bad = {}
    for index in sorted({index for said in found.values() for index, error in enumerate(said) if error is not None}):
        errors = {name: said[index] for name, said in found.items() if said[index] is not None}
        wrong = {name: error for name, error in errors.items() if not isinstance(error, NoReward)}
        if wrong or (len(errors) == len(functions) and not has_reward_model):
            bad[index] = "; ".join(f"{name}: {_reason(error)}" for name, error in (wrong or errors).items())
            bad[index] += "" if wrong else ", and nothing else rewards the row"
    for name, said in found.items():
        silent = [i for i, error in enumerate(said) if type(error) is NoReward and i not in bad]
        if silent:
            lines = by_reason([(rows[index]["at"], str(said[index])) for index in silent])
            logger.warning("%s says nothing about %d of %d rows:\n%s", name, len(silent), len(rows), "\n".join(lines))
    return bad


def usable(functions, rows, bad_rows="error", *, has_reward_model=False):
    """The rows that the functions can use; the others are an error, or left out.

    Raises:
        DataError: rows that cannot be used, by file and line; under "skip" only if nothing else is left.
        ValueError: no row at all has the column that a function reads.
    """
    bad = unusable(functions, results(functions, rows), rows, has_reward_model=has_reward_model)
    problems = Problems(bad_rows)
    for index, reason in bad.items():
        problems.add(rows[index]["at"], reason)
    problems.settle(len(rows))
    return [row for index, row in enumerate(rows) if index not in bad] if bad else rows


def _reason(error):
    return f"the row has no {error}" if isinstance(error, NoColumn) else str(error)
