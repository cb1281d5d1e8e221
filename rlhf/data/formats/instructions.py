"""Published sets of single questions with an answer."""

from .base import DEMONSTRATION, Format, as_demonstration, has, text, user


def _joined(*pieces):
    return "\n\n".join(piece for piece in pieces if piece.strip())


def _alpaca(raw):
    prompt = _joined(text(raw, "instruction"), text(raw, "input", default=""))
    system, history = text(raw, "system", default=""), raw.get("history")
    if system.strip() or history:
        turns = [turn for asked, said in history or () for turn in (*user(asked), _assistant(said))]
        prompt = [*user(prompt, system)[:-1], *turns, *user(prompt)]
    return {"prompt": prompt, "completion": text(raw, "output")}


def _assistant(content):
    return {"role": "assistant", "content": content}


def _dolly(raw):
    prompt = _joined(text(raw, "instruction"), text(raw, "context", default=""))
    return {"prompt": prompt, "completion": text(raw, "response")}


FORMATS = (
    Format(
        "alpaca",
        "Alpaca and its kin: instruction, input (behind it, one empty line between), output; system, history",
        DEMONSTRATION,
        has("instruction", "output", without=("context", "messages", "conversations")),
        as_demonstration(_alpaca),
    ),
    Format(
        "dolly",
        "Dolly: instruction, context (behind it, one empty line between), response",
        DEMONSTRATION,
        has("instruction", "response", context=(str, type(None)), category=str),
        as_demonstration(_dolly),
    ),
)
