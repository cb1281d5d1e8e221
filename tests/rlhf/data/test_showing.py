"""One row as a model reads it, and what is told of its chat template."""

import io
import logging

import pytest

from rlhf import data
from rlhf.data import showing
from tests.rlhf.data.chat_families import FIND, message, tokenizer_of


def test_what_is_learned_stands_in_marks():
    tokenizer = tokenizer_of("chatml")
    ids = [tokenizer(text).input_ids for text in ("ask", "one", "qzx")]
    learned = [None, [False, True, True]]
    assert showing.marked(tokenizer, ids[0], ids[1:]) == "ask⟦one⟧\n⟦qzx⟧"
    assert showing.marked(tokenizer, ids[0], ids[1:], learned) == "ask⟦one⟧\nq⟦zx⟧"


def test_long_texts_lose_their_middle():
    assert showing.shortened("a" * 10, 10) == "a" * 10
    assert showing.shortened("a" * 9 + "b" * 9, 4) == "aa\n[... 14 characters ...]\nbb"


def test_a_terminal_that_lacks_the_marks(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    showing.show("title:", "a⟦b⟧")
    stream.flush()
    assert stream.buffer.getvalue() == b"title:\na?b?\n\n"


ASK, TELL = message("user", "a"), message("assistant", "b")


@pytest.mark.parametrize(
    ("family", "row", "told"),
    [
        ("chatml", {"prompt": "a", "completion": "b"}, ""),
        ("chatml", {"prompt": data.Chat([ASK]), "completion": [TELL]}, ""),
        ("falcon", {"prompt": data.Chat([ASK]), "completion": [TELL]}, "writes no token behind an answer"),
        ("glm-4.5", {"prompt": data.Chat([ASK]), "completion": [TELL]}, "writes no token behind an answer"),
        ("phi-3", {"prompt": data.Chat([ASK]), "completion": [TELL]}, ""),
        ("chatml", {"prompt": data.Chat([ASK], [FIND]), "completion": [TELL]}, "does not read the rows' tools"),
        ("qwen3", {"prompt": data.Chat([ASK], [FIND]), "completion": [TELL]}, ""),
        (
            "chatml",
            {"prompt": data.Chat([ASK]), "chosen": [{**TELL, "reasoning_content": "c"}], "rejected": [TELL]},
            "does not write reasoning_content",
        ),
        ("qwen3", {"prompt": data.Chat([ASK]), "completions": [[{**TELL, "reasoning_content": "c"}], "d"]}, ""),
        ("gpt-oss", {"prompt": data.Chat([ASK]), "completion": [{**TELL, "reasoning_content": "c"}]}, ""),
    ],
)
def test_what_a_template_leaves_out_is_told(caplog, family, row, told):
    with caplog.at_level(logging.WARNING, logger="rlhf"):
        showing.warn_of_template(tokenizer_of(family), [row])
    assert len(caplog.messages) == bool(told) and told in "".join(caplog.messages)
