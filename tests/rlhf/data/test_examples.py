"""Encoded rows in arrays: they read as the dicts that went in, and are named by what they hold."""

import pytest

from rlhf.data.examples import Examples, Packer

DICTS = [
    {"prompt": [5, 0], "responses": [[7, 8, 0]], "row": {"prompt": "a", "at": "x:1"}},
    {
        "prompt": [70000],
        "responses": [[1, 0, 3, 4], [2]],
        "learned": [[True, False, False, True], None],
        "row": {"prompt": "b", "at": "x:2"},
    },
    {"prompt": [9], "responses": [[6]], "row": {"text": "c", "at": "x:3"}},
]


def test_examples_read_as_the_dicts_that_they_were_made_from():
    examples = Examples.of(DICTS)
    assert list(examples) == DICTS and examples[-1] == DICTS[2] and examples[1:] == DICTS[1:]
    assert all(type(token) is int for ids in examples[1]["responses"] for token in ids)
    assert examples.arrays.tokens.values.nbytes == 4 * sum(
        len(row["prompt"]) + sum(map(len, row["responses"])) for row in DICTS
    )
    assert examples.lengths.tolist() == [5, 5, 2] and examples.prompt_lengths.tolist() == [2, 1, 1]
    assert examples.is_text.tolist() == [False, False, True] and examples.largest_id == 70000
    assert Examples.of(examples) is examples
    with pytest.raises(IndexError):
        examples[3]
    assert list(Examples.of([])) == [] and Examples.of([]).largest_id == -1


def test_a_mask_with_nothing_left_out_is_none():
    (example,) = Examples.of([{"prompt": [1], "responses": [[2, 3]], "learned": [[True, True]], "row": {}}])
    assert "learned" not in example


def test_further_entries():
    examples = Examples.of(DICTS)
    examples.add("ref_log_probs", [[-1.5, 2.0], [0.25, 0.5], [3.0, 4.0]])
    assert examples[1]["ref_log_probs"] == [0.25, 0.5] and examples[0] == {**DICTS[0], "ref_log_probs": [-1.5, 2.0]}
    with pytest.raises(ValueError, match="margin: got 2 values for 3 examples"):
        examples.add("margin", [1, 2])


def test_the_digest_names_ids_masks_and_rows_and_not_their_place():
    def digest(number=0, **changes):
        rows = [dict(row) for row in DICTS]
        rows[number].update(changes)
        return Examples.of(rows).digest()

    assert digest(row={"prompt": "a", "at": "elsewhere:7"}) == digest()
    others = [
        digest(row={"prompt": "z", "at": "x:1"}),
        digest(prompt=[5, 1]),
        digest(prompt=[5], responses=[[0, 7, 8, 0]]),  # the same ids, cut elsewhere
        digest(learned=[[True, True, False]]),
        Examples.of(DICTS[::-1]).digest(),
        digest(),
    ]
    assert len(set(others)) == len(others)


def test_pairs_of_a_ranking_that_lost_a_completion():
    """Completion 1 of 4 did not fit: the pairs are those of 0, 2 and 3, with their own margins."""
    margins = [[10 * i + j for j in range(4)] for i in range(4)]
    row = {"prompt": "p", "completions": list("abcd"), "ranks": [0, 1, 2, 3], "margins": margins, "at": "x:1"}
    packer = Packer()
    packer.add(0, [1], [[10], [12], [13]], places=[0, 2, 3])
    examples = Examples([row], packer.arrays())
    assert examples[0]["row"]["completions"] == ["a", "c", "d"] and examples[0]["row"]["margins"][1] == [20, 22, 23]
    pairs = list(examples.pairs())
    assert [pair["responses"] for pair in pairs] == [[[10], [12]], [[10], [13]], [[12], [13]]]
    assert [pair["row"]["completions"] for pair in pairs] == [["a", "c"], ["a", "d"], ["c", "d"]]
    assert [pair["row"]["margins"][0][1] for pair in pairs] == [2, 3, 23]
    assert all(pair["prompt"] == [1] for pair in pairs)
