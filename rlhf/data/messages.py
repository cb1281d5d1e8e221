"""Conversations: lists of messages, and what a chat template takes besides them.

A prompt and its answers come as strings, as messages, or as whole dialogues that repeat the prompt; `joined` makes one
form of them.
"""

import json

from .files import Bad

DEEPEST = 100
BEFORE_TURNS = ("system", "developer")
"""Roles of messages that come before the turns of a talk."""
SAID = ("reasoning_content", "reasoning", "thinking", "tool_calls")
NOT_LEARNED = ("loss", "train")
"""Fields of a message that say with false what `weight` says with 0, as other trainers have it."""
_ABOUT = {"role", "content", "name", "weight", "tool_call_id", *NOT_LEARNED}


class Chat(list):
    """Messages with what their template takes besides: `tools` and `template_kwargs`, or None.

    A prompt of messages is a Chat, so all that renders it has what the row gave. The messages keep every field.
    """

    def __init__(self, messages=(), tools=None, template_kwargs=None):
        super().__init__(messages)
        self.tools, self.template_kwargs = tools, template_kwargs

    def __eq__(self, other):
        if isinstance(other, Chat) and (self.tools, self.template_kwargs) != (other.tools, other.template_kwargs):
            return False
        return super().__eq__(other)

    def __ne__(self, other):
        return not self == other

    __hash__ = None

    def with_messages(self, messages):
        """Other messages for the same tools and template_kwargs."""
        return Chat(messages, self.tools, self.template_kwargs)


def check_value(name, value):
    """Text must be text: half a surrogate pair, as JSON may hold by an escape, is a character of Python's strings only.
    And what a template reads must be JSON that is not too deep for those who write and render it."""
    try:
        _check_value(value, DEEPEST)
    except _Unfit as error:
        raise Bad(f"`{name}{error.path}` {error}") from None
    except RecursionError:
        raise Bad(f"`{name}` is nested deeper than {DEEPEST} levels") from None


class _Unfit(ValueError):
    path = ""


def _check_value(value, levels):
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise _Unfit(f"holds half a surrogate pair, {value[error.start]!a}, which is no text") from None
    elif isinstance(value, (dict, list)):
        if not levels:
            raise RecursionError
        for key in value if isinstance(value, dict) else ():
            if not isinstance(key, str):
                raise _Unfit(f"has the key {key!r}, which is no string")
            _check_value(key, levels)
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if type(item) is str and item.isascii():
                continue
            try:
                _check_value(item, levels - 1)
            except _Unfit as error:
                error.path = f"[{key}]{error.path}"
                raise
    elif value is not None and not isinstance(value, (bool, int, float)):
        raise _Unfit(f"holds a {type(value).__name__}, which is not of JSON")


def text_of(name, value):
    """A string that is not empty."""
    if not isinstance(value, str):
        raise Bad(f"`{name}` must be a string, got {type(value).__name__}")
    if not value or value.isspace():
        raise Bad(f"`{name}` is empty")
    if value.lstrip().startswith("[{'") and "'role':" in value:
        raise Bad(f"`{name}` looks like a list of messages as Python writes it, wants a list, or one as JSON")
    check_value(name, value)
    return value


def messages_of(name, value):
    """Checked copies of messages: fields that are None are dropped but for `content`, parts of text are joined."""
    return [_message(f"{name}[{index}]", message) for index, message in enumerate(value)]


def _message(name, message):
    if not isinstance(message, dict):
        raise Bad(f"`{name}` must be a message {{'role': ..., 'content': ...}}, got {type(message).__name__}")
    role = message.get("role")
    if not isinstance(role, str) or not role or role.isspace():
        raise Bad(f"`{name}` must be a message {{'role': ..., 'content': ...}}, got the role {role!r}")
    found = {field: value for field, value in message.items() if value is not None or field == "content"}
    content = found.get("content")
    if isinstance(content, list):
        found["content"] = content = "".join(_part(name, part) for part in content)
    if content is not None and not isinstance(content, str):
        raise Bad(f"the content of `{name}` must be a string, parts of text or null, got {type(content).__name__}")
    if "function_call" in found:
        found = _as_tool_call(name, found)
    if content is None and set(found) <= _ABOUT:
        raise Bad(f"`{name}`, of the role {role!r}, has no content")
    if any(found.get(field) is False for field in NOT_LEARNED):
        found.setdefault("weight", 0)
    if "weight" in found and found["weight"] not in (0, 1):
        raise Bad(f"the weight of `{name}` must be 1 (learned) or 0 (only read), got {found['weight']!r}")
    check_value(name, found)
    return found


def _as_tool_call(name, message):
    """A message whose one call stands in `function_call`, the field before `tool_calls`, which no template writes."""
    found = {field: value for field, value in message.items() if field != "function_call"}
    call = _parsed(f"{name}[function_call]", message["function_call"], dict, "a dict")
    call = {field: value for field, value in (call or {}).items() if value is not None}
    if any(call.values()) and not found.get("tool_calls"):
        found["tool_calls"] = [{"type": "function", "function": call}]
    return found


def _part(name, part):
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text":
        raise Bad(f"the content of `{name}` holds a part of type {kind!r}; only parts of type 'text' can be read")
    if not isinstance(part.get("text"), str):
        raise Bad(f"the content of `{name}` holds a part of type 'text' without a string `text`")
    return part["text"]


def says_something(message):
    """Whether a message has content, a tool call or reasoning."""
    content = message.get("content")
    return bool(content and not content.isspace()) or any(message.get(field) for field in SAID)


def shown(message):
    """What a message says, as text for people: reasoning, content and calls of tools, in lines."""
    said_in = [*SAID[:3], "content", *SAID[3:]]
    parts = [message[field] for field in said_in if message.get(field)]
    return "\n".join(part if isinstance(part, str) else json.dumps(part, ensure_ascii=False) for part in parts)


def _parsed(name, value, kind, what):
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError):
            raise Bad(f"`{name}` as a string must be JSON, got {value[:40]!r}") from None
    if value is not None and not isinstance(value, kind):
        raise Bad(f"`{name}` must be {what} (or one as JSON), got {type(value).__name__}")
    check_value(name, value)
    return value or None


def template_inputs(raw):
    """A row's `tools` and `chat_template_kwargs` for `Chat`; None where there are none."""
    tools = _parsed("tools", raw.get("tools"), list, "a list of dicts")
    if tools:
        tools = [_parsed(f"tools[{index}]", tool, dict, "a dict") for index, tool in enumerate(tools)]
        if None in tools:
            raise Bad(f"`tools[{tools.index(None)}]` is empty")
    options = _parsed("chat_template_kwargs", raw.get("chat_template_kwargs"), dict, "a dict")
    return tools, options


def prompt_of(name, value):
    """A string or checked messages, not empty."""
    if not isinstance(value, list):
        return text_of(name, value)
    return said(name, messages_of(name, value))


def said(name, messages):
    """Messages of which some say something."""
    if not any(map(says_something, messages)):
        raise Bad(f"`{name}` is empty")
    return messages


def joined(raw, answers):
    """(prompt, answers) of a row in one form: all of them strings, or a Chat and lists of messages.

    Answers that are whole dialogues repeat the prompt, or hold it if the row has none: it is what they all share, up to
    the last turn that is no assistant's.

    Args:
        answers: {name: value} as the row holds them.
    """
    found = {name: _said(name, value) for name, value in answers.items()}
    dialogues = [value for value in found.values() if isinstance(value, list)]
    if raw.get("prompt") is None:
        if len(dialogues) < 2 or len(dialogues) < len(found):
            raise Bad(lacks(raw, "prompt"))
        prompt, rests = _shared(dialogues)
    else:
        prompt = prompt_of("prompt", raw["prompt"])
        openings = [value[: _repeated(prompt, value)] for value in dialogues]
        if len(found) == len(dialogues) > 1 and all(openings):
            prompt, rests = _shared(dialogues)
        else:
            rests = [
                value[_repeated(prompt, value) :] if isinstance(value, list) else value for value in found.values()
            ]
            openings = [opening for opening in openings if opening]
            if any(opening != openings[0] for opening in openings):
                raise Bad("the prompt's messages in " + " and ".join(f"`{name}`" for name in found) + " differ")
            if dialogues and isinstance(prompt, str):
                prompt = openings[0] if openings else [{"role": "user", "content": prompt}]
    prompt = with_template_inputs(raw, prompt)
    if isinstance(prompt, Chat):
        rests = [[{"role": "assistant", "content": rest}] if isinstance(rest, str) else rest for rest in rests]
        for name, rest in zip(found, rests):
            check_answer(name, rest, len(found[name]) - len(rest) if isinstance(found[name], list) else 0)
    return prompt, rests


def with_template_inputs(raw, prompt):
    """A prompt of messages as a Chat with what the row gives its template; a string as it is."""
    tools, options = template_inputs(raw)
    if not isinstance(prompt, str):
        return Chat(prompt, tools, options)
    for name, value in (("tools", tools), ("chat_template_kwargs", options)):
        if value:
            raise Bad(f"`{name}` needs a prompt of messages, which a chat template renders; got a string")
    return prompt


def lacks(raw, name):
    """What to say of a row without the field `name`."""
    reason = f"lacks the field `{name}` (has {', '.join(map(repr, raw)) or 'no fields'})"
    if "completions" in raw and "labels" in raw:
        reason += "; completions with `labels` are steps judged one by one, which this method does not learn from"
    return reason


def _said(name, value):
    """An answer: a string, messages, or one message."""
    if isinstance(value, dict) and "role" in value:
        value = [value]
    if not isinstance(value, list):
        return text_of(name, value)
    if not value:
        raise Bad(f"`{name}` is empty")
    return messages_of(name, value)


def _repeated(prompt, dialogue):
    """How many messages at the beginning of a dialogue repeat the prompt."""
    if isinstance(prompt, str):
        first = next((index for index, message in enumerate(dialogue) if message["role"] not in BEFORE_TURNS), None)
        if first is None or dialogue[first]["role"] != "user":
            return 0
        asked = [index for index, message in enumerate(dialogue) if message["role"] == "user"]
        said = ((index, (dialogue[index].get("content") or "").strip()) for index in asked)
        return next((index + 1 for index, text in said if text == prompt.strip()), 0)
    return len(prompt) if prompt[0]["role"] != "assistant" and dialogue[: len(prompt)] == prompt else 0


def _shared(dialogues):
    """(prompt, what follows in each) of whole dialogues that begin alike."""
    same = 0
    for turns in zip(*dialogues):
        if any(turn != turns[0] for turn in turns):
            break
        same += 1
    cut = after_last_question(dialogues[0][:same])
    if not cut:
        raise Bad("the dialogues share no beginning that could be the prompt")
    return dialogues[0][:cut], [dialogue[cut:] for dialogue in dialogues]


def after_last_question(messages):
    """Index behind the last message that is no assistant's; 0 if all are the assistant's."""
    asked = [index for index, message in enumerate(messages) if message["role"] != "assistant"]
    return asked[-1] + 1 if asked else 0


def check_answer(name, messages, start=0):
    """Check what an assistant says: it begins and ends, and no turn that is learned is empty.

    Args:
        start: number of the first message in what the row holds, for the reason.
    """
    for index in (0, -1):
        role = messages[index]["role"] if messages else None
        if role != "assistant":
            verb, also = (
                ("end", "") if index else ("begin", "" if start else " (or hold the prompt's messages before it)")
            )
            raise Bad(f"`{name}` must {verb} with a message of the role 'assistant'{also}, got {role!r}")
    for index, message in enumerate(messages, start=start):
        if message["role"] == "assistant" and message.get("weight", 1) and not says_something(message):
            raise Bad(f"`{name}[{index}]`, of the role 'assistant', is empty: no content, tool call or reasoning")
