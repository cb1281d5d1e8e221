"""Conversations that a chat template refuses, found before anything is trained."""

import pytest

from rlhf import data
from rlhf.data import checks
from rlhf.data.checks import check_chats
from tests.tiny import word_tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m.content }} <|end|> {% endfor %}"
)
USER, ANSWER, TOOL = ({"role": role, "content": "dog"} for role in ("user", "assistant", "tool"))


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(extra=("<|end|>",), chat_template=TEMPLATE)


ROWS = {
    "sft": ({"prompt": "a", "completion": [ANSWER]}, {"prompt": "a", "completion": [ANSWER, TOOL, ANSWER]}),
    "ranked": (
        {"prompt": "a", "completions": [[ANSWER], "b"], "ranks": [0, 1]},
        {"prompt": "a", "completions": ["b", [ANSWER, TOOL, ANSWER]], "ranks": [0, 1]},
    ),
    "preference": (
        {"prompt": "a", "chosen": [ANSWER], "rejected": "b"},
        {"prompt": "a", "chosen": "b", "rejected": [ANSWER, TOOL, ANSWER]},
    ),
    "prompts": ({"prompt": [USER]}, {"prompt": [USER, TOOL]}),
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("count", [5, 500])
def test_all_that_is_refused_is_found_in_prompts_and_answers(tokenizer, kind, count, caplog, monkeypatch):
    """In many rows too, which several processes look at."""
    monkeypatch.setattr(checks, "LARGE", 100)
    good, bad = ROWS[kind]
    rows = data.rows_of([bad if n % 4 == 1 else good for n in range(count)], kind, name="rows")
    with pytest.raises(data.DataError) as caught:
        check_chats(tokenizer, rows, num_proc=2)
    refused = len(range(1, count, 4))
    places = f"rows[{','.join(map(str, range(1, count, 4)))}]" if count > 30 else "rows[1]"
    assert str(caught.value).startswith(f"{places}: the tokenizer's chat template refuses the messages: no tools")
    assert str(caught.value).count("no tools") == 1
    with caplog.at_level("WARNING", logger="rlhf"):
        kept = check_chats(tokenizer, rows, "skip", what="training", num_proc=2)
    assert [row["at"] for row in kept] == [f"rows[{n}]" for n in range(count) if n % 4 != 1]
    assert f"left out {refused} of {count} training rows:" in caplog.text


def test_rows_without_a_conversation_are_not_looked_at():
    rows = [{"text": "a"}, {"prompt": "a", "completion": "b"}]
    assert check_chats(None, rows) is rows
