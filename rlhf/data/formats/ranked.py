"""Published sets whose rows rank several answers to a prompt."""

from .base import Format, as_ranking, entries, has, is_messages, ranking, rankings, text


def _ultrafeedback(raw):
    answers = entries(raw, "completions")
    scores = [answer.get("overall_score") for answer in answers]
    if all(score is None for score in scores):
        scores = [answer.get("fine-grained_score") for answer in answers]
    return ranking(text(raw, "instruction"), [answer.get("response") for answer in answers], scores=scores)


def _nectar(raw):
    answers = entries(raw, "answers")
    ranks = [answer.get("rank") for answer in answers]
    return ranking(text(raw, "prompt"), [answer.get("answer") for answer in answers], ranks=ranks)


FORMATS = (
    Format(
        "ultrafeedback",
        "UltraFeedback as published by its makers: instruction, completions[].response, .overall_score",
        rankings("the answers of a row, by overall_score (where a row has none: by fine-grained_score)"),
        has("instruction", completions=lambda value: is_messages(value, "response")),
        as_ranking(_ultrafeedback),
    ),
    Format(
        "nectar",
        "Nectar: prompt, answers[].answer, .rank",
        rankings("the answers of a row, by rank"),
        has("prompt", answers=lambda value: is_messages(value, "answer", "rank")),
        as_ranking(_nectar),
    ),
)
