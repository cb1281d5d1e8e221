"""Published formats: rows in their layout (the text is invented) become these rows in our fields, written by hand."""

import pytest

from rlhf.data import formats
from rlhf.data.files import DataError


def convert(kind, *raws, column_map=None, data_format="auto"):
    """(name of the format, rows) of raw rows."""
    made = formats.conversion(kind, column_map, data_format, raws)
    if made.whole:
        found = list(made.whole((f"f:{number}", raw) for number, raw in enumerate(raws, 1)))
        return made.name, [row for _, row in found]
    return made.name, [row for raw in raws for row in made.each(raw)]


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def system(content):
    return {"role": "system", "content": content}


HH = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: A bird?\n\nAssistant: An owl.",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: A bird?\n\nAssistant: An ow",
}
HH_PROMPT = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: A bird?\n\nAssistant:"
ULTRAFEEDBACK = {
    "source": "invented",
    "instruction": "A bird?",
    "models": ["a", "b", "c", "d"],
    "completions": [
        {"annotations": {}, "model": "a", "response": "Owl.", "overall_score": 7.5, "fine-grained_score": 1.0},
        {"annotations": {}, "model": "b", "response": "Mud.", "overall_score": 2, "fine-grained_score": 4.0},
        {"annotations": {}, "model": "c", "response": "Elk.", "overall_score": 2, "fine-grained_score": 2.0},
        {"annotations": {}, "model": "d", "response": "Jay.", "overall_score": 8, "fine-grained_score": 3.0},
    ],
    "correct_answers": ["None"],
    "incorrect_answers": ["None"],
}
ULTRAFEEDBACK_LISTS = {
    "instruction": "A bird?",
    "completions": {"model": ["a", "b"], "response": ["Owl.", "Mud."], "overall_score": [7.5, 2]},
}
NECTAR = {
    "prompt": "\n\nHuman: A bird?\n\nAssistant: ",
    "answers": [
        {"answer": "Mud.", "model": "a", "rank": 3.0},
        {"answer": "Owl.", "model": "b", "rank": 1.0},
        {"answer": "Elk.", "model": "c", "rank": 2.0},
    ],
    "turns": 1,
    "num_responses": 3,
    "source": ["invented"],
    "good_natured": True,
}
SHAREGPT = {
    "id": "x1",
    "conversations": [{"from": "human", "value": "A bird?"}, {"from": "gpt", "value": "An owl."}],
}
ALPACA = {"instruction": "Name one.", "input": "A bird.", "output": "An owl.", "text": "all of it"}
DOLLY = {"instruction": "Which bird?", "context": "Owls are birds.", "response": "Owls.", "category": "closed_qa"}
QUESTION_ANSWER = {"question": "500 and 600?", "answer": "Add: <<500+600=1100>>1,100.\n#### 1,100"}

EXPECTED = [
    ("hh-rlhf", HH, "ranked", [{"prompt": HH_PROMPT, "completions": [" An owl.", " An ow"], "ranks": [0, 1]}]),
    ("hh-rlhf", HH, "preference", [{"prompt": HH_PROMPT, "chosen": " An owl.", "rejected": " An ow"}]),
    ("hh-rlhf", HH, "sft", [{"prompt": HH_PROMPT, "completion": " An owl."}]),
    ("hh-rlhf", HH, "prompts", [{"prompt": HH_PROMPT}]),
    (
        "hh-rlhf",
        HH,
        "unpaired",
        [
            {"prompt": HH_PROMPT, "completion": " An owl.", "label": True},
            {"prompt": HH_PROMPT, "completion": " An ow", "label": False},
        ],
    ),
    (
        "ultrafeedback",
        ULTRAFEEDBACK,
        "ranked",
        [{"prompt": "A bird?", "completions": ["Owl.", "Mud.", "Elk.", "Jay."], "scores": [7.5, 2, 2, 8]}],
    ),
    ("ultrafeedback", ULTRAFEEDBACK, "preference", [{"prompt": "A bird?", "chosen": "Jay.", "rejected": "Mud."}]),
    ("ultrafeedback", ULTRAFEEDBACK, "sft", [{"prompt": "A bird?", "completion": "Jay."}]),
    (
        "ultrafeedback",
        ULTRAFEEDBACK,
        "prompts",
        [{"source": "invented", "instruction": "A bird?", "prompt": "A bird?"}],
    ),
    (
        "ultrafeedback",
        ULTRAFEEDBACK_LISTS,
        "ranked",
        [{"prompt": "A bird?", "completions": ["Owl.", "Mud."], "scores": [7.5, 2]}],
    ),
    (
        "nectar",
        NECTAR,
        "ranked",
        [{"prompt": NECTAR["prompt"], "completions": ["Mud.", "Owl.", "Elk."], "ranks": [3.0, 1.0, 2.0]}],
    ),
    ("nectar", NECTAR, "preference", [{"prompt": NECTAR["prompt"], "chosen": "Owl.", "rejected": "Mud."}]),
    ("sharegpt", SHAREGPT, "sft", [{"messages": [user("A bird?"), assistant("An owl.")]}]),
    ("alpaca", ALPACA, "sft", [{"prompt": "Name one.\n\nA bird.", "completion": "An owl."}]),
    ("alpaca", {**ALPACA, "input": ""}, "sft", [{"prompt": "Name one.", "completion": "An owl."}]),
    ("dolly", DOLLY, "sft", [{"prompt": "Which bird?\n\nOwls are birds.", "completion": "Owls."}]),
    (
        "question-answer",
        QUESTION_ANSWER,
        "sft",
        [{"prompt": "500 and 600?", "completion": QUESTION_ANSWER["answer"]}],
    ),
    (
        "question-answer",
        QUESTION_ANSWER,
        "prompts",
        [{"question": "500 and 600?", "prompt": "500 and 600?", "answer": "1100"}],
    ),
]


@pytest.mark.parametrize(("name", "raw", "kind", "rows"), EXPECTED)
def test_rows(name, raw, kind, rows):
    assert convert(kind, raw) == (name, rows)
    assert convert(kind, raw, data_format=name) == (name, rows)


@pytest.mark.parametrize(("name", "raw"), [(name, raw) for name, raw, _, _ in EXPECTED])
def test_rows_are_of_one_format_alone(name, raw):
    assert [format.name for format in formats.FORMATS.values() if format.detect(raw)] == [name]


def test_a_format_that_does_not_hold_the_kind():
    with pytest.raises(DataError, match="data_format: alpaca holds rows of the kind sft, prompts, not ranked"):
        convert("ranked", ALPACA)
    with pytest.raises(DataError, match="data_format: alpaca holds rows of the kind sft, prompts, not ranked"):
        convert("ranked", {}, data_format="alpaca")


def test_an_unknown_format():
    with pytest.raises(ValueError, match="data_format: got 'alpaka', wants auto, own, ultrafeedback, nectar"):
        convert("sft", ALPACA, data_format="alpaka")
    assert convert("sft", ALPACA, data_format="Alpaca")[0] == "alpaca"


OWN = [
    ("sft", {"messages": [user("a"), assistant("b")], "question": "q", "answer": "a"}),
    ("sft", {"prompt": "a", "completion": "b", "instruction": "i", "output": "o"}),
    ("sft", {"text": "a"}),
    ("ranked", {"prompt": "a", "completions": ["b", "c"], "ranks": [0, 1], "answers": [{"answer": "b", "rank": 1}]}),
    ("ranked", {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "c"}),
    ("unpaired", {"prompt": [user("a")], "completion": [assistant("b")], "label": True}),
    ("prompts", {"prompt": "a", "answer": "b"}),
    ("text", {"text": "a"}),
]


@pytest.mark.parametrize(("kind", "raw"), OWN)
def test_our_own_fields_win(kind, raw):
    assert convert(kind, raw) == (None, [raw])
    assert convert(kind, raw, data_format="own") == (None, [raw])
