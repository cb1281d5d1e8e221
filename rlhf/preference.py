"""Preferences without a reward model: L_DPO = -log sigmoid(beta * (log pi/ref)(y_w) - beta * (log pi/ref)(y_l)).

The closed form of the RL problem, solved for the reward (Rafailov et al. 2023); IPO, hinge, SimPO and ORPO are further
losses on the same log-probs. The reference is the model at the start: its log-probs are computed once, before training.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from accelerate.utils import gather_object

from rlhf_kernels import preference_loss

from . import models, training
from .training import StageConfig, StageTrainer, option

WITHOUT_REFERENCE = ("orpo", "simpo")


@dataclass
class DPOConfig(StageConfig):
    """Settings of `rlhf dpo`."""

    loss_type: Literal["sigmoid", "ipo", "hinge", "orpo", "simpo"] = option(
        "sigmoid", "The loss: sigmoid is DPO; orpo and simpo need no reference."
    )
    beta: float = option(0.1, "Weight of the tether to the reference (DPO paper: 0.1 to 0.5).")
    label_smoothing: float = option(0.0, "Assumed share of wrong labels, in [0, 0.5); sigmoid and simpo.")
    learning_rate: float = option(1e-6, "Peak learning rate.")

    stage: ClassVar[str] = "dpo"
    groups: ClassVar[dict] = {**StageConfig.groups, "the method": ("loss_type", "beta", "label_smoothing")}
    paper: ClassVar[dict] = {}


class DPOTrainer(StageTrainer):
    task_type = "CAUSAL_LM"

    def collate(self, examples):
        batch = super().collate(examples)
        if "ref_log_probs" in examples[0]:
            batch["ref_log_probs"] = torch.tensor([example["ref_log_probs"] for example in examples])
        return batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        result = self.loss_of(model, inputs, num_items_in_batch=num_items_in_batch)
        self.record(result.metrics)
        return self.global_mean(result.loss) if num_items_in_batch is not None else result.loss

    def loss_of(self, model, batch, **options):
        log_probs, lengths = pair_log_probs(model, batch)
        ref = batch.get("ref_log_probs", torch.zeros(0, 2))
        free = self.args.loss_type in WITHOUT_REFERENCE
        return preference_loss(
            log_probs[:, 0],
            log_probs[:, 1],
            *((None, None) if free else (ref[:, 0], ref[:, 1])),
            loss_type=self.args.loss_type,
            beta=self.args.beta,
            label_smoothing=self.args.label_smoothing,
            chosen_lengths=lengths[:, 0] if free else None,
            rejected_lengths=lengths[:, 1] if free else None,
            **options,
        )

    def create_scheduler(self, num_training_steps, optimizer=None):
        """The reference of a sharded run is asked here: its shards are made, and no checkpoint is loaded yet."""
        if self.is_sharded and "ref_log_probs" not in self.train_dataset[0]:
            self.add_references()
        return super().create_scheduler(num_training_steps, optimizer)

    def add_references(self):
        if self.args.loss_type not in WITHOUT_REFERENCE:
            for examples in (self.train_dataset, self.held_out):
                self.add_reference(examples)
            models.reshard(self.model)

    @torch.no_grad()
    def add_reference(self, examples):
        """Put the log-probs of the model as it is now into the examples, as those of the reference.

        Each process computes its share of them, and all the same number, since sharded weights need all processes.
        """
        if not examples:
            return
        if not self.is_sharded:
            self.model.to(self.args.device)
        self.model.eval()
        with self.accelerator.split_between_processes(list(range(len(examples))), apply_padding=True) as own:
            batches = self.batches([examples[index] for index in own])
            rows = [row for batch in batches for row in pair_log_probs(self.model, batch)[0].tolist()]
            found = dict(gather_object(list(zip(own, rows, strict=True))))
        for index, example in enumerate(examples):
            example["ref_log_probs"] = found[index]

    def evaluate_rows(self, examples):
        sums = {}
        for batch in self.batches(examples):
            result = self.loss_of(self.model, batch)
            for name, value in {"loss": result.loss, **result.metrics}.items():
                sums[name] = sums.get(name, 0.0) + float(value) * (len(batch["cu_groups"]) - 1)
        return {name: total / len(examples) for name, total in sums.items()}


def pair_log_probs(model, batch):
    """Summed log-probs [N, 2] fp32 (chosen, rejected), differentiable, and the token counts [N, 2]."""
    log_probs = training.response_log_probs(model, batch)
    lengths = batch["cu_responses"].diff()
    return torch.segment_reduce(log_probs, "sum", lengths=lengths).view(-1, 2), lengths.view(-1, 2)


def train_dpo(args: DPOConfig):
    """Train a policy on preference pairs; returns the run directory, which holds the model."""
    tokenizer = training.load_stage_tokenizer(args)
    train, held_out = training.load_data(args, "preference")
    with models.loaded_whole(args.deepspeed_plugin):
        model = models.load_policy(args.model_name_or_path, **training.model_options(args))
    training.set_max_length(args, model)
    train = training.encode_rows(tokenizer, train, ("chosen", "rejected"), args, what="training")
    held_out = training.encode_rows(tokenizer, held_out, ("chosen", "rejected"), args, what="held-out")

    def make_trainer(callbacks):
        trainer = DPOTrainer(model, args, tokenizer, train, held_out, callbacks)
        if not trainer.is_sharded:
            trainer.add_references()
        return trainer

    return training.run_stage(args, make_trainer, StageTrainer.last_evaluation)
