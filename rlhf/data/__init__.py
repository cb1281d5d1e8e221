"""The user's data: rows from files, rankings, and both as token ids."""

from .chat import (
    as_text,
    encode_completion,
    encode_prompt,
    encode_text,
    end_of_turn_id,
    end_of_turn_ids,
    pad_batch,
)
from .checks import check_chats
from .encoding import Encoded, TooLong, encode_row, encode_sampled, fit_prompt
from .files import DataError
from .messages import Chat
from .prompts import encode_within
from .rows import KINDS, load_rows, reading, rows_of, split_rows
from .templates import with_chat_template

__all__ = [
    "KINDS",
    "Chat",
    "DataError",
    "Encoded",
    "TooLong",
    "as_text",
    "check_chats",
    "encode_completion",
    "encode_prompt",
    "encode_row",
    "encode_sampled",
    "encode_text",
    "encode_within",
    "end_of_turn_id",
    "end_of_turn_ids",
    "fit_prompt",
    "load_rows",
    "pad_batch",
    "reading",
    "rows_of",
    "split_rows",
    "with_chat_template",
]
