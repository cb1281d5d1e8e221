"""`--rollout_ahead 1`: an engine draws the next samples while the policy trains, from weights one iteration old."""

import dataclasses
import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
import traceback

import pytest
import torch

from rlhf import checkpoint, interrupt
from rlhf.ppo import PPOConfig, train_ppo
from rlhf.ppo.guards import compare_engine
from rlhf.rollouts.ahead import Ahead, Drawn, load_ahead, save_ahead
from rlhf.rollouts.sampling import RolloutError, Rollouts
from tests.processes import run
from tests.tiny_ppo import ROOT, TIMINGS, assert_same_run, equal, experience_of, forked, weights

SERVER = ROOT / "tests" / "server_engine.py"
AHEAD = {"rollout_ahead": 1, "rollout_engine": f"{SERVER}:Elsewhere", "rollout_correction": "token"}
LONG = 300  # seconds, for what a wrong order would make wait for ever
BATCH = Drawn(
    [4, 4, 1], Rollouts([[5], [5], [6]], [[4], [7, 2], [2]], [False, True, True], [[-0.1], [-1, -2], [0]]), 0.25
)


def full(home, **changes):
    options = {
        "temperature": 0.7, "num_ppo_epochs": 2, "num_mini_batches": 2, "ptx_coef": 0.5, "ema_decay": 0.9,
        "kl_target": 0.3, "kl_horizon": 50, "num_responses": 2, "learning_rate": 3e-3, "max_kl": 1e6,
        "ptx_dataset_name": str(home.path / "text.txt"),
    }  # fmt: skip
    return options | AHEAD | changes


def in_thread():
    return threading.current_thread().name == "rollout-ahead"


def meanwhile(trainer, action):
    """Make the engine do something in each call in the thread; the start-up check and the first samples have none."""
    trainer.engine.meanwhile = lambda: action() if in_thread() else None


def test_the_policy_trains_while_the_engine_samples_from_older_weights(home):
    """Each call in the thread waits for an optimizer step that is made after it was begun."""
    trainer, stepped, calls = home.trainer(max_steps=4, **AHEAD), threading.Condition(), []
    trainer.steps, starts = 0, []

    def update(*args, original=trainer.update):
        original(*args)
        with stepped:
            trainer.steps += 1
            stepped.notify_all()

    def begin(original=trainer.begin):
        starts.append((weights(trainer.policy), trainer.steps))
        return original()

    def wait_for_a_step():
        with stepped:
            begun = trainer.steps
            assert stepped.wait_for(lambda: trainer.steps > begun, LONG)
            calls.append((weights(trainer.engine.model), begun, trainer.steps))

    trainer.update, trainer.begin = update, begin
    meanwhile(trainer, wait_for_a_step)
    trainer.train()
    assert [start for _, start in starts] == [0, 2, 4, 6] and len(calls) == 3
    for number, (used, begun, after) in enumerate(calls):
        assert equal(used, starts[number][0])  # samples `number + 1` are of the weights that iteration began with
        assert starts[number][1] <= begun < after <= starts[number + 1][1]  # and are drawn while it trained
        assert number == 0 or not equal(used, starts[number - 1][0])
    assert trainer.engine.updates == 4  # the start-up check, the first samples, and before samples 2 and 3
    rows = home.rows()
    assert [row["rollout/ahead"] for row in rows] == [0, 1, 1, 1]
    gaps = [row["rollout/logprob_gap_mean"] for row in rows]
    assert gaps[0] < 1e-5 and min(gaps[1:]) > 1e-3
    assert rows[0]["rollout/effective_sample_size"] == pytest.approx(1, abs=1e-6)
    assert all(row["rollout/effective_sample_size"] < 1 - 1e-6 for row in rows[1:])


def test_a_wait_inside_a_checkpoint_is_counted(home):
    """The engine answers a while after a checkpoint has begun to wait; the loop then finds the samples there."""
    trainer, begun, seconds = home.trainer(max_steps=3, save_steps=1, **AHEAD), threading.Event(), 0.5

    def save_checkpoint(original=trainer.save_checkpoint):
        begun.set()
        original()

    def answer_late():
        assert begun.wait(LONG)
        begun.clear()
        time.sleep(seconds)

    trainer.save_checkpoint = save_checkpoint
    meanwhile(trainer, answer_late)
    trainer.train()
    for row in home.rows()[1:]:
        assert row["rollout/seconds_waited"] > seconds / 2 > row["time/rollout"]


def test_samples_ahead_are_those_of_an_engine_that_is_one_iteration_late(home):
    """The same seeds, prompts and weights, without a thread: every metric and weight to the bit."""
    options = {"max_steps": 4, "num_responses": 2, "num_ppo_epochs": 2, "rollout_gap_limit": None}
    runs = {"ahead": AHEAD, "late": AHEAD | {"rollout_ahead": 0, "rollout_engine": f"{SERVER}:Late"}}
    trainers = {out: home.trainer(out, **options | settings) for out, settings in runs.items()}
    for trainer in trainers.values():
        trainer.train()
    assert equal(*(weights(trainer.model) for trainer in trainers.values()))
    rows = [
        [{name: x for name, x in row.items() if name not in {*TIMINGS, "rollout/ahead", "health"}} for row in found]
        for found in map(home.rows, runs)
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 4
    assert home.rows("ahead", "samples.jsonl") == home.rows("late", "samples.jsonl")


def test_times_tell_waiting_from_sampling(home):
    """An engine that has answered before the loop asks is not waited for; its speed is that of its own seconds."""
    trainer = home.trainer(max_steps=3, **AHEAD)
    drawn = []

    def take(original=trainer.ahead.take):
        drawn.append(original())
        return drawn[-1]

    trainer.ahead.take = take
    trainer.train()
    rows = home.rows()
    assert rows[0]["rollout/seconds_waited"] >= rows[0]["rollout/seconds_sampled"] > 0
    for row, batch in zip(rows[1:], drawn, strict=True):
        assert row["rollout/seconds_sampled"] == batch.seconds
        tokens = sum(map(len, batch.rollouts.response_ids))
        assert row["throughput/rollout_tokens_per_sec"] == pytest.approx(tokens / batch.seconds)
        assert row["time/rollout"] >= row["rollout/seconds_waited"]
        phases = [row[f"time/{phase}"] for phase in ("rollout", "score", "evaluate", "update")]
        assert row["eps"] == pytest.approx(8 / sum(phases))


def resumed_from(home, places, options):
    whole = train_ppo(home.config("whole", **options))
    for place in places:
        (home.path / place).mkdir()
        for log in ("metrics.jsonl", "samples.jsonl"):
            shutil.copy(whole / log, home.path / place)
        torch.manual_seed(999)
        train_ppo(home.config(place, **options | {"resume_from_checkpoint": str(whole / f"checkpoint-{place}")}))
        assert_same_run(home, "whole", place)
        assert same_ahead(home, "whole", place)
    return [path.name.removeprefix("checkpoint-") for path in checkpoint.checkpoints(whole)]


def same_ahead(home, *runs):
    """The samples that the last checkpoints hold for the next iteration, but for the seconds; there are some."""
    files = [checkpoint.last_checkpoint(home.path / out) / "ahead.json" for out in runs]
    ranks = [[batch | {"seconds": 0} for batch in json.loads(file.read_text())] for file in files]
    assert all(batch["rollouts"]["response_ids"] and batch["rollouts"]["log_probs"] for batch in ranks[0])
    return ranks[0] == ranks[1]


def test_trap_28_resume_between_iterations_and_inside_one(home):
    resumed_from(home, ["1", "1-3"], full(home, max_steps=3, save_steps=1, save_updates=3, save_total_limit=None))


@pytest.mark.slow
def test_trap_28_resume_from_every_optimizer_step(home):
    places = [f"{step}-{updates}" for step in range(3) for updates in range(4)]
    options = full(home, max_steps=3, save_steps=1, save_updates=1, save_total_limit=None)
    names = resumed_from(home, places, options)
    assert set(names) == {*places, "1", "2", "3"}


def test_a_run_that_is_made_longer_goes_on_with_the_samples_of_its_last_checkpoint(home):
    options = full(home, save_steps=2, save_total_limit=None)
    train_ppo(home.config("whole", max_steps=4, **options))
    train_ppo(home.config("halves", max_steps=2, **options))
    train_ppo(home.config("halves", max_steps=4, resume_from_checkpoint="true", **options))
    assert_same_run(home, "whole", "halves")


def test_nothing_is_drawn_behind_the_last_iteration_without_a_checkpoint(home):
    trainer = home.trainer(max_steps=2, **AHEAD)
    trainer.train()
    assert not trainer.ahead and trainer.engine.updates == 2  # the start-up check, and samples 0; samples 1 need none


@pytest.mark.slow
@pytest.mark.parametrize("ranks, kills", [(1, 12), (2, 3)])
def test_trap_28_killed_at_random_moments(home, ranks, kills):
    options = full(
        home, max_steps=6, save_steps=1, save_updates=1, save_total_limit=1, per_device_train_batch_size=4 // ranks
    )
    runs = {out: vars(home.config(out, **options)) for out in ("whole", "killed")}
    plan = [{"options": runs["whole"], "ranks": ranks}]
    plan += [{"options": runs["killed"], "ranks": ranks, "kills": kills, "seed": 2}]
    _, hits = forked(home, plan)
    assert len(hits) >= 2, hits
    assert_same_run(home, "whole", "killed")
    assert same_ahead(home, "whole", "killed")
    assert len(json.loads((home.path / "whole" / "checkpoint-6" / "ahead.json").read_text())) == ranks


@pytest.mark.slow
def test_sharded_networks_give_whole_weights(home):
    """Two processes that shard, and two that do not: the same samples."""
    options = full(home, max_steps=3, per_device_train_batch_size=2, dtype="float64", packing="false", ema_decay=None)
    runs = {out: vars(home.config(out, **options)) for out in ("plain", "sharded")}
    sharded = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    forked(home, [
        {"options": runs["plain"], "ranks": 2},
        {"options": runs["sharded"], "ranks": 2, "environment": sharded},
    ])  # fmt: skip
    first, second = (home.rows(out, "samples.jsonl") for out in runs)
    assert [row | {"score": 0} for row in first] == [row | {"score": 0} for row in second] and len(first) == 12


def test_a_signal_waits_for_the_samples_and_the_run_goes_on_to_the_bit(home):
    options = full(home, max_steps=3, save_steps=3)
    train_ppo(home.config("whole", **options))

    def stop(trainer, step, metrics):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with interrupt.enabled(), pytest.raises(interrupt.Interrupted, match="checkpoint-2 is written"):
        train_ppo(home.config("run", **options), callbacks=[stop])
    assert (home.path / "run" / "checkpoint-2" / "ahead.json").exists()
    train_ppo(home.config("run", resume_from_checkpoint="true", **options))
    assert_same_run(home, "whole", "run")


def test_a_second_signal_does_not_wait(home, monkeypatch):
    """The engine never answers: the first Ctrl-C leads to a checkpoint, which waits for it; the second ends that."""
    trainer, waiting, over = home.trainer(max_steps=3, **AHEAD), threading.Event(), threading.Event()

    def wait(self, original=Ahead.wait):
        waiting.set()
        return original(self)

    def never():
        os.kill(os.getpid(), signal.SIGINT)
        if waiting.wait(LONG):
            os.kill(os.getpid(), signal.SIGINT)
        over.wait(LONG)

    monkeypatch.setattr(Ahead, "wait", wait)
    meanwhile(trainer, never)
    try:
        with interrupt.enabled(), pytest.raises(KeyboardInterrupt):
            trainer.train()
    finally:
        over.set()
    assert waiting.is_set() and not checkpoint.checkpoints(home.path / "run")


HANGS = """
import threading
from rlhf.ppo import PPOConfig, PPOTrainer
def fails(prompts, completions, completion_ids, **columns):
    raise OSError("the reward is gone")
trainer = PPOTrainer(PPOConfig(**SETTINGS), reward_fn=fails)
trainer.engine.meanwhile = lambda: None if threading.current_thread() is threading.main_thread() else never.wait()
never = threading.Event()
trainer.train()
"""


@pytest.mark.slow
def test_a_process_that_fails_ends_though_its_engine_does_not_answer(home):
    settings = dataclasses.asdict(home.config(**AHEAD)) | {"reward_model_path": None}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = run([sys.executable, "-c", HANGS.replace("SETTINGS", repr(settings))], cwd=home.path, env=environment)
    assert done.returncode == 1 and "the reward is gone" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("inside", [0, 1])
@pytest.mark.parametrize("kind", [RolloutError, ConnectionError, KeyError])
def test_an_error_of_the_thread_is_told_with_its_trace_and_its_prompts(home, kind, inside):
    """Met when the samples are wanted, or when a checkpoint inside the iteration before wants them."""
    trainer, calls, error = home.trainer(max_steps=4, save_updates=inside, num_responses=2, **AHEAD), [], kind("lost")

    def fail_in_the_second_call():
        calls.append(1)
        if len(calls) == 2:
            raise error

    meanwhile(trainer, fail_in_the_second_call)
    with pytest.raises(kind, match="lost") as caught:
        trainer.train()
    assert len(home.rows()) == 2 - inside and trainer.step == 2 - inside  # samples of the third iteration
    found = caught.value if caught.value is error else caught.value.__cause__
    assert found is error
    assert "fail_in_the_second_call" in [frame.name for frame in traceback.extract_tb(found.__traceback__)]
    folder = home.path / "run" / "bad_batch-3"
    told = str(caught.value) if kind is RolloutError else caught.value.__notes__[0]
    assert "iteration 3" in told and f"its prompts are in {folder}" in told
    batch = json.loads((folder / "batch.json").read_text())
    assert batch["iteration"] == 3 and batch["bad"] == [str(error)]
    cursor = home.trainer("other", num_responses=2, **AHEAD)
    wanted = [cursor.next_prompts() for _ in range(3)][-1][::2]
    assert batch["responses"] == [{name: row[name] for name in ("prompt", "prompt_ids")} for row in wanted]


def test_engines_that_read_what_trains_are_refused(home):
    for engine in ("builtin", "generate", "generate_batch"):
        with pytest.raises(
            ValueError, match=f"^rollout_ahead: got 1 with rollout_engine {engine}, which reads the weig"
        ):
            PPOConfig(rollout_ahead=1, rollout_engine=engine)
    for name, lacks in {
        "Unready": "no concurrent", "Server": "no concurrent", "silent": "no concurrent and no update_weights"
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=rf"^rollout_ahead: got 1 .*:{name}, which has {lacks}; want an engine"):
            home.trainer(rollout_ahead=1, rollout_engine=f"{SERVER}:{name}")
    for wrong in (2, -1, 0.5, True):
        with pytest.raises(ValueError, match=r"^rollout_ahead: got .*, wants a whole number in \[0, 1\]"):
            PPOConfig(rollout_ahead=wrong, rollout_engine=f"{SERVER}:Elsewhere")
    home.trainer(max_steps=1, save_steps=1, **AHEAD).train()
    with pytest.raises(ValueError, match=r"^rollout_ahead: .* by a run with 1, this run has 0"):
        home.trainer(max_steps=2, resume_from_checkpoint="true", **AHEAD | {"rollout_ahead": 0})


@pytest.mark.parametrize("kind", ["none", "token"])
def test_without_a_correction_it_is_told_once(home, caplog, kind):
    with caplog.at_level(logging.WARNING, "rlhf"):
        trainer = home.trainer(max_steps=2, **AHEAD | {"rollout_correction": kind})
        trainer.train()
    told = [record.message for record in caplog.records if record.message.startswith("rollout_ahead")]
    assert len(told) == (kind == "none") and all("rollout_correction none does not weigh them" in text for text in told)


def test_the_limit_of_the_gap_holds_where_weights_are_equal(home, caplog):
    """Then steps of training lie between the two, which are told beyond the limit, and stop nothing."""
    trainer = home.trainer(**AHEAD)
    experience, _ = experience_of(trainer)
    experience.rollouts.log_probs = [
        [x - 0.07 for x in row[keep].tolist()] for row, keep in zip(experience.log_probs, experience.mask)
    ]
    with caplog.at_level(logging.WARNING, "rlhf"):
        compare_engine(trainer, experience, older=True)
        assert not caplog.records  # under the limit of 0.1; rollout_gap_warning of 0.05 is for equal weights
        trainer.args.rollout_gap_limit = 0.06
        assert compare_engine(trainer, experience, older=True)["rollout/logprob_gap_mean"] == pytest.approx(0.07)
    assert len(caplog.records) == 1 and "or no new weights reach the engine" in caplog.records[0].message
    with pytest.raises(RolloutError, match="rollout_gap_limit sets the limit"):
        compare_engine(trainer, experience, older=False)


def test_an_engine_that_forgets_its_weights_is_told(home, caplog):
    options = AHEAD | {"rollout_engine": f"{SERVER}:Forgetful", "learning_rate": 1e-2, "max_steps": 6}
    train_ppo(home.config(**options))
    gaps = [row["rollout/logprob_gap_mean"] for row in home.rows()]
    assert gaps[0] < 1e-5 and gaps[-1] > 0.1
    told = json.loads((home.path / "run" / "run.json").read_text())["health"]
    first = next(number for number, gap in enumerate(gaps, 1) if gap > 0.1)
    assert [(entry["step"], entry["guard"]) for entry in told if entry["guard"] == "rollout_gap"] == [
        (first, "rollout_gap")
    ]


def test_one_batch_at_a_time():
    ahead, go = Ahead(), threading.Event()
    assert not ahead
    ahead.start(BATCH.rows, lambda: go.wait(LONG) and BATCH.rollouts)
    assert ahead and ahead.rows == BATCH.rows
    with pytest.raises(RuntimeError, match="those before have not been taken"):
        ahead.start([1], lambda: None)
    go.set()
    assert ahead.wait() is ahead.wait() and ahead.wait().rollouts is BATCH.rollouts and ahead.wait().seconds > 0
    assert ahead.take().rows == BATCH.rows and not ahead


def test_a_checkpoint_holds_the_batches_of_all_processes(tmp_path):
    other = dataclasses.replace(BATCH, rows=[2], rollouts=Rollouts([[8]], [[4]], [False]))
    save_ahead([BATCH, other], tmp_path)
    assert load_ahead(tmp_path, 0).take() == BATCH and load_ahead(tmp_path, 1).take() == other
    (tmp_path / "empty").mkdir()
    save_ahead([None, None], tmp_path / "empty")
    assert not load_ahead(tmp_path / "empty", 0) and not list((tmp_path / "empty").iterdir())
