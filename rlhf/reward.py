"""Stage 2, the reward model: all pairs of the K ranked responses of a prompt, all K scores from one forward.

For one prompt: L = -1/C(K,2) * sum over (w better than l) of log sigmoid(r_w - r_l); then the mean over prompts, so a
prompt with 9 responses weighs as much as one with 4 (Ouyang et al. 2022, eq. 1). The responses of one prompt are one
example and never part. At the end the scores are shifted so that demonstrations score 0 on average.
"""

import functools
import math
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import ClassVar, Literal

import torch

from rlhf_kernels import bradley_terry_loss, plackett_luce_loss

from . import data, models, training
from .data import rankings
from .data.examples import Examples
from .data.store import Mapped, take
from .ranges import at_least, option
from .reports.reward_model import labeler_agreement, ranking_report, report_table
from .training import StageConfig, StageTrainer, logger
from .training.batches import batch_scores
from .training.stage import once


@dataclass
class RewardConfig(StageConfig):
    """Settings of `rlhf reward`."""

    dataset_name: str | None = option(
        None, "Rankings: prompt, completions, ranks (or chosen, rejected); optional: weight, margin(s), labeler, pairs."
    )
    loss_type: Literal["bradley_terry", "plackett_luce"] = option(
        "bradley_terry", "All pairs of a ranking (the paper), or the ranking as a whole."
    )
    ties: Literal["drop", "half"] = option("drop", "Tied pairs: no pair (the paper), or half of each direction.")
    center_rewards_coefficient: float = option(
        0.0, "Weight of (r_w + r_l)^2, which keeps scores near 0; bradley_terry. TRL recommends 0.01.", at_least(0)
    )
    comparisons: Literal["prompt", "shuffled"] = option(
        "prompt",
        "A prompt's pairs: one example (the paper), or shuffled, each its own (batches count pairs), which overfits.",
    )
    demonstrations: str | None = option(
        None, "File of demonstrations that shall score 0 on average; without it: the best-ranked responses."
    )
    learning_rate: float = option(1e-4, "Peak learning rate.", at_least(0))

    stage: ClassVar[str] = "reward"
    groups: ClassVar[dict] = {
        **StageConfig.groups,
        "the method": ("loss_type", "ties", "center_rewards_coefficient", "comparisons", "demonstrations"),
    }
    refused: ClassVar[dict[str, str]] = {
        **StageConfig.refused,
        **dict.fromkeys(
            ("torch_compile", "torch_compile_backend", "torch_compile_mode"),
            "scores are read from inside the model, past its compiled forward",
        ),
    }
    paper: ClassVar[dict] = {
        "learning_rate": "9e-6",
        "per_device_train_batch_size": "64",
        "num_train_epochs": "1",
        "lr_scheduler_type": "cosine to 10 % of the peak",
    }

    def __post_init__(self):
        super().__post_init__()
        if self.center_rewards_coefficient and self.loss_type != "bradley_terry":
            raise ValueError(
                f"center_rewards_coefficient: got {self.center_rewards_coefficient}, wants 0 with loss_type "
                f"{self.loss_type}, which has no pairs to centre"
            )


class RewardTrainer(StageTrainer):
    """Trains a reward model on rankings: `RewardTrainer(model, args, train_dataset=rows).train()`.

    Arguments come in TRL's order; `StageTrainer` says what they take. A row is `prompt`, `completions` and `ranks` (or
    `scores`), or `prompt`, `chosen` and `rejected`.

    Args:
        model: a sequence classifier of one label, which is trained, or a language model, whose weights are copied under
            a new head; or the path of either.
    """

    config_class, kind, task_type = RewardConfig, "ranked", "SEQ_CLS"

    def __init__(
        self, model=None, args=None, data_collator=None, train_dataset=None, eval_dataset=None, processing_class=None,
        compute_metrics=None, callbacks=None, optimizers=(None, None), optimizer_cls_and_kwargs=None,
        preprocess_logits_for_metrics=None, quantization_config=None, peft_config=None,
    ):  # fmt: skip
        super().__init__(
            model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, processing_class=processing_class,
            callbacks=callbacks, optimizers=optimizers, peft_config=peft_config, data_collator=data_collator,
            compute_metrics=compute_metrics, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics, quantization_config=quantization_config,
        )  # fmt: skip

    def check_data(self, args, train, held_out):
        check_margins(args, chain(train, held_out))
        self.agreement = labeler_agreement(chain(train, held_out))
        self.demonstrations = Mapped(rankings.best, train)
        if args.demonstrations:
            skip = {"bad_rows": args.bad_rows, "num_proc": args.dataset_num_proc}
            self.demonstrations = data.load_rows(args.demonstrations, "sft", **skip)

    def load_model(self, args, model, tokenizer):
        return load_start(args, tokenizer, model)

    def encode(self, rows, what):
        if what == "training":
            return training_examples(self.tokenizer, rows, self.args)
        return training.encode_rows(self.tokenizer, decided(rows), ("completions",), self.args, what=what)

    def also_compared(self):
        return {"demonstrations": self.demonstrations}

    def before_training(self):
        rows, options = self.demonstrations, {"what": "demonstration"}
        encode = functools.partial(training.encode_rows, self.tokenizer, rows, ("completion",), self.args, **options)
        self.demonstrations = once(self.args.distributed_state, encode)
        self.demonstrations.rows = Mapped(_alone, rows)

    def finish(self):
        summary = {**self.last_evaluation(), **self.agreement}
        self.model.eval()
        summary["reward_bias"] = calibrate(self, self.demonstrations)
        if self.held_out and self.args.should_save:
            print(report_table(summary))
        return summary

    def collate(self, examples):
        return {**super().collate(examples), **rankings.tensors([example["row"] for example in examples])}

    def count_items(self, batch):
        return batch["weights"].sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        total, metrics = self.weighted_loss(batch_scores(model, inputs), inputs)
        for name, value in metrics.items():  # nan where all responses of a batch are tied
            known = ~value.isnan()
            self.record({name: value.where(known, 0.0)}, weight=known)
        if num_items_in_batch is None:
            return total / inputs["weights"].sum()
        return self.global_mean(total / num_items_in_batch)

    def weighted_loss(self, scores, batch):
        """(sum over prompts of weight * loss, metrics); the loss of a prompt is the mean over its pairs, in nats."""
        ranked = (scores, batch["ranks"], batch["cu_groups"])
        if self.args.loss_type == "plackett_luce":
            losses, metrics = plackett_luce_loss(*ranked, reduction="none")
        else:
            options = {"ties": self.args.ties, "center_coef": self.args.center_rewards_coefficient}
            losses, metrics = bradley_terry_loss(*ranked, margins=batch.get("margins"), **options, reduction="none")
        return (losses * batch["weights"]).sum(), metrics

    def scores(self, examples):
        """The score of each response, one list for each example, and the weighted mean of the prompts' losses."""
        found, total, weight = [], 0.0, 0.0
        with torch.no_grad():
            for batch in self.batches(examples):
                flat = batch_scores(self.model, batch)
                total += float(self.weighted_loss(flat, batch)[0])
                weight += float(self.count_items(batch))
                found += [group.tolist() for group in flat.split(batch["cu_groups"].diff().tolist())]
        return found, total / weight

    def evaluate_rows(self, examples):
        scores, loss = self.scores(examples)
        if not all(math.isfinite(score) for group in scores for score in group):
            raise FloatingPointError(f"step {self.state.global_step}: scores are not finite; lower --learning_rate")
        return {"loss": loss, **ranking_report(scores, [example["row"] for example in examples], self.labelers)}

    @functools.cached_property
    def labelers(self):
        """Those of the training rankings."""
        examples = Examples.of(self.train_dataset)
        return {examples.row(number).get("labeler") for number in range(len(examples))}


def calibrate(trainer, demonstrations):
    """Shift the model's scores so that the demonstrations' mean is 0; returns the shift, which the config keeps."""
    with trainer.accelerator.autocast():
        scores, _ = trainer.scores(demonstrations)
    shift = torch.tensor([score for group in scores for score in group], dtype=torch.float64).mean().item()
    config = trainer.accelerator.unwrap_model(trainer.model).config
    config.reward_bias = getattr(config, "reward_bias", 0.0) + shift
    return config.reward_bias


def load_start(args, tokenizer, model=None):
    """The model to train: a new head on a language model, or a reward model with its calibration taken off.

    Args:
        model: either of them, or its path; None = args.model_name_or_path.
    """
    options, given = training.model_options(args), isinstance(model, torch.nn.Module)
    start = model if given else args.model_name_or_path
    is_classifier = models.is_classifier(model) if given else models.is_reward_model(start, args.trust_remote_code)
    if not is_classifier:
        return models.reward_model_from_policy(start, args.seed, pad_token_id=tokenizer.pad_token_id, **options)
    model = models.as_reward_model(model, "model") if given else models.load_reward_model(start, **options)
    model.config.reward_bias = 0.0
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model


def train_reward(args: RewardConfig):
    """Train a reward model on rankings; returns the run directory, which holds the model."""
    RewardTrainer(args=args).train()
    return Path(args.output_dir)


def training_examples(tokenizer, rows, args):
    """Rankings as examples, or under comparisons="shuffled" their pairs, which the trainer's sampler mixes."""
    ties = args.ties == "half" and args.loss_type == "bradley_terry"
    rows = rows if ties else decided(rows)
    examples = training.encode_rows(tokenizer, rows, ("completions",), args, what="training")
    return examples.pairs(ties=ties) if args.comparisons == "shuffled" else examples


def _alone(row):
    return {**row, "ranks": [0]}


def check_margins(args, rows):
    """Margins belong to pairs, which a ranking as a whole does not have."""
    if args.loss_type != "plackett_luce":
        return
    at = next((row["at"] for row in rows if "margins" in row), None)
    if at:
        raise ValueError(f"loss_type: plackett_luce knows no margins, but {at} holds one; use bradley_terry")


def decided(rows):
    """The rows that have a pair: not all responses tied."""
    kept = [number for number, row in enumerate(rows) if len(set(row["ranks"])) > 1]
    if len(kept) == len(rows):
        return rows
    logger.warning("left out %d of %d rankings: all their responses are tied", len(rows) - len(kept), len(rows))
    return take(rows, kept)
