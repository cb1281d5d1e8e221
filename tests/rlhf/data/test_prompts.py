"""Prompts that must fit into some room: whole turns of a chat go first, then the left end."""

import pytest

from rlhf import data
from tests.tiny import word_tokenizer

TEMPLATE = (
    "{% if tools %}<|tool|> {{ tools[0].name }} {% endif %}"
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>")
SYSTEM = ["<|system|>", "and", "<|end|>"]
LAST = ["<|user|>", "a", "cat", "<|end|>", "<|assistant|>"]
MIDDLE = ["<|user|>", "the", "dog", "<|end|>", "<|assistant|>", "ran", "<|end|>"]
FIRST = ["<|user|>", "the", "the", "the", "<|end|>", "<|assistant|>", "up", "<|end|>"]


def message(role, content):
    return {"role": role, "content": content}


TALK = [
    message("system", "and"), message("user", "the the the"), message("assistant", "up"), message("user", "the dog"),
    message("assistant", "ran"), message("user", "a cat"),
]  # fmt: skip


def within(prompt, room, long_prompts="truncate"):
    tokenizer = word_tokenizer(extra=ROLES, chat_template=TEMPLATE)
    prompt, ids, cut = data.encode_within(tokenizer, prompt, room, long_prompts)
    return prompt, tokenizer.convert_ids_to_tokens(ids), cut


@pytest.mark.parametrize(
    "room, kept, tokens",
    [
        (23, TALK, SYSTEM + FIRST + MIDDLE + LAST),
        (22, [TALK[0], *TALK[3:]], SYSTEM + MIDDLE + LAST),
        (15, [TALK[0], *TALK[3:]], SYSTEM + MIDDLE + LAST),
        (14, [TALK[0], TALK[5]], SYSTEM + LAST),
        (8, [TALK[0], TALK[5]], SYSTEM + LAST),
        (7, [TALK[0], TALK[5]], (SYSTEM + LAST)[1:]),
        (1, [TALK[0], TALK[5]], ["<|assistant|>"]),
    ],
)
def test_a_chat_loses_whole_turns_and_keeps_its_system_message(room, kept, tokens):
    assert within(TALK, room) == (kept, tokens, room < 23)
    assert within(TALK, None) == (TALK, SYSTEM + FIRST + MIDDLE + LAST, False)


def test_tools_stay_and_a_begun_answer_too():
    chat = data.Chat([*TALK, message("assistant", "up")], [{"name": "ran"}], {"lead": 1})
    prompt, tokens, cut = within(chat, 12)
    assert cut and tokens == ["<|tool|>", "ran", *SYSTEM, *LAST, "up"]
    assert prompt == [TALK[0], TALK[5], message("assistant", "up")]
    assert prompt.tools == chat.tools and prompt.template_kwargs == {"lead": 1}


def test_one_question_alone_is_cut_at_its_left_end():
    assert within([message("user", "the dog ran up")], 4)[1] == ["ran", "up", "<|end|>", "<|assistant|>"]


def test_strings_are_cut_at_their_left_end_and_keep_bos():
    assert within("the dog ran up", 3) == ("the dog ran up", ["dog", "ran", "up"], True)
    tokenizer = word_tokenizer(bos="<s>")
    ids = data.encode_within(tokenizer, "the dog ran up", 3)[1]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "ran", "up"]


def test_what_does_not_fit_is_refused_where_nothing_is_cut():
    for prompt, count in (("the dog ran up", 4), (TALK, 23)):
        with pytest.raises(data.TooLong, match=f"the prompt has {count} tokens, longer than the 3 that fit"):
            within(prompt, 3, "drop")
        with pytest.raises(Exception, match=f"the prompt has {count} tokens, longer than the 3 that fit") as caught:
            within(prompt, 3, "error")
        assert type(caught.value).__name__ == "Bad"
        assert within(prompt, count, "error")[2] is False
