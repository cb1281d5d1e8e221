"""The trainers from Python: objects in place of paths give the same run to the bit, in TRL's order and names."""

import inspect
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, EarlyStoppingCallback, TrainerCallback

import rlhf
from rlhf import (
    DPOConfig,
    DPOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
    data,
    models,
)
from rlhf.ppo import train_ppo
from rlhf.preference import pair_log_probs
from rlhf.reward import train_reward
from rlhf.sft import train_sft
from tests.tiny import language_model, model_folder, word_tokenizer, write_jsonl
from tests.tiny_ppo import TIMINGS

STORIES = [{"prompt": f"{word} the", "completion": f"dog ran {word}"} for word in "abcdefgh"]
RANKED = [
    {"prompt": row["prompt"], "completions": [row["completion"], "cat sat", "up"], "ranks": [0, 1, 1]}
    for row in STORIES
]
PAIRS = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "cat sat"} for row in STORIES]
TRL = {  # parameters of TRL 1.16's trainers, and of 1.12's PPOTrainer
    "SFTTrainer": "model args data_collator train_dataset eval_dataset processing_class compute_loss_func "
    "compute_metrics callbacks optimizers optimizer_cls_and_kwargs preprocess_logits_for_metrics "
    "quantization_config peft_config formatting_func",
    "RewardTrainer": "model args data_collator train_dataset eval_dataset processing_class compute_metrics callbacks "
    "optimizers optimizer_cls_and_kwargs preprocess_logits_for_metrics quantization_config peft_config",
    "DPOTrainer": "model ref_model args data_collator train_dataset eval_dataset processing_class compute_metrics "
    "callbacks optimizers quantization_config peft_config",
    "KTOTrainer": "model ref_model args data_collator train_dataset eval_dataset processing_class compute_metrics "
    "callbacks optimizers quantization_config peft_config",
    "PPOTrainer": "args processing_class model ref_model reward_model train_dataset value_model data_collator "
    "eval_dataset optimizers callbacks peft_config",
}


@pytest.fixture
def policy(tmp_path):
    return model_folder(tmp_path / "policy")


@pytest.fixture
def options(tmp_path):
    """settings(name) -> keyword arguments of a stage's config whose run lies in the folder `name`."""

    def make(name, **changes):
        fixed = {"use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2, "logging_steps": 1, "max_steps": 3}
        return {"output_dir": str(tmp_path / name), **fixed, "save_strategy": "no", **changes}

    return make


def same(first, second):
    first, second = (model.state_dict() if hasattr(model, "state_dict") else model for model in (first, second))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def log_of(folder):
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in (*TIMINGS, "train/seconds")} for line in lines]


@pytest.mark.parametrize("name", TRL)
def test_signatures_are_trls(name):
    parameters = inspect.signature(getattr(rlhf, name)).parameters
    positional = [parameter.name for parameter in parameters.values() if parameter.kind != parameter.KEYWORD_ONLY]
    assert positional == TRL[name].split()


STAGES = {
    "sft": (SFTConfig, SFTTrainer, train_sft, STORIES, models.load_policy),
    "reward": (RewardConfig, RewardTrainer, train_reward, RANKED, models.load_reward_model),
}


@pytest.mark.parametrize("stage", STAGES)
def test_objects_give_the_run_of_paths(tmp_path, policy, options, stage):
    config, trainer_class, run, rows, load = STAGES[stage]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    run(config(model_name_or_path=policy, dataset_name=file, **options("paths")))
    model, tokenizer = models.load_policy(policy), models.load_tokenizer(policy)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainer = trainer_class(model, config(**options("objects")), train_dataset=rows, processing_class=tokenizer)
    result = trainer.train()
    assert result.global_step == 3
    assert log_of(tmp_path / "objects") == log_of(tmp_path / "paths")
    assert same(load(tmp_path / "objects"), load(tmp_path / "paths"))
    assert same(trainer.model, load(tmp_path / "objects"))
    if stage == "sft":
        assert trainer.model is model
    else:  # the language model was only copied
        assert same(model, before)


@pytest.mark.parametrize("kind", [str, Path])
def test_reward_models_start_from_paths(tmp_path, policy, options, kind):
    """Of a language model, or of a reward model, as an argument and in the settings."""
    models.save_model(models.reward_model_from_policy(policy, 3), word_tokenizer(), tmp_path / "rm")
    for start in (policy, tmp_path / "rm"):
        config = RewardConfig(model_name_or_path=str(start), **options("run"))
        settings = RewardTrainer(None, config, train_dataset=RANKED)
        argument = RewardTrainer(kind(start), RewardConfig(**options("run")), train_dataset=RANKED)
        assert same(settings.model, argument.model)


@pytest.mark.parametrize("before", [True, False, None])
def test_the_models_use_cache_is_kept(tmp_path, policy, options, before):
    """In the object and in what is saved, the checkpoint too; None: without one, as some that take images."""
    model, args = models.load_policy(policy), options("run", max_steps=2, save_steps=1, save_strategy="steps")
    del model.config.use_cache
    if before is not None:
        model.config.use_cache = before
    SFTTrainer(model, SFTConfig(**args), train_dataset=STORIES, processing_class=word_tokenizer()).train()
    saved = [json.loads((tmp_path / "run" / name / "config.json").read_text()) for name in (".", "checkpoint-1")]
    for config in (vars(model.config), *saved):
        assert config.get("use_cache") is before


def test_a_model_wrapped_by_torch_compile_is_refused(tmp_path, policy, options):
    message = "^{}: got a {} wrapped by torch.compile, wants the model itself .*$"
    model = torch.compile(models.load_policy(policy))
    for trainer_class, rows in ((SFTTrainer, STORIES), (RewardTrainer, RANKED), (DPOTrainer, PAIRS)):
        with pytest.raises(ValueError, match=message.format("model", "LlamaForCausalLM")):
            trainer_class(
                model, args=trainer_class.config_class(**options("run")), train_dataset=rows,
                processing_class=word_tokenizer(),
            )  # fmt: skip
    classifier = torch.compile(models.reward_model_from_policy(policy, 0))
    with pytest.raises(ValueError, match=message.format("reward_model", "LlamaForSequenceClassification")):
        models.as_reward_model(classifier)
    args = PPOConfig(output_dir=str(tmp_path / "ppo"), response_length=4, max_steps=1)
    with pytest.raises(ValueError, match=message.format("model", "LlamaForCausalLM")):
        PPOTrainer(
            args, word_tokenizer(), model, reward_model=models.reward_model_from_policy(policy, 0),
            train_dataset=[{"prompt": "the"}],
        )  # fmt: skip


def test_early_stopping(policy, options):
    """transformers' own callback finds the metrics that evaluate() returns."""
    args = SFTConfig(**options(
        "run", max_steps=6, eval_strategy="steps", eval_steps=1, learning_rate=0.0, metric_for_best_model="eval_loss"
    ))  # fmt: skip
    stop = EarlyStoppingCallback(early_stopping_patience=1)
    trainer = SFTTrainer(policy, args, train_dataset=STORIES, eval_dataset=STORIES[:2], callbacks=[stop])
    assert trainer.train().global_step == 2


@pytest.mark.parametrize("trainer_class", [SFTTrainer, RewardTrainer])
def test_what_save_model_writes_can_be_read(tmp_path, policy, options, trainer_class):
    before = os.umask(0o022)
    try:
        rows = STORIES if trainer_class is SFTTrainer else RANKED
        trainer = trainer_class(policy, trainer_class.config_class(**options("run")), train_dataset=rows)
        trainer.save_model(str(tmp_path / "saved"))
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "saved").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o644}
    assert any(path.name == "model.safetensors" for path in files)


@pytest.mark.parametrize(
    ("given", "wanted"), [(True, "true"), (False, "false"), ("auto", "auto"), ("True", "true"), ("maybe", None)]
)
def test_packing_may_be_a_bool(options, given, wanted):
    if wanted is None:
        with pytest.raises(ValueError, match="packing: got 'maybe', wants auto, true or false"):
            SFTConfig(**options("run", packing=given))
    else:
        assert SFTConfig(**options("run", packing=given)).packing == wanted


def test_ppo_packing_may_be_a_bool(home):
    assert [home.config(packing=value).packing for value in (True, False)] == ["auto", "false"]


def test_a_second_call_goes_on(tmp_path, policy, options):
    """To the bits of the one call, with one line a step in the log."""
    changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    once = SFTTrainer(policy, SFTConfig(**options("once", **changes)), train_dataset=STORIES)
    once.train()
    twice = SFTTrainer(policy, SFTConfig(**options("twice", **changes)), train_dataset=STORIES)
    twice.train()
    with pytest.raises(ValueError, match=r"output_dir: .* already holds a run"):
        twice.train()
    twice.train(resume_from_checkpoint=str(tmp_path / "twice" / "checkpoint-2"))
    assert same(once.model, twice.model)
    once, twice = ([row for row in log_of(tmp_path / name) if "train/loss" not in row] for name in ("once", "twice"))
    assert once == twice  # but for transformers' mean over the steps of a call


def test_a_reward_model_that_is_given_is_trained(policy, options):
    model = models.reward_model_from_policy(policy, 3)
    model.config.reward_bias = 2.0
    trainer = RewardTrainer(model, RewardConfig(**options("run")), train_dataset=RANKED, processing_class=policy)
    trainer.train()
    assert trainer.model is model
    demonstrations = trainer.scores(trainer.demonstrations)[0]
    assert sum(map(sum, demonstrations)) / len(demonstrations) == pytest.approx(0, abs=1e-5)  # calibrated, once


def test_a_datasets_dataset(options, policy):
    datasets = pytest.importorskip("datasets")
    rows = [{**row, "note": None if number % 2 else "x"} for number, row in enumerate(STORIES)]
    runs = []
    for name, given in (("list", STORIES), ("dataset", datasets.Dataset.from_list(rows))):
        trainer = SFTTrainer(policy, SFTConfig(**options(name)), train_dataset=given, eval_dataset=given)
        trainer.train()
        runs.append(trainer.model)
    assert same(*runs)
    with pytest.raises(ValueError, match="train_dataset: got a DatasetDict of train, wants one split's rows"):
        SFTTrainer(policy, SFTConfig(**options("dict")), train_dataset=datasets.DatasetDict(train=given))


def test_rows_are_checked(policy, options):
    with pytest.raises(data.DataError, match=r"train_dataset\[1\]: lacks the field `completion` \(has 'prompt'\)"):
        SFTTrainer(policy, SFTConfig(**options("run")), train_dataset=[STORIES[0], {"prompt": "a", "completion": None}])
    with pytest.raises(data.DataError, match="eval_dataset: holds no rows"):
        SFTTrainer(policy, SFTConfig(**options("run")), train_dataset=STORIES, eval_dataset=[])
    with pytest.raises(ValueError, match="train_dataset: got int, wants a list of dicts"):
        SFTTrainer(policy, SFTConfig(**options("run")), train_dataset=7)


def test_formatting_func(policy, options):
    def text(row):
        return f"{row['prompt']} {row['completion']}"

    given = SFTTrainer(policy, SFTConfig(**options("a")), train_dataset=STORIES, formatting_func=text)
    wanted = SFTTrainer(policy, SFTConfig(**options("b")), train_dataset=[{"text": text(row)} for row in STORIES])
    assert [example["responses"] for example in given.train_dataset] == [
        example["responses"] for example in wanted.train_dataset
    ]


def test_evaluation_of_other_rows(policy, options):
    trainer = SFTTrainer(policy, SFTConfig(**options("run", eval_fraction=0.0)), train_dataset=STORIES)
    with pytest.raises(ValueError, match="eval_dataset: got none, and the run holds no rows out"):
        trainer.evaluate()
    apart = [trainer.evaluate([row])["eval_loss"] for row in STORIES[:2]]
    assert trainer.evaluate(STORIES[:2])["eval_loss"] == pytest.approx(sum(apart) / 2, rel=1e-5)  # of equal length


def test_the_reference_of_dpo_may_be_another_model(policy, options):
    tokenizer = word_tokenizer()
    other = language_model(tokenizer, seed=5)
    args = DPOConfig(**options("run", eval_fraction=0.0))
    trainer = DPOTrainer(policy, other, args, train_dataset=PAIRS)
    trainer.train()
    batch = trainer.collate(trainer.train_dataset)
    with torch.no_grad():
        wanted, _ = pair_log_probs(models.as_policy(other), batch)
    assert torch.allclose(batch["ref_log_probs"], wanted, atol=1e-4, rtol=0)
    own, _ = pair_log_probs(models.load_policy(policy), batch)
    assert (own - wanted).abs().min() > 1e-2
    with pytest.raises(ValueError, match="ref_model: got the model itself"):
        DPOTrainer(other, other, args, train_dataset=PAIRS)


def given(home, kind="llama"):
    """The objects that `home.config()` names by their paths."""
    rows = [json.loads(line) for line in (home.path / "prompts.jsonl").read_text().splitlines()]
    return {
        "processing_class": models.load_tokenizer(home.path / kind),
        "model": models.load_policy(home.path / kind),
        "reward_model": models.load_reward_model(home.path / f"{kind}-rm"),
        "train_dataset": rows,
    }


def without_paths(home, out, **options):
    return home.config(out, sft_model_path="demo", reward_model_path=None, dataset_name=None, **options)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_ppo_with_objects_is_ppo_with_paths(home, kind):
    train_ppo(home.config("paths", kind))
    objects = given(home, kind)
    trainer = PPOTrainer(without_paths(home, "objects"), **objects)
    assert trainer.train() == home.path / "objects"
    assert trainer.policy is objects["model"]
    assert log_of(home.path / "objects") == log_of(home.path / "paths")
    assert same(models.load_policy(home.path / "objects"), models.load_policy(home.path / "paths"))
    assert same(objects["reward_model"], models.load_reward_model(home.path / f"{kind}-rm"))
    config = json.loads((home.path / "objects/run.json").read_text())["config"]
    assert config["sft_model_path"] == str(home.path / kind)


def test_ppo_with_objects_resumes_to_the_same_bits(home):
    whole = PPOTrainer(without_paths(home, "whole", max_steps=3), **given(home))
    whole.train()
    PPOTrainer(without_paths(home, "parts", max_steps=1, save_steps=1), **given(home)).train()
    again = without_paths(home, "parts", max_steps=3, save_steps=1, resume_from_checkpoint="true")
    objects = given(home)
    PPOTrainer(again, **objects).train()
    assert same(objects["model"], whole.policy)
    assert log_of(home.path / "parts") == log_of(home.path / "whole")


def test_models_of_ppo_that_cannot_be_used(home):
    objects = given(home)
    with pytest.raises(ValueError, match="ref_model: got the policy itself"):
        PPOTrainer(without_paths(home, "run"), **objects, ref_model=objects["model"])
    with pytest.raises(ValueError, match="reward_tokenizer: got 'auto' with a reward_model that is no path"):
        PPOTrainer(without_paths(home, "run", reward_tokenizer="auto"), **objects)
    with pytest.raises(ValueError, match="has 2 labels, a reward model has 1"):
        wrong = given(home)
        wrong["reward_model"].config.num_labels = 2
        PPOTrainer(without_paths(home, "run"), **wrong)
    with pytest.raises(ValueError, match="data_collator: got function, wants None"):
        PPOTrainer(without_paths(home, "run2"), **objects, data_collator=lambda rows: rows)


class Noted(TrainerCallback):
    def __init__(self, stop_at=None):
        self.events, self.stop_at = [], stop_at

    def on_train_begin(self, args, state, control, **kwargs):
        self.events.append(("begin", state.max_steps))

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.stop_at

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.events.append(("log", state.global_step, logs["objective/kl"]))

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.events.append(("end", model.config.model_type))


def test_transformers_callbacks_in_ppo(home):
    noted, functions = Noted(stop_at=2), []
    trainer = home.trainer("run", max_steps=5, callbacks=[noted, lambda *told: functions.append(told[1])])
    trainer.train()
    kl = [row["objective/kl"] for row in home.rows()]
    assert noted.events == [("begin", 5), ("log", 1, kl[0]), ("log", 2, kl[1]), ("end", "llama")]
    assert functions == [1, 2]
    with pytest.raises(ValueError, match=r"callbacks: got 3, wants functions or transformers\.TrainerCallback"):
        home.trainer("other", callbacks=[3])


def test_adapters_by_peft_config(home, policy, options):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"])
    trainer = SFTTrainer(policy, SFTConfig(**options("run")), train_dataset=STORIES, peft_config=lora)
    trainer.train()
    assert {tuple(w.shape) for name, w in trainer.model.named_parameters() if "lora_A" in name} == {(3, 16)}
    merged, start = models.load_policy(trainer.args.output_dir).state_dict(), models.load_policy(policy).state_dict()
    moved = {name for name in start if not torch.equal(merged[name], start[name])}
    assert moved and all("q_proj" in name for name in moved)
    ppo = PPOTrainer(without_paths(home, "ppo"), **given(home), peft_config=lora)
    assert {tuple(w.shape) for name, w in ppo.policy.named_parameters() if "lora_A" in name} == {(3, 16)}
    ppo.train()
    with pytest.raises(ValueError, match="model: got a PEFT model"):
        PPOTrainer(without_paths(home, "other"), **{**given(home), "model": ppo.policy})
    with pytest.raises(ValueError, match="peft_config: got one with a model that has adapters already"):
        SFTTrainer(trainer.model, SFTConfig(**options("x")), train_dataset=STORIES, peft_config=lora)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data_collator": len}, "data_collator: got builtin_function_or_method, wants None: the trainer makes"),
        ({"compute_metrics": len}, "compute_metrics: got builtin_function_or_method, wants None"),
        ({"args": RewardConfig(use_cpu=True)}, "args: got RewardConfig, wants SFTConfig"),
        ({"train_dataset": None}, "dataset_name: got none, wants the data to train on"),
        ({"processing_class": 7}, "processing_class: got int, wants a tokenizer of transformers"),
        ({"peft_config": {"r": 4}}, "peft_config: got dict, wants a peft.LoraConfig"),
        ({"callbacks": [5]}, "callbacks: got 5, wants transformers.TrainerCallback objects"),
        ({"callbacks": TrainerCallback()}, "callbacks: got TrainerCallback, wants a list"),
        ({"train_dataset": STORIES[:1]}, "eval_fraction: got 0.1, but rows: got 1 distinct prompt"),
        ({"train_dataset": "x.jsonl", "formatting_func": len}, "formatting_func: got one with a file"),
    ],
)
def test_arguments_that_mean_nothing_here(policy, options, arguments, message):
    with pytest.raises(ValueError, match=message):
        SFTTrainer(policy, **{"args": SFTConfig(**options("run")), "train_dataset": STORIES, **arguments})


def test_models_that_are_none(policy, options):
    with pytest.raises(ValueError, match="model: got int, wants a model of transformers, or its path"):
        SFTTrainer(5, SFTConfig(**options("run")), train_dataset=STORIES)
    two = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=2)
    with pytest.raises(ValueError, match="model has 2 labels, a reward model has 1"):
        RewardTrainer(two, RewardConfig(**options("run")), train_dataset=RANKED)
    classifier = models.reward_model_from_policy(policy, 0)
    with pytest.raises(ValueError, match="model: got LlamaForSequenceClassification, wants a causal language model"):
        SFTTrainer(classifier, SFTConfig(**options("run")), train_dataset=STORIES, processing_class=policy)


def test_models_that_are_none_in_ppo(home):
    objects, args = given(home), without_paths(home, "run")
    policy = objects["model"]
    for name in ("reward_model", "value_model"):
        for wrong in (4, policy):
            with pytest.raises(ValueError, match=f"{name}: got {type(wrong).__name__}, wants a sequence classifier"):
                PPOTrainer(without_paths(home, f"{name}-{wrong is policy}"), **{**objects, name: wrong})
    with pytest.raises(ValueError, match="args: got SFTConfig, wants PPOConfig"):
        PPOTrainer(SFTConfig(use_cpu=True), **objects)
    with pytest.raises(ValueError, match=r"reward_model_path: got none, .* \(in Python reward_model, reward_fn\)"):
        PPOTrainer(args, **{**objects, "reward_model": None})


def test_save_model_of_ppo(home, tmp_path):
    trainer = PPOTrainer(without_paths(home, "run"), **given(home))
    trainer.train()
    trainer.save_model(tmp_path / "again")
    assert same(models.load_policy(tmp_path / "again"), trainer.policy)


def test_a_model_without_a_tokenizer(options):
    model = language_model(word_tokenizer())
    with pytest.raises(ValueError, match="model path 'LlamaForCausalLM' does not exist"):
        SFTTrainer(model, SFTConfig(**options("run")), train_dataset=STORIES)
    trainer = SFTTrainer(model, SFTConfig(**options("run")), train_dataset=STORIES, processing_class=word_tokenizer())
    assert trainer.args.model_name_or_path == "LlamaForCausalLM"
    with pytest.raises(ValueError, match="processing_class has no pad_token"):
        SFTTrainer(model, SFTConfig(**options("x")), train_dataset=STORIES, processing_class=word_tokenizer(pad=None))
