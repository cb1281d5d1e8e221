"""Stage 2, the reward model: all pairs of the K ranked responses of a prompt, all K scores from one forward.

For one prompt: L = -1/C(K,2) * sum over (w better than l) of log sigmoid(r_w - r_l); then the mean over prompts, so a
prompt with 9 responses weighs as much as one with 4 (Ouyang et al. 2022, eq. 1). The responses of one prompt are one
example and never part. At the end the scores are shifted so that demonstrations score 0 on average.
"""

from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar, Literal

import torch

from rlhf_kernels import bradley_terry_loss, plackett_luce_loss

from . import data, models, training
from .training import StageConfig, StageTrainer, logger, option


@dataclass
class RewardConfig(StageConfig):
    """Settings of `rlhf reward`."""

    loss_type: Literal["bradley_terry", "plackett_luce"] = option(
        "bradley_terry", "All pairs of a ranking (the paper), or the ranking as a whole."
    )
    ties: Literal["drop", "half"] = option("drop", "Tied pairs: no pair (the paper), or half of each direction.")
    demonstrations: str | None = option(
        None, "File of demonstrations that shall score 0 on average; without it: the best-ranked responses."
    )
    learning_rate: float = option(1e-4, "Peak learning rate.")

    stage: ClassVar[str] = "reward"
    groups: ClassVar[dict] = {**StageConfig.groups, "the method": ("loss_type", "ties", "demonstrations")}
    paper: ClassVar[dict] = {
        "learning_rate": "9e-6",
        "per_device_train_batch_size": "64",
        "num_train_epochs": "1",
        "lr_scheduler_type": "cosine to 10 % of the peak",
    }


class RewardTrainer(StageTrainer):
    task_type = "SEQ_CLS"

    def collate(self, examples):
        ranks = [rank for example in examples for rank in example["row"]["ranks"]]
        return {**super().collate(examples), "ranks": torch.tensor(ranks)}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, metrics = self.loss_of(batch_scores(model, inputs), inputs, num_items_in_batch=num_items_in_batch)
        self.record(metrics)
        return self.global_mean(loss) if num_items_in_batch is not None else loss

    def loss_of(self, scores, batch, **options):
        if self.args.loss_type == "plackett_luce":
            return plackett_luce_loss(scores, batch["ranks"], batch["cu_groups"], **options)
        return bradley_terry_loss(scores, batch["ranks"], batch["cu_groups"], ties=self.args.ties, **options)

    def scores(self, examples):
        """The score of each response, one list for each example, and the sum of the prompts' losses."""
        found, total = [], 0.0
        with torch.no_grad():
            for batch in self.batches(examples):
                flat = batch_scores(self.model, batch)
                total += float(self.loss_of(flat, batch, reduction="sum").loss) if "ranks" in batch else 0.0
                found += [group.tolist() for group in flat.split(batch["cu_groups"].diff().tolist())]
        return found, total

    def evaluate_rows(self, examples):
        scores, total = self.scores(examples)
        return {"loss": total / len(examples), **ranking_report(scores, [example["row"] for example in examples])}


def batch_scores(model, batch):
    """[S] fp32, the score of every response: the scalar head at each response's last token."""
    hidden = models.hidden_states(model, batch["input_ids"], batch["attention_mask"], batch["position_ids"])
    return models.scores_from_hidden(model, hidden.flatten(0, 1)[batch["last_token_rows"]])


def ranking_report(scores, rows):
    """How often the scores order the decided pairs of ranked rows right, beside the rule that the longer response wins.

    Args:
        scores: one list of K numbers for each row.
        rows: ranked rows of `load_rows`. Length is counted in characters; equal scores or lengths count half.
    Returns:
        accuracy, longer_wins (shares of all pairs), pairs; accuracy_by_k, longer_wins_by_k, pairs_by_k by str(K); and
        length_correlation, of score and length over all responses (nan if either is constant).
    """
    right, longer, pairs = {}, {}, {}
    lengths = [[len(data.as_text(text)) for text in row["completions"]] for row in rows]
    for row, score, length in zip(rows, scores, lengths, strict=True):
        k = str(len(score))
        for i, j in combinations(range(len(score)), 2):
            if row["ranks"][i] == row["ranks"][j]:
                continue
            better, worse = (i, j) if row["ranks"][i] < row["ranks"][j] else (j, i)
            right[k] = right.get(k, 0) + _win(score[better], score[worse])
            longer[k] = longer.get(k, 0) + _win(length[better], length[worse])
            pairs[k] = pairs.get(k, 0) + 1
    by_k = sorted(pairs, key=int)
    count = sum(pairs.values())
    flat = torch.tensor([[s, n] for score, length in zip(scores, lengths) for s, n in zip(score, length)]).double()
    return {
        "accuracy": sum(right.values()) / count,
        "longer_wins": sum(longer.values()) / count,
        "pairs": count,
        "length_correlation": float(torch.corrcoef(flat.T)[0, 1]),
        "accuracy_by_k": {k: right[k] / pairs[k] for k in by_k},
        "longer_wins_by_k": {k: longer[k] / pairs[k] for k in by_k},
        "pairs_by_k": {k: pairs[k] for k in by_k},
    }


def _win(better, worse):
    return 1.0 if better > worse else 0.5 if better == worse else 0.0


def report_table(summary):
    """The held-out accuracy by K beside the longer-wins rule, as lines of text."""
    lines = ["held-out pairs   pairs  accuracy  longer wins"]
    for k in summary["eval/pairs_by_k"]:
        row = (summary[f"eval/{name}_by_k"][k] for name in ("pairs", "accuracy", "longer_wins"))
        lines.append("K = {:<11} {:>6}  {:>8.3f}  {:>11.3f}".format(k, *row))
    row = (summary[f"eval/{name}"] for name in ("pairs", "accuracy", "longer_wins"))
    return "\n".join([*lines, "{:<15} {:>6}  {:>8.3f}  {:>11.3f}".format("all", *row)])


def calibrate(trainer, demonstrations):
    """Shift the model's scores so that the demonstrations' mean is 0; returns the shift, which the config keeps."""
    scores, _ = trainer.scores(demonstrations)
    shift = torch.tensor([score for group in scores for score in group], dtype=torch.float64).mean().item()
    config = trainer.accelerator.unwrap_model(trainer.model).config
    config.reward_bias = getattr(config, "reward_bias", 0.0) + shift
    return config.reward_bias


def load_start(args, tokenizer):
    """The model to train: a new head on a language model, or a reward model with its calibration taken off."""
    options = training.model_options(args)
    if models.is_reward_model(args.model_name_or_path, args.trust_remote_code):
        model = models.load_reward_model(args.model_name_or_path, **options)
        model.config.reward_bias = 0.0
        return model
    return models.reward_model_from_policy(
        args.model_name_or_path, args.seed, pad_token_id=tokenizer.pad_token_id, **options
    )


def train_reward(args: RewardConfig):
    """Train a reward model on rankings; returns the run directory, which holds the model."""
    tokenizer = training.load_stage_tokenizer(args)
    train, held_out = training.load_data(args, "ranked")
    demonstrations = data.load_rows(args.demonstrations, "sft") if args.demonstrations else best_ranked(train)
    model = load_start(args, tokenizer)
    training.set_max_length(args, model)
    train = training.encode_rows(tokenizer, decided(train), ("completions",), args, what="training")
    held_out = training.encode_rows(tokenizer, decided(held_out), ("completions",), args, what="held-out")
    demonstrations = training.encode_rows(tokenizer, demonstrations, ("completion",), args, what="demonstration")
    for example in demonstrations:
        example["row"] = {**example["row"], "ranks": [0]}

    def finish(trainer):
        summary = trainer.last_evaluation()
        trainer.model.eval()
        summary["reward_bias"] = calibrate(trainer, demonstrations)
        if held_out and trainer.args.should_save:
            print(report_table(summary))
        return summary

    return training.run_stage(
        args, lambda callbacks: RewardTrainer(model, args, tokenizer, train, held_out, callbacks), finish
    )


def best_ranked(rows):
    """The best-ranked response of each row (the first of several), as demonstrations."""
    best = [row["completions"][row["ranks"].index(min(row["ranks"]))] for row in rows]
    return [{"prompt": row["prompt"], "completion": text, "at": row["at"]} for row, text in zip(rows, best)]


def decided(rows):
    """The rows that have a pair: not all responses tied."""
    kept = [row for row in rows if len(set(row["ranks"])) > 1]
    if len(kept) < len(rows):
        logger.warning("left out %d of %d rankings: all their responses are tied", len(rows) - len(kept), len(rows))
    return kept
