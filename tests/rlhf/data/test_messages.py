"""Rows of messages: every field is kept, answers have one form, dialogues are split where the prompt ends."""

import json
import random

import pytest

from rlhf import data
from rlhf.data import Chat
from rlhf.data.rows import plain

SYSTEM, USER, MORE = ({"role": role, "content": text} for role, text in
                      (("system", "be good"), ("user", "hi"), ("user", "and now?")))  # fmt: skip
YO, BYE, NO = ({"role": "assistant", "content": text} for text in ("yo", "bye", "no"))
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "find"}}]}
FOUND = {"role": "tool", "content": "a rose", "tool_call_id": "x"}
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]


def read(kind, *rows):
    return [{k: v for k, v in row.items() if k != "at"} for row in data.rows_of(list(rows), kind, name="rows")]


def refused(kind, row):
    with pytest.raises(data.DataError) as caught:
        data.rows_of([row], kind, name="rows")
    message = str(caught.value)
    assert message.startswith("rows[0]: ") and "\n" not in message
    return message.removeprefix("rows[0]: ")


@pytest.mark.parametrize(
    ("messages", "opening"),
    [
        ([USER, YO], 1),
        ([SYSTEM, USER, YO, MORE, BYE], 2),
        ([YO, USER, BYE], 2),
        ([YO, USER, BYE, MORE, NO], 2),
        ([USER, CALL, FOUND, YO], 1),
        ([SYSTEM, YO, USER, BYE], 1),
    ],
)
def test_a_dialogue_is_what_comes_before_the_first_answer_and_the_rest(messages, opening):
    (row,) = read("sft", {"messages": messages})
    assert row == {"prompt": messages[:opening], "completion": messages[opening:]}
    assert isinstance(row["prompt"], Chat) and row["prompt"].tools is None and row["prompt"].template_kwargs is None


def test_messages_keep_every_field():
    full = {"role": "assistant", "content": "yo", "reasoning_content": "r", "name": "n", "weight": 0, "extra": [1, {}]}
    (row,) = read("sft", {"messages": [{**USER, "name": None}, {**full, "thinking": None}, CALL, FOUND, YO]})
    assert row == {"prompt": [USER], "completion": [full, CALL, FOUND, YO]}


@pytest.mark.parametrize("kind", ["sft", "prompts"])
@pytest.mark.parametrize("written", [lambda value: value, json.dumps])
def test_tools_and_template_settings_go_with_the_prompt(kind, written):
    inputs = {"tools": written(TOOLS), "chat_template_kwargs": written({"enable_thinking": False})}
    for given in ({"messages": [USER, YO]}, {"prompt": [USER], "completion": "yo"}):
        prompt = read(kind, {**given, **inputs})[0]["prompt"]
        assert prompt == [USER] and prompt.tools == TOOLS and prompt.template_kwargs == {"enable_thinking": False}
    one_by_one = read(kind, {"messages": [USER, YO], "tools": [json.dumps(tool) for tool in TOOLS]})
    assert one_by_one[0]["prompt"].tools == TOOLS
    for nothing in ([], "", "[]", None):
        assert read(kind, {"messages": [USER, YO], "tools": nothing})[0]["prompt"].tools is None


def called(**arguments):
    return {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


def described(**properties):
    return [{"function": {"name": "f", "parameters": {"properties": properties}}}]


@pytest.mark.parametrize("form", ["parquet", "saved", "memory"])
def test_a_call_holds_what_it_says_and_not_what_other_rows_say(tmp_path, form):
    """Tables give every row the fields of all, None where it has none; in JSON a null is meant."""
    datasets = pytest.importorskip("datasets", reason="needs the optional package datasets")
    given = [
        {"messages": [USER, called(city="x")], "tools": described(city={"type": "string"})},
        {"messages": [USER, called(day=3)], "tools": described(day={"type": "integer", "least": 1})},
    ]
    table = datasets.Dataset.from_list(given)
    if form == "parquet":
        table.to_parquet(tmp_path / "rows.parquet")
    elif form == "saved":
        table.save_to_disk(tmp_path / "rows")
    source = {"parquet": tmp_path / "rows.parquet", "saved": tmp_path / "rows", "memory": table}[form]
    rows = data.rows_of(source, "sft", name="rows")
    assert [row["completion"] for row in rows] == [[row["messages"][1]] for row in given]
    assert [row["prompt"].tools for row in rows] == [row["tools"] for row in given]
    meant = called(city=None)
    assert read("sft", {"messages": [USER, meant]})[0]["completion"] == [meant]


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "h"}, "i", {"type": "text", "text": "", "image_url": None}]
    (row,) = read("sft", {"messages": [{"role": "user", "content": parts}, YO]})
    assert row["prompt"] == [USER]


def test_answers_have_the_form_of_their_prompt():
    answers = {"ranks": [0, 1], "completions": ["yo", [NO, MORE, BYE]]}
    expected = {"prompt": [USER], "completions": [[YO], [NO, MORE, BYE]], "ranks": [0, 1]}
    assert read("ranked", {"prompt": [USER], **answers}) == [expected]
    assert read("ranked", {"prompt": "hi", **answers}) == [expected]
    assert read("sft", {"prompt": "hi", "completion": [YO, MORE, BYE]}) == [
        {"prompt": [USER], "completion": [YO, MORE, BYE]}
    ]
    assert read("preference", {"prompt": [USER], "chosen": "yo", "rejected": NO}) == [
        {"prompt": [USER], "chosen": [YO], "rejected": [NO]}
    ]
    assert read("unpaired", {"prompt": [USER], "completion": "yo", "label": True}) == [
        {"prompt": [USER], "completion": [YO], "label": True}
    ]


def test_a_prompt_that_the_answers_repeat_counts_once():
    told = {"prompt": [USER], "completion": [YO, MORE, BYE]}
    for prompt in ("hi", " hi\n", [USER]):
        assert read("sft", {"prompt": prompt, "completion": [USER, YO, MORE, BYE]}) == [told]
    assert read("sft", {"prompt": "hi", "completion": [SYSTEM, USER, YO]})[0]["prompt"] == [SYSTEM, USER]
    mixed = {"prompt": "hi", "chosen": [SYSTEM, USER, YO], "rejected": "no"}
    assert read("preference", mixed) == [{"prompt": [SYSTEM, USER], "chosen": [YO], "rejected": [NO]}]
    unlike = {"prompt": "hi", "completions": [[SYSTEM, USER, YO], [USER, YO], "no"], "ranks": [0, 1, 2]}
    assert "`completions[0]` and `completions[1]` and `completions[2]` differ" in refused("ranked", unlike)
    unlike = {"prompt": "hi", "chosen": [SYSTEM, USER, YO], "rejected": [USER, NO]}
    assert "share no beginning that could be the prompt" in refused("preference", unlike)


@pytest.mark.parametrize(
    ("chosen", "rejected", "cut"),
    [
        ([USER, YO], [USER, NO], 1),
        ([SYSTEM, USER, YO, MORE, BYE], [SYSTEM, USER, YO, MORE, NO], 4),
        ([USER, YO, MORE, BYE], [USER, NO, MORE, BYE], 1),
        ([USER, YO, MORE, BYE], [USER, YO, USER, BYE], 1),
        ([USER, YO, BYE], [USER, YO, NO], 1),
        ([USER, YO], [USER, YO, MORE, BYE], 1),
        ([YO, USER, BYE], [YO, USER, NO], 2),
        ([USER, CALL, FOUND, YO], [USER, CALL, FOUND, NO], 3),
        ([USER, YO], [USER, YO], 1),
    ],
)
def test_dialogues_are_split_behind_the_last_question_they_share(chosen, rejected, cut):
    expected = {"prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}
    both = {"chosen": chosen, "rejected": rejected}
    assert read("preference", both) == [expected]
    assert read("ranked", both)[0]["completions"] == [chosen[cut:], rejected[cut:]]
    assert read("ranked", {"completions": [rejected, chosen], "scores": [1, 2]}) == [
        {"prompt": chosen[:cut], "completions": [rejected[cut:], chosen[cut:]], "ranks": [1, 0]}
    ]
    assert read("prompts", both) == [{"prompt": chosen[:cut]}]
    if chosen[0] == USER:
        assert read("preference", {"prompt": "hi", **both, "messages": chosen}) == [expected]


def test_a_label_judges_the_last_answer():
    (row,) = read("unpaired", {"messages": [USER, YO, MORE, CALL, FOUND, BYE], "label": 0})
    assert row == {"prompt": [USER, YO, MORE, CALL, FOUND], "completion": [BYE], "label": False}


def test_a_prompt_in_text_may_be_a_later_question_of_the_dialogues():
    dialogue = [SYSTEM, USER, YO, MORE]
    pair = {"prompt": "and now? ", "chosen": [*dialogue, BYE], "rejected": [*dialogue, NO]}
    assert read("preference", pair) == [{"prompt": dialogue, "chosen": [BYE], "rejected": [NO]}]
    assert read("sft", {"prompt": "and now?", "completion": [*dialogue, BYE]}) == [
        {"prompt": dialogue, "completion": [BYE]}
    ]
    assert read("unpaired", {"prompt": "hi", "completion": [USER, YO, MORE, BYE], "label": False}) == [
        {"prompt": [USER, YO, MORE], "completion": [BYE], "label": False}
    ]
    assert "must begin with" in refused("preference", {**pair, "prompt": "what?"})


@pytest.mark.parametrize("field", ["loss", "train"])
def test_turns_that_other_trainers_would_not_learn(field):
    messages = [USER, {**YO, field: False}, MORE, {**BYE, field: True}, MORE, {**NO, field: None}]
    (row,) = read("sft", {"messages": messages})
    assert [message.get("weight", 1) for message in row["completion"][::2]] == [0, 1, 1]


@pytest.mark.parametrize("written", [lambda value: value, json.dumps])
def test_a_call_in_the_field_before_tool_calls(written):
    call = {"name": "find", "arguments": "{}"}
    asking = {"role": "assistant", "content": "", "function_call": written(call)}
    empty = {"role": "assistant", "content": "yo", "function_call": {"name": None, "arguments": None}}
    (row,) = read("sft", {"messages": [USER, asking, FOUND, empty]})
    called = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    assert row["completion"] == [called, FOUND, YO]
    assert "`messages[1][function_call]` must be a dict" in refused(
        "sft", {"messages": [USER, {**asking, "function_call": ["find"]}]}
    )


def test_messages_in_a_cell_of_text():
    """As tables of text hold them; Python's way of writing them cannot be read, and is no answer."""
    pair = {"prompt": [USER], "chosen": [USER, YO], "rejected": [USER, NO]}
    written = {name: json.dumps(value) for name, value in pair.items()}
    assert read("preference", written) == read("preference", pair)
    answer = {"prompt": "hi", "completion": json.dumps([{"role": "owl"}])}
    assert read("sft", answer) == [answer]
    assert "looks like a list of messages as Python" in refused("sft", {"prompt": "hi", "completion": str([USER, YO])})


def test_prompts_of_dialogues_end_with_the_last_question():
    given = ({"messages": [USER, YO, MORE, BYE]}, {"messages": [USER, CALL, FOUND, YO]}, {"prompt": [USER, YO]})
    assert [row["prompt"] for row in read("prompts", *given)] == [[USER, YO, MORE], [USER, CALL, FOUND], [USER, YO]]


EMPTY = {"role": "assistant", "content": " "}
BAD = [
    ("sft", {"messages": [USER, EMPTY]}, "`messages[1]`, of the role 'assistant', is empty"),
    ("sft", {"messages": [USER, EMPTY, MORE, YO]}, "`messages[1]`, of the role 'assistant', is empty"),
    ("sft", {"messages": [USER, {"role": "assistant", "content": None}]}, "`messages[1]`, of the role 'assistant', "),
    ("sft", {"messages": [{"role": "user"}, YO]}, "`messages[0]`, of the role 'user', has no content"),
    ("sft", {"messages": [{"content": "hi"}, YO]}, "`messages[0]` must be a message {'role': ..., 'content': ...}"),
    ("sft", {"messages": [USER, {**YO, "content": 3}]}, "the content of `messages[1]` must be a string, parts of"),
    ("sft", {"messages": [USER, {**YO, "weight": 2}]}, "the weight of `messages[1]` must be 1 (learned) or 0"),
    ("sft", {"messages": [USER, {**YO, "weight": "1"}]}, "the weight of `messages[1]` must be 1 (learned) or 0"),
    ("sft", {"messages": [YO, BYE]}, "`messages` must hold at least two messages"),
    ("sft", {"messages": [USER, YO, MORE]}, "the last one of the role 'assistant'"),
    ("sft", {"messages": "hi"}, "`messages` must be a list of messages (or one as JSON), got str"),
    ("sft", {"prompt": "hi", "completion": []}, "`completion` is empty"),
    ("sft", {"prompt": "hi", "completion": [MORE, YO]}, "`completion` must begin with a message of the role"),
    ("sft", {"prompt": "hi", "completion": [YO, MORE]}, "`completion` must end with a message of the role 'assistant'"),
    ("sft", {"prompt": "hi", "completion": [USER]}, "`completion` must begin with a message of the role"),
    ("sft", {"prompt": "hi", "completion": [USER, YO, MORE, EMPTY]}, "`completion[3]`, of the role 'assistant', is"),
    ("sft", {"prompt": [USER], "completion": " "}, "`completion` is empty"),
    ("preference", {"chosen": [USER, YO], "rejected": [MORE, NO]}, "share no beginning"),
    ("preference", {"chosen": [USER, YO], "rejected": [USER]}, "`rejected` must begin with a message"),
    ("preference", {"chosen": [YO], "rejected": [NO]}, "share no beginning"),
    ("preference", {"chosen": "yo", "rejected": "no"}, "lacks the field `prompt`"),
    ("preference", {"chosen": [USER, YO], "rejected": [USER, EMPTY]}, "`rejected[1]`, of the role 'assistant', is"),
    ("prompts", {"prompt": [{"role": "user", "content": ""}]}, "`prompt` is empty"),
    ("prompts", {"messages": [YO]}, "`prompt` is empty"),
    ("prompts", {"prompt": "hi", "tools": TOOLS}, "`tools` needs a prompt of messages"),
    ("prompts", {"prompt": "hi", "chat_template_kwargs": {"a": 1}}, "`chat_template_kwargs` needs a prompt of"),
    ("prompts", {"prompt": [USER], "tools": {"a": 1}}, "`tools` must be a list of dicts (or one as JSON), got dict"),
    ("prompts", {"prompt": [USER], "tools": ["{"]}, "`tools[0]` as a string must be JSON, got '{'"),
    ("prompts", {"prompt": [USER], "tools": [{}]}, "`tools[0]` is empty"),
    ("prompts", {"prompt": [USER], "tools": [3]}, "`tools[0]` must be a dict (or one as JSON), got int"),
    ("prompts", {"prompt": [USER], "chat_template_kwargs": "[1]"}, "`chat_template_kwargs` must be a dict (or one as"),
    ("prompts", {"prompt": [{"role": "user", "content": "\ud83d"}]}, "`prompt[0][content]` holds half a"),
    ("prompts", {"prompt": [{**USER, "\udc00": 1}]}, "`prompt[0]` holds half a surrogate pair"),
    ("prompts", {"prompt": [{**USER, 3: 1}]}, "`prompt[0]` has the key 3, which is no string"),
    ("prompts", {"prompt": [{**USER, "x": b"a"}]}, "`prompt[0][x]` holds a bytes, which is not of JSON"),
    ("sft", {"prompt": "hi", "completions": ["a", "b"], "labels": [True, False]}, "steps judged one by one"),
    ("ranked", {"prompt": "hi", "completions": ["a", "b"], "labels": [True, False]}, "steps judged one by one"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "row", "reason"), BAD)
def test_what_is_wrong_with_messages_is_named(kind, row, reason):
    assert reason in refused(kind, row)


@pytest.mark.parametrize("kind", ["image", "image_url", "input_audio", "video"])
def test_parts_that_are_no_text_are_refused(kind):
    row = {"prompt": [{"role": "user", "content": [{"type": "text", "text": "what?"}, {"type": kind, kind: "x"}]}]}
    assert f"the content of `prompt[0]` holds a part of type '{kind}'" in refused("prompts", row)


def test_people_see_all_that_is_said():
    call = [{"function": {"name": "find"}}]
    thought = {**YO, "reasoning_content": "hm", "tool_calls": call}
    said = [
        "hi",
        'hm\nyo\n[{"function": {"name": "find"}}]',
        '[{"type": "function", "function": {"name": "find"}}]',
        "yo",
    ]
    roles = ["user", "assistant", "assistant", "assistant"]
    whole = "\n".join(f"{role}: {text}" for role, text in zip(roles, said, strict=True))
    assert data.as_text([USER, thought, CALL, YO]) == whole
    assert data.as_text([USER, thought, CALL, YO], roles=False) == "\n".join(said)
    assert data.as_text([USER]) == "hi" and data.as_text("a\nb") == "a\nb"


@pytest.mark.parametrize(
    "answers",
    [{"completion": [YO]}, {"chosen": YO, "rejected": NO}, {"completions": [[YO], [NO]], "ranks": [0, 1]}],
)
def test_the_prompt_alone_asks_what_the_row_asks(answers):
    """A string beside answers of messages is a user's message in every stage."""
    kind = {"completion": "sft", "chosen": "preference", "completions": "ranked"}[next(iter(answers))]
    rows = [read(which, {"prompt": "hi", **answers})[0] for which in (kind, "prompts")]
    assert rows[0]["prompt"] == rows[1]["prompt"] == [USER] and isinstance(rows[1]["prompt"], Chat)
    (text,) = read("prompts", {"prompt": "hi", "completion": "yo"})
    assert text["prompt"] == "hi"


def test_an_unlearned_turn_may_be_empty():
    (row,) = read("sft", {"messages": [USER, {**EMPTY, "weight": 0}, MORE, BYE]})
    assert row["completion"][0] == {**EMPTY, "weight": 0}


@pytest.mark.parametrize("depth", [50, 3000])
def test_deep_nesting_is_refused_before_a_template_meets_it(tmp_path, depth):
    line = json.dumps({"prompt": [USER]}).replace(
        '"content"', '"x": ' + '{"y": ' * depth + "1" + "}" * depth + ', "content"'
    )
    (tmp_path / "rows.jsonl").write_text(line + "\n", encoding="utf-8")
    if depth == 50:
        assert len(data.load_rows(tmp_path / "rows.jsonl", "prompts")) == 1
    else:
        with pytest.raises(
            data.DataError, match=r"rows\.jsonl:1: .*(`prompt` is nested deeper than 100|cannot be read)"
        ):
            data.load_rows(tmp_path / "rows.jsonl", "prompts")


def random_row(chance, kind):
    """A valid row as a user may write it."""

    def text():
        return "".join(chance.choices("ab \n\N{SNOWMAN}{}'\"", k=chance.randint(0, 8))) + chance.choice("xyz")

    def turn(role):
        message = {"role": role, "content": text()}
        if chance.random() < 0.3:
            message |= {chance.choice(["name", "id", "reasoning_content"]): text(), "empty": None}
        if role == "assistant" and chance.random() < 0.3:
            message |= {
                "tool_calls": [{"function": {"name": text(), "arguments": {"a": [1, None, 0.5]}}}],
                "content": None,
            }
        return message

    def answer():
        turns = [turn("assistant")]
        for _ in range(chance.choice([0, 0, 1, 2])):
            turns += [turn(chance.choice(["user", "tool"])), turn("assistant")]
        return turns

    chat, opening = chance.random() < 0.7, [turn("system")] * chance.randint(0, 1) + [turn("user")]
    row = {"prompt": opening if chat else text()}
    if chat and chance.random() < 0.5:
        row |= {
            "tools": chance.choice([TOOLS, json.dumps(TOOLS)]),
            "chat_template_kwargs": {"think": chance.random() < 0.5},
        }

    def said():
        return answer() if chat and chance.random() < 0.7 else text()

    if kind == "sft" and chat and chance.random() < 0.5:
        row["messages"] = row.pop("prompt") + answer()
    elif kind in ("sft", "unpaired"):
        row["completion"] = said()
    elif kind == "ranked":
        count = chance.randint(2, 5)
        row |= {"completions": [said() for _ in range(count)], "scores": [chance.randint(0, 3) for _ in range(count)]}
        row |= chance.choice([{}, {"weight": 2, "labeler": text()}, {"margin": 1}, {"pairs": [[0, 1]]}])
    elif kind == "preference":
        row |= {"chosen": said(), "rejected": said()}
    return {**row, "label": chance.random() < 0.5} if kind == "unpaired" else row


@pytest.mark.parametrize("kind", [kind for kind in data.KINDS if kind != "text"])
def test_plain_rows_are_read_back_as_they_were(tmp_path, kind):
    chance = random.Random(kind)
    rows = data.rows_of([random_row(chance, kind) for _ in range(200)], kind, name="rows")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(plain(row)) + "\n" for row in rows), encoding="utf-8")
    again = data.load_rows(path, kind)
    assert [{**row, "at": None} for row in again] == [{**row, "at": None} for row in rows]
    for first, second in zip(rows, again):
        assert type(first["prompt"]) is type(second["prompt"]) and list(first)[-1] == "at"
    assert {type(row["prompt"]) for row in rows} == {str, Chat}


def test_chats_with_other_tools_differ():
    assert Chat([USER]) == [USER] == Chat([USER]) and Chat([USER]) != Chat([USER], tools=TOOLS)
    assert (
        Chat([USER], template_kwargs={"a": 1}) != Chat([USER])
        and Chat([USER], TOOLS).with_messages([YO]).tools == TOOLS
    )
