"""Preferences without a reward model: L_DPO = -log sigmoid(beta * (log pi/ref)(y_w) - beta * (log pi/ref)(y_l)).

The closed form of the RL problem, solved for the reward (Rafailov et al. 2023); IPO, hinge, SimPO, ORPO and their kin
are further losses on the same log-probs. KTO (Ethayarajh et al. 2024) needs no pairs: responses that are desired, or
not, are held against z = max(0, KL(pi || ref)). The reference is the model at the start: its log-probs are computed
once, before training.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch

from rlhf_kernels import preference_loss, preferences

from . import training
from .data.mismatches import mismatched
from .ranges import FINITE, above, at_least, listed, option, within
from .training import StageConfig
from .training.reference import ReferenceTrainer
from .training.sums import pair_log_probs, sums, weighted_pairs


@dataclass
class DPOConfig(StageConfig):
    """Settings of `rlhf dpo`."""

    loss_type: list[str] = option(
        "sigmoid",
        "The loss, or several: sigmoid (DPO), ipo, hinge, robust, exo_pair, discopop, nca_pair, bco_pair, sppo_hard, "
        "aot, aot_unpaired, apo_zero, apo_down, sigmoid_norm, ipo_norm (by token: TRL's ipo); without reference: orpo, "
        "simpo, sft.",
    )
    loss_weights: list[float] | None = option(None, "Weight of each loss; default: 1 each.", FINITE)
    beta: float = option(0.1, "Weight of the tether to the reference (DPO paper: 0.1 to 0.5).", above(0))
    label_smoothing: float = option(
        0.0,
        "Assumed share of wrong labels, in [0, 0.5); sigmoid, sigmoid_norm, simpo, robust, aot; exo_pair wants 1e-3.",
        within(0, 0.5, open_high=True),
    )
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = option(
        "reverse_kl", "Divergence from the reference; others for losses of the gap of two scores, such as sigmoid."
    )
    f_alpha_divergence_coef: float = option(0.5, "alpha of alpha_divergence: 1 is reverse_kl, 0 forward_kl.", FINITE)
    discopop_tau: float = option(0.05, "Temperature of discopop.", above(0))
    ld_alpha: float | None = option(
        None, "Weight of the tokens beyond the shorter response of a pair (LD-DPO); default: all count.", within(0, 1)
    )
    use_weighting: bool = option(False, "Weight each pair by its probability under the policy (WPO).")
    learning_rate: float = option(1e-6, "Peak learning rate.", at_least(0))

    stage: ClassVar[str] = "dpo"
    groups: ClassVar[dict] = {
        **StageConfig.groups,
        "the method": (
            "loss_type", "loss_weights", "beta", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef",
            "discopop_tau", "ld_alpha", "use_weighting",
        ),
    }  # fmt: skip
    paper: ClassVar[dict] = {}

    def __post_init__(self):
        super().__post_init__()
        names = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type or ())
        known = [name for name in preferences.BY_NAME if name != "kto"]
        if not names or not set(names) <= set(known):
            raise ValueError(f"loss_type: got {self.loss_type!r}, wants {listed(known)}, or several of them")
        self.loss_type = names[0] if len(names) == 1 else names
        weights = self.loss_weights or [1.0] * len(names)
        if len(weights) != len(names):
            raise ValueError(f"loss_weights: got {len(weights)} of them, wants {len(names)}, one for each loss_type")
        given = [preferences.DiscoPOP(self.discopop_tau) if name == "discopop" else name for name in names]
        fields = {"label_smoothing": self.label_smoothing or None}
        self._losses = preferences.losses_of(list(zip(given, map(float, weights), strict=True)), fields, False)
        self._check_losses()

    def _check_losses(self):
        for loss, _ in self._losses:
            if self.f_divergence_type != "reverse_kl" and not loss.by_divergence:
                raise ValueError(
                    f"f_divergence_type: got {self.f_divergence_type!r}, wants 'reverse_kl' with loss_type {loss.name}"
                )
            if self.use_weighting and isinstance(loss, preferences.AOT):
                raise ValueError(f"use_weighting: got True, wants False with loss_type {loss.name}, which sorts pairs")
            if self.ld_alpha is not None and isinstance(loss, preferences.SFT):
                raise ValueError(
                    f"ld_alpha: got {self.ld_alpha}, wants None with loss_type sft, whose tokens all count"
                )

    @property
    def losses(self):
        """[(loss, weight)] of `rlhf_kernels.preferences`."""
        return self._losses

    @property
    def divergence(self):
        if self.f_divergence_type == "alpha_divergence":
            return preferences.AlphaDivergence(self.f_alpha_divergence_coef)
        return self.f_divergence_type


@dataclass
class KTOConfig(StageConfig):
    """Settings of `rlhf kto`."""

    dataset_name: str | None = option(
        None, "Responses: prompt, completion, label (true: desired); a pair of chosen and rejected is one of each."
    )
    loss_type: Literal["kto", "apo_zero_unpaired"] = option(
        "kto", "The loss; apo_zero_unpaired holds responses against the reference alone, without an estimate of the KL."
    )
    beta: float = option(0.1, "Weight of the tether to the reference (KTO paper: 0.1).", above(0))
    desirable_weight: float = option(
        1.0, "Weight of a desired response; the paper: weights times counts of the two within 1 to 4/3.", above(0)
    )
    undesirable_weight: float = option(1.0, "Weight of an undesired response.", above(0))
    learning_rate: float = option(1e-6, "Peak learning rate.", at_least(0))

    stage: ClassVar[str] = "kto"
    groups: ClassVar[dict] = {
        **StageConfig.groups,
        "the method": ("loss_type", "beta", "desirable_weight", "undesirable_weight"),
    }
    paper: ClassVar[dict] = {}


class DPOTrainer(ReferenceTrainer):
    """Trains a language model on pairs: `DPOTrainer(model, args=args, train_dataset=rows).train()`.

    Arguments come in TRL's order; `StageTrainer` says what they take. A row is `prompt`, `chosen` and `rejected`.

    Args:
        ref_model: the reference, a language model or its path. None = the model as it is when training starts.
    """

    config_class, kind = DPOConfig, "preference"

    def encode(self, rows, what):
        return training.encode_rows(self.tokenizer, rows, ("chosen", "rejected"), self.args, what=what)

    @property
    def needs_reference(self):
        return any(loss.has_reference for loss, _ in self.args.losses)

    @property
    def has_likelihood(self):
        return any(isinstance(loss, preferences.SFT) for loss, _ in self.args.losses)

    def log_probs(self, model, batch):
        return pair_log_probs(model, batch, self.args.ld_alpha)[0]

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The likelihood is a mean over the tokens of all chosen responses of a step, over all processes."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.has_likelihood:
            tokens = sum(batch["cu_responses"].diff()[::2].sum() for batch in batches)
            total = self.accelerator.reduce(torch.as_tensor(tokens, dtype=torch.float64, device=device), "sum")
            batches = [{**batch, "mean_chosen_length": total / items} for batch in batches]
        return batches, items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        result = self.loss_of(model, inputs, num_items_in_batch=num_items_in_batch)
        self.record(result.metrics)
        return self.global_mean(result.loss) if num_items_in_batch is not None else result.loss

    def loss_of(self, model, batch, **options):
        if self.args.use_weighting:
            log_probs, lengths, options["weights"] = weighted_pairs(model, batch, self.args.ld_alpha)
        else:
            log_probs, lengths = pair_log_probs(model, batch, self.args.ld_alpha)
        if self.needs_reference:
            options |= dict(zip(("ref_chosen_logps", "ref_rejected_logps"), batch["ref_log_probs"].unbind(1)))
        losses = self.args.losses
        if any(loss.by_token for loss, _ in losses):
            options |= dict(zip(("chosen_lengths", "rejected_lengths"), lengths.unbind(1)))
        if "mean_chosen_length" in batch:
            whole = preferences.SFT(mean_length=batch["mean_chosen_length"])
            losses = [(whole if isinstance(loss, preferences.SFT) else loss, weight) for loss, weight in losses]
        return preference_loss(
            *log_probs.unbind(1), loss_type=losses, beta=self.args.beta, divergence=self.args.divergence, **options
        )

    def evaluate_rows(self, examples):
        whole, totals = {}, {}
        if self.has_likelihood:
            chosen = [batch["cu_responses"].diff()[::2] for batch in self.batches(examples)]
            whole["mean_chosen_length"] = torch.cat(chosen).double().mean()
        for batch in self.batches(examples):
            result = self.loss_of(self.model, {**batch, **whole})
            for name, value in {"loss": result.loss, **result.metrics}.items():
                totals[name] = totals.get(name, 0.0) + float(value) * (len(batch["cu_groups"]) - 1)
        return {name: total / len(examples) for name, total in totals.items()}


class KTOTrainer(ReferenceTrainer):
    """Trains a language model on single responses: `KTOTrainer(model, args=args, train_dataset=rows).train()`.

    Arguments come in TRL's order; `StageTrainer` says what they take. A row is `prompt`, `completion` and `label`
    (true: desired); a row of `prompt`, `chosen` and `rejected` becomes one of each.

    z, the estimate of KL(policy || reference), is the mean log-ratio of responses behind prompts that they do not
    answer, over all rows of an optimizer step, those of accumulated batches and of other processes too. It is at least
    0 and a constant to the gradient. Each prompt gets the response of the next row with another prompt, cut where it
    does not fit.

    Args:
        ref_model: the reference, a language model or its path. None = the model as it is when training starts.
    """

    config_class, kind = KTOConfig, "unpaired"
    spare = None  # the training examples, for held-out rows of one prompt

    @property
    def wants_kl(self):
        return self.args.loss_type == "kto"

    def encode(self, rows, what):
        examples = training.encode_rows(self.tokenizer, rows, ("completion",), self.args, what=what)
        if not self.wants_kl:
            return examples
        examples = mismatched(examples, self.args.max_length, self.spare)
        if what == "training":
            self.spare = examples
        return examples

    def collate(self, examples):
        own = super().collate([one_of(example, 0) for example in examples])
        if self.wants_kl:
            own["mismatched"] = super().collate([one_of(example, 1) for example in examples])
        return {**own, **by_label(examples)}

    def log_probs(self, model, batch):
        own = sums(model, batch)
        return torch.stack([own, sums(model, batch["mismatched"]) if self.wants_kl else torch.zeros_like(own)], dim=1)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        step = self.of_step(batches)
        if self.wants_kl:
            self.record({"kl": step["kl"]})
        return [{**batch, **step} for batch in batches], items

    @torch.no_grad()
    def of_step(self, batches):
        """What is told of all batches of a step, over all processes: z, and the counts of both labels."""
        total = torch.zeros(4, dtype=torch.float64, device=self.args.device)
        for batch in map(self._prepare_inputs, batches):
            ratios = torch.zeros_like(batch["ref_log_probs"][:, 1])
            if self.wants_kl:
                with self.accelerator.autocast():
                    ratios = sums(self.model, batch["mismatched"]) - batch["ref_log_probs"][:, 1]
            counts = (len(ratios), len(batch["desired"]), len(batch["undesired"]))
            total += torch.stack([ratios.double().sum(), *(total.new_tensor(count) for count in counts)])
        total = self.accelerator.reduce(total, "sum")
        batches = len(batches) * self.accelerator.num_processes
        return {"kl": (total[0] / total[1]).clamp(min=0).float(), "labels_of_step": total[2:], "batches": batches}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        step = inputs if "kl" in inputs else self.of_step([inputs])
        both = [sums(model, inputs), inputs["ref_log_probs"][:, 0]]
        result = self.loss_of(*both, inputs, step["kl"], num_items_in_batch=num_items_in_batch)
        self.record_labels(result, step)
        return self.global_mean(result.loss) if num_items_in_batch is not None else result.loss

    def loss_of(self, log_probs, ref, labels, kl, **options):
        desired, undesired = labels["desired"], labels["undesired"]
        return preference_loss(
            log_probs[desired],
            log_probs[undesired],
            ref[desired],
            ref[undesired],
            loss_type="kto",  # apo_zero_unpaired is the same at kl = 0
            beta=self.args.beta,
            kl=kl,
            desirable_weight=self.args.desirable_weight,
            undesirable_weight=self.args.undesirable_weight,
            **options,
        )

    def record_labels(self, result, step):
        """Means over the responses of each label, which a batch may lack; the margin is that of the whole step."""
        sides = {"chosen": result.chosen_rewards, "rejected": result.rejected_rewards}
        for side, rewards in sides.items():
            for name in (f"rewards/{side}", f"logps/{side}"):
                self.record({name: result.metrics[name] if len(rewards) else 0.0}, weight=len(rewards))
        means = torch.stack([rewards.double().sum() for rewards in sides.values()]) / step["labels_of_step"]
        margin, known = means[0] - means[1], (step["labels_of_step"] > 0).all()
        self.record({"rewards/margins": margin.where(known, 0.0) * step["batches"]}, weight=known / step["batches"])

    def evaluate_rows(self, examples):
        found = [(self.log_probs(self.model, batch), batch["ref_log_probs"]) for batch in self.batches(examples)]
        log_probs, ref = map(torch.cat, zip(*found, strict=True))
        kl = (log_probs - ref)[:, 1].mean().clamp(min=0)
        result = self.loss_of(log_probs[:, 0], ref[:, 0], self._prepare_inputs(by_label(examples)), kl)
        metrics = {"loss": result.loss, **({"kl": kl} if self.wants_kl else {}), **result.metrics}
        return {name: float(value) for name, value in metrics.items() if not value.isnan()}


def by_label(examples):
    """Which of the examples are desired, and which are not, as int64 tensors."""
    desired = torch.tensor([example["row"]["label"] for example in examples])
    return {"desired": desired.nonzero().flatten(), "undesired": (~desired).nonzero().flatten()}


def one_of(example, number):
    """An example with one of its responses alone."""
    learned = {"learned": [example["learned"][number]]} if "learned" in example else {}
    return {**example, "responses": [example["responses"][number]], **learned}


def train_dpo(args: DPOConfig):
    """Train a policy on preference pairs; returns the run directory, which holds the model."""
    DPOTrainer(args=args).train()
    return Path(args.output_dir)


def train_kto(args: KTOConfig):
    """Train a policy on responses that are desired or not; returns the run directory, which holds the model."""
    KTOTrainer(args=args).train()
    return Path(args.output_dir)
