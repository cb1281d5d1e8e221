"""Our own fields: which kinds a row holds as it is, and what else can be made of pairs and rankings."""

from .base import RANKING_KINDS, Format, as_ranking, is_messages, is_text, ranking


def holds(raw, kind):
    """Whether a row has our own fields for a kind of rows."""
    return _HOLDS[kind](raw)


def _is_prompt(value):
    return is_text(value) or is_messages(value, "role")


def _is_answer(value):
    return is_text(value) or is_messages(value, "role") or (isinstance(value, dict) and "role" in value)


def _sft(raw):
    return is_messages(raw.get("messages"), "role") or _single(raw)


def _single(raw):
    return _is_prompt(raw.get("prompt")) and _is_answer(raw.get("completion"))


def is_pair(raw):
    chosen, rejected = raw.get("chosen"), raw.get("rejected")
    if is_messages(chosen, "role") and is_messages(rejected, "role"):
        return True
    return _is_prompt(raw.get("prompt")) and _is_answer(chosen) and _is_answer(rejected)


def is_ranking(raw):
    answers = raw.get("completions")
    return (
        _is_prompt(raw.get("prompt"))
        and isinstance(answers, list)
        and bool(answers)
        and all(map(_is_answer, answers))
        and ("ranks" in raw or "scores" in raw)
    )


def _prompts(raw):
    """A prompt that a row's dialogue repeats is that dialogue's first question, and not all that there is to say."""
    prompt = raw.get("prompt")
    dialogue = raw.get("messages", raw.get("chosen"))
    if is_text(prompt) and is_messages(dialogue, "role", "content"):
        return prompt not in [turn["content"] for turn in dialogue if turn["role"] == "user"]
    return _is_prompt(prompt) or is_messages(raw.get("messages"), "role")


_HOLDS = {
    "sft": _sft,
    "ranked": lambda raw: is_ranking(raw) or is_pair(raw),
    "preference": is_pair,
    "unpaired": lambda raw: "label" in raw and _sft(raw),
    "prompts": _prompts,
    "text": lambda raw: is_text(raw.get("text")),
}


def _ranking(raw):
    if not isinstance(raw.get("ranks", raw.get("scores")), list):
        return ranking(raw["prompt"], raw["completions"], ranks=[])
    name = "ranks" if "ranks" in raw else "scores"
    return {**raw, **ranking(raw["prompt"], raw["completions"], **{name: raw[name]})}


FORMATS = (
    Format(
        "ranked", "our own prompt, completions and ranks or scores", RANKING_KINDS, is_ranking, as_ranking(_ranking)
    ),
)
