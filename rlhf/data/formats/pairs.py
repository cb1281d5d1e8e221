"""Published sets that compare two answers to a prompt."""

from . import dialogues
from .base import (
    Bad,
    Format,
    as_ranking,
    assistant,
    entries,
    has,
    is_messages,
    no_media,
    number,
    pair,
    pairs,
    ranking,
    rankings,
    records_with,
    text,
    user,
)


def _hh(raw):
    return pair(*dialogues.split(text(raw, "chosen"), text(raw, "rejected")))


def _is_hh(raw):
    return "prompt" not in raw and all(dialogues.is_dialogue(raw.get(name)) for name in ("chosen", "rejected"))


def _summarize(raw):
    answers = entries(raw, "summaries")
    choice = number(raw.get("choice"))
    if choice not in range(len(answers)):
        raise Bad(f"`choice` must be the number of one of {len(answers)} summaries, got {raw.get('choice')!r}")
    ranks = [int(index != choice) for index in range(len(answers))]
    labeler = raw.get("worker") or None
    return ranking(_post(raw), [answer.get("text") for answer in answers], ranks=ranks, labeler=labeler)


def _post(raw):
    info = raw["info"]
    if info.get("post"):
        return f"SUBREDDIT: r/{info.get('subreddit')}\n\nTITLE: {info.get('title')}\n\nPOST: {info['post']}\n\nTL;DR:"
    if not info.get("article"):
        raise Bad("`info` holds neither a post nor an article")
    title = f"TITLE: {info['title']}\n\n" if info.get("title") else ""
    return f"{title}{info['article']}\n\nTL;DR:"


def _is_info(value):
    return isinstance(value, dict) and ("post" in value or "article" in value)


def _webgpt(raw):
    answers, scores = ([raw.get(f"{name}_{index}") for index in (0, 1)] for name in ("answer", "score"))
    return ranking(text(raw["question"], "full_text"), answers, scores=scores)


def _shp(raw):
    preferred = number(raw.get("labels"))
    if preferred not in (0, 1):
        raise Bad(f"`labels` must be 1 (A is preferred) or 0, got {raw.get('labels')!r}")
    return ranking(
        text(raw, "history"), [raw.get(f"human_ref_{name}") for name in "AB"], scores=[preferred, 1 - preferred]
    )


def _by_strength(prompt, answers, strength, name):
    """Below 0 the first answer is better, above 0 the second."""
    value = number(strength)
    if value is None:
        raise Bad(f"`{name}` must be a number, got {strength!r}")
    return ranking(prompt, answers, ranks=[int(value > 0), int(value < 0)])


def _helpsteer2(raw):
    answers = [raw.get("response_1"), raw.get("response_2")]
    return _by_strength(text(raw, "prompt"), answers, raw.get("preference_strength"), "preference_strength")


def _helpsteer3(raw):
    answers = [raw.get("response1"), raw.get("response2")]
    return _by_strength(raw["context"], answers, raw.get("overall_preference"), "overall_preference")


def _edit_quality(raw):
    return pair(raw["context"], raw.get("good_edited_response"), raw.get("bad_edited_response"))


def _by_id(name):
    def read(raw):
        better = number(raw.get(name))
        if better not in (0, 1):
            raise Bad(f"`{name}` must be 0 or 1, got {raw.get(name)!r}")
        answers = [raw.get("response_0"), raw.get("response_1")]
        return ranking(text(raw, "prompt"), answers, ranks=[better, 1 - better])

    return read


_QUESTIONS = ("instruction", "question", "query", "input")


def _asked(raw):
    """The column of the question. Our own `prompt` is one beside a column system, which is not ours."""
    names = (*_QUESTIONS, "prompt") if "system" in raw else _QUESTIONS
    return next((name for name in names if isinstance(raw.get(name), str)), None)


def _question_pair(chosen, rejected):
    def read(raw):
        no_media(raw)
        name = _asked(raw) or ("prompt" if "prompt" in raw else _QUESTIONS[0])
        asked = [text(raw, name), text(raw, "input", default="") if name == "instruction" else ""]
        question = "\n\n".join(piece for piece in asked if piece.strip())
        prompt = user(question, text(raw, "system", default="")) if "system" in raw else question
        return pair(prompt, text(raw, chosen), text(raw, rejected))

    return read


def _is_question_pair(chosen, rejected):
    held = has(chosen, rejected)
    return lambda raw: held(raw) and _asked(raw) is not None and ("system" in raw or "prompt" not in raw)


def _stack_exchange_paired(raw):
    return pair(text(raw, "question"), text(raw, "response_j"), text(raw, "response_k"))


def _ultrainteract(raw):
    prompt = [
        {"role": dialogues.role_of(turn.get("from")), "content": turn.get("value")}
        for turn in entries(raw, "trajectory")
    ]
    return pair(prompt, text(raw, "chosen"), text(raw, "rejected"))


def _openai(raw):
    asked = raw["input"]
    return pair(
        asked["messages"], raw["preferred_output"], raw["non_preferred_output"], tools=asked.get("tools") or None
    )


def _is_asked(value):
    return isinstance(value, dict) and is_messages(value.get("messages"), "role")


def _step_dpo(raw):
    begun = text(raw, "initial_reason_steps", default="")
    begun = [assistant(begun)] if begun.strip() else []
    return pair([*user(text(raw, "prompt")), *begun], text(raw, "chosen"), text(raw, "rejected"))


FORMATS = (
    Format(
        "hh-rlhf",
        "HH-RLHF: chosen and rejected as whole dialogues in text (Human: ... Assistant: ...)",
        pairs("the prompt is what both share up to an Assistant:, as text; hh-rlhf:chat makes messages of it"),
        _is_hh,
        as_ranking(_hh),
    ),
    Format(
        "summarize-from-feedback",
        "summarize_from_feedback, comparisons: info.post (or .article), summaries[].text, choice, worker",
        rankings("the prompt is subreddit, title and post with TL;DR: behind; worker is the labeler"),
        has(info=_is_info, summaries=records_with("text"), choice=float),
        as_ranking(_summarize),
    ),
    Format(
        "summarize-from-feedback-axis",
        "summarize_from_feedback, axis: ratings of single summaries, which rank nothing",
        {"prompts": "subreddit, title and post with TL;DR: behind"},
        has(info=_is_info, summary=dict),
        lambda raw, kind: [{"prompt": _post(raw)}],
    ),
    Format(
        "webgpt-comparisons",
        "webgpt_comparisons: question.full_text, answer_0, answer_1, score_0, score_1",
        rankings("by score, equal scores are ties; the quotes are not in the prompt"),
        has("answer_0", "answer_1", question=lambda value: isinstance(value, dict) and "full_text" in value),
        as_ranking(_webgpt),
        aliases=("webgpt",),
    ),
    Format(
        "shp",
        "SHP: history, human_ref_A, human_ref_B, labels (1: A is preferred)",
        rankings("by labels"),
        has("history", "human_ref_A", "human_ref_B", labels=float),
        as_ranking(_shp),
        aliases=("shp-2",),
    ),
    Format(
        "helpsteer2-preference",
        "HelpSteer2, preferences: prompt, response_1, response_2, preference_strength (above 0: the second)",
        rankings("by preference_strength; 0 is a tie"),
        has("prompt", "response_1", "response_2", preference_strength=float),
        as_ranking(_helpsteer2),
    ),
    Format(
        "helpsteer3",
        "HelpSteer3: context (messages), response1, response2, overall_preference (above 0: the second)",
        rankings("by overall_preference; 0 is a tie"),
        has("response1", "response2", overall_preference=float, context=is_messages),
        as_ranking(_helpsteer3),
        aliases=("helpsteer3-preference",),
    ),
    Format(
        "helpsteer3-edit-quality",
        "HelpSteer3, edit quality: context (messages), good_edited_response, bad_edited_response",
        pairs("the good edit above the bad one"),
        has("good_edited_response", "bad_edited_response", context=is_messages),
        as_ranking(_edit_quality),
    ),
    Format(
        "pku-saferlhf",
        "PKU-SafeRLHF: prompt, response_0, response_1, better_response_id",
        rankings("by better_response_id; by safety: --data_format pku-saferlhf-safer"),
        has("prompt", "response_0", "response_1", better_response_id=float),
        as_ranking(_by_id("better_response_id")),
    ),
    Format(
        "pku-saferlhf-safer",
        "PKU-SafeRLHF by safety; only by name: prompt, response_0, response_1, safer_response_id",
        rankings("by safer_response_id"),
        has("prompt", "response_0", "response_1", safer_response_id=float),
        as_ranking(_by_id("safer_response_id")),
        auto=False,
    ),
    Format(
        "orca-dpo-pairs",
        "Orca DPO pairs and others: instruction, question or input, chosen, rejected; system (also beside prompt)",
        pairs("messages where there is a column system"),
        _is_question_pair("chosen", "rejected"),
        as_ranking(_question_pair("chosen", "rejected")),
        over_own=("ranked", "preference", "unpaired", "sft", "prompts"),
        aliases=("distilabel-intel-orca-dpo-pairs",),
    ),
    Format(
        "chosen-response",
        "argilla's ultrafeedback-binarized-preferences and others: instruction, chosen_response, rejected_response",
        pairs("messages where there is a column system"),
        _is_question_pair("chosen_response", "rejected_response"),
        as_ranking(_question_pair("chosen_response", "rejected_response")),
        aliases=("ultrafeedback-binarized-preferences", "distilabel-math-preference-dpo"),
    ),
    Format(
        "stack-exchange-paired",
        "Stack Exchange paired: question, response_j (the better), response_k",
        pairs("response_j above response_k"),
        has("question", "response_j", "response_k"),
        as_ranking(_stack_exchange_paired),
    ),
    Format(
        "ultrainteract-pair",
        "UltraInteract pairs: trajectory[].from, .value, chosen, rejected",
        pairs("the trajectory is the prompt"),
        has("chosen", "rejected", trajectory=records_with("from", "value")),
        as_ranking(_ultrainteract),
    ),
    Format(
        "openai-preference",
        "OpenAI's preferences: input.messages, input.tools, preferred_output, non_preferred_output (messages)",
        pairs(""),
        has(
            input=_is_asked,
            preferred_output=lambda value: is_messages(value, "role"),
            non_preferred_output=lambda value: is_messages(value, "role"),
        ),
        as_ranking(_openai),
    ),
    Format(
        "step-dpo",
        "Step-DPO: prompt, initial_reason_steps, chosen, rejected",
        pairs("the answers go on from initial_reason_steps"),
        has("prompt", "initial_reason_steps", "chosen", "rejected"),
        as_ranking(_step_dpo),
        over_own=("ranked", "preference", "unpaired", "sft"),
        aliases=("math-step-dpo-10k",),
    ),
    Format(
        "model-written-evals",
        "Anthropic's model-written evaluations: question; which answer is better is for --columns to say",
        {"prompts": ""},
        has("question", "answer_matching_behavior", "answer_not_matching_behavior"),
        lambda raw, kind: [{**raw, "prompt": text(raw, "question")}],
    ),
)
