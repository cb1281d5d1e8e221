"""Published formats: rows in their layout become rows in our fields, and are recognised as nothing else."""

import json

import pytest

from rlhf import data
from rlhf.data import formats
from rlhf.data.files import Bad, DataError
from tests.rlhf.data.format_rows import ALSO_OURS, BINARIZED, CHAT, PUBLISHED, assistant, system, user
from tests.tiny import write_jsonl

KINDS = ("ranked", "preference", "sft", "unpaired", "prompts", "text")


def convert(kind, *raws, column_map=None, data_format="auto"):
    """(name of the format, rows) of raw rows; a Bad is raised."""
    made = formats.conversion(kind, column_map, data_format, raws)
    if not made.whole:
        return made.name, [row for raw in raws for row in made.each(raw)]
    rows = [row for _, row in made.whole((f"f:{number}", raw) for number, raw in enumerate(raws, 1))]
    for row in rows:
        if isinstance(row, Bad):
            raise row
    return made.name, rows


def cases(table):
    for number, (name, raws, made) in enumerate(table):
        for kind, rows in made.items():
            yield pytest.param(name, raws, kind, rows, id=f"{number}-{name}-{kind}")


@pytest.mark.parametrize(("name", "raws", "kind", "rows"), [*cases(PUBLISHED), *cases(ALSO_OURS)])
def test_rows(name, raws, kind, rows):
    assert convert(kind, *raws) == (name, rows)
    if name:
        assert convert(kind, *raws, data_format=name) == (name, rows)


@pytest.mark.parametrize(("name", "raws", "made"), PUBLISHED)
def test_rows_are_of_one_format_alone(name, raws, made):
    for raw in raws:
        assert [format.name for format in formats.FORMATS.values() if format.auto and format.detect(raw)] == [name]


@pytest.mark.parametrize(("name", "raws", "made"), PUBLISHED)
def test_rows_that_are_made_can_be_read(name, raws, made):
    for kind, rows in made.items():
        for row in rows:
            assert len(data.rows_of([row], kind, name="rows", data_format="own")) == 1


def test_every_format_is_tried():
    tried = {name for table in (PUBLISHED, ALSO_OURS) for name, _, _ in table}
    assert set(formats.FORMATS) - tried == {"pku-saferlhf-safer"}


def test_every_kind_of_every_format_has_a_note_or_none():
    for format in formats.FORMATS.values():
        assert set(format.kinds) <= set(KINDS) and format.kinds and format.about
        assert all(isinstance(note, str) for note in format.kinds.values())


@pytest.mark.parametrize(("name", "raws", "made"), PUBLISHED)
def test_a_kind_that_a_format_does_not_hold_is_an_error(name, raws, made):
    for kind in set(KINDS) - set(formats.FORMATS[name].kinds):
        if any(name in raw for raw in raws for name in (kind, kind.removesuffix("s"))):  # our own fields
            continue
        with pytest.raises(DataError, match=f"data_format: the format {name} holds rows of the kind .*, not {kind}"):
            convert(kind, *raws)


ALIASES = {
    "Anthropic/hh-rlhf": "hh-rlhf", "openbmb/UltraFeedback": "ultrafeedback", "berkeley-nest/Nectar": "nectar",
    "HuggingFaceH4/ultrafeedback_binarized": "pairs", "oasst1": "oasst", "OpenAssistant/oasst2": "oasst",
    "summarize_from_feedback": "summarize-from-feedback", "webgpt_comparisons": "webgpt-comparisons", "SHP": "shp",
    "HelpSteer2": "helpsteer", "HelpSteer3": "helpsteer3", "PKU-SafeRLHF": "pku-saferlhf", "tulu": "messages",
    "no_robots": "messages", "gsm8k": "question-answer", "MATH": "math", "verl": "verl", "ShareGPT": "sharegpt",
    "databricks-dolly-15k": "dolly", "Alpaca": "alpaca",
}  # fmt: skip


@pytest.mark.parametrize("alias", ALIASES)
def test_names_as_they_are_published(alias):
    format = formats.FORMATS[ALIASES[alias]]
    assert formats.conversion(next(iter(format.kinds)), None, alias, []).name == format.name


def test_names_that_are_not_known():
    with pytest.raises(ValueError, match="data_format: got 'alpaka', wants auto, own, ultrafeedback, nectar"):
        convert("sft", data_format="alpaka")
    with pytest.raises(ValueError, match="data_format: got 'alpaca:chats', wants the name of a format"):
        convert("sft", data_format="alpaca:chats")
    with pytest.raises(ValueError, match="data_format: got 'alpaca' beside columns"):
        convert("sft", data_format="alpaca", column_map="prompt=a,completion=b")


def test_by_name_alone():
    raw = {"prompt": "A?", "response_0": "B.", "response_1": "C.", "better_response_id": 1, "safer_response_id": 0}
    row = {"prompt": "A?", "chosen": "B.", "rejected": "C."}
    assert convert("preference", raw, data_format="pku-saferlhf-safer") == ("pku-saferlhf-safer", [row])


OWN = [
    ("sft", {"messages": [user("a"), assistant("b")], "question": "q", "answer": "a"}),
    ("sft", {"prompt": "a", "completion": "b", "instruction": "i", "output": "o"}),
    ("sft", {"text": "a"}),
    ("ranked", {"prompt": "a", "completions": ["b", "c"], "ranks": [0, 1], "answers": [{"answer": "b", "rank": 1}]}),
    ("ranked", {"completions": [[user("a"), assistant("b")], [user("a"), assistant("c")]], "scores": [0, 1]}),
    ("ranked", {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "c"}),
    ("unpaired", {"prompt": [user("a")], "completion": [assistant("b")], "label": True}),
    ("prompts", {"prompt": "a", "answer": "b"}),
    ("prompts", {"prompt": "other", "messages": CHAT}),
    ("text", {"text": "a"}),
]


@pytest.mark.parametrize(("kind", "raw"), OWN)
def test_our_own_fields_win(kind, raw):
    assert convert(kind, raw) == (None, [raw])
    assert convert(kind, raw, data_format="own") == (None, [raw])


def test_rows_that_are_not_ours_stay_as_they_are_under_own():
    raw = {"instruction": "A?", "output": "B."}
    assert convert("sft", raw, data_format="own") == (None, [raw])


S = "Be brief."
LED = [system(S), user("A?")]
IN_A_COLUMN = [
    ("sft", {"messages": [user("A?"), assistant("B.")]}, {"messages": [*LED, assistant("B.")]}),
    ("sft", {"messages": [system("Mine."), *CHAT]}, {"messages": [system("Mine."), *CHAT]}),
    ("sft", {"messages": json.dumps([user("A?"), assistant("B.")])}, {"messages": [*LED, assistant("B.")]}),
    ("prompts", {"messages": [user("A?")]}, {"messages": LED}),
    ("prompts", {"prompt": "A?"}, {"prompt": LED}),
    (
        "unpaired",
        {"prompt": "A?", "completion": "B.", "label": True},
        {"prompt": LED, "completion": "B.", "label": True},
    ),
    (
        "ranked",
        {"prompt": "A?", "completions": ["B.", "C."], "ranks": [0, 1]},
        {"prompt": LED, "completions": ["B.", "C."], "ranks": [0, 1]},
    ),
    (
        "preference",
        {"prompt": "A?", "chosen": [user("A?"), assistant("B.")], "rejected": [user("A?"), assistant("C.")]},
        {"prompt": LED, "chosen": [*LED, assistant("B.")], "rejected": [*LED, assistant("C.")]},
    ),
    (
        "preference",
        {"prompt": [user("A?")], "chosen": [assistant("B.")], "rejected": [assistant("C.")]},
        {"prompt": LED, "chosen": [assistant("B.")], "rejected": [assistant("C.")]},
    ),
    (
        "preference",
        {"chosen": [user("A?"), assistant("B.")], "rejected": [user("A?"), assistant("C.")]},
        {"chosen": [*LED, assistant("B.")], "rejected": [*LED, assistant("C.")]},
    ),
]


@pytest.mark.parametrize(("kind", "raw", "row"), IN_A_COLUMN)
@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_column_of_the_system_prompt(kind, raw, row, column, caplog):
    name, rows = convert(kind, {**raw, column: S})
    assert name is None and rows == [{**row, column: S}] and "goes before the messages" in caplog.text
    (checked,) = data.rows_of([{**raw, column: S}], kind, name="rows")
    assert checked["prompt"][0] == (system("Mine.") if raw.get("messages", [{}])[0] == system("Mine.") else system(S))
    assert convert(kind, {**raw, column: " "})[1] == [{**raw, column: " "}]
    assert convert(kind, {**raw, column: S}, data_format="own")[1] == [{**raw, column: S}]


def test_pairs_as_demonstrations_keep_the_column_of_the_system_prompt():
    raw = {"system": S, "chosen": [user("A?"), assistant("B.")], "rejected": [user("A?"), assistant("C.")]}
    assert convert("sft", raw) == ("pairs", [{"prompt": LED, "completion": [assistant("B.")]}])


FIRST = [
    ("question-answer", {"question": "A?", "answer": "B."}, {"context": "C."}),
    ("question-response", {"instruction": "A?", "response": "B."}, {"input": "C."}),
    ("alpaca", {"instruction": "A?", "output": "B."}, {"context": "C."}),
]


@pytest.mark.parametrize(("name", "raw", "more"), FIRST)
def test_later_rows_may_hold_what_the_first_do_not(name, raw, more):
    """As in tables, where a column may be null in the first rows."""
    with pytest.raises(Bad, match=f"holds `{next(iter(more))}`, which the format {name} leaves out"):
        convert("sft", raw, {**raw, **more})
    row = {"prompt": "A?", "completion": "B."}
    assert convert("sft", raw, {**raw, **dict.fromkeys(more, "")}) == (name, [row, row])
    assert convert("sft", raw, {**raw, **more}, data_format=name) == (name, [row, row])


SOME = [
    ("alpaca", "sft", {"instruction": "A?", "output": "B."}, {"completion": "B."}),
    ("openorca", "sft", {"prompt": "A?", "completion": "B."}, {"completion": "B."}),
    (
        "orca-dpo-pairs",
        "preference",
        {"prompt": "A?", "chosen": "B.", "rejected": "C."},
        {"chosen": "B.", "rejected": "C."},
    ),
    (None, "prompts", {"prompt": "A?"}, {}),
]


@pytest.mark.parametrize(("name", "kind", "raw", "answers"), SOME)
def test_where_some_rows_have_a_system_prompt_all_are_messages(name, kind, raw, answers):
    found, rows = convert(kind, raw, {**raw, "system": S})
    assert found == name
    assert [{field: row[field] for field in ("prompt", *answers)} for row in rows] == [
        {"prompt": [user("A?")], **answers},
        {"prompt": LED, **answers},
    ]


def test_where_some_rows_have_a_history_all_are_messages():
    raw = {"instruction": "C?", "output": "D."}
    _, rows = convert("sft", raw, {**raw, "history": [["A?", "B."]]})
    assert [row["prompt"] for row in rows] == [[user("C?")], [user("A?"), assistant("B."), user("C?")]]


def test_functions_are_tools_under_their_old_name():
    raw = {"messages": CHAT, "functions": [{"name": "find"}]}
    assert convert("sft", raw)[1] == [{**raw, "tools": [{"type": "function", "function": {"name": "find"}}]}]


def test_rows_in_our_fields_that_go_with_images():
    raw = {"messages": CHAT, "images": ["a.png"]}
    with pytest.raises(Bad, match="goes with `images`; only texts can be read"):
        convert("sft", raw)
    assert convert("sft", {**raw, "images": []})[1] == [{**raw, "images": []}]
    assert convert("sft", raw, data_format="own")[1] == [raw]


THOUGHTS = [
    ({"question": "A?", "answer": "B.", "rationale": "It flies."}, "answer"),
    ({"prompt": "A?", "response": "B.", "reasoning": "It flies."}, "response"),
    ({"instruction": "A?", "input": "", "output": "B.", "explanation": "It flies."}, "output"),
]


@pytest.mark.parametrize(("raw", "answer"), THOUGHTS)
def test_thoughts_beside_an_answer_are_not_left_out_unsaid(raw, answer):
    name = list(raw)[-1]
    with pytest.raises(Bad, match=f"holds `{name}`, which the format .* leaves out: --columns can say"):
        convert("sft", raw)
    found = formats.conversion("sft", None, "auto", [raw]).name
    assert convert("sft", raw, data_format=found)[1] == [{"prompt": "A?", "completion": "B."}]
    assert convert("prompts", raw)[1][0]["prompt"] == "A?"
    assert convert("sft", {**raw, name: ""})[1] == [{"prompt": "A?", "completion": "B."}]
    asked = next(iter(raw))
    _, (row,) = convert("sft", raw, column_map=f"prompt={asked},completion={name}+{answer}")
    assert row["completion"] == "It flies.\n\nB."


DOUBTFUL = [
    {"question": "A?", "answer": "B.", "context": "C."},
    {"question": "A?", "answer": "B.", "choices": ["B.", "D."]},
    {"prompt": "A?", "response": "B.", "label": 0},
    {"instruction": "A?", "input": "C.", "response": "B."},
    {"prompt": "A?", "answer": "42"},
    {"question": "A?", "query": "C?", "response": "B."},
]


@pytest.mark.parametrize("raw", DOUBTFUL)
def test_what_is_in_doubt_is_not_guessed(raw, caplog):
    assert convert("sft", raw) == (None, [raw])
    assert caplog.messages == ["data_format: no known format; --columns can say which columns hold what of sft rows"]


def test_rows_of_different_formats():
    alpaca, gsm = {"instruction": "A?", "output": "B."}, {"question": "A?", "answer": "B."}
    with pytest.raises(DataError, match=r"the first rows are in different formats: alpaca .*; question-answer "):
        convert("sft", alpaca, gsm)
    with pytest.raises(Bad, match=r"lacks the column `instruction` \(has 'question', 'answer'\)"):
        convert("sft", alpaca, gsm, data_format="alpaca")


def test_rows_that_are_in_no_format_do_not_hide_it():
    name, rows = convert("sft", {"instruction": "A?", "output": "B."})
    assert formats.conversion("sft", None, "auto", [{}, {"x": 1}, {"instruction": "A?", "output": "B."}]).name == name
    assert rows == [{"prompt": "A?", "completion": "B."}]


def test_pairs_and_rankings_side_by_side():
    ranking = {"prompt": "A?", "completions": ["B.", "C."], "scores": [1, 2]}
    _, rows = convert("sft", {"prompt": "D?", "chosen": "E.", "rejected": "F."}, ranking)
    assert rows == [{"prompt": "D?", "completion": "E."}, {"prompt": "A?", "completion": "C."}]
    assert convert("ranked", BINARIZED, ranking) == (None, [BINARIZED, ranking])


MEDIA = {"conversations": [{"from": "human", "value": "A?"}, {"from": "gpt", "value": "B."}], "images": ["a.png"]}
UNFIT = [
    ("sharegpt", "sft", MEDIA, "goes with `images`; only texts can be read"),
    (
        "orca-dpo-pairs",
        "ranked",
        {"question": "A?", "chosen": "B.", "rejected": "C.", "image": {"bytes": ""}},
        "`image`",
    ),
    ("ultrafeedback", "ranked", {"instruction": "A?", "completions": []}, "holds 0 answers that have a rank or score"),
    ("ultrafeedback", "ranked", {"instruction": "A?"}, "`completions` must be a list of objects, got NoneType"),
    ("ultrafeedback", "ranked", {"completions": []}, "lacks the column `instruction` (has 'completions')"),
    (
        "nectar",
        "ranked",
        {"prompt": "A?", "answers": [{"answer": "B.", "rank": 1}, {"answer": " ", "rank": 2}]},
        "holds 1 answers that have a rank or score and are not empty; a ranking needs two",
    ),
    ("hh-rlhf", "ranked", {"chosen": "B.", "rejected": "C."}, "share no beginning that ends with"),
    ("hh-rlhf", "ranked", {"chosen": "B."}, "lacks the column `rejected`"),
    ("shp", "ranked", {"history": "A?", "human_ref_A": "B.", "human_ref_B": "C."}, "`labels` must be 1"),
    ("helpsteer3", "ranked", {"response1": "B.", "response2": "C."}, "is not in the format helpsteer3 (KeyError"),
    (
        "summarize-from-feedback",
        "ranked",
        {"info": {"post": "P"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 2},
        "`choice` must be the number of one of 2 summaries, got 2",
    ),
    ("chatbot-arena", "ranked", {"winner": "me", "conversation_a": CHAT, "conversation_b": CHAT}, "`winner` must be"),
    ("sharegpt", "sft", {"conversations": [{"from": "narrator", "value": "A?"}]}, "a turn must be of one of human,"),
    ("sharegpt", "sft", {"conversations": [{"from": "human", "value": "A?"}]}, "the conversation holds no answer"),
    ("sharegpt", "sft", {"conversations": "A?"}, "holds no conversation in conversations"),
    (
        "sharegpt",
        "sft",
        {"conversations": [{"from": "human", "value": "A?"}, {"from": "function_call", "value": "find"}]},
        "a function call must be JSON with name and arguments, got 'find'",
    ),
    ("alpaca", "sft", {"instruction": ["A?"], "output": "B."}, "`instruction` must be a string, got list"),
    ("oasst", "ranked", {"text": "A?", "role": "prompter"}, "a message must have message_id and message_tree_id"),
    (
        "rankings",
        "sft",
        {"prompt": "A?", "completions": ["B.", "C."], "ranks": [0]},
        "`ranks` must be a list as long as",
    ),
]


@pytest.mark.parametrize(("name", "kind", "raw", "reason"), UNFIT)
def test_rows_that_do_not_fit(name, kind, raw, reason):
    with pytest.raises(Bad) as caught:
        convert(kind, raw, data_format=name)
    assert reason in str(caught.value)


def test_answers_without_a_score_or_a_text_are_left_out():
    answers = [("Owl.", 4), ("", 5), ("Elk.", None), (None, 3), ("Jay.", "2.5"), ("Mud.", "N/A")]
    raw = {"instruction": "A?", "completions": [{"response": said, "overall_score": score} for said, score in answers]}
    row = {"prompt": "A?", "completions": ["Owl.", "Jay."], "scores": [4, 2.5]}
    assert convert("ranked", raw) == ("ultrafeedback", [row])


def test_rows_that_belong_together_keep_their_place_and_bad_ones_theirs():
    raws = [
        ("f:1", {"prompt": "A?", "response": "B.", "helpfulness": 1}),
        ("f:2", Bad("is not JSON")),
        ("f:3", {"prompt": ["C?"], "response": "D.", "helpfulness": 2}),
        ("f:4", {"prompt": "A?", "response": "E.", "helpfulness": 3}),
    ]
    made = formats.conversion("ranked", None, "auto", [raw for _, raw in raws])
    found = [(at, str(row) if isinstance(row, Bad) else row) for at, row in made.whole(iter(raws))]
    assert found == [
        ("f:2", "is not JSON"),
        ("f:3", "`prompt` must be a string, got list"),
        ("f:1", {"prompt": "A?", "completions": ["B.", "E."], "scores": [1, 3]}),
    ]


HH = "\n\nHuman: A?\n\nAssistant: B.\n\nHuman: C?\n\nAssistant:"
STEERED = "A?\n<extra_id_1>Assistant\nB.\n<extra_id_1>User\nC?"
AS_CHAT = [
    ("auto:chat", "sft", {"instruction": "A?", "output": "B."}, {"prompt": [user("A?")], "completion": "B."}),
    (
        "hh-rlhf:chat",
        "preference",
        {"chosen": HH + " D.", "rejected": HH + " E."},
        {"prompt": [user("A?"), assistant("B."), user("C?")], "chosen": "D.", "rejected": "E."},
    ),
    (
        "nectar:chat",
        "ranked",
        {
            "prompt": "\n\nHuman: A?\n\nAssistant: ",
            "answers": [{"answer": "B. ", "rank": 1}, {"answer": "C.", "rank": 2}],
        },
        {"prompt": [user("A?")], "completions": ["B.", "C."], "ranks": [1, 2]},
    ),
    ("own:chat", "prompts", {"prompt": STEERED}, {"prompt": [user("A?"), assistant("B."), user("C?")]}),
    ("own:chat", "sft", {"messages": CHAT}, {"messages": CHAT}),
    (
        "auto:chat",
        "sft",
        {"system_prompt": "S", "question": "A?", "response": "B."},
        {"prompt": [system("S"), user("A?")], "completion": "B."},
    ),
]


@pytest.mark.parametrize(("data_format", "kind", "raw", "row"), AS_CHAT)
def test_texts_as_messages(data_format, kind, raw, row):
    assert convert(kind, raw, data_format=data_format)[1] == [row]


def test_rows_that_belong_together_as_messages():
    raws = [{"prompt": STEERED, "response": said, "helpfulness": score} for said, score in (("B.", 1), (" D.", 2))]
    row = {"prompt": [user("A?"), assistant("B."), user("C?")], "completions": ["B.", "D."], "scores": [1, 2]}
    assert convert("ranked", *raws, data_format="auto:chat") == ("helpsteer", [row])


def test_columns_and_a_hint_of_one_that_no_row_has(caplog):
    raws = [{"question": "A?", "final": "B."}, {"question": "C?", "final": "D."}]
    name, rows = convert("sft", *raws, column_map="prompt=question+hint,completion=final")
    assert name is None and [(row["prompt"], row["completion"]) for row in rows] == [("A?", "B."), ("C?", "D.")]
    assert caplog.messages == ["columns: none of the first 2 rows has 'hint'"]


def test_a_file_says_what_it_was_read_as(tmp_path, caplog):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"question": "A?", "answer": "B.\n#### 1"}])
    rows = data.load_rows(path, "prompts", columns=True)
    assert [(row["prompt"], row["answer"], row["at"]) for row in rows] == [("A?", "1", f"{path}:1")]
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith(f"{path}: read as the format question-answer (")
