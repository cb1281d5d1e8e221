"""Responses that were sampled: the message that one stands for, and its ids as a training has them."""

import sys
from contextlib import suppress

from .chat import encode_completion, encode_prompt, end_of_turn_ids, render, text_of, without_special
from .encoding import asked_for, common, encode_row, talk_of
from .files import Bad

THOUGHT, ANSWER = "Qqb", "Qqc"


def encode_sampled(tokenizer, prompt, answer, *, ended=True):
    """(prompt, response) ids of a response, as `encode_row` gives them to a training.

    Args:
        answer: its text, or the assistant's message that it stands for.
        ended: False: the response was cut off, so what ends a turn is left off.
    Raises:
        Bad: what the template refuses.
        DataError: as Bad, of a prompt alone.
    """
    if isinstance(prompt, str):
        return encode_prompt(tokenizer, prompt), encode_completion(tokenizer, answer, eos=ended)
    message = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
    if not ended and message["content"].strip():
        talk = talk_of(prompt, [message], "all", {})
        text = render(tokenizer, talk.chat, talk.messages, continue_final_message=True)
        length = common(text, asked_for(tokenizer, talk, talk.first))
        whole = text_of(tokenizer, text, talk.known, [length])
        start = whole.within(length)
        return whole.ids[:start], whole.ids[start:]
    if not ended and len(message) == 2:
        return encode_prompt(tokenizer, prompt), []
    row = {"prompt": prompt, "completion": [message]}
    (found,) = encode_row(tokenizer, row, ("completion",), max_length=sys.maxsize)
    (ids,) = found.responses
    return found.prompt, ids[:-1] if not ended and ids[-1] in end_of_turn_ids(tokenizer) else ids


def answer_of(tokenizer, prompt, text):
    """The assistant's message for which a response stands, without what the template writes around an answer.

    Thoughts that stand where the template writes them are its `reasoning_content`.

    Args:
        prompt: the messages that were answered.
        text: of the response, special tokens written out, without the token that ended it.
    """
    frames = [None, None]
    if prompt[-1]["role"] != "assistant":
        frames = [_frame(tokenizer, prompt, {"content": ANSWER})]
        frames.append(_frame(tokenizer, prompt, {"reasoning_content": THOUGHT, "content": ANSWER}))
    plain, thoughtful = frames
    thought, answer = "", text
    if plain and plain[0] and text.startswith(plain[0]):
        answer = text.removeprefix(plain[0])
    elif thoughtful and text.startswith(thoughtful[0]) and thoughtful[1] in text[len(thoughtful[0]) :]:
        thought, _, answer = text.removeprefix(thoughtful[0]).partition(thoughtful[1])
    thought, answer = (without_special(tokenizer, part) for part in (thought, answer))
    thoughts = {"reasoning_content": thought} if thought.strip() else {}
    return {"role": "assistant", **thoughts, "content": answer}


def _frame(tokenizer, prompt, fields):
    """What the template writes behind a prompt and between the fields of an answer; None if it leaves one out."""
    with suppress(Bad):
        talk = talk_of(prompt, [{"role": "assistant", **fields}], "all", {})
        text = render(tokenizer, talk.chat, talk.messages)
        rest, found = text[common(text, asked_for(tokenizer, talk, talk.first)) :], []
        for mark in fields.values():
            before, is_there, rest = rest.partition(mark)
            found.append(before)
            if not is_there:
                return None
        return found
    return None
