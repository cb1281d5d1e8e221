"""Published sets of questions whose answer can be checked."""

import json
import re
from contextlib import suppress

from .base import (
    Bad,
    Format,
    has,
    is_messages,
    is_texts,
    left_out,
    number,
    of_ranking,
    others,
    ranking,
    short_columns,
    system_of,
    text,
    user,
)
from .instructions import DOUBTFUL

_SOLUTIONS, _ANSWERS = ("solution", "generated_solution"), ("answer", "expected_answer")
_MARK = "####"
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


def _question_answer(raw, kind):
    question, answer = text(raw, "question"), text(raw, "answer")
    if kind == "sft":
        return [{"prompt": question, "completion": answer}]
    if _MARK in answer:
        answer = answer.rpartition(_MARK)[2].strip().replace(",", "")
    return [{**others(raw), "prompt": question, "answer": answer}]


def _is_question_answer(raw):
    return _HAS_QUESTION(raw) and _is_told(raw, ("answer",))


def _is_told(raw, names):
    return any(isinstance(raw.get(name), str) or number(raw.get(name)) is not None for name in names)


def _math(raw, kind):
    prompt, system = text(raw, "problem" if "problem" in raw else "question"), system_of(raw)
    prompt = user(prompt, system) if system or "messages" in raw else prompt
    solution = next((name for name in _SOLUTIONS if raw.get(name) is not None), _SOLUTIONS[0])
    if kind == "sft":
        return [{"prompt": prompt, "completion": text(raw, solution)}]
    answer = next((text(raw, name) for name in _ANSWERS if raw.get(name) is not None), None)
    answer = boxed(text(raw, solution)) if answer is None else answer
    return [{**others(raw), "prompt": prompt, "answer": answer}]


def _is_math(raw):
    if "question" in raw:
        return _HAS_SOLUTION(raw) and all(_is_told(raw, names) for names in (_SOLUTIONS, _ANSWERS))
    return isinstance(raw.get("problem"), str) and _is_told(raw, (*_SOLUTIONS, *_ANSWERS)) and "generations" not in raw


def boxed(text):
    """What stands in the last \\boxed{...} or \\fbox{...} whose braces match; None if there is none."""
    opened, best = [], (-1, None)
    for brace in _BRACES.finditer(text):
        if brace[0] == "}" and opened:
            start, is_box = opened.pop()
            if is_box and start > best[0]:
                best = start, text[start : brace.start()]
        elif brace[0].endswith("{") and brace[0] != r"\{":
            opened.append((brace.end(), brace[0] != "{"))
    return best[1]


def _openr1(raw, kind):
    prompt = user(text(raw, "problem"))
    if kind == "prompts":
        return [{**short_columns(raw), "prompt": prompt, "answer": text(raw, "answer", default="") or None}]
    answers, right = raw["generations"], raw["correctness_math_verify"]
    if len(answers) != len(right):
        raise Bad(f"holds {len(answers)} generations and {len(right)} correctness_math_verify")
    judged = [(said, bool(good)) for said, good in zip(answers, right) if said and said.strip() and good is not None]
    if kind == "unpaired":
        return [{"prompt": prompt, "completion": said, "label": good} for said, good in judged]
    if len(judged) < 2:
        return []
    return of_ranking(ranking(prompt, [said for said, _ in judged], scores=[int(good) for _, good in judged]), kind)


def _verl(raw, kind):
    return [{**others(raw), "prompt": raw["prompt"], **_answer(raw["reward_model"].get("ground_truth"))}]


def _answer(truth):
    """The column answer: a text or number, also as the only one of a list, and of one in JSON."""
    if isinstance(truth, str) and truth.lstrip().startswith('["'):
        with suppress(ValueError):
            truth = json.loads(truth)
    if isinstance(truth, list) and len(truth) == 1:
        truth = truth[0]
    plain = isinstance(truth, (str, int, float)) and not isinstance(truth, bool)
    return {"answer": str(truth)} if plain else {}


def _rlvr(raw, kind):
    return [{**others(raw), "messages": raw["messages"], **_answer(raw.get("ground_truth"))}]


def _mbpp(raw, kind):
    prompt = text(raw, "text") if isinstance(raw.get("text"), str) else text(raw, "prompt")
    if kind == "sft":
        return [{"prompt": prompt, "completion": text(raw, "code")}]
    setup = raw.get("test_imports") or [raw.get("test_setup_code") or ""]
    test = "\n".join(line for line in (*setup, *raw["test_list"]) if line.strip())
    return [{**others(raw), "prompt": prompt, "test": test}]


def _humaneval(raw, kind):
    if kind == "sft":
        return [{"prompt": text(raw, "prompt"), "completion": text(raw, "canonical_solution")}]
    test = f"{text(raw, 'test')}\n\ncheck({text(raw, 'entry_point')})"
    return [{**others(raw), "prompt": text(raw, "prompt"), "test": test}]


_HAS_QUESTION = has("question", without=(*DOUBTFUL - {"question"}, "response", *_SOLUTIONS))
_HAS_SOLUTION = has("question", without=(*DOUBTFUL - {"question"}, "response", "generations", "is_correct"))


def _has_truth(value):
    return isinstance(value, dict) and "ground_truth" in value


FORMATS = (
    Format(
        "question-answer",
        "GSM8K and others with the columns question and answer",
        {"sft": "", "prompts": 'with the column answer: of "... #### 1,234" what stands behind, without commas'},
        _is_question_answer,
        _question_answer,
        aliases=("gsm8k", "orca-math"),
        left_out=left_out(*DOUBTFUL - {"question"}),
    ),
    Format(
        "math",
        "MATH, NuminaMath and others: problem, solution (or generated_solution), answer (or expected_answer); LIMO",
        {"sft": "", "prompts": "with the column answer; without one, what the last \\boxed{} of the solution holds"},
        _is_math,
        _math,
        over_own=("prompts",),
        aliases=("math-500", "numina-math", "numinamath", "numinamath-cot", "hendrycks-math"),
    ),
    Format(
        "openr1",
        "OpenR1-Math: problem, answer, generations, correctness_math_verify",
        {
            "ranked": "all generations of a row, the right ones above the wrong ones; none from a row of one",
            "preference": "a right generation against a wrong one; none from a row where all are right, or wrong",
            "sft": "the first right generation",
            "unpaired": "every generation, good if it is right",
            "prompts": "with the column answer",
        },
        has("problem", generations=is_texts, correctness_math_verify=list),
        _openr1,
        over_own=("prompts",),
        aliases=("openr1-math-220k",),
    ),
    Format(
        "verl",
        "verl's data: prompt (messages), reward_model.ground_truth, data_source",
        {"prompts": "reward_model.ground_truth as the column answer"},
        has("data_source", prompt=(str, list), reward_model=_has_truth),
        _verl,
        over_own=("prompts",),
        aliases=("dapo-math-17k",),
    ),
    Format(
        "rlvr",
        "Tulu's verifiable rewards: messages, ground_truth, dataset",
        {"prompts": "ground_truth as the column answer"},
        has(ground_truth=(str, list), dataset=(str, list), messages=is_messages),
        _rlvr,
        over_own=("prompts",),
    ),
    Format(
        "mbpp",
        "MBPP: text or prompt, code, test_list",
        {"sft": "", "prompts": "test_list as the column test, for unit_test"},
        lambda raw: (
            has("code", test_list=is_texts)(raw) and any(isinstance(raw.get(n), str) for n in ("text", "prompt"))
        ),
        _mbpp,
        over_own=("prompts",),
    ),
    Format(
        "humaneval",
        "HumanEval: prompt, canonical_solution, test, entry_point",
        {"sft": "", "prompts": "the column test with a call of check, for unit_test"},
        has("prompt", "canonical_solution", "test", "entry_point"),
        _humaneval,
        over_own=("prompts",),
    ),
)
