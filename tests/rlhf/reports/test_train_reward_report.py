"""What the reward stage measures: accuracies by hand, intervals and calibration on pairs of known truth, the table."""

import json
import math
import random

import numpy as np
import pytest
import torch

from rlhf import data
from rlhf.reports import reward_model as reward_report
from rlhf.reports.reward_model import calibration, labeler_agreement, ranking_report, report_table, share_interval
from rlhf.reward import train_reward
from tests.tiny_reward import config_maker, rankings

ROWS = [
    {"prompt": "p", "completions": ["aaa", "b", "cc"], "ranks": [0, 1, 1]},
    {"prompt": "q", "completions": ["a", "bb"], "ranks": [1, 0]},
]
SCORES = [[1.0, 2.0, 0.0], [3.0, 3.0]]


def test_accuracy_by_k_by_hand():
    """Two rows: K = 3 with one tie (2 decided pairs), K = 2 with equal scores (half a point)."""
    report = ranking_report(SCORES, ROWS)
    assert report["pairs"] == 3 and report["pairs_by_k"] == {"2": 1, "3": 2}
    assert report["accuracy_by_k"] == {"2": 0.5, "3": 0.5}
    assert report["longer_wins_by_k"] == {"2": 1.0, "3": 1.0}
    assert report["accuracy"] == pytest.approx(0.5) and report["longer_wins"] == 1.0
    assert report["prefers_longer"] == 0.5  # cc < aaa: the longer; b > aaa: the shorter; equal: half
    lengths, scores = torch.tensor([3.0, 1, 2, 1, 2]), torch.tensor([1.0, 2, 0, 3, 3])
    centred = [x - x.mean() for x in (lengths, scores)]
    expected = (centred[0] @ centred[1]) / (centred[0].norm() * centred[1].norm())
    assert report["length_correlation"] == pytest.approx(expected.item())
    assert not any("labeler" in name or "judged" in name for name in report)


def test_accuracy_by_rank_gap_by_hand():
    """Ranks 0, 1, 3 (a completion of rank 2 was dropped): gaps 1, 3 and 2; only the neighbours stand wrong."""
    rows = [{"prompt": "p", "completions": ["aaa", "b", "cc"], "ranks": [0, 1, 3]}]
    report = ranking_report([[1.0, 2.0, 0.0]], rows)
    assert report["accuracy_by_gap"] == {"1": 0.0, "2": 1.0, "3": 1.0}
    assert report["longer_wins_by_gap"] == {"1": 1.0, "2": 0.0, "3": 1.0}
    assert report["pairs_by_gap"] == {"1": 1, "2": 1, "3": 1}


def test_accuracy_by_labeler_and_on_judged_pairs():
    """ann trained the model, cleo did not. cleo judged one pair against her own ranking: there the scores are right."""
    rows = [{**ROWS[0], "labeler": "ann"}, {**ROWS[0], "labeler": "cleo", "pairs": [[1, 0]]}, ROWS[1]]
    scores = [[3.0, 2.0, 0.0], [1.0, 2.0, 0.0], [3.0, 3.0]]
    report = ranking_report(scores, rows, {"ann", None})
    assert report["accuracy_by_labeler"] == {"ann": 1.0, "cleo": 0.5} and report["pairs_by_labeler"]["cleo"] == 2
    assert report["accuracy_by_labeler_group"] == {"held out": 0.5, "in training": 1.0}
    assert (report["accuracy_judged"], report["longer_wins_judged"], report["pairs_judged"]) == (1.0, 0.0, 1)
    assert report["pairs"] == 5 and report["accuracy"] == 0.7


def test_interval_of_independent_pairs_is_wilsons():
    """72 of 100 pairs of 100 prompts: Wilson's roots of (share - p)^2 = z^2 p (1 - p) / n, found numerically."""
    wins = [1.0] * 72 + [0.0] * 28
    low, high = share_interval(wins, range(100))
    n = 99  # the variance is the one between prompts, with its Bessel correction
    for bound in (low, high):
        assert (0.72 - bound) ** 2 == pytest.approx(1.959963984540054**2 * bound * (1 - bound) / n)
    assert low < 0.72 < high


def test_interval_goes_by_prompts():
    """Pairs that go right or wrong together are no more news than one of them; more pairs never narrow a prompt's."""
    wins = [1.0] * 18 + [0.0] * 12
    alone = share_interval(wins, range(30))
    copied = share_interval(np.repeat(wins, 6), np.repeat(range(30), 6))
    assert copied == pytest.approx(alone)
    independent = share_interval(np.repeat(wins, 6), range(180))
    assert independent[1] - independent[0] < 0.5 * (copied[1] - copied[0])
    assert share_interval([1.0, 1.0], [0, 1])[1] == 1.0 and share_interval([1.0, 0.0], [0, 0])[0] < 0.2


def test_interval_covers_the_truth():
    """1000 draws of 150 prompts of unequal K whose difficulty varies: about 95 % of the intervals hold the true share.

    Wilson's interval for as many independent pairs holds it in little more than half of the draws.
    """
    rng = np.random.default_rng(0)
    by_prompts, by_pairs = [], []
    for _ in range(1000):
        sizes = rng.choice([1, 6, 36], 150)
        prompts = np.repeat(np.arange(150), sizes)
        wins = rng.random(len(prompts)) < np.repeat(rng.choice([0.5, 0.9], 150), sizes)  # 0.7 on average
        for found, clusters in ((by_prompts, prompts), (by_pairs, np.arange(len(prompts)))):
            low, high = share_interval(wins, clusters)
            found.append(low <= 0.7 <= high)
    assert 0.93 < np.mean(by_prompts) < 0.97 and np.mean(by_pairs) < 0.7


def test_calibration_by_hand():
    """Leads 0 (p = 0.5, half), log 1.5 (p = 0.6, right), -log 1.5 (wrong), 50 (p = 1, right), in bins 0.05 wide."""
    found = calibration([0.0, math.log(1.5) + 1e-9, -math.log(1.5) - 1e-9, 50.0], list("abcd"))
    curve = found["calibration"]
    assert curve["predicted"] == pytest.approx([0.5, 0.6, 1.0]) and curve["pairs"] == [1, 2, 1]
    assert curve["observed"] == [0.5, 0.5, 1.0]
    assert found["calibration_error"] == pytest.approx((0 + 2 * 0.1 + 0) / 4)
    assert all(low <= share <= high for low, share, high in zip(curve["low"], curve["observed"], curve["high"]))


def test_calibration_of_the_true_model():
    """Pairs drawn from Bradley-Terry are calibrated under the true scores; with the scores doubled they are not."""
    rng = np.random.default_rng(0)
    gaps = 1.5 * rng.standard_normal(40_000)
    leads = np.where(rng.random(len(gaps)) < 1 / (1 + np.exp(-gaps)), gaps, -gaps)
    true, sure = (calibration(scale * leads, range(len(gaps))) for scale in (1, 2))
    assert true["calibration_error"] < 0.015 < 0.05 < sure["calibration_error"]
    curve = sure["calibration"]
    assert sum(curve["pairs"]) == 40_000
    assert all(o < p for p, o in zip(curve["predicted"][2:], curve["observed"][2:]))


def test_score_by_length_does_not_know_of_calibration():
    rows = [{"prompt": "p", "completions": ["x" * n for n in range(1, 17)], "ranks": list(range(16))}]
    scores = [[2.0 * n for n in range(16)]]
    report = ranking_report(scores, rows)["score_by_length"]
    assert report["responses"] == [2] * 8 and report["characters"] == [1.5 + 2 * n for n in range(8)]
    assert report["score"] == pytest.approx([4.0 * n + 1 - 15 for n in range(8)])
    assert report["deviation"] == pytest.approx([1.0] * 8)
    shifted = ranking_report([[value - 7.5 for value in scores[0]]], rows)["score_by_length"]
    assert shifted["score"] == pytest.approx(report["score"])


def test_labelers_agree_on_pairs_that_both_decided():
    """ann: b > c > d. bob: c > b, d > b, c and d tied. They meet on (b, c) and (b, d) and agree on neither.

    cleo decided only b over d: she agrees with ann and not with bob. Her tie of ranks says nothing beside her pairs.
    """
    texts = ["b", "c", "d"]
    ann = {"prompt": "p", "completions": texts, "ranks": [0, 1, 2], "labeler": "ann"}
    bob = {"prompt": "p", "completions": ["d", "c", "b"], "ranks": [0, 0, 1], "labeler": "bob"}
    cleo = {"prompt": "p", "completions": texts, "ranks": [0, 1, 1], "labeler": "cleo", "pairs": [[0, 2]]}
    nobody = {"prompt": "p", "completions": texts, "ranks": [2, 1, 0]}
    other = {**bob, "prompt": "another"}
    assert labeler_agreement([ann, nobody, other]) == {}
    found = labeler_agreement([ann, bob, cleo, nobody, other])
    assert found["labeler_agreement_pairs"] == 4 and found["labeler_agreement"] == 0.25
    assert 0 <= found["labeler_agreement_low"] < 0.25 < found["labeler_agreement_high"] <= 1
    assert labeler_agreement([ann, ann]) == {}  # one labeler twice


def test_table_reads_well():
    rows = [{**row, "labeler": "someone with a long name"} for row in ROWS]
    summary = {f"eval/{name}": value for name, value in ranking_report(SCORES, rows).items()}
    agreement = {"": 0.726, "_low": 0.711, "_high": 0.741, "_pairs": 3400}
    summary |= {f"labeler_agreement{end}": value for end, value in agreement.items()}
    lines = report_table(summary).splitlines()
    assert len({len(line) for line in lines[:6]}) == 1
    assert lines[1].split() == ["K", "=", "2", "1", "0.500", "1.000"]
    assert [line for line in lines if line.startswith("ranks 1 apart")] and "held out" in lines[5]
    assert lines[6].split() == ["all", "3", "0.500", "1.000"]
    assert lines[-1] == "labelers agree on 0.726 (0.711 to 0.741) of 3400 pairs that two decided"


def test_many_labelers_are_not_all_printed():
    rows = [{**ROWS[0], "labeler": f"person {n:02}"} for n in range(40)] + [{**ROWS[1], "labeler": "rare"}]
    summary = {f"eval/{k}": v for k, v in ranking_report([SCORES[0]] * 40 + [SCORES[1]], rows).items()}
    assert len(summary["eval/accuracy_by_labeler"]) == 41
    assert report_table(summary).count("labeler person") == 9 and "rare" not in report_table(summary)


def test_a_run_holds_all_of_it(tmp_path, capsys):
    """Two labelers for each prompt, judged pairs in some rows: everything is in run.json, the table and the report."""
    from rlhf.reports.report import write_report

    rows, generator = [], random.Random(0)
    for row in rankings(18):
        for labeler in ("ann", "bob"):
            scores = [score + 2.5 * generator.random() for score in row["scores"]]
            order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
            rows.append({**row, "scores": scores, "labeler": labeler, "pairs": [order[:2]]})
    args = config_maker(tmp_path, rows)(num_train_epochs=2, eval_fraction=0.3)
    run = train_reward(args)
    summary = json.loads((run / "run.json").read_text())["summary"]
    for group in ("k", "gap", "labeler", "labeler_group"):
        counts = summary[f"eval/pairs_by_{group}"]
        assert sum(counts.values()) == summary["eval/pairs"]
        total = sum(counts[name] * share for name, share in summary[f"eval/accuracy_by_{group}"].items())
        assert total / summary["eval/pairs"] == pytest.approx(summary["eval/accuracy"])
        assert set(summary[f"eval/longer_wins_by_{group}"]) == set(counts)
    assert summary["eval/accuracy_low"] < summary["eval/accuracy"] < summary["eval/accuracy_high"]
    assert summary["eval/pairs_by_labeler_group"].keys() == {"in training"}
    assert summary["eval/pairs_judged"] == len(data.split_rows(rows, 0.3, args.seed)[1])  # one in each row
    assert 0.5 < summary["labeler_agreement"] < 1
    assert sum(summary["eval/calibration"]["pairs"]) == summary["eval/pairs"]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = next(row for row in metrics if "eval/accuracy" in row)
    assert {"eval/accuracy_low", "eval/accuracy_high", "eval/calibration_error", "eval/prefers_longer"} <= set(logged)
    printed = capsys.readouterr().out
    assert "ranks 8 apart" in printed and "labeler bob" in printed and "labelers agree on" in printed
    page = write_report(run).read_text(encoding="utf-8")
    for title in ("right on held-out pairs", "near and far pairs", "calibration", "score against length"):
        assert f"<h3>Reward model: {title}</h3>" in page
    assert "<th scope=row>ranks 1 apart</th>" in page and "<th scope=row>labeler ann</th>" in page


def test_pairs_of_messages_count_their_text():
    rows = [{"prompt": [{"role": "user", "content": "hi"}], "ranks": [0, 1], "completions": [
        [{"role": "assistant", "content": "abc"}], [{"role": "assistant", "content": "a"}]]}]  # fmt: skip
    (pair,) = reward_report.pairs_of([[1.0, 0.5]], rows)
    assert (pair.prompt, pair.longer, pair.lead, pair.gap, pair.labeler) == ("hi", 2, 0.5, 1, None)
