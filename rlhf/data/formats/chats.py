"""Published sets of conversations in other shapes than our own `messages`."""

import json
from contextlib import suppress

from ..messages import NOT_LEARNED
from .base import (
    DEMONSTRATION,
    Bad,
    Format,
    as_ranking,
    entries,
    has,
    is_messages,
    is_texts,
    no_media,
    others,
    pair,
    pairs,
    records_with,
    system_of,
    text,
    user,
    with_system,
)
from .dialogues import role_of

_COLUMNS = ("conversations", "conversation", "messages", "dialog", "dialogue")
_KEYS = (("from", "value"), ("role", "content"), ("role", "value"), ("from", "content"))
_CALLS = ("function_call", "tool_call")
_KEPT = ("name", "weight", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking")


def _shape(raw):
    """(column, key of who speaks, key of what is said) of a row's conversation; None where it holds none."""
    for column in _COLUMNS:
        for keys in _KEYS:
            value = raw.get(column)
            is_own = isinstance(value, list) and (column, *keys) == ("messages", "role", "content")
            if records_with(*keys)(value) and not is_own:
                return (column, *keys)
    return None


def _turns_of(raw):
    no_media(raw)
    column, who, said = _shape(raw) or (None, None, None)
    if column is None:
        raise Bad(f"holds no conversation in {', '.join(_COLUMNS)}")
    turns = [_message(turn, who, said) for turn in entries(raw, column)]
    return with_system(turns, system_of(raw))


def _message(turn, who, said):
    more = {key: turn[key] for key in _KEPT if turn.get(key) is not None}
    if any(turn.get(key) is False for key in NOT_LEARNED):
        more["weight"] = 0
    if turn[who] in _CALLS:
        return {"role": "assistant", "content": "", **more, "tool_calls": _calls(turn[said])}
    return {"role": role_of(turn[who]), "content": turn[said], **more}


def _calls(content):
    try:
        calls = json.loads(content)
        calls = calls if isinstance(calls, list) else [calls]
        return [
            {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
            for call in calls
        ]
    except (TypeError, ValueError, KeyError, AttributeError):
        raise Bad(f"a function call must be JSON with name and arguments, got {content!r}") from None


def _tools(raw, turns):
    """The column tools, unless the system message already lists them."""
    listed = turns[0]["role"] == "system" and "<tools>" in (turns[0]["content"] or "")
    return {"tools": raw["tools"]} if raw.get("tools") and not listed else {}


def _sharegpt(raw, kind):
    turns = _turns_of(raw)
    return _conversation(raw, turns, kind, _tools(raw, turns))


def _conversation(raw, turns, kind, more):
    """A row without answers before the first question and, to learn from, without questions behind the last answer."""
    asked = next((index for index, turn in enumerate(turns) if turn["role"] == "user"), 0)
    turns = [turn for index, turn in enumerate(turns) if index >= asked or turn["role"] != "assistant"]
    if kind == "prompts":
        return [{**others(raw), "messages": turns, **more}]
    while turns and turns[-1]["role"] != "assistant":
        turns = turns[:-1]
    if not turns:
        raise Bad("the conversation holds no answer")
    return [{"messages": turns, **more}]


def _sharegpt_pair(raw):
    own = is_messages(raw.get("messages"))
    turns = with_system(raw["messages"], system_of(raw)) if own else _turns_of(raw)
    answers = [_answer(raw[name]) for name in _answer_names(raw)]
    return pair(turns, *answers, **_tools(raw, turns))


def _answer(value):
    turn = value[0] if isinstance(value, list) else value
    who, said = next(keys for keys in _KEYS if is_messages([turn], *keys))
    return [_message(turn, who, said)]


def _is_answer(value):
    turns = value if isinstance(value, list) else [value]
    return len(turns) == 1 and any(is_messages(turns, *keys) for keys in _KEYS)


def _is_sharegpt_pair(raw):
    asked = is_messages(raw.get("messages")) or _shape(raw) is not None
    return asked and all(_is_answer(raw.get(name)) for name in _answer_names(raw))


def _answer_names(raw):
    return ("chosen", "rejected") if "chosen" in raw else ("chosen_response", "rejected_response")


def _xlam(raw, kind):
    tools = [{"type": "function", "function": tool} for tool in _listed(raw, "tools")]
    row = {"prompt": user(text(raw, "query")), "tools": tools}
    if kind == "prompts":
        return [{**others(raw), **row}]
    call = {"role": "assistant", "content": "", "tool_calls": _calls(text(raw, "answers"))}
    return [{**row, "completion": [call]}]


def _listed(raw, name):
    found = raw[name]
    with suppress(TypeError, ValueError):
        found = json.loads(found)
    if is_messages(found, "name"):
        return found
    raise Bad(f"`{name}` must be a JSON list of objects with a name, got {str(raw[name])[:40]!r}")


def _alternating_column(raw):
    """The column that holds a list of texts."""
    for name in ("data", "conversations", "dialog", "dialogue"):
        value = raw.get(name)
        if is_texts(value):
            return name
    return None


def _alternating(raw, kind):
    name = _alternating_column(raw)
    if name is None:
        raise Bad("holds no list of texts in data, conversations, dialog or dialogue")
    turns = [{"role": ("user", "assistant")[index % 2], "content": said} for index, said in enumerate(raw[name])]
    return _conversation(raw, with_system(turns, system_of(raw)), kind, {})


def _is_exchanges(raw):
    return records_with("input", "output")(raw.get("conversation")) and "chosen" not in raw


def _exchanges(raw, kind):
    turns = []
    for exchange in entries(raw, "conversation"):
        turns = turns or with_system([], system_of(exchange))
        turns.append({"role": "user", "content": exchange.get("input")})
        turns.append({"role": "assistant", "content": exchange.get("output")})
    return _conversation(raw, with_system(turns, system_of(raw)), kind, {})


FORMATS = (
    Format(
        "sharegpt",
        "ShareGPT, OpenHermes, SlimOrca and others: conversations[].from (human, gpt, system, tool, ...), .value",
        DEMONSTRATION,
        lambda raw: _shape(raw) is not None and not {"chosen", "chosen_response"} & set(raw),
        _sharegpt,
        aliases=("openhermes", "openhermes-2.5", "slimorca", "lmsys-chat-1m", "wildchat"),
    ),
    Format(
        "sharegpt-pairs",
        "ShareGPT preferences: conversations[].from, .value (or messages), chosen and rejected (or chosen_response, "
        "rejected_response), each one turn",
        pairs(""),
        _is_sharegpt_pair,
        as_ranking(_sharegpt_pair),
        over_own=("sft",),
    ),
    Format(
        "xlam",
        "xLAM's calls of functions: query, tools, answers (JSON)",
        dict.fromkeys(DEMONSTRATION, "tools as those of the chat template"),
        has("query", "answers", tools=(str, list)),
        _xlam,
        aliases=("xlam-function-calling-60k",),
    ),
    Format(
        "alternating",
        "UltraChat as its makers publish it, LIMA: data or conversations, a list of texts, the user's first",
        DEMONSTRATION,
        lambda raw: _alternating_column(raw) is not None and "chosen" not in raw,
        _alternating,
        aliases=("ultrachat", "lima"),
    ),
    Format(
        "exchanges",
        "Capybara: conversation[].input, .output",
        DEMONSTRATION,
        _is_exchanges,
        _exchanges,
        aliases=("capybara",),
    ),
)
