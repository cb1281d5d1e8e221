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
from .encoding import Encoded, TooLong, encode_row, fit_prompt
from .files import DataError
from .messages import Chat
from .prompts import encode_within
from .rows import KINDS, load_rows, plain, reading, rows_of, split_rows
from .sampled import answer_of, encode_sampled
from .templates import with_chat_template

__all__ = [
    "KINDS",
    "Chat",
    "DataError",
    "Encoded",
    "TooLong",
    "answer_of",
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
    "plain",
    "reading",
    "rows_of",
    "split_rows",
    "with_chat_template",
]
