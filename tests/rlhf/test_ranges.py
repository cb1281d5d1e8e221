"""Every number of every stage and tool has a range, which the command, YAML and Python are held to alike."""

import dataclasses
import math
import typing
from types import UnionType

import pytest
from transformers import TrainingArguments

from rlhf import cli, evaluate, pipeline
from rlhf.demo.run import DemoConfig
from rlhf.ppo import PPOConfig
from rlhf.preference import DPOConfig, KTOConfig
from rlhf.ranges import above, at_least, check_value, within
from rlhf.reward import RewardConfig
from rlhf.sft import SFTConfig
from rlhf.training import StageConfig, inherited

STAGES = [SFTConfig, RewardConfig, DPOConfig, KTOConfig, PPOConfig]
NEEDED = {pipeline.PipelineConfig: {"model_name_or_path": "m", "ranked_dataset": "r", "output_dir": "o"}}


def kinds(hint):
    return set(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, UnionType) else {hint}


def numbers():
    """(config class, name, kinds of value, range) of every option that takes numbers, found by its annotation alone."""
    for config in [*STAGES, DemoConfig, *NEEDED]:
        hints = typing.get_type_hints(config)
        for item in dataclasses.fields(config):
            found = kinds(hints[item.name])
            found |= {part for kind in found if typing.get_origin(kind) is list for part in typing.get_args(kind)}
            if item.init and found & {int, float}:
                ranges = getattr(config, "inherited_ranges", {})
                yield config, item.name, found, getattr(item.metadata.get("help"), "wants", ranges.get(item.name))


NUMBERS = [pytest.param(*each, id=f"{each[0].__name__}-{each[1]}") for each in numbers()]


@pytest.mark.parametrize(("config", "name", "kinds", "wants"), NUMBERS)
def test_every_number_is_refused_out_of_its_range(config, name, kinds, wants):
    if name in getattr(config, "inherited_ranges", {}) and wants is None:
        wants = config.inherited_ranges[name]
    assert wants is not None, "no range is declared"
    wrong = ["abc", math.nan, True]
    if not wants.infinite:
        wrong += [math.inf, -math.inf]
    if float not in kinds:
        wrong += [1.5, 2**31]
    if math.isfinite(wants.low):
        wrong += [wants.low - 1, *([wants.low] if wants.open_low else [])]
    if math.isfinite(wants.high):
        wrong += [wants.high + 1, *([wants.high] if wants.open_high else [])]
    listed = any(typing.get_origin(kind) is list for kind in kinds)
    for value in wrong:
        if value in wants.also:
            continue
        with pytest.raises(ValueError, match=rf"^{name}: got .*, wants ") as error:
            config(**NEEDED.get(config, {}), **{name: [1, value] if listed else value})
        assert "\n" not in str(error.value)
    if type(None) not in kinds:
        with pytest.raises(ValueError, match=rf"^{name}: got None, wants "):
            config(**NEEDED.get(config, {}), **{name: None})


@pytest.mark.parametrize("config", STAGES)
def test_defaults_and_the_ends_of_closed_ranges_are_taken(config):
    again = dataclasses.replace(config())  # what construction has filled in is taken, too
    assert isinstance(again, config)
    assert config(learning_rate=0).learning_rate == 0 and config(max_steps=-1, seed=0).seed == 0


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        (SFTConfig, "use_peft", "yes"), (SFTConfig, "use_cpu", 3), (PPOConfig, "whiten_rewards", "false"),
        (PPOConfig, "kl_estimator", "k4"), (PPOConfig, "lr_scheduler_type", "step"), (PPOConfig, "on_health", "no"),
        (PPOConfig, "loss_agg_mode", "sum"), (DPOConfig, "loss_type", "kto"), (RewardConfig, "ties", "keep"),
        (KTOConfig, "loss_type", "ipo"),
        (PPOConfig, "reward_clip_range", [1, -1]), (PPOConfig, "reward_clip_range", [1]), (SFTConfig, "dtype", "int8"),
    ],
)  # fmt: skip
def test_flags_and_choices_name_what_they_take(config, name, value):
    with pytest.raises(ValueError, match=rf"^{name}: got .*, wants "):
        config(**{name: value})


def test_a_range_says_what_it_takes():
    said = [str(wants) for wants in (at_least(1, also=(-1,)), above(0), within(0, 1, open_high=True))]
    assert said == [">= 1 or -1", "> 0", "in [0, 1)"]
    with pytest.raises(ValueError, match=r"^n: got 0, wants a whole number >= 1 \(or None\)$"):
        check_value("n", 0, (int, type(None)), at_least(1))
    with pytest.raises(ValueError, match=r"^x: got inf, wants a finite number$"):
        check_value("x", math.inf, float, within(-math.inf, math.inf))


@pytest.mark.parametrize("config", [SFTConfig, RewardConfig, DPOConfig, KTOConfig])
def test_each_setting_of_transformers_works_or_is_refused(config):
    """What a new version of transformers adds must be looked at, and put into one of the tables."""
    own = set(StageConfig.__annotations__)
    theirs = {item.name for item in dataclasses.fields(TrainingArguments) if item.init} - own
    assert theirs - inherited.WORK - set(config.refused) == set()
    assert not inherited.WORK & set(inherited.REFUSED) and not own & inherited.WORK


@pytest.mark.parametrize("config", [SFTConfig, RewardConfig, DPOConfig, KTOConfig])
def test_settings_without_effect_are_refused_with_the_reason(config):
    fields = {item.name: item for item in dataclasses.fields(config)}
    for name in [name for name in config.refused if name in fields]:
        default, taken = fields[name].default, kinds(typing.get_type_hints(config)[name])
        value = not default if bool in taken else 1 if taken & {int, float} else "other"
        with pytest.raises(ValueError, match=rf"^{name}: got .*, wants .*: ") as error:
            config(**{name: value})
        assert config.refused[name] in str(error.value)
    with pytest.raises(
        ValueError, match=r"^train_sampling_strategy: got 'group_by_length', wants random or sequential"
    ):
        config(train_sampling_strategy="group_by_length")


def test_help_does_not_list_what_is_refused(capsys):
    assert cli.main(["sft", "--help-all"]) == 0
    listed = capsys.readouterr().out
    assert "--neftune_noise_alpha" in listed
    assert not [name for name in inherited.REFUSED if f"--{name} " in listed]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n", "0"], "n: got [0], wants a whole number >= 1"),
        (["--temperature", "nan"], "temperature: got nan, wants a number > 0"),
        (["--response_length", "-1"], "response_length: got -1, wants a whole number >= 1"),
        (["--batch_size", "0"], "batch_size: got 0"),
        (["--max_prompts", "-3"], "max_prompts: got -3"),
        (["--seed", "-1"], "seed: got -1, wants a whole number in [0, 2147483647]"),
        (["--seed", "abc"], "argument --seed: invalid int value: 'abc'"),
    ],
)
def test_best_of_n_refuses_numbers_in_one_line(flags, message, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    given = ["--model_name_or_path", "demo", "--reward_model_path", "demo", "--dataset_name", str(tmp_path / "p.jsonl")]
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*given, *flags])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith(f"rlhf best-of-n: {message}") and said.count("\n") == 1


def test_pipeline_refuses_values_of_later_stages_before_the_first():
    sections = {name: {} for name in ("sft", "reward", "ppo", "ppo_ptx", "evaluate")}
    for name, wrong, message in (
        ("ppo", {"lam": 2}, r"^ppo: lam: got 2, wants a number in \[0, 1\]"),
        ("ppo_ptx", {"ptx_coef": -1}, r"^ppo_ptx: ptx_coef: got -1"),
        ("reward", {"seed": 0.5}, r"^reward: seed: got 0.5, wants a whole number"),
        ("evaluate", {"samples_per_prompt": 0}, r"^samples_per_prompt: got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline.check_sections(sections | {name: wrong}, with_ptx=True)
    pipeline.check_sections(sections, with_ptx=True)
