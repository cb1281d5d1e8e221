"""Ranked rows: their optional fields, a ranking cut down, and a ranking taken apart into pairs."""

import pytest
import torch

from rlhf import data
from rlhf.data import rankings
from rlhf.data.examples import Examples
from tests.tiny import write_jsonl

ROW = {"prompt": "a", "completions": ["b", "c", "d"], "ranks": [0, 1, 1]}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
MATRIX = [[0, 1.5, 2], [0, 0, 0.5], [0, 0.25, 0]]


def load(tmp_path, *rows):
    return data.load_rows(write_jsonl(tmp_path / "rows.jsonl", rows), "ranked")


BAD = [
    ({**ROW, "weight": 0}, "`weight` must be a finite number above 0, got 0"),
    ({**ROW, "weight": -1.5}, "`weight` must be a finite number above 0, got -1.5"),
    ({**ROW, "weight": "heavy"}, "`weight` must be a finite number above 0, got 'heavy'"),
    ({**ROW, "weight": True}, "`weight` must be a finite number above 0, got True"),
    ('{"prompt": "a", "completions": ["b", "c"], "ranks": [0, 1], "weight": Infinity}', "above 0, got inf"),
    ({**PAIR, "weight": 0}, "`weight` must be a finite number above 0, got 0"),
    ({**PAIR, "margin": "much"}, "`margin` must be a finite number, got 'much'"),
    ('{"prompt": "a", "chosen": "b", "rejected": "c", "margin": NaN}', "`margin` must be a finite number, got nan"),
    ({**ROW, "margin": 1, "margins": MATRIX}, "`margin` and `margins` are both given"),
    ({**ROW, "margins": 1}, "`margins` must be 3 lists of 3 numbers"),
    ({**ROW, "margins": MATRIX[:2]}, "`margins` must be 3 lists of 3 numbers"),
    ({**ROW, "margins": [*MATRIX[:2], [1, 2]]}, "`margins` must be 3 lists of 3 numbers, got [1, 2]"),
    ({**ROW, "margins": [*MATRIX[:2], [1, 2, None]]}, "`margins` must hold finite numbers, got None"),
    ({**ROW, "labeler": 7}, "`labeler` must be a string that is not empty, got 7"),
    ({**PAIR, "labeler": " "}, "`labeler` must be a string that is not empty, got ' '"),
    ({**ROW, "pairs": "0>1"}, "`pairs` must be a list of pairs [better, worse], got str"),
    ({**ROW, "pairs": [[0, 1, 2]]}, "`pairs` must hold pairs [better, worse] of indices of completions, got [0, 1, 2]"),
    ({**ROW, "pairs": [[0, 1.0]]}, "of indices of completions, got [0, 1.0]"),
    ({**ROW, "pairs": [[0, 3]]}, "`pairs` must hold two different indices from 0 to 2, got [0, 3]"),
    ({**ROW, "pairs": [[0, -1]]}, "two different indices from 0 to 2, got [0, -1]"),
    ({**ROW, "pairs": [[1, 1]]}, "two different indices from 0 to 2, got [1, 1]"),
    ({**ROW, "pairs": [[0, 1], [1, 0]]}, "`pairs` must decide each pair once, got [1, 0] a second time"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_bad_field_is_named_by_file_and_line(tmp_path, row, reason):
    with pytest.raises(data.DataError) as caught:
        load(tmp_path, ROW, PAIR, row)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/rows.jsonl:3: ") and reason in message and "\n" not in message


def test_fields_are_normalised(tmp_path):
    fields = {"weight": 2, "margins": MATRIX, "labeler": "ann", "pairs": [[0, 2], [2, 1]]}
    first, second, third, fourth = load(
        tmp_path,
        {**ROW, **fields},
        {**PAIR, "margin": 1, "weight": 0.5, "labeler": "bob", "pairs": "of another kind"},
        {**ROW, "margin": -1, "weight": None, "labeler": None},
        {**ROW, "ranks": [0.5, 2, 2]},
    )
    assert {name: first[name] for name in fields} == fields and first["ranks"] == [0, 1, 1]
    assert second["margins"] == [[1.0, 1.0], [1.0, 1.0]] and second["weight"] == 0.5 and second["labeler"] == "bob"
    assert "pairs" not in second and second["ranks"] == [0, 1]
    assert third["margins"] == [[-1.0] * 3] * 3 and not {"weight", "labeler", "margin"} & set(third)
    assert set(fourth) == {"prompt", "completions", "ranks", "at"}


def test_keep_cuts_all_fields_alike():
    row = {**ROW, "ranks": [0, 1, 2], "margins": MATRIX, "pairs": [[0, 1], [0, 2], [2, 1]], "weight": 2.0}
    kept = rankings.keep(row, [2, 0])
    assert kept["completions"] == ["d", "b"] and kept["ranks"] == [2, 0] and kept["weight"] == 2.0
    assert kept["margins"] == [[0, 0], [2, 0]]  # "d beats b", "b beats d"
    assert kept["pairs"] == [[1, 0]]  # b beats d


def test_decided_pairs():
    assert sorted(rankings.decided_pairs([1, 0, 1, 2])) == [(0, 3), (1, 0), (1, 2), (1, 3), (2, 3)]
    assert rankings.decided_pairs([3, 3]) == []


def test_apart_makes_every_pair_an_example():
    row = {**ROW, "margins": MATRIX, "weight": 2.0, "labeler": "ann"}
    example = {"prompt": [1], "responses": [[2], [3], [4]], "row": row}
    found = Examples.of([example]).pairs()
    assert [ex["responses"] for ex in found] == [[[2], [3]], [[2], [4]]]
    assert all(ex["row"]["ranks"] == [0, 1] and ex["row"]["weight"] == 2.0 and ex["prompt"] == [1] for ex in found)
    assert [ex["row"]["margins"][0][1] for ex in found] == [1.5, 2]
    with_ties = Examples.of([example]).pairs(ties=True)
    assert [ex["row"]["ranks"] for ex in with_ties] == [[0, 1], [0, 1], [1, 1]]


def test_tensors_of_a_batch():
    rows = [{**ROW, "margins": MATRIX, "weight": 0.5}, {**ROW, "completions": ["b", "c"], "ranks": [1, 0]}]
    found = rankings.tensors(rows)
    assert found["ranks"].tolist() == [0, 1, 1, 1, 0] and found["weights"].tolist() == [0.5, 1.0]
    assert torch.equal(found["margins"], torch.tensor([*MATRIX, [0, 0, 0], [0, 0, 0]], dtype=torch.float32))
    assert "margins" not in rankings.tensors(rows[1:])
    smaller_first = rankings.tensors(rows[::-1])["margins"]
    assert torch.equal(smaller_first, torch.tensor([[0, 0, 0], [0, 0, 0], *MATRIX], dtype=torch.float32))


def test_real_rankings_hold_judged_pairs(shared_data):
    rows = data.load_rows(shared_data / "rankings.jsonl", "ranked")
    judged = [(row["ranks"][i], row["ranks"][j]) for row in rows for i, j in row.get("pairs", ())]
    assert len(judged) == 2104 and all(better < worse for better, worse in judged)


def test_ranks_and_scores_must_agree(tmp_path):
    both = {**ROW, "scores": [9, 2, 2]}
    assert load(tmp_path, both)[0]["ranks"] == [0, 1, 1]
    assert load(tmp_path, {**both, "scores": [9, 2, 3]})[0]["ranks"] == [0, 1, 1]  # the scores are only finer
    for scores in ([2, 9, 2], [1, 2, 3]):
        with pytest.raises(
            data.DataError, match=r"rows\.jsonl:2: `ranks` .* and `scores` .* contradict each other: compl"
        ):
            load(tmp_path, both, {**both, "scores": scores})
    with pytest.raises(data.DataError, match="`scores` must be a list as long as"):
        load(tmp_path, {**both, "scores": [1]})


def test_numbers_may_be_written_as_strings(tmp_path):
    assert load(tmp_path, {**ROW, "ranks": ["2", " 10", "1.5"]})[0]["ranks"] == [1, 2, 0]
    for value in ("first", "nan", "inf", "", "1e999"):
        with pytest.raises(data.DataError, match=f"`ranks` must hold finite numbers, got '{value}'"):
            load(tmp_path, {**ROW, "ranks": ["1", "2", value]})
