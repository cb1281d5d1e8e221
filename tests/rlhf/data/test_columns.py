"""The language of --columns: what it reads out of a row, and what it says of maps and rows that do not fit."""

import pytest

from rlhf.data import columns
from rlhf.data.files import Bad

ROW = {
    "instruction": "Name a bird.",
    "input": "",
    "extra": "Only one.",
    "number": 3,
    "output": "An owl.",
    "turns": [{"text": "Hi", "by": {"id": "u1"}}, {"text": "Hello", "by": {"id": "u2"}}],
    "answers": {"text": ["A", "B"], "score": [1.5, 2]},
    "sets": [{"items": [{"n": 1}, {"n": 2}]}, {"items": [{"n": 3}]}],
    "a.b c": "odd",
    "nothing": None,
}


def read(where, row=ROW, field="prompt"):
    return columns.apply(columns.parse({field: where}), row)[field]


READ = [
    ("instruction", "Name a bird."),
    (" instruction ", "Name a bird."),
    ("turns[0].text", "Hi"),
    ("turns[-1].text", "Hello"),
    ("turns[].text", ["Hi", "Hello"]),
    ("turns.text", ["Hi", "Hello"]),
    ("turns[].by.id", ["u1", "u2"]),
    ("turns.by.id", ["u1", "u2"]),
    ("turns[]", ROW["turns"]),
    ("turns", ROW["turns"]),
    ("answers.text", ["A", "B"]),
    ("answers[].text", ["A", "B"]),
    ("answers[1].score", 2),
    ("answers[].score", [1.5, 2]),
    ("sets[].items[].n", [[1, 2], [3]]),
    ("sets[0].items.n", [1, 2]),
    ("`a.b c`", "odd"),
    ("instruction+extra", "Name a bird.\n\nOnly one."),
    ("instruction + input + extra", "Name a bird.\n\nOnly one."),
    ("input+instruction", "Name a bird."),
    ("instruction+absent", "Name a bird."),
    ("instruction+nothing", "Name a bird."),
    ("instruction+number", "Name a bird.\n\n3"),
    ("input+input", ""),
    ('"Question: "+instruction', "Question: Name a bird."),
    ('instruction+"\\nNote: "+extra', "Name a bird.\nNote: Only one."),
    ('instruction+"\\nNote: "+input', "Name a bird."),
    ('"A: "+input+"B: "+extra', "B: Only one."),
    ('instruction+" Be brief."', "Name a bird. Be brief."),
    ('extra+input+"!"', "Only one."),
    ('"+,=[]\\"" + instruction', '+,=[]"Name a bird.'),
    ("turns[0].text+turns[1].text", "Hi\n\nHello"),
]


@pytest.mark.parametrize(("where", "found"), READ)
def test_what_is_read(where, found):
    assert read(where) == found


def test_a_map_as_text_and_as_a_dict():
    text = 'prompt=instruction+input, completion="Answer: "+output'
    row = columns.apply(columns.parse(text), ROW)
    assert (row["prompt"], row["completion"]) == ("Name a bird.", "Answer: An owl.")
    assert columns.apply(columns.parse({"prompt": "instruction+input", "completion": '"Answer: "+output'}), ROW) == row


def test_other_columns_stay_but_for_those_that_would_count_instead():
    raw = {"messages": [], "text": "t", "tools": "[]", "weight": 2, "q": "Q", "a": "A", "id": 7}
    assert columns.apply(columns.parse("prompt=q,completion=a"), raw) == {
        "prompt": "Q", "completion": "A", "tools": "[]", "weight": 2, "q": "Q", "a": "A", "id": 7,
    }  # fmt: skip
    raw = {"prompt": "P", "chosen": "C", "rejected": "R", "scores": [1, 2], "out": ["x", "y"], "order": [0, 1]}
    assert columns.apply(columns.parse("completions=out,ranks=order"), raw) == {
        "prompt": "P", "completions": ["x", "y"], "ranks": [0, 1], "out": ["x", "y"], "order": [0, 1],
    }  # fmt: skip
    assert columns.apply(columns.parse("messages=prompt"), {"prompt": [1], "completion": "x"}) == {"messages": [1]}


def test_a_column_may_change_places_with_another():
    raw = {"chosen": "worse", "rejected": "better", "prompt": "P"}
    found = columns.apply(columns.parse("chosen=rejected,rejected=chosen"), raw)
    assert found == {"prompt": "P", "chosen": "better", "rejected": "worse"}


def test_optional_fields_may_be_missing_in_a_row():
    parsed = columns.parse("prompt=q,weight=w,labeler=who.name")
    assert columns.apply(parsed, {"q": "Q"}) == {"q": "Q", "prompt": "Q"}
    assert columns.apply(parsed, {"q": "Q", "w": 2, "who": {"name": "ann"}})["labeler"] == "ann"


LACKING = [
    ("answer", "lacks the column `answer` of --columns (has 'instruction', 'input'"),
    ("turns[0].words", "`turns[0]` lacks `words` of --columns (has 'text', 'by')"),
    ("turns[].by.name", "`turns[].by` lacks `name` of --columns (has 'id')"),
    ("turns[2].text", "`turns` has no entry [2] (has 2)"),
    ("turns[-3]", "`turns` has no entry [-3] (has 2)"),
    ("output[0]", "`output` must be a list, got str"),
    ("output[]", "`output` must be a list, got str"),
    ("output.text", "`output` lacks `text` of --columns (has str)"),
    ("absent+missing", "lacks the column `absent`"),
    ("instruction+turns", "`turns` must be a text to be joined to `prompt`, got list"),
]


@pytest.mark.parametrize(("where", "reason"), LACKING)
def test_a_row_that_lacks_it(where, reason):
    with pytest.raises(Bad) as caught:
        read(where)
    assert reason in str(caught.value)


WRONG = [
    ("prompt", "wants '=', got the end (character 7 of 'prompt')"),
    ("prompt=", "wants a column, got the end (character 8 "),
    ("prompt=a+,completion=b", "wants a column, got ',completion=' (character 10 "),
    ("prompt=a completion=b", "wants ',', got 'completion=b' (character 10 "),
    ("prompt=a,", "wants a field, got the end (character 10 "),
    ("=a", "wants a field, got '=a' (character 1 "),
    ("", "wants a field, got the end (character 1 "),
    ("prompt=a[x]", "wants [] or [number] (character 9 "),
    ("prompt=a.", "wants a name behind the dot, got the end (character 10 "),
    ('prompt="a', "wants text in double quotes"),
    ('prompt="a"', "'prompt' names no column (character 1 "),
    ("prompts=a", "'prompts' is no field of ours; there are prompt, completion, messages"),
    ("completion=a,prompt=b,prompt=c", "'prompt' is given twice (character 23 "),
]


@pytest.mark.parametrize(("text", "reason"), WRONG)
def test_a_map_that_cannot_be_read(text, reason):
    with pytest.raises(ValueError, match="columns: ") as caught:
        columns.parse(text)
    assert reason in str(caught.value)


def test_prompts_may_have_columns_of_any_name():
    parsed = columns.parse("prompt=q,answer=solution", "prompts")
    assert columns.apply(parsed, {"q": "1+1?", "solution": "2"})["answer"] == "2"
