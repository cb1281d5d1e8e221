"""Published sets of single questions with an answer."""

from .base import (
    DEMONSTRATION,
    SYSTEMS,
    Format,
    as_demonstration,
    assistant,
    has,
    is_messages,
    left_out,
    others,
    system_of,
    text,
    user,
    with_system,
)

DOUBTFUL = {  # columns that may belong to the question, or judge the answer: which way is not for us to guess
    "context", "contexts", "passage", "document", "article", "choices", "options", "history", "evidence", "image",
    "images", "system", "system_prompt", "instruction", "question", "query", "prompt", "problem", "input", "messages",
    "definition", "conversations", "chosen", "rejected", "is_safe", "label", "labels", "rank", "rating",
}  # fmt: skip
_PAIRS = (
    ("question", "response"), ("query", "response"), ("prompt", "response"), ("instruction", "response"),
    ("prompt", "output"), ("question", "output"), ("query", "answer"), ("input", "output"), ("input", "target"),
    ("inputs", "targets"), ("message_1", "message_2"),
)  # fmt: skip
_OWN = ("prompt", "completion")
_BESIDE_ALPACA = ("context", "messages", "conversations", "chosen", "response")


def _joined(*pieces):
    return "\n\n".join(piece for piece in pieces if piece.strip())


def _alpaca(raw):
    prompt = _joined(text(raw, "instruction"), text(raw, "input", default=""))
    if "history" in raw or any(name in raw for name in SYSTEMS):
        before = [turn for asked, said in raw.get("history") or () for turn in (*user(asked), assistant(said))]
        lead = user(prompt, system_of(raw))
        prompt = [*lead[:-1], *before, lead[-1]]
    return {"prompt": prompt, "completion": text(raw, "output")}


def _dolly(raw):
    prompt = _joined(text(raw, "instruction"), text(raw, "context", default=""))
    return {"prompt": prompt, "completion": text(raw, "response")}


def _openorca(raw):
    asked, said = _names(raw, SYSTEMS) or _OWN
    return {"prompt": user(text(raw, asked), system_of(raw)), "completion": text(raw, said)}


def _nemotron(raw):
    return {"prompt": with_system(raw["input"], system_of(raw)), "completion": text(raw, "output")}


def _is_openorca(raw):
    systems = [name for name in SYSTEMS if isinstance(raw.get(name), str)]
    return len(systems) == 1 and _names(raw, systems) is not None


def _names(raw, known=()):
    """The columns of question and answer, if there is one way to read them.

    Args:
        known: columns that are read besides.
    """
    pairs = (*_PAIRS, _OWN) if known else _PAIRS
    found = [names for names in pairs if all(isinstance(raw.get(name), str) for name in names)]
    doubtful = DOUBTFUL.difference(known, *found[:1]).intersection(raw)
    return found[0] if len(found) == 1 and not doubtful else None


def _read(raw):
    return _names(raw) or next((names for names in _PAIRS if names[0] in raw and names[1] in raw), _PAIRS[0])


def _question_response(raw):
    asked, said = _read(raw)
    return {"prompt": text(raw, asked), "completion": text(raw, said)}


def _beavertails(raw, kind):
    prompt, safe = text(raw, "prompt"), raw["is_safe"]
    if kind == "prompts":
        return [{**others(raw), "prompt": prompt}]
    return [{"prompt": prompt, "completion": text(raw, "response"), "label": safe}]


def _content(raw, kind):
    return [{"text": text(raw, "content" if "content" in raw else "raw_content")}]


def _is_content(raw):
    return (
        "text" not in raw
        and "role" not in raw
        and any(isinstance(raw.get(name), str) for name in ("content", "raw_content"))
    )


FORMATS = (
    Format(
        "content",
        "RefinedWeb, The Stack, RedPajama: content or raw_content",
        {"text": ""},
        _is_content,
        _content,
    ),
    Format(
        "alpaca",
        "Alpaca and its kin: instruction, input, output; system, history",
        {
            "sft": "input behind instruction, one empty line between; messages where there is system or history",
            "prompts": "input behind instruction, one empty line between",
        },
        has("instruction", "output", without=_BESIDE_ALPACA),
        as_demonstration(_alpaca),
        aliases=("alpaca-cleaned", "code-alpaca", "evol-instruct"),
        left_out=left_out(*_BESIDE_ALPACA),
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
        "OpenOrca and others: system_prompt or system, question and response (or others of question-response)",
        dict.fromkeys(DEMONSTRATION, "as messages; an empty system_prompt is left out"),
        _is_openorca,
        as_demonstration(_openorca),
        over_own=("sft", "prompts"),
    ),
    Format(
        "llama-nemotron",
        "Llama-Nemotron's sets: input (messages), output, system_prompt",
        DEMONSTRATION,
        has("output", input=is_messages),
        as_demonstration(_nemotron),
        aliases=("llama-nemotron-post-training-dataset",),
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
        left_out=lambda raw, kind: left_out(*DOUBTFUL.difference(_read(raw)))(raw, kind),
    ),
)
