"""`rlhf data`: what a data set holds, as a stage would read it; and its rows written in our own fields."""

import contextlib
import logging
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy

from .. import data
from ..data import formats, kinds, rankings, rows, store
from ..data.chunks import Bad
from ..data.encoders import encode_rows
from ..data.mixtures import named_sets
from ..data.prompts import encode_prompts
from ..data.showing import MARKS, marked, printable, shortened
from ..data.sources import files_of
from ..disk import json_bytes, prepare_output_file, write_parts
from ..ranges import at_least, check_arguments
from ..settings import ToolParser

COMMANDS = {
    "ranked": "rlhf reward", "preference": "rlhf dpo", "unpaired": "rlhf kto", "sft": "rlhf sft", "prompts": "rlhf ppo",
    "text": "rlhf ppo --ptx_dataset_name",
}  # fmt: skip
ANSWERS = {"ranked": ("completions",), "preference": ("chosen", "rejected")}
"""Fields that hold the answers of a kind of rows; of others `completion`."""
WIDTH, BINS, BAR, LISTED, SHOWN = 10, 8, 40, 8, 3000
"""Of the labels; classes and longest bar of a histogram; labelers that are named; characters of the example."""
WHOLE = 2**31 - 1
"""A max_length that cuts nothing."""


def main(argv=None) -> int:
    """Print the report; returns 0, or 1 where rows cannot be used and `--bad_rows skip` does not leave them out."""
    parser = ToolParser(prog="rlhf data", description="What a data set holds, as a stage would read it.")
    parser.add_argument("file", nargs="?", help="file, pattern, folder, or a name that the package datasets knows")
    parser.add_argument("--kind", choices=rows.KINDS, help="read it as this; default: the kind that says most")
    parser.add_argument("--model_name_or_path", help="count tokens, and render the example, as this model reads them")
    parser.add_argument("--chat_template", help="for a model without one: chatml, or a file with one")
    parser.add_argument("--trust_remote_code", action="store_true", help="let the model's folder run code of its own")
    parser.add_argument("--columns", help="which columns hold what: prompt=instruction+input,completion=output")
    parser.add_argument("--data_format", default="auto", help="how a published set is read; see --formats")
    parser.add_argument(
        "--bad_rows", choices=("error", "skip"), default="error", help="what a stage shall do with them"
    )
    parser.add_argument("--split", default="train", help="of a folder or of a name")
    parser.add_argument("--dataset_config", help="configuration of a folder or of a name")
    parser.add_argument("--max_length", type=int, help="tell what does not fit into so many tokens")
    parser.add_argument("--learn_turns", choices=("all", "last"), default="all", help="as in rlhf sft")
    parser.add_argument("--write", metavar="FILE", help="write the rows in our own fields, as .jsonl or .jsonl.gz")
    parser.add_argument("--overwrite", action="store_true", help="let --write replace a file")
    parser.add_argument("--formats", action="store_true", help="list the published formats that are known, and stop")
    args = parser.parse_args(argv)
    if args.formats:
        print("\n".join(map(described, formats.FORMATS.values())))
        return 0
    if args.file is None:
        parser.error("wants a file, a folder or the name of a data set (or --formats)")
    check_arguments({"max_length": (int | None, at_least(2))}, vars(args))
    for name in ("max_length", "chat_template"):
        if getattr(args, name) and not args.model_name_or_path:
            parser.error(f"--{name} is about tokens, so it needs --model_name_or_path")
    output = output_file(args) if args.write else None
    with noted() as told:
        found = Survey(args, told)
        print(printable("\n".join(found.report())))
    if found.bad and args.bad_rows == "error":
        return 1
    if output:
        write_parts(output, packed(map(line_of, found.rows), output))
        print(f"wrote {len(found.rows)} rows: {COMMANDS[found.kind]} --dataset_name {output}")
    return 0


def described(format) -> str:
    """A format for people: its names, what it is, the kinds of rows that it gives."""
    gives = ", ".join(kind for kind in rows.KINDS if kind in format.kinds)
    return f"{', '.join((format.name, *format.aliases))}\n    {format.about}\n    gives {gives}"


def output_file(args) -> Path:
    """Where --write goes.

    Raises:
        ValueError: it is there already, is what is read, or cannot be written.
    """
    path = prepare_output_file(args.write, "write")
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"write: got {args.write}, wants a name that ends with .jsonl or .jsonl.gz")
    read = [file for name, _ in named_sets(args.file) for file in files_of(name, args.split, args.dataset_config) or ()]
    if any(path.resolve() == Path(file).resolve() for file in read):
        raise ValueError(f"write: {args.write} is the file that is read; give another one")
    if path.exists() and not args.overwrite:
        raise ValueError(f"write: {args.write} is there already; --overwrite replaces it")
    return path


def line_of(row) -> bytes:
    return json_bytes(rows.plain(row))


def packed(parts, path):
    """The parts as gzip for a path that ends with .gz, else as they are."""
    if path.suffix != ".gz":
        yield from parts
        return
    packer = zlib.compressobj(wbits=31)
    for part in parts:
        yield packer.compress(part)
    yield packer.flush()


@contextlib.contextmanager
def noted():
    """Collects what is told while rows are read: a list of log records."""
    logger, records = logging.getLogger("rlhf"), []
    handler = logging.Handler()
    handler.emit = records.append
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield records
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def bad_rows(told) -> int:
    """How many rows were left out, by what was told."""
    return sum(getattr(record, "bad_rows", 0) for record in told)


class Survey:
    """A data set, read.

    Attributes:
        kind, others: what it is read as, and what else it could be.
        rows: those that could be read.
        unread, bad: how many could not, and how many of all cannot be used, as a chat template refuses some more.
        measured: (label, unit, sizes) of prompts and answers.
        notes: what was told on the way.
    """

    def __init__(self, args, told):
        self.args = args
        self.sets = kinds.first_rows(args.file, args.split, args.dataset_config)
        fitting = kinds.fitting(self.sets, args.columns, args.data_format)
        if not (args.kind or fitting):
            raise data.DataError(
                f"{args.file}: is in no known format (columns: {columns_of(self.sets[0].raws)}); say with --columns "
                "what they hold (prompt=...,completion=...), or with --kind how to read it"
            )
        self.kind = args.kind or next(iter(fitting))
        self.others = [kind for kind, usable in fitting.items() if usable and kind != self.kind]
        self.rows = data.load_rows(
            args.file, self.kind, split=args.split, config=args.dataset_config, columns=self.kind == "prompts",
            column_map=args.columns, data_format=args.data_format, bad_rows="skip",
        )  # fmt: skip
        self.unread = bad_rows(told)
        self.tokenizer = load_tokenizer(args) if args.model_name_or_path else None
        self.measured = list(self.sizes())
        self.bad = bad_rows(told)
        self.notes = [record.getMessage() for record in told if ": read as the format" not in record.getMessage()]
        if args.max_length:
            told.clear()
            with contextlib.suppress(ValueError):  # that no row is left; it is told too
                self.prompt_tokens(args.max_length) if self.kind == "prompts" else self.encoded(args.max_length)
            self.notes += [record.getMessage() for record in told if not hasattr(record, "bad_rows")]

    def report(self):
        """The lines of the report."""
        also = ", ".join(f"{kind} by {COMMANDS[kind]}" for kind in self.others)
        yield self.args.file
        yield from said("read as", f"{self.kind}, by {COMMANDS[self.kind]}" + (f" (also: {also})" if also else ""))
        for name, raws, _ in self.sets:
            if len(self.sets) > 1:
                yield from said("set", name)
            made = formats.conversion(self.kind, self.args.columns, self.args.data_format, raws)
            own = "--columns" if self.args.columns else "our own fields"
            yield from said("format", f"{made.name or own}{f' ({made.note})' if made.note else ''}")
            yield from said("columns", columns_of(raws))
        refused = f", {self.bad} of them cannot be used: a stage stops there, or leaves them out (--bad_rows skip)"
        yield from said("rows", f"{len(self.rows) + self.unread}{refused if self.bad else ''}")
        for note in self.notes:
            yield from said("", *note.splitlines())
        yield from self.facts()
        for label, unit, sizes in self.measured:
            yield from said(label, *histogram(sizes, unit))
        learned = "" if self.kind == "prompts" else f"; {MARKS[0]}what is learned{MARKS[1]}"
        row, example = next(self.examples(), (self.rows[0], []))
        yield from said("example", f"{row['at']}{learned}", *example)

    def facts(self):
        """What the rows say beside their texts, and how often they say the same."""
        if self.kind == "ranked":
            yield from said("answers", answers_of(self.rows))
        if self.kind == "unpaired":
            desired = sum(row["label"] for row in self.rows)
            yield from said("labels", f"{desired} desired, {len(self.rows) - desired} not")
        for name in rankings.OPTIONAL:
            held = [row[name] for row in self.rows if name in row]
            if held:
                by = Counter(held) if name == "labeler" else {}
                most = ", ".join(f"{who} ({count})" for who, count in sorted(by.items(), key=lambda x: -x[1])[:LISTED])
                of = f", of {len(by)} labelers: {most}{', ...' if len(by) > LISTED else ''}" if by else ""
                yield from said(name, f"in {len(held)} rows{of}")
        yield from said("duplicates", duplicates_of(self.rows))

    def sizes(self):
        """(label, unit, sizes) of the prompts and of the answers."""
        if self.tokenizer is None:
            texts, unit = [texts_of(row, self.kind) for row in self.rows], "characters"
            prompts, answers = ([len(text) for both in texts for text in both[side]] for side in (0, 1))
        elif self.kind == "prompts":
            prompts, answers, unit = self.prompt_tokens(), [], "tokens"
        else:
            examples, unit = self.encoded(WHOLE), "tokens"
            first = examples.arrays.first
            prompts = examples.prompt_lengths[~examples.is_text]
            answers = numpy.delete(examples.arrays.sizes, first[:-1])
            answers = answers + numpy.repeat(
                examples.is_text, numpy.diff(first) - 1
            )  # a text's first token is a prompt
        for label, sizes in (("prompts", prompts), ("texts" if self.kind == "text" else "answers", answers)):
            if len(sizes):
                yield label, unit, numpy.asarray(sizes)

    def encoded(self, max_length):
        """The rows as examples; rows that the template refuses are told."""
        settings = SimpleNamespace(
            max_length=max_length, long_prompts="truncate", learn_turns=self.args.learn_turns, bad_rows="skip"
        )
        names = ANSWERS.get(self.kind, ("completion",))
        return encode_rows(self.tokenizer, self.rows, names, settings, what=self.kind)

    def prompt_tokens(self, room=None):
        prompts, places = [row["prompt"] for row in self.rows], [row["at"] for row in self.rows]
        _, found = encode_prompts(self.tokenizer, prompts, places, room=room, bad_rows="skip")
        return list(map(len, found))

    def examples(self):
        """(row, lines) of the rows that the chat template does not refuse."""
        for row in self.rows:
            with contextlib.suppress(data.DataError, Bad):
                yield row, self.example(row)

    def example(self, row):
        """Lines of a row, the learned part in marks."""
        if self.kind == "prompts" and self.tokenizer:
            ids = data.encode_prompt(self.tokenizer, row["prompt"])
            return shortened(self.tokenizer.decode(ids), SHOWN).split("\n")
        if self.tokenizer is None:
            answers = (
                [row["text"]] if "text" in row else () if self.kind == "prompts" else answers_of_row(row, self.kind)
            )
            prompt = [data.as_text(row["prompt"])] if "prompt" in row else []
            text = "\n".join([*prompt, *(marked_turns(answer, self.args.learn_turns) for answer in answers)])
            return shortened(text, SHOWN).split("\n")
        names = ANSWERS.get(self.kind, ("completion",))
        found = data.encode_row(self.tokenizer, row, names, max_length=WHOLE, learn_turns=self.args.learn_turns)
        parts = [marked(self.tokenizer, each.prompt, each.responses, each.learned) for each in found]
        return shortened("\n".join(parts), SHOWN).split("\n")


def said(label, *lines):
    """Lines of the report: the label before the first one."""
    return [f"  {label if number == 0 else '':<{WIDTH}} {line}".rstrip() for number, line in enumerate(lines)]


def columns_of(raws) -> str:
    """Names and types of the columns of raw rows."""
    found = {}
    for raw in raws:
        for name, value in raw.items() if isinstance(raw, dict) else ():
            found.setdefault(name, {})[type_of(value)] = True
    return ", ".join(f"{name} ({' or '.join(types)})" for name, types in found.items()) or "none"


def type_of(value) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(map(str, value)) + "}"
    if isinstance(value, list):
        inner = dict.fromkeys(map(type_of, value))
        return f"list of {' or '.join(inner)}" if inner else "empty list"
    names = {str: "text", bool: "true or false", int: "number", float: "number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def answers_of(ranked) -> str:
    """K, ties and pairs of rankings."""
    counts = Counter(len(row["ranks"]) for row in ranked)
    each = ", ".join(f"{count} in {rows} rows" for count, rows in sorted(counts.items()))
    tied = sum(len(set(row["ranks"])) < len(row["ranks"]) for row in ranked)
    nothing = sum(len(set(row["ranks"])) == 1 for row in ranked)
    pairs = sum(len(rankings.decided_pairs(row["ranks"])) for row in ranked)
    return f"{each}; ties in {tied}, all tied in {nothing}; {pairs} decided pairs"


def duplicates_of(found) -> str:
    """How many rows repeat another one's prompt, or all that it says."""
    prompts, whole = repeated(store.digests_of(found)), repeated(store.contents_of(found))
    return f"{prompts} rows repeat a prompt, {whole} the whole row" if "prompt" in found[0] else f"{whole} rows"


def repeated(digests) -> int:
    """How many of the digests an earlier row has too."""
    return len(digests) - len(set(map(bytes, digests)))


def answers_of_row(row, kind):
    return row["completions"] if kind == "ranked" else [row[name] for name in ANSWERS.get(kind, ("completion",))]


def texts_of(row, kind):
    """([prompt], [answers]) of a row as text for people; a plain text is an answer."""
    if "text" in row:
        return [], [row["text"]]
    if kind == "prompts":
        return [data.as_text(row["prompt"], roles=False)], []
    answers = answers_of_row(row, kind)
    return [data.as_text(row["prompt"], roles=False)], [data.as_text(answer, roles=False) for answer in answers]


def marked_turns(answer, learn_turns):
    """An answer as text for people, in marks what is learned of it: of messages the assistant's turns."""
    if isinstance(answer, str) or len(answer) == 1:
        return f"{MARKS[0]}{data.as_text(answer)}{MARKS[1]}"
    said = [number for number, message in enumerate(answer) if message["role"] == "assistant"]
    said = said[-1:] if learn_turns == "last" else said
    learned = {number for number in said if answer[number].get("weight", 1)}
    texts = [data.as_text([message]) for message in answer]
    texts = [f"{MARKS[0]}{text}{MARKS[1]}" if number in learned else text for number, text in enumerate(texts)]
    return "\n".join(f"{message['role']}: {text}" for message, text in zip(answer, texts))


def histogram(sizes, unit):
    """Lines: the range of sizes, and how many lie in each of a few classes; the last one is open."""
    ordered = numpy.sort(sizes)
    least, middle, high, most = (int(ordered[round(share * (len(ordered) - 1))]) for share in (0, 0.5, 0.95, 1))
    yield f"{len(ordered)}; {unit}: least {least}, median {middle}, 95 % up to {high}, most {most}"
    wanted = max(1, -(-(high + 1 - least) // BINS))
    width = next(step for power in range(20) for step in (10**power, 2 * 10**power, 5 * 10**power) if step >= wanted)
    edges = [*range(least // width * width, high + 1, width)]
    counts = numpy.histogram(ordered, [*edges, most + 1])[0]
    for number, (low, count) in enumerate(zip(edges, counts.tolist())):
        end = low + width - 1 if number + 1 < len(edges) else most
        bar = "#" * -(-BAR * count // len(ordered))
        yield f"{f'{low} to {end}' if end > low else low:>16}  {bar} {count}"


def load_tokenizer(args):
    from .. import models

    options = {"chat_template": args.chat_template, "trust_remote_code": args.trust_remote_code}
    return models.load_tokenizer(args.model_name_or_path, **options)
