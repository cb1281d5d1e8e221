"""Our own fields: which kinds a row holds as it is, and what else can be made of pairs and rankings."""

from .. import rankings
from ..cells import typed
from ..messages import joined
from .base import (
    PAIR_KINDS,
    RANKING_KINDS,
    Bad,
    Format,
    is_messages,
    is_text,
    no_media,
    of_ranking,
    others,
    short_columns,
    system_of,
    user,
    with_system,
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
    if not isinstance(answers, list) or not answers or ("ranks" not in raw and "scores" not in raw):
        return False
    return all(is_messages(said, "role") for said in answers) or (
        _is_prompt(raw.get("prompt")) and all(map(_is_answer, answers))
    )


def _is_prompts(raw):
    prompt = raw.get("prompt")
    if is_text(prompt) and (_repeats(raw.get("messages", raw.get("chosen")), prompt) or _is_answered(raw)):
        return False
    return _is_prompt(prompt) or _is_conversation(raw)


def _repeats(dialogue, prompt):
    """Whether a dialogue beside a prompt in text holds it as a user's turn: then the dialogue is the whole prompt."""
    if not is_messages(dialogue, "role", "content"):
        return False
    said = [turn["content"] for turn in dialogue if turn["role"] == "user" and is_text(turn["content"])]
    return prompt.strip() in [text.strip() for text in said]


def _is_answered(raw):
    """Whether a prompt in text holds the question and, at its end, the answer of other columns of the row."""
    asked, said = raw.get("instruction"), raw.get("output")
    if not (is_text(asked) and is_text(said) and said.strip()):
        return False
    return asked.strip() in raw["prompt"] and raw["prompt"].rstrip().endswith(said.strip())


_HOLDS = {
    "sft": _is_demonstration,
    "ranked": lambda raw: is_ranking(raw) or is_pair(raw),
    "preference": is_pair,
    "unpaired": lambda raw: _is_demonstration(raw) if "label" in raw else is_pair(raw),
    "prompts": _is_prompts,
    "text": lambda raw: is_text(raw.get("text")),
}


def completed(raw, kind):
    """A row in our fields with the system prompt that stands in a column of its own. Bad for one that is not of text
    alone."""
    if kind == "text":
        return raw
    no_media(raw)
    if is_messages(raw.get("functions"), "name") and "tools" not in raw:
        raw = {**raw, "tools": [{"type": "function", "function": function} for function in raw["functions"]]}
    system = system_of(raw)
    if not system:
        return raw
    found = typed(raw)
    for name in ("messages", "prompt", "completion", "chosen", "rejected"):
        if name in found:
            found[name] = _behind(system, found[name], asks=name == "prompt")
    if isinstance(found.get("completions"), list):
        found["completions"] = [_behind(system, said) for said in found["completions"]]
    return found


def _behind(system, value, asks=False):
    if is_messages(value, "role"):
        return with_system(value, system) if asks or value[0]["role"] != "assistant" else value
    return user(value, system) if asks and is_text(value) else value


def _convert(raw, kind):
    """Rows of another kind of a row in our fields; a set may hold pairs and rankings side by side."""
    raw = completed(raw, kind)
    if holds(raw, kind):
        return [raw]
    if is_pair(raw):
        row = _joined(raw, {name: raw[name] for name in ("chosen", "rejected")}, [0, 1])
    elif is_ranking(raw):
        answers = {f"completions[{index}]": said for index, said in enumerate(raw["completions"])}
        try:
            ranks = rankings.ranks_of_row(raw, len(answers))
        except ValueError as error:
            raise Bad(str(error)) from None
        row = _joined(raw, answers, ranks)
    elif _is_conversation(raw) and kind == "prompts":
        return [{**others(raw), "messages": raw["messages"], **_template_fields(raw)}]
    else:
        return [raw]
    more = short_columns(raw) if kind == "prompts" else {}
    return [{**more, **found, **_template_fields(raw)} for found in of_ranking(row, kind)]


def _joined(raw, answers, ranks):
    prompt, answers = joined(raw, answers)
    return {"prompt": prompt if is_text(prompt) else list(prompt), "completions": answers, "ranks": ranks}


def _template_fields(raw):
    return {name: raw[name] for name in ("tools", "chat_template_kwargs") if raw.get(name) is not None}


FORMATS = (  # what is told when rows of one kind are asked for as another; or by name
    Format(
        "messages",
        "Tulu, no_robots, UltraChat-200k, smoltalk and others: messages[].role, .content",
        {"sft": "", "prompts": "the conversation up to its last question"},
        lambda raw: _is_conversation(raw) and not {"chosen", "chosen_response"} & set(raw),
        _convert,
        aliases=("tulu", "no-robots", "ultrachat-200k", "smoltalk"),
    ),
    Format(
        "judged",
        "KTO's sets: prompt, completion, label",
        {"unpaired": "", "sft": "the completions whose label is true", "prompts": ""},
        lambda raw: _is_demonstration(raw) and raw.get("label") in (0, 1),
        lambda raw, kind: [completed(raw, kind)] if kind != "sft" or typed(raw).get("label") else [],
        over_own=("sft",),
        aliases=("kto-mix-14k",),
    ),
    Format(
        "pairs",
        "binarized UltraFeedback, argilla's, trl-lib's, Skywork's and others: chosen, rejected (messages); prompt",
        {"ranked": "", "preference": "", **PAIR_KINDS},
        is_pair,
        _convert,
        aliases=(
            "ultrafeedback-binarized",
            "ultrafeedback-binarized-preferences-cleaned",
            "dpo-mix-7k",
            "orpo-dpo-mix-40k",
        ),
    ),
    Format(
        "rankings",
        "our own prompt, completions, ranks or scores",
        {"ranked": "", **RANKING_KINDS},
        is_ranking,
        _convert,
    ),
)
