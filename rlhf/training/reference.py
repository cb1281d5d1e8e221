"""A stage whose loss holds log-probs against those of a reference, which are computed once."""

from pathlib import Path

import numpy
import torch
from accelerate.utils import gather_object

from .. import models
from ..data.store import Mapped
from .stage import model_options
from .trainer import StageTrainer


class ReferenceTrainer(StageTrainer):
    """A stage whose loss holds log-probs against those of a reference; a subclass gives `log_probs` beside the rest.

    Args:
        ref_model: the reference, a language model or its path. None = the model as it is when training starts.
    """

    task_type = "CAUSAL_LM"

    def __init__(
        self, model=None, ref_model=None, args=None, data_collator=None, train_dataset=None, eval_dataset=None,
        processing_class=None, compute_metrics=None, callbacks=None, optimizers=(None, None),
        quantization_config=None, peft_config=None,
    ):  # fmt: skip
        if isinstance(model, torch.nn.Module) and ref_model is model:
            raise ValueError("ref_model: got the model itself, wants another one, or None for the model at the start")
        self.ref_model = ref_model
        super().__init__(
            model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, processing_class=processing_class,
            callbacks=callbacks, optimizers=optimizers, peft_config=peft_config, data_collator=data_collator,
            compute_metrics=compute_metrics, quantization_config=quantization_config,
        )  # fmt: skip

    needs_reference = True

    def log_probs(self, model, batch):
        """[N, 2] fp32, differentiable: the two log-probs of each example that the reference's are held against."""
        raise NotImplementedError

    def also_compared(self):
        return {} if self.ref_model is None else {"ref_model": self.ref_model}

    def load_model(self, args, model, tokenizer):
        options = model_options(args)
        if isinstance(self.ref_model, (str, Path)):
            self.ref_model = models.load_policy(self.ref_model, **options)
        elif self.ref_model is not None:
            self.ref_model = models.as_policy(self.ref_model, "ref_model")
        if model is not None and not isinstance(model, (str, Path)):
            return models.as_policy(model)
        return models.load_policy(args.model_name_or_path, **options)

    def collate(self, examples):
        batch = super().collate(examples)
        if "ref_log_probs" in examples[0]:
            batch["ref_log_probs"] = torch.tensor(
                [example["ref_log_probs"] for example in examples], dtype=torch.float32
            )
        return batch

    def create_scheduler(self, num_training_steps, optimizer=None):
        """The reference of a sharded run is asked here: its shards are made, and no checkpoint is loaded yet."""
        if self.is_sharded and "ref_log_probs" not in self.train_dataset[0]:
            self.add_references()
        return super().create_scheduler(num_training_steps, optimizer)

    def before_training(self):
        if not self.is_sharded:
            self.add_references()

    def add_references(self):
        if self.needs_reference:
            for examples in (self.train_dataset, self.held_out):
                self.add_reference(examples)
            models.reshard(self.model)

    def measure(self, examples):
        if self.needs_reference and "ref_log_probs" not in examples.columns:
            if self.ref_model is None and self.state.global_step:
                raise ValueError(
                    "eval_dataset: the reference, the model before its training, is no more; give these rows, or a "
                    "ref_model, to the trainer"
                )
            self.add_reference(examples)
        return super().measure(examples)

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
                values = [self.log_probs(model, batch).float().cpu().numpy() for batch in batches]
            for numbers, rows in gather_object([(own, numpy.concatenate(values))]):
                found[numbers] = rows
        examples.add("ref_log_probs", found)
