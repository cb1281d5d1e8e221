"""The user's data: rows from files, rankings, and both as token ids."""

from .chat import (
    as_text,
    check_chats,
    encode_completion,
    encode_example,
    encode_prompt,
    encode_text,
    end_of_turn_id,
    fit_prompt,
    pad_batch,
)
from .files import DataError
from .messages import Chat
from .rows import KINDS, load_rows, reading, rows_of, split_rows

__all__ = [
    "KINDS",
    "Chat",
    "DataError",
    "as_text",
    "check_chats",
    "encode_completion",
    "encode_example",
    "encode_prompt",
    "encode_text",
    "end_of_turn_id",
    "fit_prompt",
    "load_rows",
    "pad_batch",
    "reading",
    "rows_of",
    "split_rows",
]
