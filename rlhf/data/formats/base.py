"""What a format is, and what its rows have in common: texts, numbers, lists of records, and rankings as other kinds."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..columns import FIELDS, records
from ..files import Bad
from ..messages import BEFORE_TURNS


@dataclass(frozen=True)
class Format:
    """A layout of rows that data sets are published in.

    Args:
        name: as `--data_format` takes it.
        about: one line for people: the data sets, and what stands where.
        kinds: {kind of rows that it holds: what is made of it, or ""}.
        detect: whether a raw row is of this layout, and no other.
        convert: (raw row, kind) -> rows in our fields, none or several; raises Bad.
        group: where rows belong together: the key of a raw row's group. `convert` then takes the list of the group's
            raw rows. None: each row is one of its own.
        over_own: kinds for which the layout says more than the fields of our own that its rows hold too.
        auto: False: only by name.
        aliases: other names that `--data_format` takes.
        left_out: (row, kind) -> the name of a column that may belong to what is learned and is not read, or None: such
            a row is bad where the format is found, and read without it where it is named.
    """

    name: str
    about: str
    kinds: Mapping[str, str]
    detect: Callable
    convert: Callable
    group: Callable | None = None
    over_own: tuple = ()
    auto: bool = True
    aliases: tuple = ()
    left_out: Callable | None = None


def text(raw, name, *, default=None):
    """A string that a row holds; numbers are written out. Missing or null: the default, or Bad if there is none."""
    value = raw.get(name)
    if value is None:
        if default is None:
            raise Bad(f"lacks the column `{name}` (has {', '.join(map(repr, raw)) or 'no columns'})")
        return default
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise Bad(f"`{name}` must be a string, got {type(value).__name__}")
    return str(value)


def number(value):
    """A finite number, or a string that is one; else None."""
    try:
        found = float(value) if not isinstance(value, bool) else None
    except (TypeError, ValueError, OverflowError):
        return None
    if found is None or found != found or abs(found) == float("inf"):
        return None
    return found if isinstance(value, str) else value


def entries(raw, name):
    """A list of dicts that a row holds, also as a dict of lists."""
    value = records(raw.get(name))
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise Bad(f"`{name}` must be a list of objects, got {type(raw.get(name)).__name__}")
    return value


def no_media(raw):
    """Raise Bad for a row that goes with images, sound or films."""
    for name in ("image", "images", "video", "videos", "audio", "audios"):
        if raw.get(name):
            raise Bad(f"goes with `{name}`; only texts can be read")


SYSTEMS = ("system", "system_prompt")


def system_of(raw):
    """What the column of a system prompt holds, or ""."""
    found = (raw.get(name) for name in SYSTEMS)
    return next((value for value in found if isinstance(value, str) and value.strip()), "")


def with_system(turns, system):
    """Messages behind those of a system prompt, if there is one and they do not begin with their own."""
    if not system.strip() or (turns and turns[0].get("role") in BEFORE_TURNS):
        return turns
    return [{"role": "system", "content": system}, *turns]


_BESIDE = (
    "reasoning", "reasoning_content", "thinking", "thought", "thoughts", "rationale", "explanation", "cot",
    "chain_of_thought", "corrected",
)  # fmt: skip


def left_out(*columns):
    """A `left_out`: the columns, and thoughts beside an answer that is learned, where a row holds something there."""

    def find(raw, kind):
        held = [name for name in columns if raw.get(name) not in (None, "", [], {})]
        if kind == "sft":
            held += [name for name in _BESIDE if isinstance(raw.get(name), str) and " " in raw[name].strip()]
        return held[0] if held else None

    return find


def is_text(value):
    return isinstance(value, str)


def is_texts(value):
    """A list of at least one string and nothing else."""
    return isinstance(value, list) and bool(value) and all(isinstance(entry, str) for entry in value)


def is_messages(value, *keys):
    """A list of at least one dict that has the keys, by default those of messages."""
    keys = keys or ("role", "content")
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) and set(keys) <= set(v) for v in value)


def records_with(*keys):
    """Whether a value is a list of dicts (or a dict of lists) that have the keys: for `has`."""
    return lambda value: is_messages(records(value), *keys)


def has(*texts, without=(), **types):
    """A `detect`: the row holds these columns as strings, `types` as their types, and none of `without`."""

    def detect(raw):
        return (
            all(isinstance(raw.get(name), str) for name in texts)
            and all(_is(raw.get(name), wanted) for name, wanted in types.items())
            and not any(name in raw for name in without)
        )

    return detect


def _is(value, wanted):
    if wanted is float:
        return number(value) is not None
    return wanted(value) if not isinstance(wanted, (type, tuple)) else isinstance(value, wanted)


def user(content, system=""):
    """The messages of a question."""
    lead = [{"role": "system", "content": system}] if system and system.strip() else []
    return [*lead, {"role": "user", "content": content}]


def assistant(content):
    """The message of an answer."""
    return {"role": "assistant", "content": content}


def others(raw):
    """The columns of a row that are no fields of ours: what reward functions may read."""
    return {name: value for name, value in raw.items() if name not in FIELDS}


DEMONSTRATION = {"sft": "", "prompts": ""}
RANKING_KINDS = {
    "preference": "the best answer against the worst; none from a row whose answers are all tied",
    "sft": "the best answer",
    "unpaired": "the best answer as good, the worst as bad; none from a row whose answers are all tied",
    "prompts": "",
}
PAIR_KINDS = {"sft": "the chosen answer", "unpaired": "the chosen answer as good, the rejected as bad", "prompts": ""}


def rankings(what):
    """The kinds of a format whose rows rank several answers."""
    return {"ranked": what, **RANKING_KINDS}


def pairs(what):
    """The kinds of a format whose rows say which of two answers is better."""
    return {"ranked": what, "preference": what, **PAIR_KINDS}


def ranking(prompt, answers, *, scores=None, ranks=None, **more):
    """A ranked row. Answers that are empty, or whose score or rank is missing, are left out if two remain."""
    values = [number(value) for value in (ranks if scores is None else scores)]
    if len(values) != len(answers):
        raise Bad(f"holds {len(answers)} answers and {len(values)} ranks or scores")
    kept = [
        index
        for index, (answer, value) in enumerate(zip(answers, values))
        if value is not None and answer is not None and not (isinstance(answer, str) and not answer.strip())
    ]
    if len(kept) < 2:
        raise Bad(f"holds {len(kept)} answers that have a rank or score and are not empty; a ranking needs two")
    name = "ranks" if scores is None else "scores"
    return {
        "prompt": prompt,
        "completions": [answers[index] for index in kept],
        name: [values[index] for index in kept],
        **{field: value for field, value in more.items() if value is not None},
    }


def pair(prompt, chosen, rejected, **more):
    """A ranked row of two answers, the better one first."""
    return ranking(prompt, [chosen, rejected], ranks=[0, 1], **more)


def as_ranking(read):
    """A `convert` of a function that makes a ranked row of a raw row, or None where there is nothing to rank."""

    def convert(raw, kind):
        row = read(raw)
        found = [] if row is None else of_ranking(row, kind)
        return [{**short_columns(raw), **row} for row in found] if kind == "prompts" else found

    return convert


def short_columns(raw):
    """The columns of a row that are no fields of ours and no lists or dicts."""
    return {name: value for name, value in others(raw).items() if not isinstance(value, (list, dict))}


def of_ranking(row, kind):
    """A ranked row as rows of another kind."""
    if kind == "ranked":
        return [row]
    same = {name: row[name] for name in ("prompt", "tools", "chat_template_kwargs") if name in row}
    if kind == "prompts":
        return [same]
    values = row.get("ranks") or [-score for score in row["scores"]]
    best, worst = values.index(min(values)), values.index(max(values))
    answers = row["completions"]
    if kind == "sft":
        return [{**same, "completion": answers[best]}]
    if values[best] == values[worst]:
        return []
    if kind == "preference":
        return [{**same, "chosen": answers[best], "rejected": answers[worst]}]
    return [{**same, "completion": answers[index], "label": index == best} for index in (best, worst)]


def as_demonstration(read):
    """A `convert` of a function that makes an sft row of a raw row."""

    def convert(raw, kind):
        row = read(raw)
        if kind == "prompts":
            row = {name: value for name, value in {**others(raw), **row}.items() if name != "completion"}
        return [row]

    return convert
