"""SFT -> reward model -> PPO -> PPO-ptx on a real pretrained model and real stories, and the numbers that follow."""

import json
import math
import re

import numpy as np
import pytest
import torch
import yaml

from rlhf import pipeline
from rlhf.data import load_rows
from rlhf.demo import labeler
from rlhf.demo.run import DemoConfig, rank_responses
from rlhf.evaluate import win_rate
from rlhf.reports.runs import read_report

SECTIONS = """
sft: {learning_rate: 1.0e-3, max_steps: 50, per_device_train_batch_size: 16, logging_steps: 5, eval_strategy: "no",
      lr_scheduler_type: cosine, save_steps: 100000, disable_tqdm: true}
reward: {learning_rate: 1.0e-3, num_train_epochs: 2, per_device_train_batch_size: 16, packing: "false",
         eval_fraction: 0.15, logging_steps: 2, eval_strategy: "no", lr_scheduler_type: cosine, save_steps: 100000,
         disable_tqdm: true}
ppo: {response_length: 32, max_steps: 16, rollout_batch_size: 64, per_device_train_batch_size: 64, num_ppo_epochs: 2,
      learning_rate: 5.0e-4, kl_coef: 0.1, missing_eos_penalty: 1.0, cliprange_value: 1.0, save_steps: 0,
      disable_tqdm: true}
ppo_ptx: {ptx_coef: 1.0, ptx_max_length: 64}
evaluate: {samples_per_prompt: 2}
"""


def stories(path, count):
    """The first `count` stories that begin with three short sentences: [(first sentence, the second, the story)]."""
    found = []
    for text in path.read_text(encoding="utf-8").split("<|endoftext|>"):
        sentences = re.findall(r"[A-Z][^.!?\"]*[.!?]", " ".join(text.split()))
        if len(sentences) >= 3 and all(len(s) < 70 for s in sentences[:2]):
            found.append((sentences[0], " " + sentences[1], text.strip()))
        if len(found) == count:
            return found
    raise AssertionError(f"only {len(found)} such stories")


@pytest.fixture(scope="module")
def run(shared_data, tmp_path_factory):
    """One pipeline for all tests of this file."""
    folder = tmp_path_factory.mktemp("pipeline")
    threads = torch.get_num_threads()
    torch.set_num_threads(min(2, threads))
    found = stories(shared_data / "tinystories_sample.txt", 500)
    model = shared_data / "stories260K-hf"
    openings = list(dict.fromkeys(opening for opening, _, _ in found))
    sft = [{"prompt": opening, "completion": rest} for opening, rest, _ in found[:400]]
    pipeline.write_rows(folder / "sft.jsonl", sft)
    pipeline.write_rows(folder / "ptx.jsonl", [{"text": text} for _, _, text in found])
    first = folder / "first" / "sft"
    settings = yaml.safe_load(SECTIONS)["sft"]
    pipeline.train_sft(first, model=model, dataset=folder / "sft.jsonl", settings={"seed": 0, **settings})
    ranked, facts = rank_responses(first, openings[:200], DemoConfig(response_length=32, batch_size=256), seed=0)
    pipeline.write_rows(folder / "ranked.jsonl", ranked)
    pipeline.write_rows(folder / "prompts.jsonl", [{"prompt": opening} for opening in openings])
    (folder / "settings.yaml").write_text(SECTIONS, encoding="utf-8")
    args = pipeline.PipelineConfig(
        model_name_or_path=str(first),
        ranked_dataset=str(folder / "ranked.jsonl"),
        prompts_dataset=str(folder / "prompts.jsonl"),
        ptx_dataset=str(folder / "ptx.jsonl"),
        output_dir=str(folder / "out"),
        config=str(folder / "settings.yaml"),
        held_out_prompts=80,
        quiet=True,
    )
    pipeline.run_pipeline(args)
    torch.set_num_threads(threads)
    return folder, args, facts


@pytest.fixture(scope="module")
def evaluation(run):
    return json.loads((run[0] / "out" / "evaluation.json").read_text(encoding="utf-8"))


def gold(evaluation, name):
    rows = evaluation["responses"][name]
    return [labeler.gold_score(row["prompt"], row["completion"], row["ended"]) for row in rows]


@pytest.mark.slow
def test_labelers_agree_as_people_do(run):
    facts = run[2]
    assert facts["agreement"] == pytest.approx(0.73, abs=1e-6)
    assert facts["measured_agreement"] == pytest.approx(0.73, abs=0.03)
    ks = [len(row["completions"]) for row in load_rows(run[0] / "ranked.jsonl", "ranked")]
    assert min(ks) >= 2 and max(ks) == 9 and np.mean(ks) > 5.5


@pytest.mark.slow
def test_sft_learns_the_demonstrations(run):
    rows = [json.loads(line) for line in (run[0] / "first/sft/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.slow
def test_reward_model_is_right_on_held_out_pairs(run):
    summary = read_report(run[0] / "out").reward_summary
    assert summary["eval/pairs"] > 400
    assert summary["eval/accuracy"] > 0.6
    assert summary["eval/accuracy"] > summary["eval/longer_wins"]
    assert summary["eval/accuracy"] < run[2]["ceiling"] + 0.05


@pytest.mark.slow
def test_ppo_raises_the_gold_score_that_it_never_saw(run, evaluation):
    for name in ("PPO", "PPO-ptx"):
        won = win_rate(gold(evaluation, name), gold(evaluation, "SFT"), per_prompt=2)
        assert won.low > 0.5, (name, won)
        assert np.mean(gold(evaluation, name)) > np.mean(gold(evaluation, "SFT")) + 0.1
    rows = {row["name"]: row for row in evaluation["policies"]}
    assert rows["PPO"]["reward"] > rows["SFT"]["reward"] + 0.3
    assert rows["SFT"]["kl"] == 0.0
    assert 0.3 < rows["PPO"]["kl"] < 25.0
    assert rows["PPO"]["ends_properly"] > rows["SFT"]["ends_properly"]


@pytest.mark.slow
def test_ptx_gives_back_part_of_the_alignment_tax(evaluation):
    rows = {row["name"]: row for row in evaluation["policies"]}
    tax = rows["PPO"]["lm_loss"] - rows["SFT"]["lm_loss"]
    with_ptx = rows["PPO-ptx"]["lm_loss"] - rows["SFT"]["lm_loss"]
    assert tax > 0
    assert with_ptx < 0.8 * tax


@pytest.mark.slow
def test_report_shows_every_stage(run):
    page = (run[0] / "out" / "report.html").read_text(encoding="utf-8")
    report = read_report(run[0] / "out")
    assert list(report.runs) == ["Reward model", "PPO", "PPO-ptx"]
    for title in ("Win rate over SFT", "Alignment tax", "Score in PPO", "Reward model: right on held-out pairs"):
        assert f"<h3>{title}</h3>" in page
    assert "Value function explains nothing" in page
    assert math.isfinite(report.runs["PPO"].series("val/explained_variance")[1][-1])


@pytest.mark.slow
def test_finished_stages_are_skipped_and_other_settings_refused(run, capsys):
    before = (run[0] / "out/ppo/model.safetensors").stat().st_mtime_ns
    pipeline.run_pipeline(run[1])
    assert capsys.readouterr().out.count("done before") == 4
    assert (run[0] / "out/ppo/model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="already holds a run with other settings"):
        pipeline.run_pipeline(pipeline.PipelineConfig(**{**vars(run[1]), "seed": 1}))
