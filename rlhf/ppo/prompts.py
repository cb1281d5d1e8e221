"""The prompts of a PPO run: read, encoded, looked at by the reward functions, and made to fit the networks."""

import logging
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from accelerate.utils import gather_object

from .. import models
from ..data import DataError, encode_prompt, encode_within, load_rows, reading, rows_of
from ..data.encoders import encoded
from ..data.encoding import Encoded
from ..data.files import Bad
from ..data.problems import Problems
from ..data.store import Mapped
from ..rewards import row_checks
from ..rewards.scoring import named, reward_context
from ..training.stage import once

logger = logging.getLogger("rlhf")


class Prompts(Sequence):
    """Rows of the data that the run asks: `prompts[i]` is a row with its `prompt_ids` and, as `row_number`, i.

    Attributes:
        fields: names of all fields of the data.
        lengths: tokens of each prompt.
        tokens: ids of all prompts, one after the other.
    """

    def __init__(self, rows, fields=()):
        self.rows, self.fields, self.sources, self.shorter = rows, tuple(fields), array("q"), {}
        self.tokens, self.lengths, self.starts = array("i"), array("q"), array("q")

    def add(self, source: int, ids: list[int], shorter=None) -> None:
        """Add a row by its number in the data. `shorter` is the prompt to show in place of its own."""
        if shorter is not None:
            self.shorter[len(self)] = shorter
        self.sources.append(source)
        self.starts.append(len(self.tokens))
        self.lengths.append(len(ids))
        self.tokens.extend(ids)

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        row = {**self.rows[self.sources[number]], "prompt_ids": self.ids(number), "row_number": number}
        return {**row, "prompt": self.shorter[number]} if number in self.shorter else row

    def ids(self, number: int) -> list[int]:
        start = self.starts[number]
        return self.tokens[start : start + self.lengths[number]].tolist()

    def only(self, numbers: Iterable[int]) -> "Prompts":
        """Those of these numbers, in order, numbered anew."""
        found = Prompts(self.rows, self.fields)
        for number in numbers:
            found.add(self.sources[number], self.ids(number), self.shorter.get(number))
        return found

    def all_ids(self) -> Iterator[list[int]]:
        return map(self.ids, range(len(self)))


def load_prompts(run, train_dataset) -> Prompts:
    """Read the prompts, encode them, and let the reward functions look at their rows.

    Raises:
        DataError: rows that cannot be used, all of them by place; with `bad_rows` skip they are left out and told.
        ValueError: the data have no column that a reward function reads.
    """
    args = run.args
    read = {"columns": bool(run.reward_functions), **reading(args)}
    if train_dataset is None:
        read |= {"split": args.dataset_train_split, "config": args.dataset_config}
        rows = once(run.accelerator, lambda: load_rows(args.dataset_name, "prompts", **read))
    else:
        rows = once(run.accelerator, lambda: rows_of(train_dataset, "prompts", name="train_dataset", **read))
    arrays, done = once(run.accelerator, lambda: encoded(rows, Alone(run.tokenizer), args, what="prompt"))
    prompts = Prompts(rows, _fields(rows) if run.reward_functions else rows[0])
    for source, start, size in zip(arrays.source.tolist(), arrays.starts.tolist(), arrays.sizes.tolist(), strict=True):
        prompts.add(source, arrays.tokens.read(start, start + size).tolist())
    refused = {**_refused_by_functions(run, rows), **{number: reason for _, reason, number in done["problems"]}}
    problems = Problems(args.bad_rows)
    for number in sorted(refused):
        problems.add(rows[number]["at"], refused[number])
    problems.settle(len(rows))
    return prompts.only(number for number, source in enumerate(prompts.sources) if source not in refused)


@dataclass(frozen=True)
class Alone:
    """The way in which a prompt without a response becomes ids, as `encoders.encoded` takes it."""

    tokenizer: object
    key = "prompt"

    def __call__(self, row):
        return [Encoded(encode_within(self.tokenizer, row["prompt"], None)[1], [], None, cut=False)], None


def _fields(rows) -> dict:
    """The fields of all rows, in the order in which they come."""
    return dict.fromkeys(name for row in rows for name in row)


def _refused_by_functions(run, rows) -> dict[int, str]:
    """{number of a row: why a reward function cannot use it}; each process looks at its share of the rows."""
    functions = named(run.reward_functions)
    found = row_checks.results(functions, Mapped(rows.__getitem__, range(run.rank, len(rows), run.world)))
    if run.world > 1:
        shares, found = gather_object([found]), {name: [None] * len(rows) for name in found}
        for rank, share in enumerate(shares):
            for name, said in share.items():
                found[name][rank :: run.world] = said
    args = run.args
    has_reward_model = bool(args.reward_model_path or args.reward_server) or run.given.reward_model is not None
    return row_checks.unusable(functions, found, rows, has_reward_model=has_reward_model)


def fit_prompts(run, readers: dict) -> None:
    """Make the prompts fit `max_prompt_length`, and the networks beside a response, as `long_prompts` says.

    Args:
        readers: {name: network} of those that read the policy's tokens.
    Raises:
        DataError: prompts that are too long, all of them by place; or none is left.
        ValueError: no prompt has room beside `response_length`.
    """
    args, others = run.args, _too_long_for_own_tokens(run)
    prompts = run.prompts
    room, limit = _room(args, readers)
    too_long = {number: f"the prompt has {n} tokens{limit}" for number, n in enumerate(prompts.lengths) if n > room}
    if args.long_prompts != "truncate":
        too_long = {**others, **too_long}
    elif others:
        logger.warning("long_prompts: the reward model reads %d of %d prompts cut", len(others), len(prompts))
    run.prompt_room = room
    if args.long_prompts == "drop" and 0 < len(too_long) < len(prompts):
        run.prompts = prompts.only(number for number in range(len(prompts)) if number not in too_long)
        logger.warning(
            "long_prompts: dropped %d of %d prompts: at most %d tokens fit", len(too_long), len(prompts), room
        )
    elif args.long_prompts == "truncate":
        _cut(run, too_long, room)
    elif too_long:
        if args.long_prompts == "drop":
            first = f"{prompts[0]['at']}: {too_long[0]}"
            raise DataError(f"long_prompts: drop leaves none of {len(prompts)} prompts, as of {first}")
        problems = Problems("error")
        for number in sorted(too_long):
            problems.add(prompts[number]["at"], too_long[number])
        problems.settle(len(prompts))


def _room(args, readers: dict) -> tuple[int, str]:
    """(tokens that a prompt may have, what a message says of a prompt with more)."""
    room, limit = args.max_prompt_length or sys.maxsize, f", longer than max_prompt_length {args.max_prompt_length}"
    for name, model in readers.items():
        context = models.context_length(model)
        if context and context - args.response_length < room:
            room, reader = (
                context - args.response_length,
                f"the {name}'s context of {context}{models.context_hint(model)}",
            )
            limit = f"; with response_length {args.response_length} it does not fit {reader}"
    if room < 1:
        raise ValueError(f"response_length: got {args.response_length}, which leaves no room for a prompt in {reader}")
    return room, limit


def _too_long_for_own_tokens(run) -> dict[int, str]:
    """The same of a reward model that reads other tokens; prompts that its template refuses are told, or left out."""
    own, length, found, refused = run.own_tokens, run.args.response_length, {}, Problems(run.args.bad_rows)
    if own is None:
        return found
    context, kept = reward_context(run), []
    for number, row in enumerate(run.prompts):
        try:
            count = len(encode_prompt(own.tokenizer, row["prompt"]))
        except DataError as error:
            refused.add(row["at"], f"of the reward model's tokenizer: {error}")
            continue
        if context and count + length > context:
            has = f"the prompt has {count} tokens of the reward model"
            found[len(kept)] = f"{has}; with response_length {length} it does not fit its context of {context}"
        kept.append(number)
    refused.settle(len(run.prompts))
    run.prompts = run.prompts.only(kept)
    return found


def _cut(run, too_long, room: int) -> None:
    """Cut the prompts of these numbers."""
    prompts, problems = run.prompts, Problems(run.args.bad_rows)
    if not too_long:
        return
    run.prompts = Prompts(prompts.rows, prompts.fields)
    for number, source in enumerate(prompts.sources):
        if number not in too_long:
            run.prompts.add(source, prompts.ids(number))
            continue
        row = prompts[number]
        try:
            prompt, ids, _ = encode_within(run.tokenizer, row["prompt"], room)
            run.prompts.add(source, ids, None if prompt is row["prompt"] else prompt)
        except (Bad, DataError) as error:
            problems.add(row["at"], error)
    problems.settle(len(prompts))
    logger.warning("long_prompts: cut %d of %d prompts to the %d tokens that fit", len(too_long), len(prompts), room)
