"""Preferences without a reward model: L_DPO = -log sigmoid(beta * (log pi/ref)(y_w) - beta * (log pi/ref)(y_l)).

The closed form of the RL problem, solved for the reward (Rafailov et al. 2023); IPO, hinge, SimPO and ORPO are further
losses on the same log-probs. The reference is the model at the start: its log-probs are computed once, before training.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy
import torch
from accelerate.utils import gather_object

from rlhf_kernels import preference_loss

from . import models, training
from .data.store import Mapped
from .ranges import above, at_least, option, within
from .training import StageConfig, StageTrainer

WITHOUT_REFERENCE = ("orpo", "simpo")


@dataclass
class DPOConfig(StageConfig):
    """Settings of `rlhf dpo`."""

    loss_type: Literal["sigmoid", "ipo", "hinge", "orpo", "simpo"] = option(
        "sigmoid", "The loss: sigmoid is DPO; orpo and simpo need no reference."
    )
    beta: float = option(0.1, "Weight of the tether to the reference (DPO paper: 0.1 to 0.5).", above(0))
    label_smoothing: float = option(
        0.0, "Assumed share of wrong labels, in [0, 0.5); sigmoid and simpo.", within(0, 0.5, open_high=True)
    )
    learning_rate: float = option(1e-6, "Peak learning rate.", at_least(0))

    stage: ClassVar[str] = "dpo"
    groups: ClassVar[dict] = {**StageConfig.groups, "the method": ("loss_type", "beta", "label_smoothing")}
    paper: ClassVar[dict] = {}


class DPOTrainer(StageTrainer):
    """Trains a language model on pairs: `DPOTrainer(model, args=args, train_dataset=rows).train()`.

    Arguments come in TRL's order; `StageTrainer` says what they take. A row is `prompt`, `chosen` and `rejected`.

    Args:
        ref_model: the reference, a language model or its path. None = the model as it is when training starts.
    """

    config_class, kind, task_type = DPOConfig, "preference", "CAUSAL_LM"

    def __init__(
        self, model=None, ref_model=None, args=None, data_collator=None, train_dataset=None, eval_dataset=None,
        processing_class=None, compute_metrics=None, callbacks=None, optimizers=(None, None),
        quantization_config=None, peft_config=None,
    ):  # fmt: skip
        if ref_model is not None and ref_model is model:
            raise ValueError("ref_model: got the model itself, wants another one, or None for the model at the start")
        self.ref_model = ref_model
        super().__init__(
            model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, processing_class=processing_class,
            callbacks=callbacks, optimizers=optimizers, peft_config=peft_config, data_collator=data_collator,
            compute_metrics=compute_metrics, quantization_config=quantization_config,
        )  # fmt: skip

    def also_compared(self):
        return {} if self.ref_model is None else {"ref_model": self.ref_model}

    def load_model(self, args, model, tokenizer):
        options = training.model_options(args)
        if isinstance(self.ref_model, (str, Path)):
            self.ref_model = models.load_policy(self.ref_model, **options)
        elif self.ref_model is not None:
            self.ref_model = models.as_policy(self.ref_model, "ref_model")
        if model is not None and not isinstance(model, (str, Path)):
            return models.as_policy(model)
        return models.load_policy(args.model_name_or_path, **options)

    def encode(self, rows, what):
        return training.encode_rows(self.tokenizer, rows, ("chosen", "rejected"), self.args, what=what)

    def collate(self, examples):
        batch = super().collate(examples)
        if "ref_log_probs" in examples[0]:
            batch["ref_log_probs"] = torch.tensor(
                [example["ref_log_probs"] for example in examples], dtype=torch.float32
            )
        return batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        result = self.loss_of(model, inputs, num_items_in_batch=num_items_in_batch)
        self.record(result.metrics)
        return self.global_mean(result.loss) if num_items_in_batch is not None else result.loss

    def loss_of(self, model, batch, **options):
        log_probs, lengths = pair_log_probs(model, batch)
        ref = batch.get("ref_log_probs", torch.zeros(0, 2, dtype=torch.float32))
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

    def before_training(self):
        if not self.is_sharded:
            self.add_references()

    def add_references(self):
        if self.args.loss_type not in WITHOUT_REFERENCE:
            for examples in (self.train_dataset, self.held_out):
                self.add_reference(examples)
            models.reshard(self.model)

    @torch.no_grad()
    def add_reference(self, examples):
        """Put the reference's log-probs into the examples: those of ref_model, or of the model as it is now.

        Each process computes its share of them, and all the same number, since sharded weights need all processes.
        """
        if not examples:
            return
        model = self.model if self.ref_model is None else self.ref_model.to(self.args.device)
        if not self.is_sharded:
            self.model.to(self.args.device)
        model.eval()
        found = numpy.empty((len(examples), 2), numpy.float32)
        with self.accelerator.split_between_processes(list(range(len(examples))), apply_padding=True) as own:
            batches = self.batches(Mapped(examples.__getitem__, own))
            with self.accelerator.autocast():  # as the log-probs that they are held against
                values = [pair_log_probs(model, batch)[0].float().cpu().numpy() for batch in batches]
            for numbers, rows in gather_object([(own, numpy.concatenate(values))]):
                found[numbers] = rows
        examples.add("ref_log_probs", found)

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
    DPOTrainer(args=args).train()
    return Path(args.output_dir)
