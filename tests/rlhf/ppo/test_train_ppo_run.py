"""PPO runs as a whole: resuming to the bit, what a run writes and refuses, when it stops, and whether it learns."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import normalizers

from rlhf import models
from rlhf.ppo import PPOTrainer, train_ppo
from tests.tiny_ppo import EOS, PAD, WORDS, bananas, equal, make_tokenizer, weights

FULL = {
    "temperature": 0.7, "num_ppo_epochs": 2, "ptx_coef": 0.5, "ema_decay": 0.9, "kl_target": 0.3, "kl_horizon": 50,
    "warmup_iterations": 3, "num_responses": 2, "save_total_limit": None, "learning_rate": 3e-3,
}  # fmt: skip


def comparable(rows):
    timings = ("time", "throughput", "eps", "tokens_per_sec")
    return [{name: value for name, value in row.items() if not name.startswith(timings)} for row in rows]


def run_files(folder):
    return sorted(path for path in folder.rglob("*.safetensors") if "checkpoint-2" not in str(path))


def assert_same_run(home, first, second):
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert comparable(home.rows(first, file)) == comparable(home.rows(second, file))
    pairs = list(zip(run_files(home.path / first), run_files(home.path / second), strict=True))
    assert len(pairs) == 5  # policy and value, final and checkpoint-4, and the average
    assert all(equal(load_file(a), load_file(b)) for a, b in pairs)


def test_trap_28_resume_is_the_same_to_the_bit(home):
    options = FULL | {"ptx_dataset_name": str(home.path / "text.txt"), "save_steps": 2}
    train_ppo(home.config("whole", max_steps=4, **options))
    train_ppo(home.config("halves", max_steps=2, **options))
    torch.manual_seed(999)
    train_ppo(home.config("halves", max_steps=4, resume_from_checkpoint="true", **options))
    assert [row["step"] for row in home.rows("halves")] == [1, 2, 3, 4]
    assert_same_run(home, "whole", "halves")
    final, average = (weights(models.load_policy(home.path / "whole" / name)) for name in ("", "checkpoint-4"))
    assert not equal(final, average)  # the run hands on the average of the weights, the checkpoint the weights


@pytest.mark.parametrize("place", ["rollout", "update", "save"])
def test_trap_28_a_killed_iteration_is_done_again(home, place, monkeypatch):
    options = FULL | {"ptx_dataset_name": str(home.path / "text.txt"), "save_steps": 1}
    train_ppo(home.config("whole", max_steps=3, **options))
    name = {"rollout": "sample", "update": "update", "save": "save_checkpoint"}[place]
    original, calls = getattr(PPOTrainer, name), []

    def killed(self, *args):
        calls.append(1)
        if len(calls) == {"rollout": 2, "update": 7, "save": 2}[place]:
            raise KeyboardInterrupt
        return original(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PPOTrainer, name, killed)
        train_ppo(home.config("killed", max_steps=3, **options))
    train_ppo(home.config("killed", max_steps=3, resume_from_checkpoint="true", **options))
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert comparable(home.rows("whole", file)) == comparable(home.rows("killed", file))
    whole, again = (weights(models.load_policy(home.path / out / "checkpoint-3")) for out in ("whole", "killed"))
    assert equal(whole, again)


def test_ema_is_the_average_and_is_handed_on(home):
    seen = []
    note = [lambda trainer, step, metrics: seen.append(weights(trainer.policy))]
    trainer = home.trainer(ema_decay=0.9, max_steps=3, callbacks=note)
    expected = {name: weight.double() for name, weight in weights(trainer.policy).items()}
    trainer.train()
    for snapshot in seen:
        expected = {name: 0.9 * weight + 0.1 * snapshot[name].double() for name, weight in expected.items()}
    saved = weights(models.load_policy(home.path / "run"))
    for name, weight in expected.items():
        torch.testing.assert_close(saved[name].double(), weight, rtol=0, atol=1e-6)
    assert equal(seen[-1], weights(trainer.policy))


def test_the_run_directory(home):
    folder = train_ppo(home.config(save_steps=1, save_total_limit=1, num_logged_samples=3))
    assert folder == home.path / "run"
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json", "value"}
    assert [path.name for path in folder.iterdir() if path.name.startswith("checkpoint")] == ["checkpoint-2"]
    run = json.loads((folder / "run.json").read_text())
    assert run["stage"] == "ppo" and run["config"]["max_steps"] == 2 and run["summary"]["iterations"] == 2
    assert {"step", "prompt", "completion", "score"} == set(home.rows(file="samples.jsonl")[0])
    assert len(home.rows(file="samples.jsonl")) == 6
    names = (
        "objective/kl objective/entropy objective/scores objective/rlhf_reward objective/non_score_reward "
        "objective/kl_coef policy/approxkl_avg policy/clipfrac_avg policy/entropy_avg loss/policy_avg loss/value_avg "
        "val/ratio val/ratio_var val/clipfrac_avg val/num_eos_tokens val/explained_variance completions/mean_length "
        "completions/clipped_ratio eps episode lr step time"
    )
    assert set(names.split()) <= set(home.rows()[0])
    first = home.rows()[0]
    total = first["objective/scores"] + first["objective/non_score_reward"]
    assert first["objective/rlhf_reward"] == pytest.approx(total) and first["episode"] == 8
    models.load_policy(folder)
    models.load_reward_model(folder / "value")


def test_episodes_and_epochs_give_the_iterations(home):
    assert home.trainer("a", max_steps=-1, total_episodes=50).iterations == 7
    trainer = home.trainer("b", max_steps=-1, num_train_epochs=2.0, rollout_batch_size=None, num_mini_batches=2)
    assert (trainer.local_batch_size, trainer.mini_batch_size, trainer.iterations) == (8, 4, 2)
    seen = [row["prompt"] for _ in range(3) for row in trainer.next_prompts()]
    counts = [seen.count(row["prompt"]) for row in trainer.prompts]
    assert counts == [4] * 6  # 24 draws of 6 prompts: each comes once an epoch


BANANA_RUN = {
    "rollout_batch_size": 64, "per_device_train_batch_size": 32, "num_ppo_epochs": 2, "learning_rate": 3e-3,
    "max_steps": 30, "cliprange_value": 5.0, "value_learning_rate": 1e-2,
}  # fmt: skip


@pytest.mark.slow
def test_banana(home):
    """Reward 1 for each "banana": without a tether only bananas are left, a huge beta does not move."""
    ends = {}
    for beta in (0.0, 0.5, 100.0):
        train_ppo(home.config(f"beta{beta}", reward_model_path=None, kl_coef=beta, **BANANA_RUN), reward_fn=bananas)
        rows = home.rows(f"beta{beta}")
        start, end = rows[0], rows[-5:]
        ends[beta] = {
            name: sum(row[name] for row in end) / 5
            for name in ("objective/scores", "objective/kl", "policy/entropy_avg", "completions/mean_length")
        }
    before, collapsed, middle, held = start["objective/scores"], ends[0.0], ends[0.5], ends[100.0]
    assert collapsed["objective/scores"] > 0.9 * 8 and collapsed["policy/entropy_avg"] < 0.3
    assert abs(held["objective/scores"] - before) < 0.4 and held["objective/kl"] < 1.5 < 15 < collapsed["objective/kl"]
    assert before + 0.7 < middle["objective/scores"] < 4 and middle["policy/entropy_avg"] > 1.5
    assert held["objective/kl"] < middle["objective/kl"] < collapsed["objective/kl"]


def test_max_kl_ends_the_run(home):
    options = BANANA_RUN | {"kl_coef": 0.0, "max_kl": 1.0, "reward_model_path": None, "save_steps": 1}
    options["save_total_limit"] = None
    train_ppo(home.config(**options), reward_fn=bananas)
    rows = home.rows()
    handed_on, measured = (
        weights(models.load_policy(home.path / "run" / name)) for name in ("", f"checkpoint-{len(rows) - 2}")
    )
    assert equal(handed_on, measured)  # the policy that the last but one iteration sampled from
    (home.path / "run" / "model.safetensors").unlink()
    resumed = home.config(resume_from_checkpoint=str(home.path / "run" / f"checkpoint-{len(rows) - 1}"), **options)
    train_ppo(resumed, reward_fn=bananas)
    assert equal(handed_on, weights(models.load_policy(home.path / "run")))
    assert comparable(rows) == comparable(home.rows())
    assert len(rows) < 30 and rows[-1]["objective/kl"] > 1.0 and all(row["objective/kl"] <= 1.0 for row in rows[:-1])
    assert "policy/approxkl_avg" not in rows[-1]
    run = json.loads((home.path / "run" / "run.json").read_text())
    assert run["summary"]["stopped"].startswith("max_kl") and (home.path / "run" / f"checkpoint-{len(rows)}").is_dir()


def test_callbacks_and_reward_functions(home):
    seen = []

    def reward(prompts, completions, completion_ids, **columns):
        seen.append((prompts, completions, completion_ids))
        return [1.0] * len(prompts)

    train_ppo(home.config(reward_model_path=None, max_steps=9), reward_fn=reward, callbacks=[lambda t, s, m: s == 2])
    assert len(seen) == len(home.rows()) == 2
    prompts, completions, ids = seen[0]
    assert prompts[0] in ["the cat", "a dog sat on", "it", "the dog and the cat ran", "the mat", "a cat saw it"]
    assert completions[0].split() == [WORDS[token] for token in ids[0] if token not in (PAD, 1, EOS)]
    with pytest.raises(ValueError, match="reward_fn: got 2 scores, want 8 finite"):
        train_ppo(home.config("few", reward_model_path=None), reward_fn=lambda *args: [1.0, 2.0])
    with pytest.raises(ValueError, match="finite"):
        train_ppo(home.config("nan", reward_model_path=None), reward_fn=lambda p, *args: [math.nan] * len(p))


def test_nan_stops_the_run(home):
    trainer = home.trainer(save_steps=1)
    with torch.no_grad():
        trainer.value.score.weight[:] = torch.nan
    with pytest.raises(FloatingPointError, match=r"iteration 1: values, advantages, returns became NaN"):
        trainer.train()
    assert not list((home.path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rollout_batch_size": 10}, "rollout_batch_size: got 10, want a multiple of"),
        ({"num_responses": 3}, "num_responses: got 3, want a divisor of 8"),
        ({"reward_model_path": None}, "reward_model_path: got none, want a reward model"),
        ({"dataset_name": None}, "dataset_name: got none"),
        (
            {"response_length": 43, "long_prompts": "error"},
            "the prompt has 6 tokens; with response_length 43 .*policy's context of 48",
        ),
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"ptx_coef": 1.0}, "ptx_dataset_name: got none"),
        ({"ptx_coef": -1.0}, "ptx_coef: got -1.0"),
        ({"reward_clip_range": [1.0]}, "reward_clip_range: got"),
        ({"lr_scheduler_type": "square"}, "lr_scheduler_type: got 'square'"),
        ({"kl_coef": -0.1}, "kl_coef: got -0.1"),
        ({"kl_target": 0.0}, "kl_target: got 0.0"),
        ({"ema_decay": 1.0}, "ema_decay: got 1.0"),
        ({"report_to": "wandb"}, "report_to: got 'wandb'"),
        ({"on_health": "panic"}, "on_health: got 'panic', wants warn, stop or ignore"),
        ({"health_patience": 0}, "health_patience: got 0"),
        ({"rollout_engine": "sglang"}, "rollout_engine: got 'sglang', want builtin, generate, generate_batch, vllm"),
        ({"lora_dropout": 0.1}, "lora_dropout: got 0.1, wants 0: with dropout an unchanged"),
        ({"sft_model_path": "/no/such/model"}, "/no/such/model"),
    ],
)
def test_bad_input(home, options, message):
    with pytest.raises(ValueError, match=message):
        home.trainer(**options)


def test_a_prompt_that_gives_no_tokens_is_named_before_the_run(home):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    (home.path / "odd.jsonl").write_text('{"prompt": "the cat"}\n{"prompt": "~"}\n')
    with pytest.raises(ValueError, match=r"odd\.jsonl:2: the prompt gives no tokens$"):
        PPOTrainer(home.config(dataset_name=str(home.path / "odd.jsonl")), processing_class=tokenizer)


def test_an_output_dir_that_holds_a_run_is_refused(home):
    train_ppo(home.config(max_steps=1))
    with pytest.raises(ValueError, match="already holds a run"):
        train_ppo(home.config(max_steps=1))


@pytest.mark.parametrize("setting", ["sft_model_path", "reward_model_path"])
def test_a_run_does_not_go_on_with_another_reference_or_reward_model(home, setting):
    options = {"use_peft": True} if setting == "sft_model_path" else {}
    train_ppo(home.config(max_steps=1, save_steps=1, **options))
    other = models.load_policy(home.path / "llama") if options else models.load_reward_model(home.path / "llama-rm")
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    models.save_model(other, make_tokenizer(), home.path / "other")
    again = home.config(max_steps=2, resume_from_checkpoint="true", **options, **{setting: str(home.path / "other")})
    with pytest.raises(ValueError, match=f"^{setting}: holds other weights than when .*checkpoint-1 was written"):
        train_ppo(again)
