"""The prompts of a PPO run, as token ids."""

from ..data import DataError, encode_prompt, load_rows, reading, rows_of
from ..data.problems import Problems


def load_prompts(args, tokenizer, train_dataset=None, *, columns=False):
    """The rows of the prompts with `prompt_ids` and their `row_number`.

    Args:
        train_dataset: rows in place of those that the settings name.
        columns: True keeps the other fields of a row, for reward functions.
    Raises:
        DataError: prompts that cannot be used, by file and line.
    """
    read = {"columns": columns, **reading(args)}
    if train_dataset is None:
        where = {"split": args.dataset_train_split, "config": args.dataset_config}
        rows = load_rows(args.dataset_name, "prompts", **where, **read)
    else:
        rows = rows_of(train_dataset, "prompts", name="train_dataset", **read)
    found, problems = [], Problems(args.bad_rows)
    for row in rows:
        try:
            ids = encode_prompt(tokenizer, row["prompt"])
        except DataError as error:
            problems.add(row["at"], error)
            continue
        if ids:
            found.append({**row, "prompt_ids": ids, "row_number": len(found)})
        else:
            problems.add(row["at"], "the prompt gives no tokens")
    problems.settle(len(rows))
    return found
