"""Prompts that must fit into some room before a response is sampled: PPO, best-of-n, evaluation."""

from bisect import bisect_left

from .chat import encode_prompt
from .encoding import BEFORE_TURNS, fit_prompt
from .files import Bad
from .messages import Chat


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
