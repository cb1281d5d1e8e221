"""OpenAssistant: trees of messages, in one row each or as a table of messages."""

from .base import RANKING_KINDS, Bad, Format, has, of_ranking, ranking

_ROLES = {"prompter": "user", "assistant": "assistant"}
_KINDS = {
    "ranked": "every question with two or more ranked answers; what was said before it is in the prompt",
    **RANKING_KINDS,
    "sft": "of every tree the conversation of the best ranked turns",
    "prompts": "every question, with what was said before it",
}


def _usable(node):
    kept = not node.get("deleted") and node.get("review_result") is not False
    return kept and node.get("role") in _ROLES and bool((node.get("text") or "").strip())


def _replies(node, role):
    """Usable replies of a role, the best ranked first, those without a rank last."""
    found = [reply for reply in node.get("replies") or () if _usable(reply) and reply["role"] == role]
    return sorted(found, key=lambda reply: (reply.get("rank") is None, reply.get("rank") or 0))


def _message(node):
    return {"role": _ROLES[node["role"]], "content": node.get("text")}


def _rows(root, kind):
    if not _usable(root) or root["role"] != "prompter":
        return []
    if kind == "sft":
        turns = _best(root)
        return [{"messages": turns}] if len(turns) > 1 else []
    return [row for question, path in _questions(root, []) for row in _rows_of(question, path, kind)]


def _best(root):
    """The messages along the best ranked answers, and the best ranked questions that have an answer."""
    turns, node = [_message(root)], root
    while node is not None:
        answers = _replies(node, "assistant")
        turns += [_message(answer) for answer in answers[:1]]
        asked = _replies(answers[0], "prompter") if answers else []
        node = next((question for question in asked if _replies(question, "assistant")), None)
        turns += [_message(node)] if node else []
    return turns


def _questions(root, before):
    """(question, messages up to and with it) of a tree, the upper ones first."""
    waiting = [(root, before)]
    while waiting:
        question, before = waiting.pop(0)
        path = [*before, _message(question)]
        yield question, path
        for answer in _replies(question, "assistant"):
            waiting += [(asked, [*path, _message(answer)]) for asked in _replies(answer, "prompter")]


def _rows_of(question, path, kind):
    if kind == "prompts":
        return [{"prompt": path}]
    ranked = [answer for answer in _replies(question, "assistant") if answer.get("rank") is not None]
    if len(ranked) < 2:
        return []
    answers, ranks = [answer.get("text") for answer in ranked], [answer["rank"] for answer in ranked]
    return of_ranking(ranking(path, answers, ranks=ranks), kind)


def _tree_of(raws):
    """The root of a table's messages, each with its replies."""
    nodes = {raw["message_id"]: {**raw, "replies": []} for raw in raws}
    roots = []
    for node in nodes.values():
        parent = node.get("parent_id")
        if parent is None:
            roots.append(node)
        elif parent in nodes:
            nodes[parent]["replies"].append(node)
    return roots


def _id_of_tree(raw):
    found = raw.get("message_tree_id")
    if not isinstance(found, str) or not isinstance(raw.get("message_id"), str):
        raise Bad("a message must have message_id and message_tree_id")
    return found


FORMATS = (
    Format(
        "oasst-trees",
        "OpenAssistant (oasst1, oasst2), trees: prompt.text, .replies[].text, .rank",
        _KINDS,
        has(prompt=lambda value: isinstance(value, dict) and "text" in value and value.get("role") in tuple(_ROLES)),
        lambda raw, kind: _rows(raw["prompt"], kind),
    ),
    Format(
        "oasst",
        "OpenAssistant (oasst1, oasst2), table of messages: message_id, parent_id, message_tree_id, text, role, rank",
        _KINDS,
        has("message_id", "message_tree_id", "text", role=lambda value: value in tuple(_ROLES)),
        lambda raws, kind: [row for root in _tree_of(raws) for row in _rows(root, kind)],
        group=_id_of_tree,
        aliases=("oasst1", "oasst2", "openassistant", "oasst-messages"),
    ),
)
