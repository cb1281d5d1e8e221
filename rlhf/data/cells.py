"""Fields that are no text, where they come as text: the cells of a table in text hold numbers and lists as JSON."""

import json

NOT_TEXT = (
    "messages", "completions", "ranks", "scores", "label", "weight", "margin", "margins", "pairs", "tools",
    "chat_template_kwargs",
)  # fmt: skip


TEXT_OR_MESSAGES = ("prompt", "completion", "chosen", "rejected")


def typed(raw):
    """A row in our fields; those that are no text, or are messages, are read where they are text; empty ones absent."""
    found = {
        name: _read(value) if name in NOT_TEXT and isinstance(value, str) else value for name, value in raw.items()
    }
    for name in TEXT_OR_MESSAGES:
        if isinstance(found.get(name), str) and found[name].lstrip().startswith("[{"):
            value = _read(found[name])
            if isinstance(value, list) and all(isinstance(v, dict) and {"role", "content"} <= v.keys() for v in value):
                found[name] = value
    return {name: value for name, value in found.items() if not (name in NOT_TEXT and value == "")}


def _read(text):
    text = text.strip()
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
