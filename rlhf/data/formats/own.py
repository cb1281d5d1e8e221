"""Our own fields: which kinds a row holds as it is, and what else can be made of pairs and rankings."""

from ..messages import joined
from .base import (
    PAIR_KINDS,
    RANKING_KINDS,
    Format,
    as_ranking,
    is_messages,
    is_text,
    of_ranking,
    others,
    pair,
    ranking,
    short_columns,
)


def holds(raw, kind):
    """Whether a row has our own fields for a kind of rows."""
    return _HOLDS[kind](raw)


def _is_prompt(value):
    return is_text(value) or is_messages(value, "role")


def _is_answer(value):
    return is_text(value) or is_messages(value, "role") or (isinstance(value, dict) and "role" in value)


def _is_conversation(raw):
    return is_messages(raw.get("messages"), "role")


def _is_demonstration(raw):
    return _is_conversation(raw) or (_is_prompt(raw.get("prompt")) and _is_answer(raw.get("completion")))


def is_pair(raw):
    chosen, rejected = raw.get("chosen"), raw.get("rejected")
    if is_messages(chosen, "role") and is_messages(rejected, "role"):
        return True
    return _is_prompt(raw.get("prompt")) and _is_answer(chosen) and _is_answer(rejected)


def is_ranking(raw):
    answers = raw.get("completions")
    is_answers = isinstance(answers, list) and bool(answers) and all(map(_is_answer, answers))
    return is_answers and _is_prompt(raw.get("prompt")) and ("ranks" in raw or "scores" in raw)


def _is_prompts(raw):
    prompt = raw.get("prompt")
    if is_text(prompt) and _repeats(raw.get("messages", raw.get("chosen")), prompt):
        return False
    return _is_prompt(prompt) or _is_conversation(raw)


def _repeats(dialogue, prompt):
    """Whether a dialogue beside a prompt in text holds it as a user's turn: then the dialogue is the whole prompt."""
    if not is_messages(dialogue, "role", "content"):
        return False
    return prompt in [turn["content"] for turn in dialogue if turn["role"] == "user"]


_HOLDS = {
    "sft": _is_demonstration,
    "ranked": lambda raw: is_ranking(raw) or is_pair(raw),
    "preference": is_pair,
    "unpaired": lambda raw: _is_demonstration(raw) if "label" in raw else is_pair(raw),
    "prompts": _is_prompts,
    "text": lambda raw: is_text(raw.get("text")),
}


def _ranking(raw):
    name = "ranks" if raw.get("ranks") is not None else "scores"
    values = raw[name] if isinstance(raw[name], list) else []
    return {**raw, **ranking(raw["prompt"], raw["completions"], **{name: values})}


def _pair(raw, kind):
    if kind in ("ranked", "preference", "unpaired"):
        return [raw]
    prompt, answers = joined(raw, {name: raw.get(name) for name in ("chosen", "rejected")})
    row = pair(prompt if isinstance(prompt, str) else list(prompt), *answers, **_template_fields(raw))
    found = of_ranking(row, kind)
    return [{**short_columns(raw), **row} for row in found] if kind == "prompts" else found


def _messages(raw, kind):
    if kind == "sft":
        return [raw]
    return [{**others(raw), "messages": raw["messages"], **_template_fields(raw)}]


def _template_fields(raw):
    return {name: raw[name] for name in ("tools", "chat_template_kwargs") if raw.get(name) is not None}


FORMATS = (
    Format(
        "messages",
        "Tulu, no_robots, UltraChat-200k, smoltalk and others: messages[].role, .content",
        {"sft": "", "prompts": "the conversation up to its last question"},
        lambda raw: _is_conversation(raw) and not is_pair(raw),
        _messages,
        aliases=("tulu", "no-robots", "ultrachat-200k", "smoltalk"),
    ),
    Format(
        "pairs",
        "binarized UltraFeedback, argilla's, trl-lib's, Skywork's and others: chosen, rejected (messages); prompt",
        {**PAIR_KINDS, "ranked": "", "preference": ""},
        is_pair,
        _pair,
        aliases=(
            "ultrafeedback-binarized",
            "ultrafeedback-binarized-preferences-cleaned",
            "dpo-mix-7k",
            "orpo-dpo-mix-40k",
        ),
    ),
    Format(
        "rankings", "our own prompt, completions and ranks or scores", RANKING_KINDS, is_ranking, as_ranking(_ranking)
    ),
)
