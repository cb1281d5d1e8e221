"""`rlhf data`: what it says of small data sets, by hand, and the rows that it writes."""

import gzip
import json
import os
import random
import subprocess
import sys

import pytest

from rlhf import cli, data
from rlhf.data.formats import FORMATS
from rlhf.reports import data_set
from tests.tiny import model_folder, word_tokenizer, write_jsonl

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    "<|{{ m.role }}|> {{ m.content }} <|end|> {% endfor %}{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
MARKS = ("<|end|>", "<|user|>", "<|assistant|>")


@pytest.fixture
def tell(capsys):
    """tell(*argv) -> (exit status, {label: its lines}, what went to stderr) of `rlhf data`."""

    def run(*argv):
        capsys.readouterr()
        try:
            status = cli.main(["data", *map(str, argv)])
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        found, label = {}, None
        for line in out.splitlines()[1:]:
            label = line[2:12].strip() or label
            found.setdefault(label, []).append(line[13:])
        return status, found, err

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    tokenizer = word_tokenizer(extra=MARKS, chat_template=TEMPLATE)
    return model_folder(tmp_path_factory.mktemp("models") / "chat", tokenizer=tokenizer)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


RANKED = [
    {"prompt": "a b", "completions": ["c", "d", "e"], "ranks": [0, 1, 1], "labeler": "ann"},
    {"prompt": "a b", "completions": ["c", "d", "e"], "ranks": [0, 1, 1], "labeler": "ann"},
    {"prompt": "a b", "completions": ["c", "d", "e", "f"], "ranks": [3, 2, 1, 0], "labeler": "bob"},
    {"prompt": "g", "completions": ["c", "d"], "ranks": [1, 1]},
]


def test_rankings(tell, tmp_path):
    """Pairs by hand: of 3 answers with a tie 2, of 4 without one 6, of 2 tied ones none."""
    status, found, _ = tell(write_jsonl(tmp_path / "r.jsonl", RANKED))
    assert status == 0
    assert found["read as"][0].startswith("ranked, by rlhf reward (also: ")
    assert found["format"] == ["our own fields"]
    assert found["columns"] == ["prompt (text), completions (list of text), ranks (list of number), labeler (text)"]
    assert found["rows"] == ["4"]
    assert found["answers"][0] == "2 in 1 rows, 3 in 2 rows, 4 in 1 rows; ties in 3, all tied in 1; 10 decided pairs"
    assert found["labeler"] == ["in 3 rows, of 2 labelers: ann (2), bob (1)"]
    assert found["duplicates"] == ["2 rows repeat a prompt, 1 the whole row"]
    assert found["prompts"][0] == "4; characters: least 1, median 3, 95 % up to 3, most 3"
    assert found["answers"][1] == "12; characters: least 1, median 1, 95 % up to 1, most 1"
    assert found["example"][0] == f"{tmp_path / 'r.jsonl'}:1; ⟦what is learned⟧"
    assert found["example"][1:] == ["a b", "⟦c⟧", "⟦d⟧", "⟦e⟧"]


KINDS = {
    "ranked": RANKED,
    "preference": [{"prompt": "a", "chosen": "b", "rejected": "c"}],
    "unpaired": [{"prompt": "a", "completion": "b", "label": True}],
    "sft": [{"messages": [user("a"), assistant("b")]}],
    "prompts": [{"prompt": "a", "answer": "3"}],
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_that_says_most_is_found(tell, tmp_path, kind):
    file = write_jsonl(tmp_path / "rows.jsonl", KINDS[kind])
    status, found, _ = tell(file)
    assert status == 0 and found["read as"][0].startswith(f"{kind}, by ")
    assert "by rlhf ppo" in found["read as"][0]
    assert tell(file, "--kind", "prompts")[1]["read as"][0].startswith("prompts, by rlhf ppo")


def test_pairs_are_told_from_rankings_of_two_and_what_cannot_be_used_from_something_else(tell, tmp_path):
    pair = {"prompt": "a", "completions": ["b", "c"], "ranks": [0, 1]}
    _, found, _ = tell(write_jsonl(tmp_path / "two.jsonl", [pair]))
    assert found["read as"][0].startswith("ranked, by rlhf reward (also: preference by rlhf dpo")
    file = write_jsonl(tmp_path / "wrong.jsonl", [{**pair, "scores": [0, 1]}] * 2)
    status, _, err = tell(file)
    assert status == 2 and f"{file}:1: " in err and "ranks" in err and f"{file}:2: " in err


def test_published_formats_and_columns(tell, tmp_path):
    nectar = {
        "prompt": "\n\nHuman: a\n\nAssistant: ",
        "answers": [{"answer": x, "rank": r} for r, x in enumerate("bcd", 1)],
    }
    _, found, _ = tell(write_jsonl(tmp_path / "n.jsonl", [nectar]))
    assert found["read as"][0].startswith("ranked, by rlhf reward") and found["format"][0].startswith("nectar")
    assert found["columns"] == ["prompt (text), answers (list of {answer, rank})"]
    rows = [{"q": "a", "x": {"y": "b"}}]
    status, found, err = tell(write_jsonl(tmp_path / "own.jsonl", rows))
    assert status == 2 and "is in no known format (columns: q (text), x ({y}))" in err
    status, found, _ = tell(tmp_path / "own.jsonl", "--columns", "prompt=q,completion=x.y")
    assert status == 0 and found["read as"][0].startswith("sft") and found["format"] == ["--columns"]


def test_plain_text(tell, tmp_path):
    (tmp_path / "t.txt").write_text("one\n\ntwo\n\none\n")
    status, found, _ = tell(tmp_path / "t.txt")
    assert status == 0 and found["read as"] == ["text, by rlhf ppo --ptx_dataset_name"]
    assert found["rows"] == ["3"] and found["duplicates"] == ["1 rows"]
    assert found["texts"][0] == "3; characters: least 3, median 3, 95 % up to 3, most 3"


def test_bad_rows_are_all_listed_and_the_others_still_told(tell, tmp_path, model):
    """One that is no JSON, one without an answer, one that the template refuses."""
    good = {"messages": [user("a"), assistant("b")]}
    refused = {"messages": [{"role": "system", "content": "c"}, *good["messages"]]}
    file = write_jsonl(tmp_path / "b.jsonl", [good, "{", {"messages": [user("a"), assistant("")]}, refused, good])
    for extra, bad in (((), 2), (("--model_name_or_path", model), 3)):
        status, found, _ = tell(file, *extra)
        assert status == 1
        assert found["rows"][0].startswith(f"5, {bad} of them cannot be used")
        told = "\n".join(found["rows"])
        assert f"{file}:2: is not JSON" in told and f"{file}:3: `messages[1]`" in told
        assert (f"{file}:4: the tokenizer's chat template refuses" in told) == (bad == 3)
        assert found["prompts"][0].startswith(f"{5 - bad};")
        assert tell(file, *extra, "--bad_rows", "skip")[0] == 0


def test_tokens_and_the_learned_part(tell, tmp_path, model):
    """Counted by hand from the template: <|user|> a b <|end|> <|assistant|> is 5 tokens, an answer of one word 2."""
    turns = [user("a b"), assistant("c"), user("d"), assistant("e")]
    rows = [{"messages": turns}, {"messages": turns[:2]}]
    file = write_jsonl(tmp_path / "m.jsonl", rows)
    status, found, _ = tell(file, "--model_name_or_path", model)
    assert status == 0
    assert found["prompts"][0] == "2; tokens: least 5, median 5, 95 % up to 5, most 5"
    assert found["answers"][0] == "2; tokens: least 2, median 2, 95 % up to 8, most 8"
    learned = "<|user|> a b <|end|> <|assistant|>⟦c <|end|>⟧<|user|> d <|end|> <|assistant|>⟦e <|end|>⟧"
    assert found["example"][1].replace(" ", "") == learned.replace(" ", "")
    _, found, _ = tell(file, "--model_name_or_path", model, "--learn_turns", "last")
    learned = "<|user|> a b <|end|> <|assistant|> c <|end|> <|user|> d <|end|> <|assistant|>⟦e <|end|>⟧"
    assert found["example"][1].replace(" ", "") == learned.replace(" ", "")


def test_without_a_model_only_the_turns_of_the_assistant_are_marked(tell, tmp_path):
    turns = [user("a"), assistant("c"), user("d"), assistant("e"), user("f"), assistant("g")]
    turns[1]["weight"] = 0
    file = write_jsonl(tmp_path / "m.jsonl", [{"messages": turns}])
    said = ["a", "assistant: c", "user: d", "assistant: ⟦e⟧", "user: f", "assistant: ⟦g⟧"]
    assert tell(file)[1]["example"][1:] == said
    said[3] = "assistant: e"
    assert tell(file, "--learn_turns", "last")[1]["example"][1:] == said


@pytest.mark.parametrize("kind", ["sft", "prompts"])
def test_the_example_is_a_row_that_the_template_takes(tell, tmp_path, model, kind):
    rows = [
        {"messages": [{"role": "system", "content": "c"}, user("a"), assistant("b")]},
        {"messages": [user("a"), assistant("b")]},
    ]
    file = write_jsonl(tmp_path / "m.jsonl", rows)
    status, found, _ = tell(file, "--kind", kind, "--model_name_or_path", model)
    assert status == 1 and f"{file}:1: the tokenizer's chat template refuses" in "\n".join(found["rows"])
    assert found["example"][0].startswith(f"{file}:2") and "<|user|> a <|end|>" in found["example"][1]


def test_what_does_not_fit(tell, tmp_path, model):
    rows = [{"prompt": "a b c d e f", "completion": "g"}, {"prompt": "a", "completion": "b c d e f g"}]
    file = write_jsonl(tmp_path / "long.jsonl", rows)
    _, found, _ = tell(file, "--model_name_or_path", model, "--max_length", 6)
    told = "\n".join(found["rows"])
    assert "cut 1 of 2" in told and "dropped 1 of 2" in told


def test_prompts_and_a_template_of_ones_own(tell, tmp_path, model):
    """chatml writes user, line breaks and assistant beside a's word; words that are one token each, or unknown."""
    file = write_jsonl(
        tmp_path / "p.jsonl", [{"prompt": [user("a")]}, {"prompt": [{"role": "system", "content": "a"}]}]
    )
    status, found, _ = tell(file, "--model_name_or_path", model)
    assert status == 1 and f"{file}:2: the tokenizer's chat template refuses" in "\n".join(found["rows"])
    assert found["prompts"][0] == "1; tokens: least 4, median 4, 95 % up to 4, most 4"
    _, found, _ = tell(file, "--model_name_or_path", model, "--bad_rows", "skip", "--max_length", 3)
    assert "cut 1 of 2 prompts: 3 tokens fit" in "\n".join(found["rows"])
    status, found, _ = tell(file, "--model_name_or_path", model, "--chat_template", "chatml")
    assert status == 0 and found["prompts"][0].startswith("2; tokens: ")
    assert found["example"][1] == "<|im_start|> <unk> a <|im_end|> <|im_start|> <unk>"


def test_classes_of_a_histogram():
    sizes = [3] * 4 + [12] * 10 + [25] * 5 + [1000]
    lines = list(data_set.histogram(sizes, "tokens"))
    assert lines[0] == "20; tokens: least 3, median 12, 95 % up to 25, most 1000"
    assert [(line[:16].strip(), int(line.rpartition(" ")[2])) for line in lines[1:]] == [
        ("0 to 4", 4), ("5 to 9", 0), ("10 to 14", 10), ("15 to 19", 0), ("20 to 24", 0), ("25 to 1000", 6),
    ]  # fmt: skip
    assert [line.count("#") for line in lines[1:]] == [8, 0, 20, 0, 0, 12]


def random_rows(seed):
    chance = random.Random(seed)
    tools = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "find"}}]}
    for number in range(20):
        turns = [
            user(f"é {number}"),
            call,
            {"role": "tool", "content": "x"},
            assistant("b"),
            user("c"),
            assistant("d\n"),
        ]
        row = {"messages": turns[: chance.choice((2, 4, 6))]}
        if chance.random() < 0.5:
            row |= {"tools": tools, "chat_template_kwargs": {"enable_thinking": False}}
        yield row


@pytest.mark.parametrize("kind", [*KINDS, "chats"])
@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_written_rows_are_read_as_the_same_rows(tell, tmp_path, kind, ending):
    file = write_jsonl(tmp_path / "in.jsonl", list(random_rows(0)) if kind == "chats" else KINDS[kind])
    out, kind = tmp_path / f"out{ending}", "sft" if kind == "chats" else kind
    assert tell(file, "--write", out)[0] == 0
    opened = gzip.open if ending.endswith("gz") else open
    with opened(out, "rt", encoding="utf-8") as lines:
        assert all("at" not in json.loads(line) for line in lines)

    def read(path):
        rows = data.load_rows(path, kind, columns=kind == "prompts")
        chats = [
            (row["prompt"].tools, row["prompt"].template_kwargs) for row in rows if isinstance(row["prompt"], data.Chat)
        ]
        return [{name: value for name, value in row.items() if name != "at"} for row in rows], chats

    assert read(out) == read(file)


def test_nothing_is_overwritten_or_written_by_halves(tell, tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "in.jsonl", KINDS["sft"] * 2)
    out = tmp_path / "out.jsonl"
    out.write_text("old")
    status, _, err = tell(file, "--write", out)
    assert status == 2 and f"write: {out} is there already; --overwrite replaces it" in err and out.read_text() == "old"
    assert tell(file, "--write", file, "--overwrite")[0] == 2
    assert "wants a name that ends with .jsonl" in tell(file, "--write", tmp_path / "out.csv")[2]

    def full(*_):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        status, _, err = tell(file, "--write", out, "--overwrite")
        assert status == 2 and f"{out}: cannot be written (No space left" in err
    assert out.read_text() == "old" and sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]
    assert tell(file, "--write", out, "--overwrite")[0] == 0 and out.read_text().count("\n") == 2
    bad = write_jsonl(tmp_path / "bad.jsonl", [*KINDS["sft"], "{"])
    assert tell(bad, "--write", tmp_path / "new.jsonl")[0] == 1 and not (tmp_path / "new.jsonl").exists()
    assert tell(bad, "--write", tmp_path / "new.jsonl", "--bad_rows", "skip")[0] == 0


def test_formats_are_listed(capsys):
    assert cli.main(["data", "--formats"]) == 0
    out = capsys.readouterr().out
    for name, format in FORMATS.items():
        assert f"{name}\n" in out or f"{name}, " in out
        assert format.about in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "wants a file, a folder or the name of a data set"),
        (["x.jsonl", "--max_length", "8"], "--max_length is about tokens, so it needs --model_name_or_path"),
        (["no-such.jsonl"], "no-such.jsonl: no such file"),
        (
            ["x.jsonl", "--max_length", "1", "--model_name_or_path", "demo"],
            "max_length: got 1, wants a whole number >= 2",
        ),
        (["x.jsonl", "--kind", "dpo"], "invalid choice: 'dpo'"),
    ],
)
def test_errors_are_one_line(tell, argv, message):
    status, _, err = tell(*argv)
    assert status == 2 and message in err and err.strip().count("\n") == 0


def test_several_sets_are_told_apart(tell, tmp_path):
    first = write_jsonl(tmp_path / "a.jsonl", KINDS["sft"] * 4)
    second = write_jsonl(tmp_path / "b.jsonl", [{"instruction": "a", "input": "", "output": "b"}] * 4)
    status, found, _ = tell(f"{first}:3,{second}:1")
    assert status == 0 and found["set"] == [first, second]
    assert found["format"][0] == "our own fields" and found["format"][1].startswith("alpaca")
    assert found["rows"][0] == "5"


def test_a_terminal_without_the_characters(tmp_path):
    """Those of an answer and of the marks are ? then, and the command goes on."""
    file = write_jsonl(tmp_path / "e.jsonl", [{"prompt": "caf\u00e9 \u4e2d", "completion": "b"}])
    command = [sys.executable, "-m", "rlhf", "data", file]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(command, capture_output=True, env=environment, check=True)
    assert done.stdout.decode("latin-1").endswith("caf\u00e9 ?\n             ?b?\n")
