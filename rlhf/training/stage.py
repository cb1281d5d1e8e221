"""What a stage starts from: its rows, its tokenizer and the lengths that its model can read."""

from pathlib import Path

import torch
from accelerate.utils import gather_object

from .. import data, models
from ..data import parallel
from ..data.showing import MARKS, marked, show, warn_of_template
from ..errors import RunError

DEFAULT_CONTEXT = 1024


def once(state, make):
    """`make()` on one process of each machine, and then on the others, which find in the cache what it left there.

    All processes must call; an error of one of them is an error of all.

    Args:
        state: a `PartialState` or an `Accelerator`.
    Raises:
        RunError: it failed on another process.
    """
    if state.num_processes == 1:
        return make()
    found = error = None
    for is_first in (True, False):
        if state.is_local_main_process is is_first:
            try:
                with parallel.others_wait(is_first):
                    found = make()
            except Exception as raised:
                error = raised
        told = gather_object([error and (" ".join(str(error).split()) or type(error).__name__)])
        if error is not None:
            raise error
        for process, reason in enumerate(told):
            if reason:
                raise RunError(f"process {process}: {reason}")
    return found


def load_data(args, kind, train_dataset=None, eval_dataset=None):
    """(train, held-out) rows of the stage, all checked; the held-out side is empty if eval_fraction is 0.

    Args:
        train_dataset, eval_dataset: rows that are in memory (or files) in place of those that the settings name.
    """
    if train_dataset is None and not args.dataset_name:
        raise ValueError(
            "dataset_name: got none, wants the data to train on (--dataset_name FILE, or in Python train_dataset)"
        )
    return once(args.distributed_state, lambda: _load(args, kind, train_dataset, eval_dataset))


def _load(args, kind, train_dataset, eval_dataset):
    read = data.reading(args)
    options = {"config": args.dataset_config, **read}
    if train_dataset is None:
        rows = data.load_rows(args.dataset_name, kind, split=args.dataset_train_split, **options)
    else:
        rows = data.rows_of(train_dataset, kind, name="train_dataset", **read)
    if eval_dataset is not None:
        return rows, data.rows_of(eval_dataset, kind, name="eval_dataset", **read)
    if args.eval_dataset_name:
        return rows, data.load_rows(args.eval_dataset_name, kind, split=args.dataset_test_split, **options)
    try:
        return data.split_rows(rows, args.eval_fraction, args.seed)
    except ValueError as error:
        hint = "; 0 holds none out, eval_dataset_name (in Python eval_dataset) brings others"
        raise ValueError(f"eval_fraction: got {args.eval_fraction}, but {error}{hint}") from None


def load_stage_tokenizer(args, processing_class=None):
    """The tokenizer of the run: the one given, else that of its model's folder; with what the run names for it."""
    tokens = {"pad_token": args.pad_token, "eos_token": args.eos_token, "chat_template": args.chat_template}
    if processing_class is not None and not isinstance(processing_class, (str, Path)):
        return models.with_tokens(processing_class, "processing_class", **tokens)
    path = processing_class or args.model_name_or_path
    return models.load_tokenizer(path, trust_remote_code=args.trust_remote_code, **tokens)


def make_room(args, networks, tokenizer, *, adapters):
    """Room for the tokens that args.chat_template brought, in those of `networks` that are models."""
    for network in networks if args.chat_template else ():
        if isinstance(network, torch.nn.Module):
            models.make_room(network, tokenizer, args.seed, adapters=adapters)


def model_options(args):
    names = ("dtype", "attn_implementation", "trust_remote_code")
    return {name: getattr(args, name) for name in names}


def set_max_length(args, model):
    """Fill in max_length from the model's context, or check that it fits there."""
    context = models.context_length(model)
    if args.max_length is None:
        args.max_length = min(context or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    elif args.max_length < 2 or (context and args.max_length > context):
        hint = models.context_hint(model)
        raise ValueError(f"max_length: got {args.max_length}, wants 2 to {context}, the model's context{hint}")
    return args.max_length


def show_example(args, tokenizer, examples):
    """Print an example of the run's data as the model reads it, and tell what its chat template does to the rows."""
    if args.process_index or not len(examples):
        return
    warn_of_template(tokenizer, examples.rows)
    example = examples[0]
    responses = example["responses"][: 1 if args.stage == "kto" else None]  # kto reads one behind other prompts too
    text = marked(tokenizer, example["prompt"], responses, example.get("learned"))
    part = "is scored" if args.stage == "reward" else "is learned"
    show(f"{example['row']['at']} as the model reads it; what {part} stands in {MARKS}:", text)
