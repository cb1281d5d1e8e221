"""Reading the user's data: every row is checked before any training starts, and a bad one is named by file and line."""

import json
import random
from pathlib import Path

from . import rankings
from .files import Bad, DataError, read

KINDS = ("sft", "ranked", "preference", "unpaired", "prompts", "text")


_SHOWN_ERRORS = 10


def reading(args):
    """How a run's settings say that data are read, as options of `load_rows` and `rows_of`."""
    return {
        "column_map": args.columns,
        "data_format": args.data_format,
        "bad_rows": args.bad_rows,
        "num_proc": args.dataset_num_proc,
    }


def load_rows(
    name_or_path, kind, *, split="train", config=None, columns=False, column_map=None, data_format="auto",
    bad_rows="error", num_proc=None,
):  # fmt: skip
    """Read and check every row of a data file (or of a set of the `datasets` package) before it is used.

    Args:
        name_or_path: a .jsonl, .json, .parquet or (kind "text") .txt file; a folder holding `<split>.<one of these>`;
            else a name that `datasets.load_dataset` knows, if that package is installed.
        kind: "sft" (`text`, `messages` or `prompt` + `completion`), "ranked" (`prompt` + `completions` + `ranks` or
            `scores`, or `prompt` + `chosen` + `rejected`; optional fields: see rankings.py), "preference" (`prompt` +
            `chosen` + `rejected`), "unpaired" (`prompt` + `completion` + `label`), "prompts", "text" (or a text file).
        split, config: which split of a folder or of a named data set, and which configuration of the latter.
        columns: True keeps the other fields of a row too, unchecked.
    Returns:
        Dicts with the fields of their kind and (but for `columns`) no other, and `at`, the place a row came from
        ("file:line"). A string `context` has been put before the prompt, one empty line between. Ranks are integers,
        lower is better.
    Raises:
        DataError: what is wrong, by file and line; also when the file is missing or holds no rows.
    """
    _check_kind(kind)
    return _checked(read(str(name_or_path), kind, split, config), f"{name_or_path}:1", kind, columns)


def rows_of(rows, kind, *, name, columns=False, column_map=None, data_format="auto", bad_rows="error", num_proc=None):
    """Check rows that are in memory as `load_rows` checks those of a file.

    Args:
        rows: dicts, in a list or a `datasets.Dataset`; or a file, as in `load_rows`. A field that is None is absent.
        kind, columns: as in `load_rows`.
        name: the argument that holds the rows, for messages.
    Returns:
        As `load_rows`; `at` is `name[index]`.
    Raises:
        DataError: what is wrong with a row; no rows.
        ValueError: `rows` is no list of dicts.
    """
    _check_kind(kind)
    if isinstance(rows, (str, Path)):
        return load_rows(rows, kind, columns=columns)
    if isinstance(rows, dict):
        raise ValueError(f"{name}: got a {type(rows).__name__} of {', '.join(map(str, rows))}, wants one split's rows")
    if not hasattr(rows, "__iter__"):
        raise ValueError(f"{name}: got {type(rows).__name__}, wants a list of dicts, a datasets.Dataset or a file")
    return _checked(_in_memory(rows, name), name, kind, columns)


def _in_memory(rows, name):
    for index, row in enumerate(rows):
        if isinstance(row, dict):
            row = {field: value for field, value in row.items() if value is not None}
        yield f"{name}[{index}]", row


def _check_kind(kind):
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, wants one of {', '.join(KINDS)}")


def _checked(found, name, kind, columns):
    """The rows among ("place", row) pairs, all of them good, or a DataError that lists the bad ones."""
    rows, problems = [], []
    for at, raw in found:
        try:
            if isinstance(raw, Bad):
                raise raw
            if not isinstance(raw, dict):
                raise Bad(f"a row must be a JSON object with named fields, got {type(raw).__name__}")
            row = _CHECKS[kind](raw)
            _check_unicode(row)
            rows.append({**(raw if columns else {}), **row, "at": at})
        except Bad as error:
            problems.append(f"{at}: {error}")
    if len(problems) > _SHOWN_ERRORS:
        problems[_SHOWN_ERRORS:] = [f"... and {len(problems) - _SHOWN_ERRORS} more bad rows"]
    if problems:
        raise DataError("\n".join(problems))
    if not rows:
        raise DataError(f"{name}: holds no rows")
    return rows


def _check_unicode(value, name=""):
    """Half a surrogate pair, as JSON may hold by an escape, is a character of Python's strings, but no text."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise Bad(f"`{name}` holds half a surrogate pair, {value[error.start]!a}, which is no text") from None
    elif isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_unicode(item, f"{name}[{key}]" if name else key)


def _field(raw, name):
    if name not in raw:
        raise Bad(f"lacks the field `{name}` (has {', '.join(map(repr, raw)) or 'no fields'})")
    return raw[name]


def _messages(name, value):
    for message in value:
        if not (isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))):
            raise Bad(f"`{name}` as a list must hold messages {{'role': ..., 'content': ...}} with string values")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _text(name, value):
    if not isinstance(value, str):
        raise Bad(f"`{name}` must be a string, got {type(value).__name__}")
    if not value.strip():
        raise Bad(f"`{name}` is empty")
    return value


def _prompt(raw):
    value = _field(raw, "prompt")
    context = raw.get("context")
    if context is not None and not isinstance(context, str):
        raise Bad(f"`context` must be a string, got {type(context).__name__}")
    if isinstance(value, list):
        messages = _messages("prompt", value)
        if not messages or not any(message["content"].strip() for message in messages):
            raise Bad("`prompt` is empty")
        if context:
            messages[-1] = {**messages[-1], "content": f"{context}\n\n{messages[-1]['content']}"}
        return messages
    value = _text("prompt", value)
    return f"{context}\n\n{value}" if context else value


def _completion(name, value):
    """A string, or a list with one assistant message (kept as a list: it then ends with the chat's end of turn)."""
    if isinstance(value, list):
        messages = _messages(name, value)
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            raise Bad(f"`{name}` as a list must hold one message of the role 'assistant'")
        _text(name, messages[0]["content"])
        return messages
    return _text(name, value)


def _check_sft(raw):
    if "messages" in raw:
        value = raw["messages"]
        messages = _messages("messages", value) if isinstance(value, list) else []
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise Bad("`messages` must hold at least two messages, the last one of the role 'assistant'")
        prompt = _prompt({**raw, "prompt": messages[:-1]})
        return {"prompt": prompt, "completion": _completion("messages", messages[-1:])}
    if "prompt" not in raw and "text" in raw:
        return {"text": _text("text", raw["text"])}
    return {"prompt": _prompt(raw), "completion": _completion("completion", _field(raw, "completion"))}


def _check_ranked(raw):
    if "completions" not in raw and "chosen" in raw:
        row = _check_preference(raw)
        prompt, completions = row["prompt"], [row["chosen"], row["rejected"]]
        raw = {"ranks": [0, 1], **{name: raw[name] for name in ("weight", "margin", "labeler") if name in raw}}
    else:
        prompt, completions = _prompt(raw), _completions(raw)
    name = "ranks" if "ranks" in raw or "scores" not in raw else "scores"
    values, count = _field(raw, name), len(completions)
    try:
        ranked = {"ranks": rankings.ranks_of(name, values, count), **rankings.optional_fields(raw, count)}
    except ValueError as error:
        raise Bad(str(error)) from None
    return {"prompt": prompt, "completions": completions, **ranked}


def _completions(raw):
    completions = _field(raw, "completions")
    if not isinstance(completions, list):
        raise Bad(f"`completions` must be a list, got {type(completions).__name__}")
    if len(completions) < 2:
        raise Bad(f"`completions` must hold at least two completions to rank, got {len(completions)}")
    return [_completion(f"completions[{index}]", value) for index, value in enumerate(completions)]


def _check_preference(raw):
    answers = {name: _completion(name, _field(raw, name)) for name in ("chosen", "rejected")}
    return {"prompt": _prompt(raw), **answers}


def _check_unpaired(raw):
    label = _field(raw, "label")
    if label not in (0, 1):
        raise Bad(f"`label` must be true (desired) or false, got {label!r}")
    return {**_check_sft({name: raw[name] for name in raw if name != "text"}), "label": bool(label)}


def _check_prompts(raw):
    if "prompt" not in raw and "messages" in raw:
        messages = _messages("messages", raw["messages"]) if isinstance(raw["messages"], list) else []
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        raw = {**raw, "prompt": messages}
    return {"prompt": _prompt(raw)}


def _check_text(raw):
    return {"text": _text("text", _field(raw, "text"))}


_CHECKERS = (_check_sft, _check_ranked, _check_preference, _check_unpaired, _check_prompts, _check_text)


_CHECKS = dict(zip(KINDS, _CHECKERS))


def split_rows(rows, fraction, seed):
    """Hold out a share of the rows, split by prompt: no prompt is on both sides. The same seed gives the same split.

    Args:
        fraction: share of the prompts to hold out, in [0, 1). Above 0, at least one prompt is held out and one kept.
    Returns:
        (train, held_out), both in the order of `rows`.
    Raises:
        ValueError: fraction outside [0, 1), or all rows share one prompt.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction: got {fraction}, wants a number in [0, 1)")
    if fraction == 0:
        return list(rows), []
    keys = [json.dumps(row.get("prompt", row.get("text")), sort_keys=True) for row in rows]
    prompts = sorted(set(keys))
    if len(prompts) < 2:
        raise ValueError(f"rows: got {len(prompts)} distinct prompt, wants at least 2 to hold one out")
    random.Random(seed).shuffle(prompts)
    held = set(prompts[: min(max(round(fraction * len(prompts)), 1), len(prompts) - 1)])
    pairs = list(zip(rows, keys))
    return [row for row, key in pairs if key not in held], [row for row, key in pairs if key in held]
