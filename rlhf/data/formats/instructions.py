"""Published sets of single questions with an answer."""

from .base import DEMONSTRATION, Format, as_demonstration, has, others, text, user

DOUBTFUL = {  # columns that may belong to the question, or judge the answer: which way is not for us to guess
    "context", "contexts", "passage", "document", "article", "choices", "options", "history", "evidence", "image",
    "images", "system", "system_prompt", "instruction", "question", "query", "prompt", "problem", "input", "messages",
    "conversations", "chosen", "rejected", "is_safe", "label", "labels", "rank", "rating",
}  # fmt: skip
_PAIRS = (
    ("question", "response"), ("query", "response"), ("prompt", "response"), ("instruction", "response"),
    ("prompt", "output"), ("question", "output"), ("query", "answer"), ("input", "output"), ("inputs", "targets"),
)  # fmt: skip


def _joined(*pieces):
    return "\n\n".join(piece for piece in pieces if piece.strip())


def _alpaca(raw):
    prompt = _joined(text(raw, "instruction"), text(raw, "input", default=""))
    if "system" in raw or "history" in raw:
        before = [turn for asked, said in raw.get("history") or () for turn in (*user(asked), _assistant(said))]
        lead = user(prompt, text(raw, "system", default=""))
        prompt = [*lead[:-1], *before, lead[-1]]
    return {"prompt": prompt, "completion": text(raw, "output")}


def _assistant(content):
    return {"role": "assistant", "content": content}


def _dolly(raw):
    prompt = _joined(text(raw, "instruction"), text(raw, "context", default=""))
    return {"prompt": prompt, "completion": text(raw, "response")}


def _openorca(raw):
    prompt = user(text(raw, "question"), text(raw, "system_prompt", default=""))
    return {"prompt": prompt, "completion": text(raw, "response")}


def _names(raw):
    """The columns of question and answer, if there is one way to read them."""
    found = [names for names in _PAIRS if all(isinstance(raw.get(name), str) for name in names)]
    return found[0] if len(found) == 1 and not DOUBTFUL.difference(found[0]).intersection(raw) else None


def _question_response(raw):
    asked, said = _names(raw) or next((names for names in _PAIRS if names[0] in raw and names[1] in raw), _PAIRS[0])
    return {"prompt": text(raw, asked), "completion": text(raw, said)}


def _beavertails(raw, kind):
    prompt, safe = text(raw, "prompt"), raw["is_safe"]
    if kind == "prompts":
        return [{**others(raw), "prompt": prompt}]
    return [{"prompt": prompt, "completion": text(raw, "response"), "label": safe}]


FORMATS = (
    Format(
        "alpaca",
        "Alpaca and its kin: instruction, input, output; system, history",
        {
            "sft": "input behind instruction, one empty line between; messages where there is system or history",
            "prompts": "input behind instruction, one empty line between",
        },
        has("instruction", "output", without=("context", "messages", "conversations", "chosen", "response")),
        as_demonstration(_alpaca),
        aliases=("alpaca-cleaned", "code-alpaca", "evol-instruct"),
    ),
    Format(
        "dolly",
        "Dolly: instruction, context, response",
        dict.fromkeys(DEMONSTRATION, "context behind instruction, one empty line between"),
        has("instruction", "context", "response", without=("input", "output")),
        as_demonstration(_dolly),
        aliases=("databricks-dolly-15k",),
    ),
    Format(
        "openorca",
        "OpenOrca: system_prompt, question, response",
        dict.fromkeys(DEMONSTRATION, "as messages; an empty system_prompt is left out"),
        has("system_prompt", "question", "response"),
        as_demonstration(_openorca),
    ),
    Format(
        "beavertails",
        "BeaverTails: prompt, response, is_safe",
        {"unpaired": "a safe response is a good one", "prompts": ""},
        has("prompt", "response", is_safe=bool),
        _beavertails,
    ),
    Format(
        "question-response",
        "MetaMath and others: " + ", ".join(f"{asked} and {said}" for asked, said in _PAIRS),
        DEMONSTRATION,
        lambda raw: _names(raw) is not None and "helpfulness" not in raw,
        as_demonstration(_question_response),
        aliases=("metamath", "metamathqa"),
    ),
)
