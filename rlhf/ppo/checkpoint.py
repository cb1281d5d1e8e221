"""Checkpoints of a PPO run: everything that the steps to come depend on, so that they come out the same to the bit.

`checkpoint-N/` stands after N iterations, `checkpoint-N-U/` U optimizer steps into the next one. Both hold the policy
(as a model that can be used), `value/`, `ema.safetensors`, `within_budget.safetensors`, `optimizer.pt`, `scheduler.pt`,
`rng_state.pth` (of every process) and `trainer_state.json`: counters, the KL controller, the cursors of prompts and
pretraining texts, and the settings. Within an iteration they also hold `experience.safetensors` and `iteration.json`:
the responses with their log-probs, values, scores and advantages, and the metrics up to there. The order of the
minibatches that are left follows from the seed, the iteration and the epoch. With `rollout_ahead` there is `ahead.json`
too, the samples of the next iteration: they are waited for.

A run that is sharded and asked for it writes `shards/` in place of networks, averages and the optimizer's moments: see
`rlhf.ppo.shards`.
"""

import dataclasses
import json
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.torch import load_file, save_file

from .. import models
from ..checkpoint import atomic_directory, rng_state, set_rng_state
from ..disk import writing
from ..rollouts.ahead import load_ahead, save_ahead
from ..same_run import check_same_run, digest
from .ahead import samples_ahead
from .iteration import load_iteration, save_iteration
from .sharding import cut_like, gathered, trained_weights, whole_state
from .shards import holds_shards, load_shards, save_shards

MAY_CHANGE = (
    "sft_model_path", "reward_model_path", "value_model_path", "dataset_name", "dataset_config", "dataset_train_split",
    "columns", "data_format", "bad_rows", "dataset_num_proc", "ptx_dataset_name", "output_dir", "trust_remote_code",
    "total_episodes", "num_train_epochs", "max_steps", "save_steps", "save_updates", "save_total_limit",
    "resume_from_checkpoint", "report_to", "num_logged_samples", "disable_tqdm", "rollout_gap_warning",
    "rollout_gap_limit", "on_health", "health_kl", "health_entropy", "health_explained_variance",
    "health_clip_fraction", "health_patience", "vllm_server", "vllm_timeout", "vllm_weights_dir", "vllm_options",
    "reward_server", "reward_server_timeout", "gradient_checkpointing",
)  # fmt: skip
"""Settings that a resumed run may have otherwise: where things lie, how long it goes on, what it writes and guards."""
DATA = ("dataset_name", "ptx_dataset_name")


def save_checkpoint(trainer, directory: Path) -> None:
    """Write everything that the next step depends on; called by every process."""
    ahead = gather_object([samples_ahead(trainer)])  # waits for them
    begun, main = trainer.begun, trainer.accelerator.is_main_process
    ranks = gather_object([(rng_state(), begun and begun.averages.state())])
    with atomic_directory(directory, replace=True) if main else writing(directory) as folder, models.quiet():
        if trainer.sharding.shards:
            save_shards(trainer, Path(broadcast_object_list([str(folder)])[0]))
            if main:
                groups = trainer.optimizer.state_dict()["param_groups"]
                torch.save({"state": {}, "param_groups": groups}, folder / "optimizer.pt")
        else:
            _save_whole(trainer, folder)
        if not main:
            return
        trainer.tokenizer.save_pretrained(folder)
        if begun is not None:
            save_iteration(begun, [averages for _, averages in ranks], folder)
        save_ahead(ahead, folder)
        torch.save(trainer.scheduler.state_dict(), folder / "scheduler.pt")
        torch.save({"ranks": [rng for rng, _ in ranks]}, folder / "rng_state.pth")
        state = {
            "global_step": trainer.step, "episode": trainer.episode, "kl_coef": trainer.kl.value,
            "stopped": trainer.stopped, "seconds": trainer.seconds,
            "prompts": trainer.prompt_cursor.state(), "ptx": trainer.texts and trainer.texts.state(),
            "guards": trainer.guards.state(), "run": _run(trainer),
        }  # fmt: skip
        (folder / "trainer_state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def _save_whole(trainer, folder: Path | None) -> None:
    """Called by every process, with a folder by the one that writes."""
    _save_network(trainer.policy, folder)
    if trainer.value is not None:
        _save_network(trainer.value, folder and folder / "value")
    averages = {"ema": trainer.ema and trainer.ema.weights, "within_budget": trainer.within_budget}
    for name, weights in averages.items():
        if weights is not None:
            _save_tensors(weights, folder and folder / f"{name}.safetensors", save_file)
    _save_tensors(trainer.optimizer.state_dict(), folder and folder / "optimizer.pt", torch.save)


def _save_network(network, folder: Path | None) -> None:
    """Called by every process, with a folder by the one that writes."""
    if models.is_cut(network) and not hasattr(network, "get_base_model"):
        models.save_cut_weights(network, folder)
        return
    state = whole_state(network, keep=folder is not None)
    if folder is not None:
        network.save_pretrained(folder, state_dict=state)


def _save_tensors(tensors: dict, file: Path | None, write) -> None:
    whole = gathered(tensors, keep=file is not None)
    if file is not None:
        write(whole, file)


def load_checkpoint(trainer, directory: Path) -> None:
    """Put back what `save_checkpoint` wrote; whole networks were loaded from the checkpoint when they were made.

    Raises:
        ValueError: this run has other settings, data or processes than the one that wrote it; names what differs.
    """
    state = json.loads((directory / "trainer_state.json").read_text(encoding="utf-8"))
    if "run" not in state:
        raise ValueError(f"resume_from_checkpoint: {directory} was written by another version or another stage")
    check_same_run(state["run"], _run(trainer), directory, DATA, tuple(trainer.weights))
    trainer.step, trainer.episode, trainer.kl.value = state["global_step"], state["episode"], state["kl_coef"]
    trainer.stopped, trainer.seconds = state["stopped"], state["seconds"]
    if (trainer.stopped or "").startswith("on_health") and trainer.args.on_health != "stop":
        trainer.stopped = None
    trainer.prompt_cursor.load(state["prompts"])
    trainer.guards.load(state["guards"])
    if trainer.texts:
        trainer.texts.load(state["ptx"])
    optimizer = torch.load(directory / "optimizer.pt", weights_only=True, map_location="cpu")
    if holds_shards(directory):
        trainer.optimizer.load_state_dict(optimizer | {"state": load_shards(trainer, directory)})
    else:
        _load_whole(trainer, directory, optimizer)
    trainer.ahead = load_ahead(directory, trainer.rank)
    trainer.begun = load_iteration(directory, trainer.rank, trainer.accelerator.device)
    trainer.scheduler.load_state_dict(torch.load(directory / "scheduler.pt", weights_only=True))
    set_rng_state(torch.load(directory / "rng_state.pth", weights_only=True)["ranks"][trainer.rank])


def _load_whole(trainer, directory: Path, optimizer: dict) -> None:
    if trainer.ema is not None:
        trainer.ema.weights = _cut_like(load_file(directory / "ema.safetensors"), trainer.ema.weights)
    if (directory / "within_budget.safetensors").exists():
        weights = load_file(directory / "within_budget.safetensors")
        trainer.within_budget = _cut_like(weights, trained_weights(trainer.policy))
    _load_optimizer(trainer.optimizer, optimizer)


def _cut_like(whole: dict, like: dict) -> dict:
    return {name: cut_like(tensor, like[name]) for name, tensor in whole.items()}


def _load_optimizer(optimizer, state: dict) -> None:
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for number, moments in state["state"].items():
        state["state"][number] = {name: cut_like(x, weights[number]) if x.dim() else x for name, x in moments.items()}
    optimizer.load_state_dict(state)


def _run(trainer) -> dict:
    """What must be the same for a run to go on: settings, data, the models that stay as they are, processes."""
    settings = {name: value for name, value in dataclasses.asdict(trainer.args).items() if name not in MAY_CHANGE}
    run = {"num_processes": trainer.world, **settings}
    if trainer.args.lr_scheduler_type != "constant":
        run["max_steps"] = trainer.iterations  # such a schedule looks to the end
    digests = digest(trainer.prompts.all_ids()), trainer.texts.digest() if trainer.texts else digest([])
    return {**run, **dict(zip(DATA, digests, strict=True)), **trainer.weights}
