"""Published sets whose rows hold two answers, one of them preferred."""

from . import dialogues
from .base import Format, as_ranking, pair, rankings


def _hh(raw):
    prompt, chosen, rejected = dialogues.split(raw["chosen"], raw["rejected"])
    return pair(prompt, chosen, rejected)


def _is_hh(raw):
    return "prompt" not in raw and all(dialogues.is_dialogue(raw.get(name)) for name in ("chosen", "rejected"))


FORMATS = (
    Format(
        "hh-rlhf",
        "HH-RLHF: chosen and rejected as whole dialogues in text (Human: ... Assistant: ...)",
        rankings("the prompt goes up to and with the last Assistant: that both dialogues share"),
        _is_hh,
        as_ranking(_hh),
    ),
)
