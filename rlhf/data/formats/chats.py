"""Published sets of conversations in other shapes than `messages`."""

import json

from .base import DEMONSTRATION, Bad, Format, entries, is_messages, others

_SAID_BY = {
    "user": ("human", "user", "prompter"),
    "assistant": ("gpt", "assistant", "chatgpt", "bing", "bard", "model"),
    "system": ("system",),
    "developer": ("developer",),
    "tool": ("tool", "function", "function_response", "observation"),
}
_ROLES = {name: role for role, names in _SAID_BY.items() for name in names}
_CALLS = ("function_call", "tool_call")
_COLUMNS = ("conversations", "conversation", "messages", "dialog", "dialogue")
_KEYS = (("from", "value"), ("role", "content"), ("role", "value"), ("from", "content"))


def _shape(raw):
    """(column, key of the role, key of the text) of a row's conversation, or None."""
    for column in _COLUMNS:
        for keys in _KEYS:
            if is_messages(raw.get(column), *keys) and (column, *keys) != ("messages", "role", "content"):
                return (column, *keys)
    return None


def _sharegpt(raw, kind):
    column, said_by, said = _shape(raw) or (None, None, None)
    if column is None:
        raise Bad("holds no conversation of from and value, or role and content")
    turns = [_message(turn, said_by, said) for turn in entries(raw, column)]
    system = raw.get("system") or raw.get("system_prompt")
    if isinstance(system, str) and system.strip() and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system})
    row = {"messages": _whole_turns(turns, kind)}
    tools = raw.get("tools")
    if tools and not (turns[0]["role"] == "system" and "<tools>" in (turns[0]["content"] or "")):
        row["tools"] = tools
    return [{**others(raw), **row}] if kind == "prompts" else [row]


def _message(turn, said_by, said):
    name, content = turn[said_by], turn[said]
    more = {key: value for key, value in turn.items() if key not in (said_by, said) and value is not None}
    if name in _CALLS:
        return {"role": "assistant", "content": "", "tool_calls": _calls(content), **more}
    if name not in _ROLES:
        raise Bad(f"`{said_by}` must be one of {', '.join((*_ROLES, *_CALLS))}, got {name!r}")
    return {"role": _ROLES[name], "content": content, **more}


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


def _whole_turns(turns, kind):
    """Without answers before the first question and, to learn from, questions behind the last answer."""
    asked = next((index for index, turn in enumerate(turns) if turn["role"] == "user"), 0)
    turns = [turn for index, turn in enumerate(turns) if index >= asked or turn["role"] != "assistant"]
    if kind == "sft":
        while turns and turns[-1]["role"] != "assistant":
            turns = turns[:-1]
        if not turns:
            raise Bad("the conversation holds no answer")
    return turns


FORMATS = (
    Format(
        "sharegpt",
        "ShareGPT, OpenHermes, SlimOrca and others: conversations[].from (human, gpt, system, ...), .value",
        DEMONSTRATION,
        lambda raw: _shape(raw) is not None and "chosen" not in raw,
        _sharegpt,
    ),
)
