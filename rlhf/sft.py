"""Stage 1, supervised fine-tuning: L = - sum_t log p(y_t | x, y_<t), over the response tokens only.

The mean is over all response tokens of an optimizer step, whatever the number of processes and accumulation steps. The
prompt and the end token: the prompt is read but not learned; the end token (EOS) is learned, or a model never ends.
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy
import torch

from . import models, training
from .data.examples import Examples
from .models.sequences import label_loss
from .ranges import at_least, option, within
from .training import StageConfig, StageTrainer

logger = logging.getLogger("rlhf")


@dataclass
class SFTConfig(StageConfig):
    """Settings of `rlhf sft`."""

    dropout: float = option(
        0.0, "Dropout on the residual blocks' outputs, a probability (paper: 0.2).", within(0, 1, open_high=True)
    )
    learn_turns: Literal["all", "last"] = option(
        "all", "Which assistant turns of a chat are learned: all, or the last; a message's `weight: 0` leaves it out."
    )
    num_samples: int = option(4, "Held-out prompts to write sample completions for, at each evaluation.", at_least(0))
    sample_length: int = option(64, "Most tokens of a sample completion.", at_least(1))

    stage: ClassVar[str] = "sft"
    groups: ClassVar[dict] = {
        **StageConfig.groups,
        "the method": ("learn_turns", "dropout", "num_samples", "sample_length"),
    }
    paper: ClassVar[dict] = {
        "learning_rate": "9.65e-6 at 1.3B and 6B, 5.03e-6 at 175B",
        "per_device_train_batch_size": "32, at 175B 8",
        "num_train_epochs": "16",
        "lr_scheduler_type": "cosine to 10 % of the peak",
    }


def token_losses(model, batch, **options):
    """Cross-entropy of the response tokens; `options` go to `sequences.label_loss`."""
    return label_loss(model, training.batch_inputs(batch), batch["labels"], batch["label_rows"], **options)


class SFTTrainer(StageTrainer):
    """Fine-tunes a language model on demonstrations: `SFTTrainer(model, args, train_dataset=rows).train()`.

    Arguments come in TRL's order; `StageTrainer` says what they take. A row is `text`, `messages`, or `prompt` and
    `completion`; `formatting_func(row)` may make a text of any other.

    Example:
        trainer = SFTTrainer("demo", train_dataset=[{"prompt": "Write a story.", "completion": " Tom had a cat."}])
        trainer.train()
        trainer.model  # as it is in runs/sft
    """

    config_class, kind, task_type = SFTConfig, "sft", "CAUSAL_LM"
    is_over, sampled_step = False, None  # samples of the last step wait until the model is saved

    def __init__(
        self, model=None, args=None, data_collator=None, train_dataset=None, eval_dataset=None, processing_class=None,
        compute_loss_func=None, compute_metrics=None, callbacks=None, optimizers=(None, None),
        optimizer_cls_and_kwargs=None, preprocess_logits_for_metrics=None, quantization_config=None, peft_config=None,
        formatting_func=None,
    ):  # fmt: skip
        if formatting_func is not None:
            if isinstance(train_dataset, (str, Path, type(None))) or isinstance(eval_dataset, (str, Path)):
                raise ValueError("formatting_func: got one with a file, wants the rows in memory (train_dataset)")
            train_dataset, eval_dataset = (
                rows and [{"text": formatting_func(row)} for row in rows] for rows in (train_dataset, eval_dataset)
            )
        super().__init__(
            model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, processing_class=processing_class,
            callbacks=callbacks, optimizers=optimizers, peft_config=peft_config, data_collator=data_collator,
            compute_loss_func=compute_loss_func, compute_metrics=compute_metrics,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics, quantization_config=quantization_config,
        )  # fmt: skip

    def load_model(self, args, model, tokenizer):
        if model is not None and not isinstance(model, (str, Path)):
            return models.as_policy(model, dropout=args.dropout)
        return models.load_policy(args.model_name_or_path, dropout=args.dropout, **training.model_options(args))

    @property
    def samples_behind_prompts(self):
        return self.args.num_samples > 0 and bool(self.held_out)

    def encode(self, rows, what):
        return training.encode_rows(self.tokenizer, rows, ("completion",), self.args, what=what)

    def collate(self, examples):
        """Several answers to one prompt that meet in a batch become one example, and share it where that pays."""
        merged = {}
        for number, example in enumerate(examples):
            key = tuple(example["prompt"]) if "prompt" in example["row"] else number  # plain texts stay apart
            whole = merged.setdefault(key, {**example, "responses": [], "learned": []})
            whole["responses"] += example["responses"]
            whole["learned"] += example.get("learned") or [None] * len(example["responses"])
        return super().collate(list(merged.values()))

    def count_items(self, batch):
        return len(batch["labels"])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = token_losses(model, inputs, num_items_in_batch=num_items_in_batch)
        return self.global_mean(loss) if num_items_in_batch is not None else loss

    def evaluate_rows(self, examples):
        total = tokens = 0
        for batch in self.batches(examples):
            total += float(token_losses(self.model, batch, reduction="sum"))
            tokens += len(batch["labels"])
        if self.state.global_step < self.state.max_steps and not self.is_over:
            self.write_samples(examples)
        return {"loss": total / tokens, "perplexity": perplexity(total / tokens)}

    def before_training(self):
        """Try whether completions can be sampled; where the weights are sharded, they are not yet."""
        self.is_over, self.sampled_step = False, None
        if not self.is_sharded:
            self.sample_completions(self.shown(self.held_out)[:1], most=2)

    def finish(self):
        self.is_over = True
        return super().finish()

    def after_saving(self):
        if self.sampled_step != self.state.global_step:
            self.write_samples(self.held_out)

    def write_samples(self, examples):
        """Sample completions of some prompts into samples.jsonl."""
        self.sampled_step = self.state.global_step
        examples = self.shown(examples)
        completions = self.sample_completions(examples)
        if self.args.should_save and completions:
            self.append_samples(examples, completions)

    def shown(self, examples):
        examples = Examples.of(examples)
        return [examples[number] for number in numpy.flatnonzero(~examples.is_text)[: self.args.num_samples]]

    def sample_completions(self, examples, most=None):
        """Completions of prompts, at most `most` tokens each, without touching the run's random numbers.

        A prompt that leaves no room in the model's context loses its left end, as in training. Where the weights are
        sharded, all processes sample, and up to the full length, so that they make the same number of steps. What goes
        wrong is told, and then there are none: samples are not worth a trained model.
        """
        from .rollouts.sampling import sample

        if self.samples is None or not examples or not (self.args.should_save or self.is_sharded):
            return []
        model = self.accelerator.unwrap_model(self.model)
        context, length = models.context_length(model), most or self.args.sample_length
        length = min(length, context // 2) if context else length
        room = context - length if context else 0  # [-0:] keeps all
        stop = models.stop_token_ids(self.tokenizer, model)
        try:
            with torch.random.fork_rng():
                torch.manual_seed(self.args.seed)
                rollouts = sample(
                    model,
                    self.tokenizer,
                    [example["prompt"][-room:] for example in examples],
                    response_length=length,
                    temperature=1.0,
                    stop_token_ids=[] if self.is_sharded else stop,
                )
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            logger.warning("num_samples: no completions in samples.jsonl, sampling failed (%s)", reason)
            return []
        return [up_to_stop(ids, stop) for ids in rollouts.response_ids]

    def asked(self, example):
        """The prompt of an example, for people; of a chat that of the example, which may be in the midst of its row."""
        prompt = example["row"]["prompt"]
        if isinstance(prompt, str):
            return prompt
        return self.tokenizer.decode(example["prompt"], skip_special_tokens=True).strip()

    def append_samples(self, examples, responses):
        texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
        prompts = [self.asked(example) for example in examples]
        rows = [{"prompt": prompt, "completion": text, "score": None} for prompt, text in zip(prompts, texts)]
        self.samples.append([{"step": self.state.global_step, **row} for row in rows])


def up_to_stop(ids, stop):
    """The ids up to and with the first one of `stop`."""
    end = next((index for index, token in enumerate(ids) if token in stop), len(ids))
    return ids[: end + 1]


def train_sft(args: SFTConfig):
    """Fine-tune a language model on demonstrations; returns the run directory, which holds the model."""
    SFTTrainer(args=args).train()
    return Path(args.output_dir)


def perplexity(loss):
    return math.exp(loss) if loss < 700 else math.inf
