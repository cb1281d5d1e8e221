"""Conversations as their chat template renders them, and strings, as token ids.

A template is a program of the tokenizer's: what it writes is what the model reads, so nothing is put beside it here.
"""

import functools
import inspect
import json
import weakref
from contextlib import suppress
from typing import NamedTuple

from .files import Bad, DataError
from .messages import shown
from .rendering import Plain
from .tokens import SlowText, Splitter, Text, ids_of

LONGEST_REASON = 500


def encode_prompt(tokenizer, prompt, at=None):
    """Token ids of a prompt: a string, or messages (with a Chat's tools and template_kwargs) as the template has them.

    BOS comes first if and only if the tokenizer, or the template, puts it there, and once; an EOS that the tokenizer
    adds is taken off. Messages that end with one of the assistant's are continued, others ask for an answer.

    Args:
        at: where the prompt comes from ("file:line"), for messages.
    Raises:
        DataError: messages without a chat template, or messages that it refuses.
    """
    if isinstance(prompt, str):
        return encode_string(tokenizer, prompt)
    try:
        return tokens_of(tokenizer, render_prompt(tokenizer, prompt, prompt))
    except Bad as error:
        raise DataError(f"{at}: {error}" if at else str(error)) from error


def encode_string(tokenizer, text):
    """Ids of a string that something goes on from, as `encode_prompt` gives them."""
    (ids,) = ids_of(tokenizer, [text], add_special_tokens=True)
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
        ids.pop()
    while ids[:2] == [tokenizer.bos_token_id] * 2:  # the tokenizer's own, before one that is written in the text
        del ids[0]
    return ids


def encode_completion(tokenizer, completion, *, eos=True):
    """Token ids of a completion as it stands: nothing is put before it, and the end token comes once, at the end.

    Args:
        completion: a string, which goes on from a prompt that is a string.
        eos: True adds the end token unless the ids already end with it; False leaves it off.
    """
    ids = _encode_continuation(tokenizer, completion)
    if eos and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return ids


def _encode_continuation(tokenizer, text):
    """Ids of text that goes on from something. Some tokenizers put a space before any string: then encode it after a
    line break, and take the line break off again."""
    anchor = _known(tokenizer).anchor
    joined = tokens_of(tokenizer, "\n" + text) if anchor else []
    return joined[len(anchor) :] if joined and joined[: len(anchor)] == anchor else tokens_of(tokenizer, text)


def encode_text(tokenizer, text):
    """Token ids of a whole text: as a prompt, and EOS once at the end."""
    ids = encode_string(tokenizer, text)
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def tokens_of(tokenizer, text):
    """Ids of a text in which all special tokens are written out."""
    return ids_of(tokenizer, [text])[0]


def render(tokenizer, chat, messages, **options):
    """What the chat template makes of messages, as text.

    Args:
        chat: what brings `tools` and `template_kwargs`, if it has them.
        options: add_generation_prompt or continue_final_message, of transformers.
    Raises:
        Bad: there is no template, it refuses the messages, or it would leave the call of a tool out.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise Bad(
            "prompt: got a list of messages, but the tokenizer has no chat template; name one with --chat_template "
            "(chatml, or a file with one), or give a string"
        )
    more = getattr(chat, "template_kwargs", None) or {}
    taken = sorted(_options() & set(more))
    if taken:
        raise Bad(f"chat_template_kwargs: got {taken[0]}, wants names that the template itself reads")
    try:
        tools, known, text = getattr(chat, "tools", None), _known(tokenizer), None
        messages = _as_wanted(messages, known)
        if not (tools or more or "continue_final_message" in options):
            text = known.plain.render(tokenizer, messages, **options)
        if text is None:
            text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options, **more)
    except Exception as error:  # a template is a program: whatever it raises is about these messages
        reason = " ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__
        raise Bad(f"the tokenizer's chat template refuses the messages: {reason}") from error
    if any(message.get("tool_calls") for message in messages) and "tool_calls" not in repr(tokenizer.chat_template):
        raise Bad("a message has tool_calls, which the tokenizer's chat template does not write (--chat_template FILE)")
    return text


@functools.cache
def _options():
    """Names of what `apply_chat_template` takes itself, which a template does not read."""
    from transformers import PreTrainedTokenizerBase

    return set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"documents", "kwargs"}


def render_prompt(tokenizer, chat, messages):
    """The text that an answer to the messages goes on from."""
    is_begun = bool(messages) and messages[-1].get("role") == "assistant"
    return render(
        tokenizer, chat, messages, **{"continue_final_message" if is_begun else "add_generation_prompt": True}
    )


def end_of_turn_id(tokenizer):
    """The token that closes an assistant's turn in the tokenizer's chat template, or None where there is no such."""
    return next(iter(end_of_turn_ids(tokenizer)), None)


def end_of_turn_ids(tokenizer):
    """All tokens that close an assistant's turn in the tokenizer's chat template, that of a plain answer first."""
    return [tokenizer.convert_tokens_to_ids(token) for token in _known(tokenizer).ends]


def answer_is_ended(tokenizer):
    """Whether the chat template writes a token behind an answer that no turn follows."""
    messages = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    text = _tried(tokenizer, _as_parts(messages) if _known(tokenizer).wants_parts else messages)
    return any(token in text.rpartition(_ANSWER)[2] for token in _known(tokenizer).ends)


def end_of_turn(tokenizer, text, start):
    """The length of a rendered conversation up to and with the token that ends its last turn.

    A template may write more behind that (a line break, another token). Where no token ends the turn: the whole length.

    Args:
        start: length of the text at which the last turn begins.
    """
    tokens, ends = _known(tokenizer)[:2]
    end, found = len(text), len(text)
    while end > start:
        end = start + len(text[start:end].rstrip())
        if not text.endswith(tokens, start, end):
            break
        token = max((token for token in tokens if text.endswith(token, start, end)), key=len)
        end -= len(token)
        if token in ends:
            found = end + len(token)
    return found


def text_of(tokenizer, text, known, cuts=()):
    """A rendered text as tokens, that tells which of them lie in its first characters.

    Args:
        known: what is known of the pieces of other texts of the row, which is added to.
        cuts: lengths that it will be asked for, as far as they are known.
    """
    if not tokenizer.is_fast:
        return SlowText(tokenizer, text)
    return Text(_known(tokenizer).splitter, text, known, cuts)


def without_special(tokenizer, text):
    """A text without the special tokens that are written out in it."""
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    for token in {*special, *tokenizer.all_special_tokens}:
        text = text.replace(token, "")
    return text


class Known(NamedTuple):
    """What is known of a tokenizer: all tokens that a template may write out, those that end a turn, how texts part,
    the ids of a line break where it puts a space before every string, else none, and whether its template takes
    contents as lists of parts only, and arguments of calls as text only."""

    written: tuple
    ends: list
    splitter: Splitter | None
    anchor: list
    wants_parts: bool = False
    wants_text: bool = False
    plain: Plain | None = None


_KNOWN = weakref.WeakKeyDictionary()
_QUESTION, _THOUGHT, _ANSWER = "Qqa", "Qqb", "Qqc"


def _known(tokenizer):
    template = tokenizer.chat_template
    splits = getattr(tokenizer, "split_special_tokens", False)
    key = (template if isinstance(template, str) else repr(template), len(tokenizer), tokenizer.eos_token, splits)
    if _KNOWN.get(tokenizer, (None,))[0] != key:
        added = {str(token): token.special for token in tokenizer.added_tokens_decoder.values()}
        added |= dict.fromkeys(filter(None, tokenizer.all_special_tokens), True)
        written = tuple(token for token in added if token.strip())
        known = Known(written, [], None, [])
        if tokenizer.chat_template:
            known = known._replace(wants_parts=_wants_parts(tokenizer))
            known = known._replace(wants_text=_wants_text(tokenizer, known))
            known = known._replace(ends=_ends(tokenizer, known, added), plain=Plain(tokenizer))
        parting = [
            str(token)
            for token in tokenizer.added_tokens_decoder.values()
            if str(token).strip() and not (token.lstrip or token.normalized or token.single_word)
        ]
        splitter = Splitter(tokenizer, parting)
        anchor = tokens_of(tokenizer, "\n")
        puts_space = len(anchor) > 1 and tokens_of(tokenizer, "\n\n")[: len(anchor)] == anchor
        _KNOWN[tokenizer] = (key, known._replace(splitter=splitter, anchor=anchor if puts_space else []))
    return _KNOWN[tokenizer][1]


def _wants_parts(tokenizer):
    """Whether the template writes contents that are lists of parts, and strings not, as those of models that see do."""
    asked, answer = {"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}
    if _ANSWER in _tried(tokenizer, [asked, answer]):
        return False
    text = _tried(tokenizer, _as_parts([asked, answer]))
    return _QUESTION in text and _ANSWER in text


def _as_parts(messages):
    """Messages whose contents are lists of parts in place of strings."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


def _as_wanted(messages, known):
    """Messages in the form in which the template takes them: arguments of calls, in JSON or not, as what it reads."""
    found = []
    for message in messages:
        calls = message.get("tool_calls")
        if isinstance(calls, list) and calls:
            message = {**message, "tool_calls": [_with_arguments(call, known.wants_text) for call in calls]}
        found.append(message)
    return _as_parts(found) if known.wants_parts else found


def _with_arguments(call, as_text):
    """A call of a tool whose arguments are a dict, as templates read them, or text, as rows of other makers have it."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_arguments(call["function"], as_text)}
    given = call.get("arguments")
    if as_text and isinstance(given, dict):
        return {**call, "arguments": json.dumps(given, ensure_ascii=False)}
    if not as_text and isinstance(given, str):
        with suppress(ValueError, RecursionError):
            read = json.loads(given)
            return {**call, "arguments": read} if isinstance(read, dict) else call
    return call


def _wants_text(tokenizer, known):
    """Whether the template refuses calls whose arguments are a dict, and takes them as text, as some old ones do."""
    asked, call = {"role": "user", "content": _QUESTION}, _call()
    if _tried(tokenizer, _as_wanted([asked, call], known)):
        return False
    return bool(_tried(tokenizer, _as_wanted([asked, call], known._replace(wants_text=True))))


def _call():
    function = {"name": "find", "arguments": {"key": _ANSWER}}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "callfind1", "type": "function", "function": function}],
    }


def _tried(tokenizer, messages, **options):
    """What the template writes of messages, if need be behind a system message; "" where it refuses them."""
    for system in ([], [{"role": "system", "content": "s"}]):
        with suppress(Exception):  # a template is a program
            return tokenizer.apply_chat_template([*system, *messages], tokenize=False, **options)
    return ""


def _ends(tokenizer, known, is_special):
    """The tokens that end a turn, found by rendering some: one that is the last, one that is not, calls of a tool."""
    asked, answer = {"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}
    thoughtful = {**answer, "reasoning_content": _THOUGHT, "thinking": _THOUGHT}
    parameters = {"type": "object", "properties": {"key": {"type": "string", "description": "key"}}}
    tool = {"type": "function", "function": {"name": "find", "description": "find", "parameters": parameters}}

    def rendered(*messages, **options):
        return _tried(tokenizer, _as_wanted(messages, known), **options)

    last = _written(known.written, rendered(asked, answer).rpartition(_ANSWER)[2])
    within = _written(known.written, _between(rendered(asked, thoughtful), _THOUGHT, _ANSWER))
    earlier = _written(known.written, _between(rendered(asked, answer, asked), _ANSWER, _QUESTION))
    ends = [*last[:1], *(token for token in earlier[:1] if token not in within)]
    for more in ({}, {"builtin_tools": ["find"]}):  # some end a call of these by a token of its own
        text = rendered(asked, _call(), tools=[tool], **more).rpartition(_ANSWER)[2]
        found = [token for token in _written(known.written, text) if is_special[token]]
        ends += found[-1:] if not set(found) & set(ends) else []
    return list(dict.fromkeys(ends))


def _between(text, first, last):
    behind = text.partition(first)[2]
    return behind.partition(last)[0] if last in behind else ""


def _written(tokens, text):
    """The tokens that are written out in a text, in order."""
    found, at = [], 0
    while at < len(text):
        token = max((token for token in tokens if text.startswith(token, at)), key=len, default=None)
        found += [] if token is None else [token]
        at += len(token or " ")
    return found


def as_text(text, roles=True):
    """A prompt or completion as one string, for people: of several messages each begins a line, behind its role."""
    if isinstance(text, str):
        return text
    named = roles and len(text) > 1
    return "\n".join(f"{message['role']}: {shown(message)}" if named else shown(message) for message in text)


def pad_batch(sequences, pad_id, side="right"):
    """Pad lists of ids to the longest: (input_ids [B, T] int64, attention_mask [B, T] bool, True = token)."""
    import torch

    if side not in ("left", "right"):
        raise ValueError(f"side: got {side!r}, wants 'left' or 'right'")
    width = max((len(ids) for ids in sequences), default=0)
    input_ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(sequences), width), dtype=torch.bool)
    for row, ids in enumerate(sequences):
        span = slice(0, len(ids)) if side == "right" else slice(width - len(ids), width)
        input_ids[row, span] = torch.tensor(ids, dtype=torch.long)
        mask[row, span] = True
    return input_ids, mask
