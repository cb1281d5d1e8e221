"""Rows: every bad one is named, and what is read has one form."""

import json
import random

import pytest

from rlhf import data
from rlhf.data import Chat, store
from rlhf.data import rows as rows_module
from rlhf.data.files import Bad
from tests.tiny import WORDS, write_jsonl

TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]

RANKED = {"prompt": "a", "completions": ["b", "c"], "ranks": [0, 1]}
SFT = {"prompt": "a", "completion": "b"}
GOOD = {
    "sft": SFT,
    "ranked": RANKED,
    "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "unpaired": {"prompt": "a", "completion": "b", "label": True},
    "prompts": {"prompt": "a"},
    "text": {"text": "a"},
}
BAD = [
    ("sft", '{"prompt": "a", ', "is not JSON"),
    ("sft", "[1]", "must be a JSON object"),
    ("sft", {"prompt": "a"}, "lacks the field `completion`"),
    ("sft", {"completion": "a"}, "lacks the field `prompt`"),
    ("sft", {"prompt": "", "completion": "b"}, "`prompt` is empty"),
    ("sft", {"prompt": " \n", "completion": "b"}, "`prompt` is empty"),
    ("sft", {"prompt": "a", "completion": ""}, "`completion` is empty"),
    ("sft", {"prompt": 3, "completion": "b"}, "`prompt` must be a string, got int"),
    (
        "sft",
        {"prompt": "a", "completion": ["b"]},
        "`completion[0]` must be a message {'role': ..., 'content': ...}, got str",
    ),
    ("sft", {"messages": [{"role": "user", "content": "a"}]}, "at least two messages"),
    ("sft", {"messages": [{"role": "user", "content": "a"}] * 2}, "of the role 'assistant'"),
    ("sft", {"prompt": [], "completion": "b"}, "`prompt` is empty"),
    ("ranked", {**RANKED, "ranks": [0]}, "as long as `completions` (2), got 1"),
    ("ranked", {**RANKED, "ranks": [0, 1, 2]}, "as long as `completions` (2), got 3"),
    ("ranked", {**RANKED, "ranks": 0}, "as long as `completions` (2), got int"),
    ("ranked", {**RANKED, "ranks": [0, None]}, "must hold finite numbers, got None"),
    ("ranked", {**RANKED, "ranks": [0, True]}, "must hold finite numbers, got True"),
    ("ranked", '{"prompt": "a", "completions": ["b", "c"], "scores": [1, NaN]}', "must hold finite numbers, got nan"),
    ("ranked", {"prompt": "a", "completions": ["b", "c"]}, "lacks the field `ranks`"),
    ("ranked", {**RANKED, "completions": ["b"], "ranks": [0]}, "at least two completions to rank, got 1"),
    ("ranked", {**RANKED, "completions": [], "ranks": []}, "at least two completions to rank, got 0"),
    ("ranked", {**RANKED, "completions": "bc"}, "`completions` must be a list, got str"),
    ("ranked", {**RANKED, "completions": ["b", " "]}, "`completions[1]` is empty"),
    ("ranked", {**RANKED, "prompt": ""}, "`prompt` is empty"),
    ("preference", {"prompt": "a", "chosen": "b"}, "lacks the field `rejected`"),
    ("unpaired", {**SFT, "label": "yes"}, "`label` must be true"),
    ("prompts", {"text": "a"}, "lacks the field `prompt`"),
    ("text", {"text": ""}, "`text` is empty"),
    ("sft", r'{"prompt": "a", "completion": "x \ud83d y"}', r"`completion` holds half a surrogate pair, '\ud83d'"),
    ("ranked", r'{"prompt": "a", "completions": ["b", "\udc00"], "ranks": [0, 1]}', "`completions[1]` holds half"),
    ("preference", r'{"prompt": "a", "chosen": "\ud83d", "rejected": "c"}', "`chosen` holds half a surrogate pair"),
    ("prompts", r'{"prompt": [{"role": "user", "content": "\ud83d"}]}', "`prompt[0][content]` holds half a surrogate"),
    ("text", r'{"text": "\ud83d \ude00"}', "`text` holds half a surrogate pair"),
    ("text", '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "is JSON that cannot be read"),
    ("text", '{"text": ' + "1" * 10_000 + "}", "is JSON that cannot be read (Exceeds the limit"),
    (
        "ranked",
        '{"prompt": "a", "completions": ["b", "c"], "ranks": [0, 1' + "0" * 400 + "]}",
        "must hold finite numbers",
    ),
]


@pytest.mark.parametrize(("kind", "line", "reason"), BAD)
def test_bad_line_is_named(tmp_path, kind, line, reason):
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD[kind], line, GOOD[kind]])
    with pytest.raises(data.DataError) as caught:
        data.load_rows(path, kind)
    message = str(caught.value)
    assert message.startswith(f"{path}:2: ") and reason in message
    assert "\n" not in message


def test_every_bad_line_is_reported(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [SFT, "{", SFT, {"prompt": "a"}, *["{"] * 20])
    with pytest.raises(data.DataError) as caught:
        data.load_rows(path, "sft")
    lines = str(caught.value).split("\n")
    assert [line.split(": ")[0] for line in lines] == [f"{path}:{n}" for n in (2, 4, *range(5, 25))]


def test_very_many_bad_lines_are_grouped_by_reason(tmp_path):
    """A reason that many rows have stands once; of others the first hundred one by one, and the rest in groups."""
    bad = [*["{"] * 100, *[{"messages": [{"role": n}]} for n in range(300)], {"prompt": "a"}, "{", SFT, "{"]
    path = write_jsonl(tmp_path / "rows.jsonl", [SFT, *bad])
    with pytest.raises(data.DataError) as caught:
        data.load_rows(path, "sft")
    lines = str(caught.value).split("\n")
    assert lines[0].startswith(f"{path}:2-101,403,405: is not JSON")
    assert lines[1].startswith(f"{path}:102: ") and lines[1].endswith("got the role 0")
    assert lines[100].startswith(f"{path}:201: ") and lines[100].endswith("got the role 99")
    assert lines[101] == "and 201 more:" and lines[102].startswith(f"{path}:202-401: ")
    assert lines[103] == f"{path}:402: lacks the field `completion` (has 'prompt')" and len(lines) == 104


def test_bad_rows_are_left_out_when_asked(tmp_path, caplog):
    path = write_jsonl(tmp_path / "rows.jsonl", [SFT, "{", {"prompt": "a"}, {"prompt": "b"}, {**SFT, "prompt": "b"}])
    with caplog.at_level("WARNING", logger="rlhf"):
        rows = data.load_rows(path, "sft", bad_rows="skip")
    assert [row["prompt"] for row in rows] == ["a", "b"]
    told = caplog.messages[0].split("\n")
    assert told[0] == "left out 3 of 5 rows:" and told[1].startswith(f"{path}:2: is not JSON")
    assert told[2:] == [f"{path}:3-4: lacks the field `completion` (has 'prompt')"]
    with caplog.at_level("WARNING", logger="rlhf"):
        data.rows_of([SFT, {}, {}, 3], "sft", name="rows", bad_rows="skip")
    assert caplog.messages[1].split("\n")[1:] == [
        "rows[1-2]: lacks the field `prompt` (has no fields)",
        "rows[3]: a row must be a JSON object with named fields, got int",
    ]
    with pytest.raises(data.DataError, match=r"rows\[0\]: lacks the field `prompt`.*\nnone of the 1 rows can be used"):
        data.rows_of([{}], "sft", name="rows", bad_rows="skip")


def test_kinds_are_normalised(tmp_path):
    def load(kind, *rows):
        return [{k: v for k, v in row.items() if k != "at"} for row in data.load_rows(write(rows), kind)]

    def write(rows):
        return write_jsonl(tmp_path / "rows.jsonl", rows)

    user, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
    assert load("sft", {**SFT, "extra": 1}) == [SFT]
    assert load("sft", {**SFT, "context": "c"}) == [SFT]
    assert load("sft", {"messages": [user, answer]}) == [{"prompt": [user], "completion": [answer]}]
    assert load("sft", {"text": "a b"}) == [{"text": "a b"}]
    assert load("ranked", RANKED) == [RANKED]
    scored = {"prompt": "a", "completions": ["b", "c", "d"], "scores": [0.5, 2.5, 0.5]}
    assert load("ranked", scored)[0]["ranks"] == [1, 0, 1]
    assert load("ranked", {**RANKED, "ranks": [7, 3]})[0]["ranks"] == [1, 0]
    assert load("ranked", GOOD["preference"]) == [RANKED]
    assert load("preference", GOOD["preference"]) == [GOOD["preference"]]
    assert load("unpaired", {**SFT, "label": 0}) == [{**SFT, "label": False}]
    assert load("prompts", SFT, {"messages": [user, answer]}) == [{"prompt": "a"}, {"prompt": [user]}]


def test_split_is_by_prompt_and_repeats():
    generator = random.Random(0)
    rows = [{"prompt": generator.choice(WORDS[:20]), "n": n} for n in range(200)]
    train, held_out = data.split_rows(rows, 0.25, seed=3)
    assert {row["prompt"] for row in train}.isdisjoint({row["prompt"] for row in held_out})
    assert len({row["prompt"] for row in held_out}) == 5
    assert sorted(row["n"] for row in train + held_out) == list(range(200))
    assert data.split_rows(rows, 0.25, seed=3) == (train, held_out)
    assert data.split_rows(rows, 0.25, seed=4) != (train, held_out)
    assert data.split_rows(rows, 0, seed=3) == (rows, [])
    assert len(data.split_rows(rows[:2], 0.001, seed=0)[1]) == 1
    with pytest.raises(ValueError, match="at least 2"):
        data.split_rows([rows[0]], 0.5, seed=0)
    with pytest.raises(ValueError, match="fraction"):
        data.split_rows(rows, 1.0, seed=0)


def test_a_whole_surrogate_pair_is_a_character(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [r'{"text": "\ud83d\ude00"}'])
    assert data.load_rows(path, "text")[0]["text"] == "\N{GRINNING FACE}"


def test_rows_in_memory_are_text_too():
    with pytest.raises(data.DataError, match=r"rows\[1\]: `prompt` holds half a surrogate pair"):
        data.rows_of([{"prompt": "a"}, {"prompt": "\ud83d"}], "prompts", name="rows")


def test_the_split_takes_digests_and_indices():
    """Rows that lie elsewhere are split as a list of them is, without being read."""

    class Stored(list):
        def __iter__(self):
            raise AssertionError("read")

        def take(self, indices):
            return [self[index] for index in indices]

    rows = [{"prompt": f"{n % 7}"} for n in range(30)]
    stored = Stored(rows)
    stored.digests = [store.prompt_digest(row) for row in rows]
    assert data.split_rows(stored, 0.3, seed=1) == data.split_rows(rows, 0.3, seed=1)


def test_a_digest_is_of_all_that_the_prompt_is():
    user = [{"role": "user", "content": "a"}]
    different = [
        {"prompt": "a"}, {"text": "b"}, {"prompt": Chat(user)}, {"prompt": Chat(user, tools=TOOLS)},
        {"prompt": Chat(user, template_kwargs={"enable_thinking": False})}, {"prompt": Chat(user * 2)},
    ]  # fmt: skip
    digests = [store.prompt_digest(row) for row in different]
    assert len(set(digests)) == len(different) and {len(digest) for digest in digests} == {16}
    turned = {"prompt": Chat([{"content": "a", "role": "user"}]), "completion": "c"}
    assert store.prompt_digest(turned) == digests[2]


def test_published_rows_and_named_columns_are_read_as_ours(tmp_path, caplog):
    alpaca = {"instruction": "add", "input": "1 2", "output": "3"}
    path = write_jsonl(tmp_path / "rows.jsonl", [alpaca, alpaca])
    with caplog.at_level("WARNING", logger="rlhf"):
        rows = data.load_rows(path, "sft")
    assert [row["completion"] for row in rows] == ["3", "3"] and [row["at"] for row in rows] == [
        f"{path}:1",
        f"{path}:2",
    ]
    assert [text.partition(" (")[0] for text in caplog.messages] == [f"{path}: read as the format alpaca"]
    mapped = data.rows_of(path, "sft", name="rows", column_map="prompt=input,completion=output")
    assert {(row["prompt"], row["completion"]) for row in mapped} == {("1 2", "3")}
    with pytest.raises(data.DataError, match=r"rows\.jsonl:1: lacks the field `prompt`"):
        data.load_rows(path, "sft", data_format="own")
    with pytest.raises(data.DataError, match=r"rows\[2\]: lacks the column `instruction`"):
        data.rows_of([alpaca, alpaca, {"input": "a"}], "sft", name="rows")
    both = [alpaca, {"input": "a"}, {"instruction": None, "output": "a"}, alpaca]
    assert len(data.rows_of(both, "sft", name="rows", bad_rows="skip")) == 2


def test_a_pair_is_a_good_and_a_bad_response(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{**SFT, "label": 1}, GOOD["preference"]])
    rows = [(row["completion"], row["label"], row["at"]) for row in data.load_rows(path, "unpaired")]
    assert rows == [("b", True, f"{path}:1"), ("b", True, f"{path}:2"), ("c", False, f"{path}:2")]


def test_data_that_give_nothing_to_learn_from_are_an_error():
    with pytest.raises(data.DataError, match=r"rows: none of 1 rows gives one .*tied"):
        data.rows_of([{**RANKED, "ranks": [1, 1]}], "preference", name="rows")


FIELDS = (
    "prompt", "completion", "messages", "text", "completions", "ranks", "scores", "chosen", "rejected", "label",
    "weight", "margin", "margins", "labeler", "pairs", "tools", "chat_template_kwargs",
)  # fmt: skip


def any_value(chance, depth=0):
    made = [
        lambda: chance.choice(["", "a", " ", "\ud83d", "[1]", "{}", "1", "nan"]),
        lambda: chance.choice([0, 1, -1, 2.5, float("nan"), 10**400, True, None, b"x", (1,)]),
        lambda: [{"role": chance.choice(["user", "assistant"]), "content": "hi"} for _ in range(chance.randrange(5))],
        lambda: {chance.choice(["role", "content", "type", "tool_calls", "weight", 3]): any_value(chance, depth + 1)},
        lambda: [any_value(chance, depth + 1) for _ in range(chance.randrange(4))],
    ]
    return chance.choice(made if depth < 3 else made[:3])()


@pytest.mark.parametrize("kind", data.KINDS)
def test_whatever_a_row_holds_it_is_read_or_told_in_one_line(kind):
    chance, rows = random.Random(kind), []
    for _ in range(3000):
        raw = {**GOOD[kind], **{name: any_value(chance) for name in chance.sample(FIELDS, chance.randrange(5))}}
        try:
            rows += rows_module.check_row(raw, kind)
        except Bad as error:
            assert str(error) and "\n" not in str(error)
    assert rows
    for row in rows:
        (again,) = rows_module.check_row(json.loads(json.dumps(rows_module.plain(row))), kind)
        assert again == row and again.get("prompt") == row.get("prompt")
