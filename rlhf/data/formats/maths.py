"""Published sets of questions whose answer can be checked."""

from .base import Format, has, others, text

_MARK = "####"
_FACTS = (
    "context", "contexts", "passage", "document", "article", "choices", "options", "history", "support", "evidence",
    "image", "images", "system", "system_prompt", "input",
)  # fmt: skip


def _question_answer(raw, kind):
    if kind == "sft":
        return [{"prompt": text(raw, "question"), "completion": text(raw, "answer")}]
    answer = text(raw, "answer")
    if _MARK in answer:
        answer = answer.rpartition(_MARK)[2].strip().replace(",", "")
    return [{**others(raw), "prompt": text(raw, "question"), "answer": answer}]


FORMATS = (
    Format(
        "question-answer",
        "GSM8K and others with the columns question and answer",
        {"sft": "", "prompts": 'with the column answer; where it has "#### 42", only what stands behind (no commas)'},
        has("question", "answer", without=_FACTS),
        _question_answer,
    ),
)
