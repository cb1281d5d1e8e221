"""PPO runs that are killed and go on: from every optimizer step, at random moments, on one process and on two."""

import json
import shutil

import pytest
import torch

from rlhf import checkpoint
from rlhf.metrics import Averages
from rlhf.ppo import train_ppo
from rlhf.ppo.iteration import draws, load_iteration
from tests.tiny_ppo import assert_same_run, bananas, forked

FULL = {
    "temperature": 0.7, "num_ppo_epochs": 2, "ptx_coef": 0.5, "ema_decay": 0.9, "kl_target": 0.3, "kl_horizon": 50,
    "warmup_iterations": 3, "num_responses": 2, "learning_rate": 3e-3, "max_kl": 1e6, "lr_scheduler_type": "cosine",
}  # fmt: skip


def full(home, **changes):
    return FULL | {"ptx_dataset_name": str(home.path / "text.txt")} | changes


def test_trap_28_resume_from_every_optimizer_step(home):
    """3 iterations of 4 steps in one go, and begun anew from each checkpoint between two steps."""
    options = full(home, max_steps=3, save_steps=1, save_updates=1, save_total_limit=None)
    whole = train_ppo(home.config("whole", **options))
    names = [path.name.removeprefix("checkpoint-") for path in checkpoint.checkpoints(whole)]
    inside = [[f"{step}-{updates}" for updates in range(4)] for step in range(3)]
    assert names == [*inside[0], "1", *inside[1], "2", *inside[2], "3"]
    for place in names:
        (home.path / place).mkdir()
        for log in ("metrics.jsonl", "samples.jsonl"):
            shutil.copy(whole / log, home.path / place)
        torch.manual_seed(999)
        train_ppo(home.config(place, **options | {"resume_from_checkpoint": str(whole / f"checkpoint-{place}")}))
        if place == "3":  # nothing was left to do but to hand on the models
            shutil.copytree(whole / "checkpoint-3", home.path / place / "checkpoint-3")
        assert_same_run(home, "whole", place)
    summaries = [json.loads((home.path / place / "run.json").read_text())["summary"] for place in ("whole", "3")]
    assert summaries[0] == summaries[1]


def test_trap_28_two_halves_and_the_checkpoints_that_are_kept(home):
    """6 = 3 + 3; the second half saves at other places, which changes nothing; what is inside an iteration goes."""
    whole = train_ppo(home.config("whole", **full(home, lr_scheduler_type="constant", max_steps=6, save_steps=6)))
    halves = full(home, lr_scheduler_type="constant", save_total_limit=1, save_steps=2)
    train_ppo(home.config("halves", max_steps=3, save_updates=2, **halves))
    folder = home.path / "halves"
    assert [path.name for path in checkpoint.checkpoints(folder)] == ["checkpoint-3"]
    seen = []
    again = home.config("halves", max_steps=6, save_updates=3, resume_from_checkpoint="true", **halves)
    train_ppo(again, callbacks=[lambda *_: seen.append([path.name for path in checkpoint.checkpoints(folder)])])
    assert seen[0] == ["checkpoint-3", "checkpoint-3-3"] and seen[1] == ["checkpoint-4", "checkpoint-4-3"]
    assert [path.name for path in checkpoint.checkpoints(whole)] == ["checkpoint-6"]
    assert_same_run(home, "whole", "halves")


def test_an_iteration_in_a_checkpoint_is_the_one_that_was_left(home):
    trainer = home.trainer(**full(home, max_steps=1, save_updates=1, save_total_limit=None))
    held = []
    trainer.save_inside = lambda begun, original=trainer.save_inside: (held.append(begun), original(begun))
    trainer.train()
    found = load_iteration(home.path / "run" / "checkpoint-0-3", 0, "cpu")
    experience = held[0].experience
    assert found.updates == 3 and found.experience.rollouts == experience.rollouts
    assert found.experience.prompts == experience.prompts and len(set(experience.prompts)) == 4
    for name, value in vars(experience).items():
        if isinstance(value, torch.Tensor):
            assert (
                torch.equal(value, getattr(found.experience, name))
                and value.dtype == getattr(found.experience, name).dtype
            )
    assert load_iteration(home.path / "run" / "checkpoint-0-0", 0, "cpu").updates == 0
    assert (home.path / "run" / "checkpoint-0-3" / "model.safetensors").exists()


def test_averages_go_on_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(40, generator=generator)
    weights = torch.randint(1, 2**26, (40,), generator=generator)
    whole, halves = Averages(), Averages()
    for i in range(40):
        whole.add({"x": numbers[i], "y": float(numbers[i])}, weights[i])
        halves.add({"x": numbers[i], "y": float(numbers[i])}, weights[i])
        again = Averages()
        again.load(json.loads(json.dumps(halves.state())))
        halves = again
    assert whole.read(lambda x: x) == halves.read(lambda x: x)
    expected = float((numbers.double() * weights).sum() / weights.double().sum())
    assert whole.read(lambda x: x)["x"] == pytest.approx(expected, rel=1e-12)


def test_draws_depend_on_their_numbers_alone():
    assert draws(7, 0, 1).random(3).tolist() == draws(7, 0, 1).random(3).tolist()
    firsts = [draws(*numbers).random() for numbers in ((7, 0, 1), (7, 1, 0), (8, 0, 1), (7, 1, 0, 1), (-7, 0, 1))]
    assert len(set(firsts)) == 5


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 8}, {"dataset_name": "other.jsonl"}, {"ptx_dataset_name": "other.txt"},
        *(pytest.param(change, marks=pytest.mark.slow) for change in (
            {"per_device_train_batch_size": 2}, {"rollout_batch_size": 16}, {"learning_rate": 1.0},
            {"temperature": 0.8}, {"kl_coef": 0.1}, {"num_ppo_epochs": 3}, {"response_length": 7}, {"ema_decay": 0.5},
            {"max_steps": 9},
        )),
    ],
)  # fmt: skip
def test_another_run_is_not_gone_on_with(home, change):
    (home.path / "other.jsonl").write_text('{"prompt": "the dog"}\n{"prompt": "the cat"}\n')
    (home.path / "other.txt").write_text("a dog sat .")
    train_ppo(home.config(**full(home, max_steps=1, save_steps=1)))
    ((name, value),) = change.items()
    if str(value).startswith("other"):
        change = {name: str(home.path / value)}
    with pytest.raises(ValueError, match=rf"^{name}: .*resume_from_checkpoint goes on with the same run only"):
        home.trainer(**full(home, max_steps=1, resume_from_checkpoint="true") | change)


def test_another_number_of_processes_is_refused(home):
    folder = train_ppo(home.config(max_steps=1, save_steps=1))
    file = folder / "checkpoint-1" / "trainer_state.json"
    state = json.loads(file.read_text())
    state["run"]["num_processes"] = 2
    file.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"num_processes: .* was written by a run with 2, this run has 1"):
        home.trainer(max_steps=1, resume_from_checkpoint="true")
    del state["run"]
    file.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: .* another version or another stage"):
        home.trainer(max_steps=1, resume_from_checkpoint="true")


def test_a_run_that_stopped_stays_stopped(home):
    """Killed between its last checkpoint and the final models: nothing more is sampled."""
    options = {"max_kl": 0.5, "kl_coef": 0.0, "max_steps": 40, "save_steps": 1, "rollout_batch_size": 32}
    folder = train_ppo(home.config(reward_model_path=None, **options), reward_fn=bananas)
    rows, model = home.rows(), (folder / "model.safetensors").read_bytes()
    assert len(rows) < 40
    (folder / "model.safetensors").unlink()
    again = home.config(reward_model_path=None, resume_from_checkpoint="true", **options)
    train_ppo(again, reward_fn=lambda *args, **columns: pytest.fail("the run went on"))
    assert home.rows() == rows and (folder / "model.safetensors").read_bytes() == model
    assert json.loads((folder / "run.json").read_text())["summary"]["stopped"].startswith("max_kl")


def test_a_full_disk_while_saving_loses_nothing(home, monkeypatch):
    from rlhf.ppo import checkpoint as ppo_checkpoint

    options = full(home, max_steps=2, save_steps=1, save_updates=1, save_total_limit=1)
    train_ppo(home.config("whole", **options))
    calls, original = [], ppo_checkpoint.save_iteration

    def out_of_space(*args):
        calls.append(1)
        if len(calls) == 7:
            raise OSError(28, "No space left on device")
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(ppo_checkpoint, "save_iteration", out_of_space)
        train_ppo(home.config("filled", **options))
    assert [path.name for path in checkpoint.checkpoints(home.path / "filled")] == ["checkpoint-1", "checkpoint-1-1"]
    assert not [path for path in (home.path / "filled").iterdir() if ".tmp" in path.name]
    train_ppo(home.config("filled", resume_from_checkpoint="true", **options))
    assert_same_run(home, "whole", "filled")


@pytest.mark.slow
def test_trap_28_killed_at_twenty_random_moments(home):
    options = full(home, max_steps=20, save_steps=1, save_updates=1, save_total_limit=1)
    runs = {out: vars(home.config(out, **options)) for out in ("whole", "killed")}
    plan = [{"options": runs["whole"]}, {"options": runs["killed"], "kills": 20, "seed": 1}]
    _, hits = forked(home, plan)
    assert len(hits) >= 10 and len(set(hits) & {"rollout", "update", "save"}) >= 2, hits
    assert_same_run(home, "whole", "killed")


@pytest.mark.slow
def test_trap_28_two_processes_killed(home):
    options = full(home, max_steps=6, save_steps=1, save_updates=1, save_total_limit=1, per_device_train_batch_size=2)
    runs = {out: vars(home.config(out, **options)) for out in ("whole", "killed")}
    plan = [{"options": runs["whole"], "ranks": 2}, {"options": runs["killed"], "ranks": 2, "kills": 3, "seed": 2}]
    _, hits = forked(home, plan)
    assert len(hits) >= 2, hits
    assert_same_run(home, "whole", "killed")
    assert len(torch.load(home.path / "killed" / "checkpoint-6" / "rng_state.pth", weights_only=True)["ranks"]) == 2
