"""Rows as token ids. All stages encode here, so the ids that trained the reward model are those that PPO scores.

Strings: a prompt and a completion are tokenised apart and joined as ids. Chats: the ids are those of the template's
rendering of the whole conversation, split where that parts from the rendering of the prompt; what the template writes
behind the end of the last turn is left off.
"""

import itertools
import re
from bisect import bisect_left
from typing import NamedTuple

from .chat import (
    encode_completion,
    encode_prompt,
    encode_text,
    end_of_turn,
    render,
    render_prompt,
    text_of,
)
from .files import Bad
from .messages import BEFORE_TURNS

LOOKED_AT = 200
"""Characters at the end of an answer among which its last word is."""
THOUGHTS = ("reasoning_content", "reasoning", "thinking")


class Encoded(NamedTuple):
    """A prompt with its responses, as token ids.

    Attributes:
        prompt: list of int.
        responses: lists of int; the last token is the one that ends the response.
        learned: None = all tokens of all responses; else, for each response, None or a list of bool (False = read, not
            learned).
        cut: whether something was left out to make the rest fit: of the prompt, or a turn of its own.
    """

    prompt: list
    responses: list
    learned: list | None
    cut: bool


class TooLong(Bad):
    """A row that cannot fit into max_length; `fits` are the indices of the completions that would."""

    def __init__(self, reason, fits=()):
        super().__init__(reason)
        self.fits = list(fits)


class Rewritten(Bad):
    """A template renders earlier turns of a conversation otherwise once more turns follow."""


def encode_row(tokenizer, row, names, *, max_length, long_prompts="truncate", learn_turns="all"):
    """The ids of a checked row: one Encoded; of a chat whose template rewrites earlier turns one for each learned turn.

    Args:
        row: of `load_rows`.
        names: fields that hold completions, or ("completions",), which holds a list of them.
        max_length: tokens that the prompt and its longest response may fill.
        long_prompts: "truncate": of a chat the oldest turns are left out, system messages and the last question stay;
            then the left end is cut, a leading BOS stays; "drop": TooLong; "error": Bad.
        learn_turns: "all" turns of the assistant's in a completion are learned, or the "last" one.
    Raises:
        TooLong: the row cannot fit, or a prompt does not under "drop".
        Bad: what the template, or the row, does not allow.
    """
    limit = (max_length, long_prompts)
    if "text" in row:
        ids = encode_text(tokenizer, row["text"])
        if len(ids) < 2:  # the end alone
            raise Bad("the text gives no tokens")
        return [_fitted(tokenizer, Encoded(ids[:1], [ids[1:]], None, cut=False), *limit)]
    prompt, is_ranking = row["prompt"], names == ("completions",)
    answers = row["completions"] if is_ranking else [row[name] for name in names]
    if isinstance(prompt, str) and all(isinstance(answer, str) for answer in answers):
        responses = [encode_completion(tokenizer, answer) for answer in answers]
        return [_fitted(tokenizer, Encoded(encode_prompt(tokenizer, prompt), responses, None, cut=False), *limit)]
    known = {}
    talks = [talk_of(prompt, answer, learn_turns, known) for answer in answers]
    if is_ranking or len(talks) > 1:
        return [_fitting(tokenizer, talks, *limit, encode=_encode_scored if is_ranking else _encode_together)]
    try:
        return [_fitting(tokenizer, talks, *limit)]
    except Rewritten:
        return _turn_by_turn(tokenizer, talks[0], *limit)


class Talk(NamedTuple):
    """A conversation: `messages`, the first of an answer, the learned ones, and the one that the answer continues.

    `known` is what `Text` knows of the pieces of all talks of a row.
    """

    chat: list
    messages: list
    first: int
    learned: list
    begun: dict | None
    known: dict


def talk_of(prompt, answer, learn_turns, known):
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answer = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    context, answer = [_without_weight(message) for message in chat], list(answer)
    turns = [index for index, message in enumerate(answer) if message["role"] == "assistant"]
    turns = turns[-1:] if learn_turns == "last" else turns
    learned = [len(context) + index for index in turns if answer[index].get("weight", 1)]
    if not learned:
        raise Bad("no turn of the assistant's is learned: all have the weight 0")
    answer, begun = [_without_weight(message) for message in answer], None
    if context and context[-1]["role"] == "assistant" and answer[0]["role"] == "assistant":
        begun, learned = context.pop(), [index - 1 for index in learned]
        text = (begun.get("content") or "") + (answer[0].get("content") or "")
        answer[0] = {**begun, **answer[0], "content": text}
    return Talk(chat, context + answer, len(context), learned, begun, known)


def _without_weight(message):
    return {name: value for name, value in message.items() if name != "weight"}


def asked_for(tokenizer, talk, index):
    """The rendered prompt for the message at `index`; one that follows an assistant's is a turn of its own."""
    before = talk.messages[:index]
    if talk.begun is not None and index == talk.first:
        return render_prompt(tokenizer, talk.chat, [*before, talk.begun])
    return render(tokenizer, talk.chat, before, add_generation_prompt=True)


def _spans(tokenizer, talk, text, asked):
    """(start, end) in the text of each learned turn, found by rendering the conversation up to it.

    Args:
        asked: the rendered prompt for the first learned turn.
    """
    spans = []
    for index in talk.learned:
        is_last = index + 1 == len(talk.messages)
        own = text if is_last else render(tokenizer, talk.chat, talk.messages[: index + 1])
        start = common(own, asked if index == talk.learned[0] else asked_for(tokenizer, talk, index))
        end = end_of_turn(tokenizer, own, start)
        _check_written(talk.messages[index], own, start, end)
        if not is_last and not text.startswith(own[:end]):
            raise Rewritten(
                "the chat template renders earlier turns otherwise once more turns follow (it may leave their thoughts "
                "out), so several turns of one completion cannot be learned together; use a completion of one message"
            )
        spans.append((start, end))
    return spans


def _check_written(message, text, start, end):
    """Raise Bad where a template leaves out what an answer says: its end alone would be learned. The last word is
    looked for, as a template may strip the text or set its thoughts apart; a call of a tool says enough."""
    content = message.get("content") or ""
    field = "content" if content.strip() else next((name for name in THOUGHTS if message.get(name)), None)
    if message.get("tool_calls") or field is None:
        return
    said = str(message[field]).strip()
    word = (re.findall(r"\w+", said[-LOOKED_AT:]) or [said[-1:]])[-1]
    if text.rfind(word, 0, end) < start - len(word) + 1:
        raise Bad(f"the chat template does not write the {field} of an answer, {said[:40]!r}")


def _encode_turns(tokenizer, talks):
    """One conversation: the response begins with its first learned turn and ends with its last."""
    (talk,) = talks
    talk = talk._replace(messages=talk.messages[: talk.learned[-1] + 1])
    whole = render(tokenizer, talk.chat, talk.messages)
    spans = _spans(tokenizer, talk, whole, asked_for(tokenizer, talk, talk.learned[0]))
    text = text_of(tokenizer, whole[: spans[-1][1]], talk.known, itertools.chain.from_iterable(spans))
    spans = [(text.within(start), text.begun(end)) for start, end in spans]
    first = spans[0][0]
    return _encoded(text.ids[:first], [text.ids[first:]], [[(start - first, end - first) for start, end in spans]])


def _encode_together(tokenizer, talks, *, is_scored=False):
    """Several answers to one prompt: each response is all that the template writes of its answer."""
    asked, texts, spans = asked_for(tokenizer, talks[0], talks[0].first), [], []
    for talk in talks:
        whole, last = render(tokenizer, talk.chat, talk.messages), len(talk.messages) - 1
        start = common(whole, asked)
        end = end_of_turn(
            tokenizer, whole, start if last == talk.first else common(whole, asked_for(tokenizer, talk, last))
        )
        try:
            first = asked if talk.learned[0] == talk.first else asked_for(tokenizer, talk, talk.learned[0])
            found = _spans(tokenizer, talk, whole, first)
        except Rewritten:
            if not is_scored:
                raise
            found = [(start, end)]
        cuts = [start, *itertools.chain.from_iterable(found)]
        texts.append(text_of(tokenizer, whole[:end], talk.known, cuts))
        spans.append([(texts[-1].within(a), texts[-1].begun(b)) for a, b in [(start, start), *found]])
    shared = min(own[0][0] for own in spans)
    for text in texts[1:]:
        shared = min(shared, common(texts[0].ids[:shared], text.ids))
    parts = []
    for (begin, _), *learned in spans:
        if learned[0][0] == begin:
            learned[0] = (shared, learned[0][1])
        parts.append([(start - shared, end - shared) for start, end in learned])
    return _encoded(texts[0].ids[:shared], [text.ids[shared:] for text in texts], parts)


def _encode_scored(tokenizer, talks):
    """Answers that are scored as a whole, so that no turn has to be told from the others."""
    return _encode_together(tokenizer, talks, is_scored=True)


def _encoded(prompt, responses, spans):
    learned = []
    for ids, own in zip(responses, spans):
        if not ids or not all(end > start for start, end in own):
            raise Bad("the chat template writes nothing of an answer")
        mask = [False] * len(ids)
        for start, end in own:
            mask[start:end] = [True] * (end - start)
        learned.append(None if all(mask) else mask)
    return Encoded(prompt, responses, learned if any(learned) else None, cut=False)


def _turn_by_turn(tokenizer, talk, *limit):
    """Each learned turn from a rendering that ends with it; the last one, which shows most of the row, comes first.

    A turn that does not fit is left out, as long as another one does.
    """
    found, too_long = [], None
    for index in reversed(talk.learned):
        part = talk._replace(messages=talk.messages[: index + 1], learned=[index])
        try:
            found.append(_fitting(tokenizer, [part], *limit))
        except TooLong as error:
            too_long = error
    if not found:
        raise too_long
    return found if too_long is None else [found[0]._replace(cut=True), *found[1:]]


def _fitting(tokenizer, talks, max_length, long_prompts, encode=_encode_turns):
    """Encode conversations of one prompt; those that are too long lose their oldest turns, as few as will do."""
    encoded = encode(tokenizer, talks)
    if _length(encoded) <= max_length or long_prompts != "truncate":
        return _fitted(tokenizer, encoded, max_length, long_prompts)
    turns = _later_turns(talks)
    if not turns:
        return _fitted(tokenizer, encoded, max_length, long_prompts)

    def without(count):
        return encode(tokenizer, [_from_turn(talk, turns[count]) for talk in talks])

    count = bisect_left(range(len(turns) - 1), True, key=lambda count: _length(without(count)) <= max_length)
    return _fitted(tokenizer, without(count), max_length, long_prompts)._replace(cut=True)


def _length(encoded):
    return len(encoded.prompt) + max(map(len, encoded.responses))


def _later_turns(talks):
    """The user's turns, up to the last question, with which the conversations may begin instead."""
    talk = talks[0]
    last = talk.first if len(talks) > 1 else talk.learned[-1]
    users = [index for index, message in enumerate(talk.messages[:last]) if message["role"] == "user"]
    return users[1:]


def _from_turn(talk, turn):
    """The conversation that begins with that turn, behind the system messages."""
    system = next(index for index, m in enumerate(talk.messages) if m["role"] not in BEFORE_TURNS)
    gone = turn - system
    return talk._replace(
        messages=talk.messages[:system] + talk.messages[turn:],
        first=talk.first - gone if talk.first >= turn else -1,
        learned=[index - gone for index in talk.learned if index >= turn],
        begun=talk.begun if talk.first >= turn else None,
    )


def _fitted(tokenizer, encoded, max_length, long_prompts):
    """Make the prompt fit beside the longest response by cutting its left end; a leading BOS stays."""
    if not encoded.prompt:
        raise Bad("the prompt gives no tokens")
    longest = max(map(len, encoded.responses))
    if longest >= max_length:
        fits = [index for index, ids in enumerate(encoded.responses) if len(ids) < max_length]
        raise TooLong(f"the text to learn fills {longest} tokens, too many for max_length {max_length}", fits)
    prompt = fit_prompt(tokenizer, encoded.prompt, max_length - longest, long_prompts)
    return encoded._replace(prompt=prompt, cut=len(prompt) < len(encoded.prompt))


def fit_prompt(tokenizer, prompt_ids, room, long_prompts="truncate"):
    """Make the ids of a prompt fit into `room` tokens by cutting their left end; a leading BOS stays.

    Raises:
        TooLong: under long_prompts="drop".
        Bad: under "error".
    """
    if len(prompt_ids) <= room:
        return prompt_ids
    if long_prompts != "truncate":
        kind = TooLong if long_prompts == "drop" else Bad
        raise kind(f"the prompt has {len(prompt_ids)} tokens, longer than the {room} that fit")
    if prompt_ids[0] == tokenizer.bos_token_id and room > 1:
        return [prompt_ids[0], *prompt_ids[len(prompt_ids) - room + 1 :]]
    return prompt_ids[len(prompt_ids) - room :]


def common(first, second):
    """The length of what two texts, or two lists of ids, begin with alike."""
    if first[: len(second)] == second:
        return len(second)
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[low:middle] == second[low:middle] else (low, middle - 1)
    return low
