"""TRL's RewardTrainer on the all-pairs loss: its own pairs, and rows of K ranked responses. Imports trl."""

import json
import math
from dataclasses import dataclass
from numbers import Real

import torch
import trl.data_utils as data_utils
import trl.trainer.utils as trl_utils
from accelerate.logging import get_logger
from datasets import Dataset
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from trl import RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from ..bradley_terry import bradley_terry_loss
from ._patch import check_signatures, check_version
from .trl import TESTED

logger = get_logger(__name__)
_SIGNATURES = {
    RewardTrainer: {
        "compute_loss": ("self", "model", "inputs", "return_outputs", "num_items_in_batch"),
        "_prepare_dataset": ("self", "dataset", "processing_class", "args", "dataset_name"),
        "_set_signature_columns_if_needed": ("self",),
        "_get_num_items_in_batch": ("self", "batch_samples", "device"),
    },
    data_utils: {"_tokenize": ("processing_class", "input", "apply_chat_template_kwargs")},
    trl_utils: {"pad": ("tensors", "padding_value", "padding_side", "pad_to_multiple_of")},
}
_NOT_TAKEN = ("weight", "margins")  # fields of our ranked rows that change the loss


def check_reward_trainer() -> None:
    """Raise unless TRL's RewardTrainer is what the loss and the trainer here were written for."""
    check_version("trl", TESTED)
    for holder, wanted in _SIGNATURES.items():
        check_signatures(holder, wanted)


check_reward_trainer()  # before a class is built on it


def pair_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    """`RewardTrainer.compute_loss` on `bradley_terry_loss`: an fp32 loss of scores in any dtype, and TRL's metrics."""
    mode = "train" if self.model.training else "eval"
    margins = inputs.get("margin")
    outputs = model(**{key: value for key, value in inputs.items() if key != "margin"} | {"use_cache": False})
    scores = outputs.logits.squeeze(-1).view(2, -1).t()  # [P, 2], the chosen first
    ranks = torch.arange(2, dtype=torch.int64, device=scores.device).expand(scores.shape)
    loss, _ = bradley_terry_loss(scores, ranks, margins=margins, center_coef=_centering(self.args))

    gathered, metrics = self.accelerator.gather_for_metrics, self._metrics[mode]
    if mode == "train":
        self._total_train_tokens += gathered(inputs["attention_mask"].sum()).sum().item() // self._tp_size
    metrics["num_tokens"] = [self._total_train_tokens]
    with torch.no_grad():
        chosen, rejected = scores.unbind(-1)
        rewards = self.accelerator.gather(outputs.logits)
        metrics["min_reward"].append(rewards.min().item())
        metrics["mean_reward"].append(rewards.mean().item())
        metrics["max_reward"].append(rewards.max().item())
        metrics["accuracy"].append(gathered((chosen > rejected).float().mean()).mean().item())
        metrics["margin"].append(gathered((chosen - rejected).mean()).mean().item())
    return (loss, outputs) if return_outputs else loss


def _centering(args):
    return args.center_rewards_coefficient or 0.0


@dataclass
class _Collator:
    """Rows of K responses -> `group_sizes` [P], `ranks` [S], `input_ids` and `attention_mask` [S, T], `margin` [P].

    `group_sizes` comes first: Trainer counts the rows of a batch by its first tensor.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows):
        ids = [_integers(response) for row in rows for response in row["completions_ids"]]
        shape = {"padding_side": "right", "pad_to_multiple_of": self.pad_to_multiple_of}
        batch = {
            "group_sizes": _integers([len(row["ranks"]) for row in rows]),
            "ranks": _integers([rank for row in rows for rank in row["ranks"]]),
            "input_ids": trl_utils.pad(ids, padding_value=self.pad_token_id, **shape),
            "attention_mask": trl_utils.pad([torch.ones_like(x) for x in ids], padding_value=0, **shape),
        }
        if "margin" in rows[0]:
            margins = [row["margin"] for row in rows]
            batch["margin"] = torch.tensor(margins, dtype=torch.float32, device="cpu")
        return batch


def _integers(values):
    return torch.tensor(values, dtype=torch.int64, device="cpu")


class RankedRewardTrainer(RewardTrainer):
    """TRL's RewardTrainer on rows of K ranked responses: all pairs of a prompt in one batch, a mean over prompts.

    For one prompt -1/|pairs| * sum over (w better than l) of log sigmoid(s_w - s_l - margin), Ouyang et al. 2022, eq.
    (1), plus `center_rewards_coefficient` times the mean of (s_w + s_l)^2 over its pairs; a tie is no pair. All
    responses of a batch are scored in one forward. A step's loss is the mean over the prompts of all its micro-batches
    and processes. With K = 2 loss and gradients are those of TRL's RewardTrainer. It needs no enable().

    A row is `prompt` (a string or messages; none where the completions are whole texts or dialogues), `completions` and
    `ranks` (lower is better, equal is a tie) or `scores` (higher is better), and may hold `margin`, `tools` and
    `chat_template_kwargs` as TRL's pairs do; it becomes ids as they do. Rows that are tokenised hold `completions_ids`
    and `ranks`, integers from 0. A response that with its prompt and the end of text has more than `max_length` tokens
    is left out of its row, and a row that keeps no two responses of different rank is left out; both are counted in a
    warning, but for streamed rows.

    Metrics are TRL's, means over the batches: accuracy (equal scores count half) and margin over all pairs of a batch,
    min_reward, mean_reward and max_reward over its responses, num_tokens. `predict` gives the scores, [rows, K], -100
    where a row has fewer.

    Args:
        *arguments, **options: those of TRL's RewardTrainer. A batch counts prompts: `per_device_train_batch_size=1` is
            K sequences. A `data_collator` takes prepared rows and gives what the trainer's own does. `compute_metrics`
            is refused: transformers would not call it, since rankings have no labels.
    Raises:
        ValueError: a row is not as above, by its number, or holds `weight` or `margins`, which are not taken here; no
            row is left.
        RuntimeError: TRL is another version than those tested, or what this class replaces takes other arguments.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        if self.compute_metrics is not None:
            raise ValueError("compute_metrics must be None: it would not be called, since rankings have no labels")
        if isinstance(self.data_collator, DataCollatorForPreference):
            self.data_collator = _Collator(self.processing_class.pad_token_id, self.args.pad_to_multiple_of)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        columns = data_utils.get_dataset_column_names(dataset)
        shared = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
        with trl_utils.global_then_local_main_first():
            if "completions_ids" not in columns:
                if "completions" not in columns:
                    raise ValueError(
                        f"the {dataset_name} dataset has the columns {', '.join(columns) or 'none'}, expected "
                        "`completions` with `ranks` or `scores`; pairs of `chosen` and `rejected` are for RewardTrainer"
                    )
                dataset = dataset.map(
                    _tokenized, fn_kwargs={"processing_class": processing_class, "dataset_name": dataset_name},
                    with_indices=True, remove_columns=columns, **shared,
                )  # fmt: skip
            before = dataset
            if args.max_length is not None:
                dataset = dataset.map(_shortened, fn_kwargs={"max_length": args.max_length}, **shared)
            responses = dataset
            dataset = dataset.filter(_has_pair, **shared)
        if isinstance(dataset, Dataset):
            _tell(dataset_name, args.max_length, before, responses, dataset)
            if len(dataset) == 0:
                raise ValueError(
                    f"the {dataset_name} dataset has no row left of {len(before)}: none has two responses of different "
                    f"rank of at most max_length={args.max_length} tokens, prompt and end of text included"
                )
        return dataset

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test"):
        """Scores [rows, K], -100 where a row has fewer responses, of rows as those to train on."""
        if "completions_ids" not in data_utils.get_dataset_column_names(test_dataset):
            test_dataset = self._prepare_dataset(test_dataset, self.processing_class, self.args, "test")
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = ["completions_ids", "ranks", "margin"]

    def _get_num_items_in_batch(self, batch_samples, device):
        """Prompts of all micro-batches and processes; every row that is prepared has a pair."""
        prompts = _integers(sum(len(batch["group_sizes"]) for batch in batch_samples)).to(device)
        return self.accelerator.gather(prompts).sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "train" if self.model.training else "eval"
        mask = inputs["attention_mask"]
        outputs = model(input_ids=inputs["input_ids"], attention_mask=mask, use_cache=False)
        ranked = outputs.logits.squeeze(-1), inputs["ranks"], pad(inputs["group_sizes"].cumsum(0), (1, 0))
        options = {"margins": inputs.get("margin"), "center_coef": _centering(self.args)}
        if mode == "eval" or num_items_in_batch is None:
            loss, metrics = bradley_terry_loss(*ranked, **options)
        else:
            loss, metrics = bradley_terry_loss(*ranked, **options, num_items_in_batch=num_items_in_batch)
            loss = loss * self.accelerator.num_processes  # whose gradients are averaged afterwards
        self._record(self._metrics[mode], metrics, mask.sum(), len(mask), mode)
        if not return_outputs:
            return loss
        rows = ranked[0].split(inputs["group_sizes"].tolist())
        outputs.logits = pad_sequence(rows, batch_first=True, padding_value=-100.0)  # as Trainer pads
        return loss, outputs

    def _record(self, into, metrics, tokens, responses, mode):
        """Append a batch's metrics over all processes, which may hold different numbers of pairs and responses."""
        pairs = metrics["pairs"]
        sums = pairs * metrics["accuracy"], pairs * metrics["margin"], metrics["mean_reward"] * responses
        counts = pairs, tokens.to(pairs.dtype), pairs.new_tensor(responses)
        table = self.accelerator.gather(
            torch.stack([*sums, *counts, metrics["min_reward"], metrics["max_reward"]])[None]
        )
        correct, margin, reward, pairs, tokens, responses = table[:, :6].sum(0).tolist()
        if mode == "train":
            self._total_train_tokens += int(tokens) // self._tp_size
        into["num_tokens"] = [self._total_train_tokens]
        into["min_reward"].append(table[:, 6].min().item())
        into["mean_reward"].append(reward / responses)
        into["max_reward"].append(table[:, 7].max().item())
        into["accuracy"].append(correct / pairs)
        into["margin"].append(margin / pairs)


def _tokenized(row, number, processing_class, dataset_name):
    """A ranked row as {completions_ids, ranks, margin}."""
    try:
        ranks = _ranks(row)
        ids = [_ids(row, place, processing_class) for place in range(len(ranks))]
        margin = {"margin": _margin(row["margin"])} if "margin" in row else {}
    except ValueError as error:
        raise ValueError(f"row {number} of the {dataset_name} dataset: {error}") from None
    return {"completions_ids": ids, "ranks": ranks, **margin}


def _ranks(row):
    """Ranks 0, 1, ... of a row's `ranks` or `scores`, checked against its completions."""
    for name in _NOT_TAKEN:
        if row.get(name) is not None:
            raise ValueError(f"`{name}` is not taken here; `rlhf reward` takes it")
    completions = row["completions"]
    if not isinstance(completions, list) or len(completions) < 2:
        raise ValueError(f"`completions` must be a list of at least two, got {completions!r}")
    given = [name for name in ("ranks", "scores") if row.get(name) is not None]
    if len(given) != 1:
        raise ValueError(f"either `ranks` or `scores` must be given, got {' and '.join(given) or 'neither'}")
    values = row[given[0]]
    if not isinstance(values, list) or len(values) != len(completions):
        raise ValueError(f"`{given[0]}` must be a list as long as `completions` ({len(completions)}), got {values!r}")
    if not all(map(_is_finite, values)):
        raise ValueError(f"`{given[0]}` must hold finite numbers, got {values!r}")
    better_first = sorted(set(values), reverse=given[0] == "scores")
    return [better_first.index(value) for value in values]


def _margin(value):
    if value is not None and not _is_finite(value):
        raise ValueError(f"`margin` must be a finite number, got {value!r}")
    return float(value or 0.0)


def _is_finite(value):
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _ids(row, place, processing_class):
    """Token ids of a row's prompt and one of its completions, as TRL makes them of a chosen or rejected text."""
    prompt, completion = row.get("prompt"), row["completions"][place]
    if not (prompt is None or isinstance(prompt, str) or _are_messages(prompt)):
        raise ValueError(f"`prompt` must be a string or a list of messages, got {prompt!r}")
    if not isinstance(completion, str | list):
        raise ValueError(f"`completions[{place}]` must be a string or a list of messages, got {completion!r}")
    if isinstance(completion, str) and isinstance(prompt, list):
        completion = [{"role": "assistant", "content": completion}]
    if isinstance(completion, str):
        eos = processing_class.eos_token
        text = completion if completion.endswith(eos) else completion + eos
        return data_utils._tokenize(processing_class, (prompt or "") + text)["input_ids"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    options = {"tools": tools, **(row.get("chat_template_kwargs") or {})}
    return data_utils._tokenize(processing_class, (prompt or []) + completion, **options)["input_ids"]


def _are_messages(value):
    return isinstance(value, list) and all(isinstance(message, dict) for message in value)


def _shortened(row, max_length):
    kept = [place for place, ids in enumerate(row["completions_ids"]) if len(ids) <= max_length]
    return {name: [row[name][place] for place in kept] for name in ("completions_ids", "ranks")}


def _has_pair(row):
    return len(set(row["ranks"])) > 1


def _tell(name, max_length, before, shortened, kept):
    all_of, some = (sum(map(len, rows["ranks"])) for rows in (before, shortened))
    if some < all_of:
        logger.warning(f"{name} dataset: left out {all_of - some} of {all_of} responses of over {max_length} tokens")
    if len(kept) < len(before):
        logger.warning(
            f"{name} dataset: left out {len(before) - len(kept)} of {len(before)} rows, in which no two responses of "
            "different rank are left"
        )
