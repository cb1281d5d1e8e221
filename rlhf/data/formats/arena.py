"""Votes of the Chatbot Arena: two models answer, turn by turn, and a person says which is better."""

import json

from .base import Bad, Format, as_ranking, assistant, entries, has, ranking, rankings, records_with, text, user

_RANKS = {"model_a": [0, 1], "model_b": [1, 0], "tie": [0, 0], "tie (bothbad)": [0, 0], "both_bad": [0, 0]}


def _arena(raw):
    ranks = _RANKS.get(raw["winner"])
    if ranks is None:
        raise Bad(f"`winner` must be one of {', '.join(_RANKS)}, got {raw['winner']!r}")
    first, second = ([_turn(turn) for turn in entries(raw, f"conversation_{name}")] for name in "ab")
    shared = next((index for index, turns in enumerate(zip(first, second)) if turns[0] != turns[1]), None)
    shared = min(len(first), len(second)) if shared is None else shared
    asked = [index for index in range(shared) if first[index]["role"] != "assistant"]
    if not asked:
        raise Bad("`conversation_a` and `conversation_b` do not begin with the same question")
    cut = asked[-1] + 1
    judge = raw.get("judge")
    labeler = judge if isinstance(judge, str) and judge.strip() else None
    return ranking(first[:cut], [first[cut:] or None, second[cut:] or None], ranks=ranks, labeler=labeler)


def _turn(turn):
    content = turn.get("content")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        content = "".join(part for part in parts if part is not None)
    return {"role": turn.get("role"), "content": content}


def _turns(raw, name):
    try:
        turns = json.loads(text(raw, name))
    except ValueError:
        turns = None
    if not isinstance(turns, list) or not turns:
        raise Bad(f"`{name}` must be a JSON list of turns, got {raw[name][:40]!r}")
    return turns


def _arena_55k(raw):
    asked = _turns(raw, "prompt")
    answers = []
    for said in (_turns(raw, "response_a"), _turns(raw, "response_b")):
        turns = [turn for question, answer in zip(asked, said) for turn in (*user(question), assistant(answer))]
        answers.append(turns[1:] if all(said) and len(said) == len(asked) else None)
    won = [bool(raw.get(f"winner_model_{name}")) for name in "ab"]
    return ranking(user(asked[0]), answers, ranks=[int(won[1] and not won[0]), int(won[0] and not won[1])])


FORMATS = (
    Format(
        "chatbot-arena",
        "Chatbot Arena: conversation_a, conversation_b, winner (model_a, model_b, tie, ...), judge",
        rankings("by winner; judge is the labeler; what both conversations share is the prompt"),
        has("winner", conversation_a=records_with("role", "content"), conversation_b=records_with("role", "content")),
        as_ranking(_arena),
        aliases=("chatbot-arena-conversations", "arena-human-preference-140k", "arena-human-preference-100k"),
    ),
    Format(
        "arena-human-preference-55k",
        "Arena votes with turns as JSON: prompt, response_a, response_b, winner_model_a, winner_model_b",
        rankings("by winner; the first question is the prompt"),
        has("prompt", "response_a", "response_b", winner_model_a=float, winner_model_b=float),
        as_ranking(_arena_55k),
        over_own=("prompts",),
    ),
)
