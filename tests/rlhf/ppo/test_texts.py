"""Pretraining texts of PPO-ptx: those of a stream, in order, again after the end, and from where a run was left."""

import hashlib
import json
from collections import Counter
from types import SimpleNamespace

import pytest

from rlhf import data
from rlhf.ppo import train_ppo
from rlhf.ppo.texts import StreamedTexts, Texts, pretraining_texts
from tests.tiny import WORDS, word_tokenizer, write_jsonl
from tests.tiny_ppo import assert_same_run

FULL = {
    "ptx_coef": 0.5, "ptx_streaming": True, "ptx_shuffle_buffer": 4, "ptx_batch_multiplier": 2, "ptx_max_length": 4,
    "num_ppo_epochs": 2, "ema_decay": 0.9, "max_kl": 1e6,
}  # fmt: skip


def settings(path, **changes):
    options = {
        "ptx_dataset_name": str(path), "ptx_coef": 1.0, "ptx_streaming": True, "ptx_shuffle_buffer": 5,
        "ptx_max_length": 4, "seed": 3, "bad_rows": "error", "dataset_num_proc": 1,
    }  # fmt: skip
    return SimpleNamespace(**options | changes)


@pytest.fixture
def shards(tmp_path):
    """24 texts of 1 to 8 words in 3 shards."""
    texts = [" ".join(WORDS[start : start + 1 + start % 8]) for start in range(24)]
    for shard in range(3):
        rows = [{"text": text} for text in texts[8 * shard : 8 * shard + 8]]
        write_jsonl(tmp_path / f"train-{shard}-of-3.jsonl", rows)
    return tmp_path


def test_an_epoch_of_a_stream_holds_every_piece_once(shards):
    tokenizer = word_tokenizer()
    held, streamed = (pretraining_texts(settings(shards, ptx_streaming=way), tokenizer) for way in (False, True))
    assert isinstance(held, Texts) and isinstance(streamed, StreamedTexts)
    count, all_pieces = len(held), sorted(held.take(len(held)))
    assert all_pieces == sorted(Texts(settings(shards, seed=9), tokenizer).take(count))
    epochs = [streamed.take(count) for _ in range(3)]
    for epoch in epochs:
        assert Counter(map(tuple, epoch)) == Counter(map(tuple, all_pieces))
    assert epochs[0] != epochs[1] != epochs[2] and streamed.longest == held.longest == 4
    assert pretraining_texts(settings(shards, ptx_coef=0.0), tokenizer) is None


def test_texts_in_memory(tmp_path):
    """Cut at 4 tokens, the end of each text its last one, a single token left out; named as their JSON is."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in ("a b c", "a b c d", "a b c d e f", "b")])
    tokenizer = word_tokenizer()
    a, b, c, d, e, f, end = tokenizer.convert_tokens_to_ids([*"abcdef", "</s>"])
    pieces = [[a, b, c, end], [a, b, c, d], [a, b, c, d], [e, f, end], [b, end]]
    texts = Texts(settings(path), tokenizer)
    assert len(texts) == 5 and sorted(texts.take(5)) == sorted(pieces) and texts.longest == 4
    assert texts.digest() == hashlib.sha256(json.dumps(pieces).encode()).hexdigest()[:16]


def test_the_order_of_a_stream_depends_on_the_seed(shards):
    tokenizer = word_tokenizer()
    first, again, other, plain = (
        StreamedTexts(settings(shards, **changes), tokenizer).take(60)
        for changes in ({}, {}, {"seed": 4}, {"ptx_shuffle_buffer": 1})
    )
    assert first == again and other != first != plain


def test_a_stream_goes_on_from_every_state(shards):
    """A stream that takes single pieces over two epochs, and one that is put where each of its states says."""
    tokenizer = word_tokenizer()
    whole = StreamedTexts(settings(shards), tokenizer)
    states, pieces = [], []
    for _ in range(90):
        states.append(json.loads(json.dumps(whole.state())))
        pieces += whole.take(1)
    assert states[-1]["epoch"] == 2
    for number, state in enumerate(states):
        again = StreamedTexts(settings(shards), tokenizer)
        again.load(state)
        assert again.state() == state and again.take(len(pieces) - number) == pieces[number:]


def test_texts_too_short_to_learn_from(tmp_path):
    """A piece of one token predicts nothing; a set of such texts is an error, not an endless search."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}] * 60)
    tokenizer = word_tokenizer()
    pieces = StreamedTexts(settings(path, ptx_max_length=2), tokenizer).take(2)
    assert [len(piece) for piece in pieces] == [2, 2]
    for way in (True, False):
        with pytest.raises(data.DataError, match=r"a\.jsonl: holds no text of two tokens"):
            pretraining_texts(settings(path, ptx_max_length=1, ptx_streaming=way), tokenizer).take(1)


def test_a_stream_of_nothing_is_an_error_at_the_start(tmp_path):
    with pytest.raises(data.DataError, match=r"none\.jsonl: no such file"):
        StreamedTexts(settings(tmp_path / "none.jsonl"), word_tokenizer())


def test_a_run_on_a_stream_goes_on_to_the_bit(home):
    options = FULL | {"ptx_dataset_name": str(home.path / "text.txt"), "save_total_limit": None}
    train_ppo(home.config("whole", **options, max_steps=4, save_steps=4))
    train_ppo(home.config("halves", **options, max_steps=2, save_steps=2, save_updates=1))
    state = json.loads((home.path / "halves" / "checkpoint-2" / "trainer_state.json").read_text())["ptx"]
    assert state["epoch"] > 0
    train_ppo(home.config("halves", **options, max_steps=4, save_steps=4, resume_from_checkpoint="true"))
    assert_same_run(home, "whole", "halves")
    assert home.rows("whole")[0]["loss/ptx_avg"] > 0


@pytest.mark.parametrize("change", [{"ptx_streaming": False}, {"ptx_shuffle_buffer": 5}, {"ptx_dataset_name": "other"}])
def test_a_run_on_another_stream_is_refused(home, change):
    (home.path / "other").mkdir()
    (home.path / "other" / "text.txt").write_text("a dog sat .")
    options = FULL | {"ptx_dataset_name": str(home.path / "text.txt")}
    train_ppo(home.config(**options, max_steps=1, save_steps=1))
    if "ptx_dataset_name" in change:
        change = {"ptx_dataset_name": str(home.path / "other" / "text.txt")}
    with pytest.raises(ValueError, match=rf"^{next(iter(change))}: .*goes on with the same run only"):
        home.trainer(**options | change, max_steps=1, resume_from_checkpoint="true")
