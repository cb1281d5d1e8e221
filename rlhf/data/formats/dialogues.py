"""Dialogues written as one text: "\\n\\nHuman: ...\\n\\nAssistant: ..." and HelpSteer's "<extra_id_1>User"."""

import re

from ..files import Bad

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant):")
_EXTRA_ID = re.compile(r"\s*<extra_id_1>(User|Assistant)\s*")
_SAID_BY = {
    "user": ("human", "user", "prompter"),
    "assistant": ("gpt", "assistant", "chatgpt", "bing", "bard", "model", "bot", "chatbot", "ai"),
    "system": ("system",),
    "developer": ("developer",),
    "tool": ("tool", "function", "function_response", "observation", "tool_response", "tool_result"),
}
ROLES = {name: role for role, names in _SAID_BY.items() for name in names}


def role_of(name):
    """The role of who says something, by the names that data sets use."""
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise Bad(f"a turn must be of one of {', '.join(ROLES)}, got {name!r}")
    return role


def is_dialogue(value):
    return isinstance(value, str) and value.lstrip("\n").startswith("Human:") and ASSISTANT in value


def split(chosen, rejected):
    """(prompt, chosen, rejected) of two dialogues: the prompt goes up to and with the last "Assistant:" of both."""
    cut = len(chosen)
    while cut >= 0:
        cut = chosen.rfind(ASSISTANT, 0, cut)
        end = cut + len(ASSISTANT)
        if cut >= 0 and rejected.startswith(chosen[:end]):
            return chosen[:end], chosen[end:], rejected[end:]
    raise Bad('`chosen` and `rejected` share no beginning that ends with "\\n\\nAssistant:"')


def messages_of(prompt):
    """A prompt in text as messages: the turns of a dialogue, or one question."""
    for mark, is_one in ((_TURN, is_dialogue), (_EXTRA_ID, lambda value: "<extra_id_1>" in value)):
        if is_one(prompt):
            text = "\n\n" + prompt.lstrip("\n") if mark is _TURN else prompt
            lead, *pieces = mark.split(text)
            turns = [("Human", lead)] if lead.strip() else []
            turns += zip(pieces[::2], pieces[1::2])
            found = [{"role": ROLES[who.lower()], "content": said.strip()} for who, said in turns]
            return found[:-1] if found[-1] == {"role": "assistant", "content": ""} else found
    return [{"role": "user", "content": prompt}]


def as_chat(row):
    """A row in our fields with its prompt in text as messages, its answers without the blanks around them."""
    if not isinstance(row.get("prompt"), str):
        return row
    found = {**row, "prompt": messages_of(row["prompt"])}
    for name in ("completion", "chosen", "rejected"):
        if isinstance(found.get(name), str):
            found[name] = found[name].strip()
    if "completions" in found:
        found["completions"] = [said.strip() if isinstance(said, str) else said for said in found["completions"]]
    return found
