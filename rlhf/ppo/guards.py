"""Guards of a PPO run: what looks unhealthy is told once; numbers that are not finite stop it, and leave their batch.

A guard reads the metrics of an iteration, decides nothing but whether to warn (or stop, with `--on_health stop`), and
changes no number. SPEC's failure modes have their page in the report (`rlhf.reports.health`); this is the look while
it runs.
"""

import contextlib
import json
import logging
import math

import torch
from safetensors.torch import save_file

from ..checkpoint import atomic_directory
from ..rollouts.engines import gap_complaint, log_prob_gap
from ..rollouts.sampling import RolloutError
from .sharding import local, trained_weights

logger = logging.getLogger("rlhf")
FIRST_ITERATIONS = 5
RATIO_DRIFT, VALUE_LOSS_GROWTH = 0.5, 100.0


def kl_runaway(args, metrics, first) -> str | None:
    per_token = metrics["objective/kl"] / max(metrics["completions/mean_length"], 1.0)
    if per_token > args.health_kl:
        return f"the KL is {per_token:.3g} nats a token (above {args.health_kl:g}): raise kl_coef, or set max_kl"


def entropy_collapse(args, metrics, first) -> str | None:
    now, start = metrics.get("policy/entropy_avg", math.inf), first["policy/entropy_avg"]
    if start is not None and now < args.health_entropy * start:
        return (
            f"the policy's entropy is {now:.3g} nats a token, {start:.3g} at the start (below {args.health_entropy:g} "
            "of it): raise kl_coef, or lower learning_rate"
        )


def value_blowup(args, metrics, first) -> str | None:
    explained, loss = metrics.get("val/explained_variance", math.nan), metrics.get("loss/value_avg", 0.0)
    if -math.inf < explained < args.health_explained_variance:
        return (
            f"the values explain {explained:.3g} of the returns' variance (below {args.health_explained_variance:g}; 1 "
            "is all): lower value_learning_rate"
        )
    start = first["loss/value_avg"]
    if start is not None and loss > VALUE_LOSS_GROWTH * start:
        return f"the value loss is {loss:.3g}, {start:.3g} at the start: lower value_learning_rate"


def ratio_blowup(args, metrics, first) -> str | None:
    clipped, ratio = metrics.get("policy/clipfrac_avg", 0.0), metrics.get("val/ratio", 1.0)
    if clipped > args.health_clip_fraction:
        share = args.health_clip_fraction
        return f"the ratio of {clipped:.0%} of the tokens is clipped (above {share:.0%}): lower learning_rate"
    if abs(ratio - 1) > RATIO_DRIFT:
        return f"the mean ratio is {ratio:.3g} (1 is unchanged): lower learning_rate or num_ppo_epochs"


GUARDS = (kl_runaway, entropy_collapse, value_blowup, ratio_blowup)


class HealthGuards:
    """Looks at each iteration's metrics; `found` lists what was told, `{"step", "guard", "message"}`, once a run each.

    Args:
        args: a `PPOConfig`, or what else has its on_health, health_kl, ..., health_patience.
    """

    def __init__(self, args):
        self.args, self.found = args, []
        self.streaks = {guard.__name__: 0 for guard in GUARDS}
        self.first = {"policy/entropy_avg": [], "loss/value_avg": []}

    def check(self, step: int, metrics: dict[str, float]) -> list[str]:
        """Take in an iteration's metrics; return the names of the guards that hold against it."""
        if self.args.on_health == "ignore":
            return []
        first = {name: sum(values) / len(values) if values else None for name, values in self.first.items()}
        holding = []
        for guard in GUARDS:
            name, message = guard.__name__, guard(self.args, metrics, first)
            self.streaks[name] = self.streaks[name] + 1 if message else 0
            if self.streaks[name] >= self.args.health_patience:
                holding.append(name)
                self._tell(step, name, message)
        for name, values in self.first.items():
            if name in metrics and len(values) < FIRST_ITERATIONS:
                values.append(metrics[name])
        return holding

    def warn(self, step: int, name: str, message: str) -> None:
        """Tell what something else than a guard found, once a run."""
        if self.args.on_health != "ignore":
            self._tell(step, name, message)

    def _tell(self, step: int, name: str, message: str) -> None:
        if name not in {entry["guard"] for entry in self.found}:
            self.found.append({"step": step, "guard": name, "message": message})
            logger.warning("iteration %d: %s: %s", step, name, message)

    def reason_to_stop(self, holding: list[str]) -> str | None:
        """What ends the run after `check` returned `holding`; None without `on_health` stop."""
        if self.args.on_health != "stop" or not holding:
            return None
        messages = {entry["guard"]: entry["message"] for entry in self.found}
        return f"on_health: {holding[0]}: {messages[holding[0]]}"

    def state(self) -> dict:
        return {"found": self.found, "streaks": self.streaks, "first": self.first}

    def load(self, state: dict) -> None:
        self.found, self.streaks, self.first = state["found"], state["streaks"], state["first"]


def stop_if_not_finite(trainer, numbers: dict, experience, averages, rows=None) -> None:
    """Raise if a number is NaN or infinite, on any process, after writing the batch to `bad_batch-<iteration>`.

    Called before an optimizer step is made from the numbers, so that no weights, and no checkpoint, hold what they did.

    Args:
        trainer: a `PPOTrainer`.
        numbers: tensors or floats by name; None is passed over.
        experience: the iteration's `Experience`.
        averages: the iteration's metrics up to here.
        rows: the responses of the optimizer step; None = all.
    Raises:
        FloatingPointError: names the numbers and the folder.
    """
    tensors = {
        name: x if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=torch.float64)
        for name, x in numbers.items()
        if x is not None
    }
    if not tensors:
        return
    flags = [(~x.isfinite()).any().to(trainer.accelerator.device) for x in tensors.values()]
    counts = trainer._sum(torch.stack(flags).float()).tolist()
    bad = [name for name, count in zip(tensors, counts, strict=True) if count]
    if not bad:
        return
    message, folder = (
        f"iteration {trainer.step + 1}: {', '.join(bad)} became NaN or infinite",
        _folder(trainer, trainer.step + 1),
    )
    try:
        _save_batch(trainer, folder, bad, tensors, experience, averages, rows)
    except OSError as error:
        raise FloatingPointError(f"{message}; the batch could not be written ({error})") from error
    raise FloatingPointError(f"{message}; the batch is in {folder}, and no checkpoint holds a step made from it")


def compare_engine(trainer, experience, older: bool) -> dict[str, float]:
    """Return how far the log-probs that the rollout engine gave lie from the trainer's; {} where it gave none.

    Args:
        older: the samples come from the weights of one iteration before, so that a step of training lies between the
            two; beyond the limit that is told, and nothing is raised.
    Raises:
        RolloutError: farther than `rollout_gap_limit`.
    """
    if experience.rollouts.log_probs is None:
        return {}
    limit, warning = trainer.args.rollout_gap_limit, trainer.args.rollout_gap_warning
    gap = log_prob_gap(experience.rollouts.log_probs, experience.log_probs, experience.mask)
    beyond, told = gap_complaint(gap, limit), gap_complaint(gap, limit if older else warning)
    if beyond and not older:
        raise RolloutError(f"{beyond}; rollout_gap_limit sets the limit")
    if told and older:
        told += "; samples drawn ahead are one iteration old: its steps are large, or no new weights reach the engine"
    if told:
        trainer.guards.warn(trainer.step + 1, "rollout_gap", told)
    return gap


@contextlib.contextmanager
def prompts_kept(trainer, prompts: list[dict], iteration: int | None = None):
    """Write the prompts to `bad_batch-<iteration>` where sampling their responses fails.

    Args:
        iteration: that of the prompts, counted from 1; None = the one that the trainer is in.
    Raises:
        RolloutError: what the engine did wrong, with the iteration and the folder. Other errors stay what they are, and
            get a note of both.
    """
    iteration = trainer.step + 1 if iteration is None else iteration
    try:
        yield
    except Exception as error:
        folder = _folder(trainer, iteration)
        rows = [{"prompt": row["prompt"], "prompt_ids": row["prompt_ids"]} for row in prompts]
        where = f"its prompts are in {folder}"
        try:
            with atomic_directory(folder, replace=True) as directory:
                _write(directory, {"iteration": iteration, "bad": [str(error)], "responses": rows})
        except OSError as failure:
            where = f"its prompts could not be written ({failure})"
        if isinstance(error, RolloutError):
            raise RolloutError(f"iteration {iteration}: {error}; {where}") from error
        error.add_note(f"while sampling for iteration {iteration}; {where}")
        raise


def _folder(trainer, iteration: int):
    rank = f"-rank{trainer.rank}" if trainer.world > 1 else ""
    return trainer.output_dir / f"bad_batch-{iteration}{rank}"


def refuse_bad_weights(trainer) -> None:
    """Raise a FloatingPointError if a weight that trains is NaN or infinite, before it is written anywhere."""
    for name, network in trainer.trained().items():
        trained = [local(weight.detach()) for weight in trained_weights(network).values()]
        bad = trainer._sum(torch.stack([(~weight.isfinite()).any() for weight in trained]).any().float())
        if bad.item():
            raise FloatingPointError(
                f"iteration {trainer.step}: weights of the {name} are NaN or infinite; they are not written, the last "
                "checkpoint is whole"
            )


def finite_experience(experience, scores) -> dict:
    """The numbers of an experience that must be finite, what stands under the mask left out."""
    names = ("log_probs", "ref_log_probs", "values", "entropy", "advantages", "returns")
    found = {name: getattr(experience, name) for name in names}
    kept = {name: torch.where(experience.mask, x, 0) for name, x in found.items() if x is not None}
    return {"scores": scores, **kept}


def _save_batch(trainer, folder, bad, numbers, experience, averages, rows) -> None:
    """`batch.safetensors`: [B, T] tensors of the whole iteration; `batch.json`: what is bad, losses, ids and texts."""
    rollouts = experience.rollouts
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in vars(experience).items()
        if isinstance(tensor, torch.Tensor)
    }
    tensors |= {name: x.detach().cpu().contiguous() for name, x in numbers.items() if x.dim() and name not in tensors}
    scalars = {name: float(x) for name, x in numbers.items() if not x.dim()}
    what = {
        "iteration": trainer.step + 1, "bad": bad, "optimizer_step_rows": rows, "numbers": _plain(scalars),
        "metrics": _plain(averages.read(lambda tensor: tensor)),
        "responses": [
            {"prompt": prompt, "completion": completion, "prompt_ids": prompt_ids, "response_ids": ids, "ended": ended}
            for prompt, completion, prompt_ids, ids, ended in zip(
                trainer._decode(rollouts.prompt_ids), trainer._decode(rollouts.response_ids), rollouts.prompt_ids,
                rollouts.response_ids, rollouts.ended, strict=True,
            )
        ],
    }  # fmt: skip
    with atomic_directory(folder, replace=True) as directory:
        save_file(tensors, directory / "batch.safetensors")
        _write(directory, what)


def _write(directory, what: dict) -> None:
    text = json.dumps(what, indent=1, ensure_ascii=False, allow_nan=False)
    (directory / "batch.json").write_text(text + "\n", encoding="utf-8")


def _plain(numbers: dict[str, float]) -> dict:
    """JSON has no NaN: numbers that are not finite as text."""
    return {name: x if math.isfinite(x) else str(x) for name, x in numbers.items()}
