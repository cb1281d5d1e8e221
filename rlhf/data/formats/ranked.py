"""Published sets that rank more than two answers to a prompt."""

from .base import (
    Bad,
    Format,
    as_ranking,
    entries,
    has,
    is_texts,
    number,
    of_ranking,
    ranking,
    rankings,
    records_with,
    short_columns,
    text,
    user,
)


def _ultrafeedback(raw):
    answers = entries(raw, "completions")
    scores = [answer.get("overall_score") for answer in answers]
    if not any(number(score) is not None for score in scores):
        scores = [answer.get("fine-grained_score") for answer in answers]
    return ranking(text(raw, "instruction"), [answer.get("response") for answer in answers], scores=scores)


def _nectar(raw):
    answers = entries(raw, "answers")
    ranks = [answer.get("rank") for answer in answers]
    return ranking(text(raw, "prompt"), [answer.get("answer") for answer in answers], ranks=ranks)


def _stack_exchange(raw):
    answers = entries(raw, "answers")
    scores = [answer.get("pm_score") for answer in answers]
    return ranking(text(raw, "question"), [answer.get("text") for answer in answers], scores=scores)


def _scored(raw):
    return ranking(user(text(raw, "prompt")), raw["all_generated_responses"], scores=raw["all_rm_scores"])


def _good_and_bad(raw):
    good, bad = raw["chosen"], raw["rejected"]
    return ranking(text(raw, "prompt"), [*good, *bad], ranks=[0] * len(good) + [1] * len(bad))


def _helpsteer(raws, kind):
    if kind == "prompts":
        return [{**short_columns(raws[0]), "prompt": raws[0]["prompt"]}]
    if len(raws) < 2:
        return []
    scores = [raw.get("helpfulness") for raw in raws]
    return of_ranking(ranking(raws[0]["prompt"], [raw.get("response") for raw in raws], scores=scores), kind)


def _prompt_of(raw):
    prompt = raw.get("prompt")
    if not isinstance(prompt, str):
        raise Bad(f"`prompt` must be a string, got {type(prompt).__name__}")
    return prompt


FORMATS = (
    Format(
        "ultrafeedback",
        "UltraFeedback as its makers publish it: instruction, completions[].response, .overall_score",
        rankings("all answers of a row, by overall_score, or by fine-grained_score where a row has none"),
        has("instruction", completions=records_with("response")),
        as_ranking(_ultrafeedback),
    ),
    Format(
        "nectar",
        "Nectar: prompt, answers[].answer, .rank",
        rankings("all answers of a row, by rank; prompts as text, nectar:chat makes messages of them"),
        has("prompt", answers=records_with("answer", "rank")),
        as_ranking(_nectar),
    ),
    Format(
        "helpsteer",
        "HelpSteer and HelpSteer2: prompt, response, helpfulness; the rows of one prompt belong together",
        rankings("all answers to a prompt, if there are two, by helpfulness; helpsteer:chat makes messages of turns"),
        has("prompt", "response", helpfulness=float),
        _helpsteer,
        group=_prompt_of,
        over_own=("prompts",),
        aliases=("helpsteer2",),
    ),
    Format(
        "stack-exchange",
        "Stack Exchange preferences: question, answers[].text, .pm_score",
        rankings("all answers of a row, by pm_score"),
        has("question", answers=records_with("text", "pm_score")),
        as_ranking(_stack_exchange),
        aliases=("stack-exchange-preferences",),
    ),
    Format(
        "scored-generations",
        "UltraFeedback answered anew and scored by a reward model: prompt, all_generated_responses, all_rm_scores",
        rankings("all answers of a row, by all_rm_scores; the prompt as a message"),
        has("prompt", all_generated_responses=is_texts, all_rm_scores=list),
        as_ranking(_scored),
        over_own=("ranked",),
    ),
    Format(
        "reward-bench-2",
        "RewardBench 2: prompt, chosen and rejected as lists of answers",
        rankings("all answers of a row, those of chosen (tied) above those of rejected (tied)"),
        has("prompt", chosen=is_texts, rejected=is_texts),
        as_ranking(_good_and_bad),
    ),
)
