"""Prompts, completions and chats as token ids. All stages encode here, so all see the same ids.

A prompt and a completion are tokenised apart and joined as ids, so the ids that trained the reward model are the ids
that the policy samples.
"""

import contextlib

from .files import DataError


def encode_prompt(tokenizer, prompt, at=None):
    """Token ids of a prompt: a string, or a list of messages rendered with the tokenizer's chat template.

    BOS comes first if and only if the tokenizer puts it there by itself; an EOS that the tokenizer adds is taken off.

    Args:
        at: where the prompt comes from ("file:line"), for messages.
    Raises:
        DataError: messages without a chat template, or messages that it refuses.
    """
    if not isinstance(prompt, str):
        at = f"{at}: " if at else ""
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"{at}prompt: got a list of messages, but the tokenizer has no chat template; give a string"
            )
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        try:
            return list(tokenizer.apply_chat_template(prompt, **options))
        except Exception as error:  # a template is a program: whatever it raises is about these messages
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"{at}the tokenizer's chat template refuses the messages: {reason}") from error
    ids = list(tokenizer(prompt, verbose=False).input_ids)
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
        ids.pop()
    return ids


def encode_completion(tokenizer, completion, *, eos=True):
    """Token ids of a completion as it stands: nothing is put before it, and the end token comes once, at the end.

    Args:
        completion: a string, or a list of one assistant message; the latter ends with the chat template's end of turn.
        eos: True adds the end token unless the ids already end with it; False leaves it off.
    """
    is_chat = not isinstance(completion, str)
    text = completion[0]["content"] if is_chat else completion
    ids = _encode_continuation(tokenizer, text)
    if eos:
        end = end_of_turn_id(tokenizer) if is_chat else None
        end = tokenizer.eos_token_id if end is None else end
        if not ids or ids[-1] != end:
            ids.append(end)
    return ids


def _encode_continuation(tokenizer, text):
    """Ids of text that goes on from something. Some tokenizers put a space before any string: then encode it after a
    line break, and take the line break off again."""

    def encode(string):
        return list(tokenizer(string, add_special_tokens=False, verbose=False).input_ids)

    anchor = encode("\n")
    puts_space = len(anchor) > 1 and encode("\n\n")[: len(anchor)] == anchor
    joined = encode("\n" + text) if puts_space else []
    return joined[len(anchor) :] if joined and joined[: len(anchor)] == anchor else encode(text)


def end_of_turn_id(tokenizer):
    """The token that closes an assistant's turn in the tokenizer's chat template, or None where there is no such."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = ""
    for system in ([], [{"role": "system", "content": "c"}]):  # which some templates want
        with contextlib.suppress(Exception):  # a template is a program: whatever it raises is about these messages
            text = text or tokenizer.apply_chat_template(system + turn, tokenize=False)
    if "b" not in text:
        return None
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    tail = tokenizer(text[text.rindex("b") + 1 :], add_special_tokens=False).input_ids
    return next((token for token in tail if token in special), None)


def encode_example(tokenizer, row, *, max_length, long_prompts="truncate"):
    """Token ids and labels of one row: the loss counts the completion (and its EOS), not the prompt.

    Args:
        row: {"prompt", "completion"} or {"text"}, of `load_rows`.
        max_length: tokens; what the row may fill.
        long_prompts: "truncate" cuts a too long prompt at its left end (a leading BOS stays); "error" raises.
    Returns:
        {"input_ids": list of int, "labels": list of int with -100 on the prompt}. The last label is the end token.
    Raises:
        ValueError: completion, EOS and one prompt token do not fit into max_length; a long prompt under "error".
    """
    at = f"{row['at']}: " if "at" in row else ""
    is_text = "text" in row
    answer = encode_text(tokenizer, row["text"]) if is_text else encode_completion(tokenizer, row["completion"])
    room = max_length - len(answer)
    if room < (0 if is_text else 1):
        raise ValueError(f"{at}the text to learn fills {len(answer)} tokens, too many for max_length {max_length}")
    prompt_ids = [] if is_text else encode_prompt(tokenizer, row["prompt"], row.get("at"))
    prompt = [] if is_text else fit_prompt(tokenizer, prompt_ids, room, long_prompts, at)
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def check_chats(tokenizer, rows):
    """Raise DataError for the first row whose prompt is a list of messages that the chat template refuses."""
    for row in rows:
        if not isinstance(row.get("prompt", ""), str):
            encode_prompt(tokenizer, row["prompt"], row.get("at"))


def as_text(text):
    """A prompt or completion as one string, for people: messages are joined by line breaks."""
    return text if isinstance(text, str) else "\n".join(message["content"] for message in text)


def encode_text(tokenizer, text):
    """Token ids of a whole text: as a prompt, and EOS once at the end."""
    ids = encode_prompt(tokenizer, text)
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def fit_prompt(tokenizer, prompt_ids, room, long_prompts="truncate", at=""):
    """Make a prompt fit into `room` tokens by cutting its left end; a leading BOS stays."""
    if len(prompt_ids) <= room:
        return prompt_ids
    if long_prompts == "error":
        raise ValueError(f"{at}the prompt has {len(prompt_ids)} tokens, longer than the {room} that fit")
    if prompt_ids[0] == tokenizer.bos_token_id and room > 1:
        return [prompt_ids[0], *prompt_ids[len(prompt_ids) - room + 1 :]]
    return prompt_ids[len(prompt_ids) - room :]


def pad_batch(sequences, pad_id, side="right"):
    """Pad lists of ids to the longest: (input_ids [B, T] int64, attention_mask [B, T] bool, True = token)."""
    import torch

    if side not in ("left", "right"):
        raise ValueError(f"side: got {side!r}, wants 'left' or 'right'")
    width = max((len(ids) for ids in sequences), default=0)
    input_ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(sequences), width), dtype=torch.bool)
    for row, ids in enumerate(sequences):
        span = slice(0, len(ids)) if side == "right" else slice(width - len(ids), width)
        input_ids[row, span] = torch.tensor(ids, dtype=torch.long)
        mask[row, span] = True
    return input_ids, mask
