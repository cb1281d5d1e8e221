"""Large data: the rows, ids and splits of data in memory, read and encoded by several processes, once."""

import json
import math
import os
import pickle

import pytest

from rlhf import data, training
from rlhf.data import Chat, cache, encoders, large, parallel, store
from rlhf.data.examples import Examples
from rlhf.errors import RunError
from rlhf.preference import DPOConfig, train_dpo
from rlhf.reward import RewardConfig, train_reward
from rlhf.sft import SFTConfig, train_sft
from tests.tiny import model_folder, word_tokenizer, write_jsonl

TEMPLATE = (
    "{% for message in messages %}{{ message.role }} {{ message.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
TALK = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"}]
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]
SFT = [
    {"prompt": "the dog ran é 中", "completion": "up and\n\ndown \U0001f600"},
    {"messages": [*TALK, {"role": "assistant", "content": "e", "name": "x", "score": 0.1}]},
    {"prompt": TALK, "completion": "was good", "tools": TOOLS, "chat_template_kwargs": {"deep": [1, None, 2.5]}},
    {"text": "a text\twith all of it"},
]
RANKED = [
    {"prompt": "a", "completions": ["b", "c d", "e"], "scores": [1, 3, 2.5], "weight": 0.5, "labeler": "ann"},
    {"prompt": "a", "completions": ["b", "c"], "ranks": [0, 1], "margin": 0.25, "pairs": [[0, 1]]},
    {"prompt": TALK, "completions": ["b", "c"], "ranks": [0, 1]},
]
PAIRS = [{"prompt": f"a {word}", "chosen": word, "rejected": "bad"} for word in "bcde"]
KINDS = {
    "sft": SFT,
    "ranked": RANKED,
    "preference": PAIRS,
    "unpaired": PAIRS,  # two rows each
    "prompts": [{"prompt": row["prompt"]} for row in PAIRS] + [{"prompt": TALK}],
    "text": [{"text": f"{word} and more"} for word in "abc"],
}
HELPSTEER = [  # all answers to a prompt are one ranking, wherever they stand
    {"prompt": prompt, "response": response, "helpfulness": helpfulness}
    for prompt, response, helpfulness in (
        ("a", "one", 4),
        ("b", "x", 1),
        ("a", "two", 2),
        ("b", "y", 3),
        ("a", "three", 3),
    )
]


@pytest.fixture
def no_work(monkeypatch):
    """no_work() makes reading, checking and encoding an error."""

    def forbid():
        def fail(*args, **options):
            raise AssertionError("this is in the cache")

        monkeypatch.setattr(parallel, "in_order", fail)
        monkeypatch.setattr(large, "read_chunks", fail)

    return forbid


def same(rows, others):
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        assert row == other and list(row) == list(other)
        if isinstance(other.get("prompt"), Chat):
            assert type(row["prompt"]) is Chat
            assert row["prompt"].tools == other["prompt"].tools
            assert row["prompt"].template_kwargs == other["prompt"].template_kwargs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_rows_are_those_of_small_data(tmp_path, everything_is_large, monkeypatch, kind, form):
    path = write_jsonl(tmp_path / "rows.jsonl", KINDS[kind] * 5)
    if form == "json":
        path = str(tmp_path / "rows.json")
        (tmp_path / "rows.json").write_text(json.dumps(KINDS[kind] * 5))
    rows = data.load_rows(path, kind)
    assert isinstance(rows, store.Rows)
    monkeypatch.setattr(large, "BYTES", math.inf)
    expected = data.load_rows(path, kind)
    assert isinstance(expected, list)
    same(rows, expected)
    same(rows[2:7:2], expected[2:7:2])
    same(rows.take([4, 0, 3])[1:], [expected[0], expected[3]])
    assert rows[-1] == expected[-1] and store.digest(rows) == store.digest(expected)
    assert store.digest(rows[1:]) == store.digest(expected[1:]) != store.digest(expected[:-1])
    with pytest.raises(IndexError):
        rows[len(expected)]
    with pytest.raises(IndexError):
        rows[-len(expected) - 1]


def test_a_split_is_that_of_small_data(tmp_path, everything_is_large, monkeypatch):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"a {n % 7}", "completion": f"b {n}"} for n in range(40)])
    large_sides = data.split_rows(data.load_rows(path, "sft"), 0.3, seed=5)
    monkeypatch.setattr(large, "BYTES", math.inf)
    for side, expected in zip(large_sides, data.split_rows(data.load_rows(path, "sft"), 0.3, seed=5), strict=True):
        assert isinstance(side, store.Rows) and list(side) == expected


def test_a_published_format_and_its_note_are_told_again(tmp_path, everything_is_large, no_work, monkeypatch, caplog):
    path = write_jsonl(tmp_path / "helpsteer.jsonl", HELPSTEER)
    rows = list(data.load_rows(path, "ranked"))
    told = caplog.text
    assert "read as the format helpsteer (all answers" in told and [row["ranks"] for row in rows] == [[0, 2, 1], [1, 0]]
    caplog.clear()
    no_work()
    assert list(data.load_rows(path, "ranked")) == rows and caplog.text == told
    monkeypatch.setattr(large, "BYTES", math.inf)
    assert data.load_rows(path, "ranked") == rows


def test_bad_rows_are_all_listed_or_left_out_as_of_small_data(
    tmp_path, everything_is_large, no_work, monkeypatch, caplog
):
    lines = [{"prompt": "a", "completion": f"b {n}"} for n in range(20)]
    lines[3], lines[11], lines[17] = {"prompt": "a"}, '{"prompt": ', {"prompt": "", "completion": "c"}
    path = write_jsonl(tmp_path / "rows.jsonl", lines)

    def outcome():
        caplog.clear()
        with pytest.raises(data.DataError) as caught:
            data.load_rows(path, "sft")
        return str(caught.value), list(data.load_rows(path, "sft", bad_rows="skip")), caplog.text

    first = outcome()
    assert f"{path}:4: lacks the field `completion`" in first[0] and f"{path}:12: is not JSON" in first[0]
    assert len(first[1]) == 17 and "left out 3 of 20 rows" in first[2]
    with monkeypatch.context() as patched:
        patched.setattr(large, "BYTES", math.inf)
        assert outcome() == first
    no_work()
    assert outcome() == first


def test_nothing_to_learn_from_is_told(tmp_path, everything_is_large):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n")
    with pytest.raises(data.DataError, match=r"rows\.jsonl:1: holds no rows"):
        data.load_rows(path, "sft")
    assert not list((tmp_path / "cache").iterdir())


def test_a_changed_file_is_read_anew(tmp_path, everything_is_large):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"prompt": "a", "completion": "b"}])
    assert [row["completion"] for row in data.load_rows(path, "sft")] == ["b"]
    before = path.stat()
    write_jsonl(path, [{"prompt": "a", "completion": "c"}])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert [row["completion"] for row in data.load_rows(path, "sft")] == ["c"]
    assert [row["completion"] for row in data.load_rows(path, "sft", column_map="completion=prompt,prompt=prompt")] == [
        "a"
    ]


def test_a_file_that_changes_while_it_is_read_is_told(tmp_path, everything_is_large, monkeypatch):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, SFT)
    written = store.write

    def write(folder, parts):
        with open(path, "a") as file:
            file.write('{"text": "more"}\n')
        return written(folder, parts)

    monkeypatch.setattr(store, "write", write)
    with pytest.raises(data.DataError, match=r"rows\.jsonl: was written to while it was read"):
        data.load_rows(str(path), "sft")
    assert not list((tmp_path / "cache").iterdir())


def test_rows_of_a_large_file_may_be_given_as_they_are(tmp_path, everything_is_large):
    rows = data.load_rows(write_jsonl(tmp_path / "rows.jsonl", SFT), "sft")
    assert data.rows_of(rows, "sft", name="train_dataset") is rows
    assert data.rows_of(rows[1:], "sft", name="train_dataset")[0] == rows[1]
    with pytest.raises(data.DataError, match=r"train_dataset\[0\]: lacks"):
        data.rows_of(rows, "preference", name="train_dataset")


def test_rows_that_were_cut_off_are_told(tmp_path, everything_is_large):
    rows = data.load_rows(write_jsonl(tmp_path / "rows.jsonl", SFT), "sft")
    os.truncate(rows.folder / "rows.bin", 20)
    with pytest.raises(data.DataError, match=r"rows\.bin: is shorter than when it was written; remove its folder"):
        rows[3]


def test_rows_and_examples_travel_to_other_processes(tmp_path, everything_is_large):
    rows = data.load_rows(write_jsonl(tmp_path / "rows.jsonl", KINDS["preference"]), "preference")
    examples = encode(word_tokenizer(), rows, ("chosen", "rejected"))
    examples.add("ref_log_probs", [[0.5, -1.0]] * 4)
    again = pickle.loads(pickle.dumps(examples))
    assert list(again) == list(examples) and list(pickle.loads(pickle.dumps(rows[1:]))) == list(rows)[1:]
    assert len(pickle.dumps(rows)) < 1000


class Settings:
    max_length, long_prompts, disable_tqdm = 12, "truncate", True


def encode(tokenizer, rows, names, **changes):
    args = Settings()
    vars(args).update(changes)
    return training.encode_rows(tokenizer, rows, names, args, what="training")


@pytest.mark.parametrize("names", [("completion",), ("completions",), ("chosen", "rejected")])
def test_ids_are_those_of_small_data_and_are_made_once(
    tmp_path, everything_is_large, no_work, monkeypatch, caplog, names
):
    """Of rows that fit, are cut, are dropped, and of a ranking that loses a completion."""
    long, longer = " ".join("abcdefgh"), " ".join("abcdefghijklmnop")
    made = {
        ("completion",): [*SFT[::2], {"prompt": longer, "completion": "b"}, {"prompt": "a", "completion": longer}],
        ("completions",): [*RANKED, {"prompt": long, "completions": [longer, "b", long], "ranks": [0, 1, 2]}],
        ("chosen", "rejected"): [*PAIRS, {"prompt": "a", "chosen": longer, "rejected": "b"}],
    }[names]
    kind = {"completion": "sft", "completions": "ranked", "chosen": "preference"}[names[0]]
    path = write_jsonl(tmp_path / "rows.jsonl", made * 4)
    tokenizer = word_tokenizer(extra=("user", "assistant"), chat_template=TEMPLATE)
    rows = data.load_rows(path, kind)
    found = encode(tokenizer, rows, names)
    told = caplog.text
    assert "dropped 4 of" in told or names == ("completions",)
    small = list(rows)
    caplog.clear()
    with monkeypatch.context() as patched:
        patched.setattr(encoders, "LARGE", math.inf)
        expected = encode(tokenizer, small, names)
    assert caplog.text == told
    assert list(found) == list(expected) and len(found) > 4
    assert found.digest() == expected.digest() and found.largest_id == expected.largest_id
    assert found.lengths.tolist() == expected.lengths.tolist() and found.is_text.tolist() == expected.is_text.tolist()
    if names == ("completions",):
        assert list(found.pairs()) == list(expected.pairs())
    again = list(encode(tokenizer, small, names))  # several processes, no file
    assert again == list(expected)
    no_work()
    caplog.clear()
    cached = encode(tokenizer, data.load_rows(path, kind), names)
    assert list(cached) == list(expected) and caplog.text == told


def test_ids_of_other_rows_or_settings_or_tokenizers_are_not_taken_for_these(tmp_path, everything_is_large):
    rows = data.load_rows(write_jsonl(tmp_path / "rows.jsonl", SFT[:3] * 2), "sft")
    options = {"extra": ("user", "assistant"), "chat_template": TEMPLATE}
    tokenizer, folder = word_tokenizer(**options), tmp_path / "cache"

    def is_new(tokenizer=tokenizer, rows=rows, **changes):
        before = set(folder.iterdir())
        encode(tokenizer, rows, ("completion",), **changes)
        return set(folder.iterdir()) != before

    assert is_new() and not is_new() and not is_new(word_tokenizer(**options))
    assert (
        is_new(rows=rows[1:]) and is_new(max_length=13) and is_new(long_prompts="drop") and is_new(learn_turns="last")
    )
    assert is_new(word_tokenizer(**{**options, "chat_template": TEMPLATE.replace("assistant ", "")}))
    assert is_new(word_tokenizer(**options, bos="<s>")) and is_new(word_tokenizer(**options, eos="b"))
    splitting = word_tokenizer(**options)
    splitting.split_special_tokens = True
    assert is_new(splitting)
    assert not is_new() and not is_new(rows=rows[1:])


def test_a_tokenizer_with_code_of_its_own_is_asked_each_time(tmp_path, everything_is_large):
    class Shouting(type(word_tokenizer())):
        pass

    tokenizer = word_tokenizer()
    tokenizer.__class__ = Shouting
    rows = data.load_rows(write_jsonl(tmp_path / "rows.jsonl", PAIRS), "preference")
    before = set((tmp_path / "cache").iterdir())
    assert list(encode(tokenizer, rows, ("chosen", "rejected"))) == list(
        encode(word_tokenizer(), list(rows), ("chosen", "rejected"))
    )
    assert set((tmp_path / "cache").iterdir()) == before


def test_rows_that_a_template_refuses_are_listed_from_the_cache_too(tmp_path, everything_is_large, no_work):
    template = "{% if messages[0].content == 'bad' %}{{ raise_exception('no bad words') }}{% endif %}" + TEMPLATE
    tokenizer = word_tokenizer(extra=("user", "assistant"), chat_template=template)
    talks = [
        [{"role": "user", "content": word}, {"role": "assistant", "content": "c"}] for word in ("a", "bad", "b", "bad")
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": talk} for talk in talks])
    for again in (False, True):
        no_work() if again else None
        rows = data.load_rows(path, "sft")
        with pytest.raises(data.DataError, match=r"(?s)jsonl:2: .*no bad words.*jsonl:4: .*no bad words"):
            encode(tokenizer, rows, ("completion",))
        assert [row["row"]["at"][-1] for row in encode(tokenizer, rows, ("completion",), bad_rows="skip")] == ["1", "3"]


def test_a_process_that_dies_leaves_no_entry(tmp_path, everything_is_large, monkeypatch):
    path = write_jsonl(tmp_path / "rows.jsonl", PAIRS * 4)
    rows = data.load_rows(path, "preference")
    monkeypatch.setattr(encoders, "encode_row", lambda *args, **options: os._exit(9))
    before = set((tmp_path / "cache").iterdir())
    with pytest.raises(RunError, match="dataset_num_proc: a process"):
        encode(word_tokenizer(), rows, ("chosen", "rejected"))
    assert set((tmp_path / "cache").iterdir()) == before


RANKINGS = [{"prompt": f"a {n % 9}", "completions": ["b", "c d", "e"], "ranks": [n % 2, 1, 2]} for n in range(24)]
STAGES = {
    "sft": (SFTConfig, train_sft, [{"prompt": f"a {n} the", "completion": f"{'b c ' * (n % 5)}d"} for n in range(24)]),
    "dpo": (DPOConfig, train_dpo, [{**PAIRS[n % 4], "chosen": "up " * (n % 4 + 1)} for n in range(24)]),
    "reward": (RewardConfig, train_reward, [{**row, "labeler": "xy"[n % 2]} for n, row in enumerate(RANKINGS)]),
    "shuffled": (RewardConfig, train_reward, RANKINGS),
}  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_learns_the_same_from_large_data(tmp_path, everything_is_large, monkeypatch, stage):
    """The loss of every step and the evaluation; a checkpoint of the one is gone on with by the other."""
    config, train, rows = STAGES[stage]
    policy, path = model_folder(tmp_path / "policy"), write_jsonl(tmp_path / "rows.jsonl", rows)
    options = {
        "model_name_or_path": policy, "dataset_name": path, "use_cpu": True, "disable_tqdm": True, "eval_fraction": 0.3,
        "per_device_train_batch_size": 2, "logging_steps": 1, "max_steps": 4, "save_steps": 2, "learning_rate": 1e-2,
        **({"comparisons": "shuffled"} if stage == "shuffled" else {}),
    }  # fmt: skip
    found = {}
    for size in (1, math.inf):
        monkeypatch.setattr(large, "BYTES", size)
        monkeypatch.setattr(encoders, "LARGE", size)
        run = train(config(output_dir=str(tmp_path / f"run-{size}"), **options))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        records = [json.loads(file.read_text()) for file in sorted(run.glob("checkpoint-*/same_run.json"))]
        timed = ("time", "train/seconds")
        found[size] = [{name: line[name] for name in line if name not in timed} for line in lines], records
    assert found[1] == found[math.inf] and len(found[1][0]) >= 4 and len(found[1][1]) == 2
    assert {path.name.partition("-")[0] for path in (tmp_path / "cache").iterdir()} == {"rows", "ids"}


def test_what_names_rows():
    """Mapped rows have a name where theirs have one; rows in memory have none."""
    assert store.key_of([{"prompt": "a"}]) is None and store.key_of(store.Mapped(len, [[1]])) is None
    assert (
        Examples.of([]).digest()
        == Examples.of([]).digest()
        != Examples.of([{"prompt": [1], "responses": [[2]]}]).digest()
    )
    assert cache.name_of({"a": 1, "b": 2}) == cache.name_of({"b": 2, "a": 1}) != cache.name_of({"a": 1, "b": 3})
