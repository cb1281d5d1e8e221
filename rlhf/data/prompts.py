"""Prompts that must fit into some room before a response is sampled: PPO, best-of-n, evaluation."""

import logging
from bisect import bisect_left

from .chat import encode_prompt
from .encoding import TooLong, fit_prompt
from .files import Bad, DataError
from .messages import BEFORE_TURNS, Chat
from .problems import Problems

logger = logging.getLogger("rlhf")


def encode_prompts(tokenizer, prompts, places=None, *, room=None, long_prompts="truncate", bad_rows="error"):
    """(prompts, their ids) of prompts made to fit into `room` tokens; how many were cut or dropped is told.

    Args:
        places: where each comes from, for messages; None: its number.
        room, long_prompts: as in `encode_within`.
        bad_rows: "skip" leaves out what the chat template refuses.
    Raises:
        DataError: all prompts that cannot be used, by place; or none is left.
    """
    if long_prompts not in ("truncate", "drop", "error"):
        raise ValueError(f"long_prompts: got {long_prompts!r}, wants truncate, drop or error")
    places = places or [f"prompts[{index}]" for index in range(len(prompts))]
    problems, too_long, kept, found, cut = Problems(bad_rows), Problems("error"), [], [], 0
    way = "drop" if long_prompts == "error" else long_prompts
    for prompt, at in zip(prompts, places, strict=True):
        try:
            prompt, ids, is_cut = encode_within(tokenizer, prompt, room, way)
        except TooLong as error:
            too_long.add(at, error)
            continue
        except (Bad, DataError) as error:
            problems.add(at, error)
            continue
        kept.append(prompt)
        found.append(ids)
        cut += is_cut
    problems.settle(len(prompts))
    if long_prompts == "error" or not kept:
        too_long.settle(len(prompts))
    for count, what in ((cut, "cut"), (len(too_long.found), "dropped")):
        if count:
            logger.warning("long_prompts: %s %d of %d prompts: %d tokens fit", what, count, len(prompts), room)
    return kept, found


def encode_within(tokenizer, prompt, room, long_prompts="truncate"):
    """(prompt, ids, cut): a prompt made to fit into `room` tokens, and whether anything of it was left out.

    Args:
        room: tokens; None = any number.
        long_prompts: "truncate": a chat is left without its oldest turns, system messages and the last question stay;
            where that is too long too, and of a string, the left end of the ids is cut, a leading BOS stays. "drop":
            TooLong; "error": Bad.
    Returns:
        The prompt without the turns that were left out; of a string all of it, and `ids` alone are cut.
    Raises:
        DataError: the template refuses the messages.
        Bad: the prompt gives no tokens, or is too long for `long_prompts`.
    """
    ids = encode_prompt(tokenizer, prompt)
    if not ids:
        raise Bad("the prompt gives no tokens")
    if room is None or len(ids) <= room:
        return prompt, ids, False
    if long_prompts == "truncate" and not isinstance(prompt, str):
        prompt, ids = _without_oldest_turns(tokenizer, prompt, ids, room)
    return prompt, fit_prompt(tokenizer, ids, room, long_prompts), True


def _without_oldest_turns(tokenizer, prompt, ids, room):
    """The prompt from the first of the user's later turns that lets it fit, or from the last one."""
    chat = prompt if isinstance(prompt, Chat) else Chat(prompt)
    lead = next((index for index, message in enumerate(chat) if message["role"] not in BEFORE_TURNS), len(chat))
    later = [index for index, message in enumerate(chat) if message["role"] == "user"][1:]
    if not later:
        return prompt, ids

    def without(count):
        shorter = chat.with_messages(chat[:lead] + chat[later[count] :])
        return shorter, encode_prompt(tokenizer, shorter)

    return without(bisect_left(range(len(later) - 1), True, key=lambda count: len(without(count)[1]) <= room))
