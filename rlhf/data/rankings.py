"""A ranking of K completions: what its row may say beside the order, and its pairs.

Optional fields of a ranked row:

- `weight`: number > 0, how much the prompt counts; 1 without it.
- `margin`: number, the gap in score that the better completion of each pair must win by; 0 without it.
- `margins`: K x K numbers in place of `margin`; entry [i][j] is for the pair "i beats j". Other entries are not read.
- `labeler`: string, who ranked. Several rows may hold the same prompt, ranked by several labelers.
- `pairs`: [[i, j], ...], the pairs that the labeler judged one by one and decided: i beats j. They are measured on; the
  loss takes all pairs of the ranking, as the paper's does.
"""

import contextlib
import math
from itertools import combinations
from numbers import Real

OPTIONAL = ("weight", "margin", "margins", "labeler", "pairs")


def ranks_of(name, values, count):
    """Ranks 0, 1, ... (lower is better, equal is a tie) from a row's `ranks` (lower is better) or `scores` (higher is).

    Numbers may be written as strings.

    Raises:
        ValueError: no list of `count` finite numbers.
    """
    if not isinstance(values, list) or len(values) != count:
        got = f"{len(values)}" if isinstance(values, list) else type(values).__name__
        raise ValueError(f"`{name}` must be a list as long as `completions` ({count}), got {got}")
    numbers = [_number(value) for value in values]
    for number, value in zip(numbers, values):
        if not _is_finite(number):
            raise ValueError(f"`{name}` must hold finite numbers, got {value!r}")
    better_first = sorted(set(numbers), reverse=name == "scores")
    return [better_first.index(number) for number in numbers]


def _number(value):
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def ranks_of_row(raw, count):
    """Ranks of a row that holds `ranks`, `scores`, or both that say the same order.

    Raises:
        ValueError: what is wrong with one of them, or one puts above what the other puts below.
    """
    found = [ranks_of(name, raw[name], count) for name in ("ranks", "scores") if name in raw]
    for i, j in combinations(range(count), 2):
        if len(found) > 1 and (found[0][i] - found[0][j]) * (found[1][i] - found[1][j]) < 0:
            raise ValueError(
                f"`ranks` (lower is better) and `scores` (higher is better) contradict each other: completions {i} and "
                f"{j} have the ranks {raw['ranks'][i]} and {raw['ranks'][j]}, the scores {raw['scores'][i]} and "
                f"{raw['scores'][j]}; give one of the two"
            )
    return found[0]


def optional_fields(raw, count):
    """The optional fields that a row of `count` completions holds, checked; `margin` becomes `margins`. null is absent.

    Raises:
        ValueError: what is wrong with one of them.
    """
    given = {name: raw[name] for name in OPTIONAL if raw.get(name) is not None}
    found = {}
    if "weight" in given:
        if not _is_finite(given["weight"]) or given["weight"] <= 0:
            raise ValueError(f"`weight` must be a finite number above 0, got {given['weight']!r}")
        found["weight"] = float(given["weight"])
    if "margin" in given and "margins" in given:
        raise ValueError("`margin` and `margins` are both given; give one of them")
    if "margin" in given:
        if not _is_finite(given["margin"]):
            raise ValueError(f"`margin` must be a finite number, got {given['margin']!r}")
        found["margins"] = [[float(given["margin"])] * count for _ in range(count)]
    if "margins" in given:
        found["margins"] = _margins(given["margins"], count)
    if "labeler" in given:
        if not isinstance(given["labeler"], str) or not given["labeler"].strip():
            raise ValueError(f"`labeler` must be a string that is not empty, got {given['labeler']!r}")
        found["labeler"] = given["labeler"]
    if "pairs" in given:
        found["pairs"] = _judged_pairs(given["pairs"], count)
    return found


def _is_finite(value):
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _margins(rows, count):
    if not isinstance(rows, list) or len(rows) != count:
        raise ValueError(f"`margins` must be {count} lists of {count} numbers, one for each pair (a number: `margin`)")
    for row in rows:
        if not isinstance(row, list) or len(row) != count:
            raise ValueError(f"`margins` must be {count} lists of {count} numbers, got {row!r} as one of them")
        for value in row:
            if not _is_finite(value):
                raise ValueError(f"`margins` must hold finite numbers, got {value!r}")
    return [[float(value) for value in row] for row in rows]


def _judged_pairs(pairs, count):
    if not isinstance(pairs, list):
        raise ValueError(f"`pairs` must be a list of pairs [better, worse], got {type(pairs).__name__}")
    seen = set()
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(type(index) is int for index in pair):
            raise ValueError(f"`pairs` must hold pairs [better, worse] of indices of completions, got {pair!r}")
        if pair[0] == pair[1] or not all(0 <= index < count for index in pair):
            raise ValueError(f"`pairs` must hold two different indices from 0 to {count - 1}, got {pair!r}")
        if frozenset(pair) in seen:
            raise ValueError(f"`pairs` must decide each pair once, got {pair!r} a second time")
        seen.add(frozenset(pair))
    return pairs


def keep(row, kept):
    """A ranked row with only the completions at the indices `kept`, and what belongs to them; ranks keep their gaps."""
    row = {**row, **{name: [row[name][index] for index in kept] for name in ("completions", "ranks")}}
    if "margins" in row:
        row["margins"] = [[row["margins"][i][j] for j in kept] for i in kept]
    if "pairs" in row:
        place = {index: position for position, index in enumerate(kept)}
        row["pairs"] = [[place[i], place[j]] for i, j in row["pairs"] if i in place and j in place]
    return row


def best(row):
    """The best-ranked completion of a ranked row (the first of several), as a demonstration."""
    number = row["ranks"].index(min(row["ranks"]))
    return {"prompt": row["prompt"], "completion": row["completions"][number], "at": row["at"]}


def decided_pairs(ranks):
    """[(better, worse), ...], the index pairs of all completions that are not tied."""
    ordered = (sorted(pair, key=lambda index: ranks[index]) for pair in combinations(range(len(ranks)), 2))
    return [(better, worse) for better, worse in ordered if ranks[better] != ranks[worse]]


def tensors(rows):
    """`ranks` [S] int64, `weights` [P] fp32 and, if any row has some, `margins` [S, K] fp32 of P rows in a batch."""
    import torch

    found = {
        "ranks": torch.tensor([rank for row in rows for rank in row["ranks"]], dtype=torch.int64),
        "weights": torch.tensor([row.get("weight", 1.0) for row in rows], dtype=torch.float32),
    }
    if any("margins" in row for row in rows):
        largest = max(len(row["ranks"]) for row in rows)
        found["margins"] = torch.zeros(len(found["ranks"]), largest, dtype=torch.float32)
        start = 0
        for row in rows:
            count = len(row["ranks"])
            if "margins" in row:
                found["margins"][start : start + count, :count] = torch.tensor(row["margins"], dtype=torch.float32)
            start += count
    return found
