"""Fields that are no text, where they come as text: the cells of a table in text hold numbers and lists as JSON."""

import json

NOT_TEXT = (
    "messages", "completions", "ranks", "scores", "label", "weight", "margin", "margins", "pairs", "tools",
    "chat_template_kwargs",
)  # fmt: skip


def typed(raw):
    """A row in our fields; those that are no text are read where they are text. An empty one is absent."""
    found = {
        name: _read(value) if name in NOT_TEXT and isinstance(value, str) else value for name, value in raw.items()
    }
    return {name: value for name, value in found.items() if not (name in NOT_TEXT and value == "")}


def _read(text):
    text = text.strip()
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
