"""An iteration of PPO that has begun: what its optimizer steps need, the same on every process and in a checkpoint."""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file

from ..metrics import Averages
from ..rollouts.sampling import Rollouts


def draws(seed: int, *numbers: int) -> numpy.random.Generator:
    """Return a source of random numbers that depends on these numbers alone: not on the process, nor on past draws.

    Example:
        >>> draws(7, 1).random() == draws(7, 1).random() != draws(7, 2).random()
        True
    """
    return numpy.random.default_rng([seed % 2**64, *numbers])


def sampling_noise(seed: int, iteration: int, shape: tuple[int, int, int]) -> torch.Tensor:
    """Return the numbers that choose the tokens of an iteration, float64 in [0, 1), [prompts, responses, tokens]."""
    return torch.from_numpy(draws(seed, 0, iteration).random(shape))


def minibatches(seed: int, iteration: int, *, episodes: int, epochs: int, size: int) -> Iterable[list[int]]:
    """Yield the rows of each optimizer step of an iteration: each epoch a fresh permutation of all responses, cut."""
    for epoch in range(epochs):
        order = draws(seed, 1, iteration, epoch).permutation(episodes).tolist()
        yield from (order[start : start + size] for start in range(0, episodes, size))


@dataclass
class Experience:
    """What the losses need of an iteration's responses; [B, T], 0 under the mask, 1 = keep."""

    rollouts: Rollouts
    mask: torch.Tensor
    log_probs: torch.Tensor
    ref_log_probs: torch.Tensor
    entropy: torch.Tensor
    values: torch.Tensor | None = None  # None without a value network; so are the returns
    advantages: torch.Tensor | None = None
    returns: torch.Tensor | None = None
    weights: torch.Tensor | None = None  # importance weights of samples that come from another engine
    raw_scores: torch.Tensor | None = None  # [B], as the reward model or function gave them
    prompts: list[int] | None = None  # number of each response's prompt in the data


def gather(value, accelerator):
    """Return an `Experience` (a tensor, a list, ...) of the rows of all processes, in the order of the processes."""
    if isinstance(value, torch.Tensor):
        return accelerator.gather(value.contiguous())
    if isinstance(value, list):
        return gather_object(value)
    if dataclasses.is_dataclass(value):
        parts = {item.name: gather(getattr(value, item.name), accelerator) for item in dataclasses.fields(value)}
        return type(value)(**parts)
    return value


@dataclass
class Iteration:
    """An iteration between two optimizer steps: its experience, the metrics up to here, and the steps that are done."""

    experience: Experience
    averages: Averages
    updates: int = 0


def save_iteration(iteration: Iteration, averages: list[dict], folder: Path) -> None:
    """Write the iteration to a checkpoint's folder: `experience.safetensors` and `iteration.json`.

    Args:
        averages: `Averages.state()` of every process.
    """
    tensors, lists = {}, {}
    experience = iteration.experience
    for prefix, part in (("", experience), ("rollouts.", experience.rollouts)):
        for item in dataclasses.fields(part):
            value = getattr(part, item.name)
            if isinstance(value, torch.Tensor):
                tensors[prefix + item.name] = value.contiguous()
            elif isinstance(value, list):
                lists[prefix + item.name] = value
    save_file(tensors, folder / "experience.safetensors")
    state = {"updates": iteration.updates, "averages": averages, **lists}
    (folder / "iteration.json").write_text(json.dumps(state) + "\n", encoding="utf-8")


def load_iteration(folder: Path, rank: int, device) -> Iteration | None:
    """Return the iteration that a checkpoint stands in, on process `rank`; None between two iterations."""
    if not (folder / "iteration.json").exists():
        return None
    values = json.loads((folder / "iteration.json").read_text(encoding="utf-8"))
    updates, averages = values.pop("updates"), Averages()
    averages.load(values.pop("averages")[rank])
    tensors = load_file(folder / "experience.safetensors")
    values |= {name: tensor.to(device) for name, tensor in tensors.items()}
    inner = {name: values.pop(name) for name in list(values) if name.startswith("rollouts.")}
    rollouts = Rollouts(**{name.partition(".")[2]: value for name, value in inner.items()})
    return Iteration(Experience(rollouts, **values), averages, updates)
