"""The pretraining texts of PPO-ptx: all of them as ids, or a stream of files that are read as they are needed."""

import random
from collections import deque
from dataclasses import dataclass
from itertools import islice

from ..data import DataError, encode_prompt, load_rows
from ..data.encoders import encoded
from ..data.encoding import Encoded
from ..data.streaming import shuffled, stream_identity, stream_rows
from ..same_run import digest
from .state import Cursor


def pretraining_texts(args, tokenizer):
    """The texts that a run's settings name; None without gamma."""
    if not args.ptx_coef:
        return None
    return (StreamedTexts if args.ptx_streaming else Texts)(args, tokenizer)


def pieces_of(text, tokenizer, length):
    """The ids of a text and its end, in pieces of at most `length` and at least 2."""
    ids = [*encode_prompt(tokenizer, text), tokenizer.eos_token_id]
    pieces = (ids[start : start + length] for start in range(0, len(ids), length))
    return [piece for piece in pieces if len(piece) > 1]


@dataclass(frozen=True)
class Pieces:
    """The way in which a text becomes pieces of ids, as `encoders.encoded` takes it."""

    tokenizer: object
    length: int

    def __call__(self, row):
        found = pieces_of(row["text"], self.tokenizer, self.length)
        return [Encoded(piece, [], None, cut=False) for piece in found], None

    @property
    def key(self):
        return ["pieces", self.length]


class Texts:
    """All texts as ids, in a fresh order each epoch: four bytes a token, of large data in a file."""

    def __init__(self, args, tokenizer):
        rows = load_rows(args.ptx_dataset_name, "text", bad_rows=args.bad_rows, num_proc=args.dataset_num_proc)
        self.arrays, _ = encoded(rows, Pieces(tokenizer, args.ptx_max_length), args, what="text")
        if not len(self):
            raise _no_text(args)
        self.longest = int(self.arrays.sizes.max())
        self.cursor = Cursor(len(self), args.seed + 1)

    def __len__(self):
        return len(self.arrays.sizes)

    def _piece(self, index):
        start = self.arrays.starts[index]
        return self.arrays.tokens.read(start, start + self.arrays.sizes[index]).tolist()

    def digest(self) -> str:
        return digest(map(self._piece, range(len(self))))

    def state(self) -> dict:
        return self.cursor.state()

    def load(self, state: dict) -> None:
        self.cursor.load(state)

    def take(self, count: int) -> list[list[int]]:
        """Return the next texts as ids."""
        return [self._piece(i) for i in self.cursor.take(count)]


class StreamedTexts:
    """Texts read from files as they are needed, and again when the files end; a text is drawn from a buffer of them.

    The order depends on the seed and the epoch alone. The state counts the texts that have been drawn: a resumed
    stream reads and skips them.
    """

    def __init__(self, args, tokenizer):
        self.args, self.tokenizer, self.longest = args, tokenizer, args.ptx_max_length
        next(stream_rows(args.ptx_dataset_name, "text", bad_rows=args.bad_rows, tell=True), None)  # can it be read?
        self._start(0)

    def digest(self) -> str:
        return digest(stream_identity(self.args.ptx_dataset_name))

    def state(self) -> dict:
        """The epoch, how many of its texts are drawn, and how many pieces of the last of them are used."""
        return {"epoch": self.epoch, "texts": self.drawn, "pieces": self.used}

    def load(self, state: dict) -> None:
        self._start(state["epoch"], skipped=max(state["texts"] - 1, 0))
        if state["texts"]:
            self._draw()
        self.take(state["pieces"])

    def _start(self, epoch, skipped=0):
        rows = stream_rows(self.args.ptx_dataset_name, "text", bad_rows=self.args.bad_rows)
        generator = random.Random(self.args.seed * 1_000_003 + epoch)
        drawn = shuffled((row["text"] for row in rows), self.args.ptx_shuffle_buffer, generator)
        self.texts, self.left = islice(drawn, skipped, None), deque()
        self.epoch, self.drawn, self.used, self.fruitless = epoch, skipped, 0, not skipped

    def _draw(self) -> bool:
        text = next(self.texts, None)
        if text is None:
            return False
        self.left.extend(pieces_of(text, self.tokenizer, self.args.ptx_max_length))
        self.drawn, self.used = self.drawn + 1, 0
        return True

    def take(self, count: int) -> list[list[int]]:
        """Return the next texts as ids; an epoch's texts all come before any of the next epoch."""
        taken = []
        while len(taken) < count:
            if self.left:
                taken.append(self.left.popleft())
                self.used, self.fruitless = self.used + 1, False
            elif not self._draw():
                if self.fruitless:
                    raise _no_text(self.args)
                self._start(self.epoch + 1)
        return taken


def _no_text(args):
    return DataError(f"{args.ptx_dataset_name}: holds no text of two tokens")
