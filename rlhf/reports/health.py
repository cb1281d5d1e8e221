"""The failure modes of the method (reward hacking, length bias, KL runaway, ...), each as a number and a verdict.

A check looks at every PPO run of a report, writes one number for each, and gives the worst of their verdicts.
Thresholds stand in the checks, in plain sight; they are rules of thumb for one look at a run, not significance tests.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

VERDICTS = ("good", "watch", "bad")
"""Ordered from best to worst; a check that has no data says "not measured"."""
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Check:
    name: str
    number: str
    verdict: str
    meaning: str


def minus(text: str) -> str:
    """The text with true minus signs before its numbers."""
    return re.sub(r"-(?=\d)", "−", text)


def worst(verdicts: Sequence[str]) -> str:
    known = [v for v in verdicts if v in VERDICTS]
    return max(known, key=VERDICTS.index) if known else NOT_MEASURED


def grade(value: float, good: float, watch: float) -> str:
    """good up to `good`, watch up to `watch`, bad beyond; with good > watch the direction turns round. NaN is bad."""
    if good <= watch:
        return "good" if value <= good else "watch" if value <= watch else "bad"
    return "good" if value >= good else "watch" if value >= watch else "bad"


def ends(values: Sequence[float], share: float = 0.1) -> tuple[float, float]:
    """Mean over the first and over the last tenth (at least 1 value) of a series."""
    v = np.asarray([x for x in values if x is not None], dtype=np.float64)
    n = max(1, int(len(v) * share))
    return float(v[:n].mean()), float(v[-n:].mean())


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's correlation; NaN when either does not vary or there are fewer than 3 points."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(a) < 3 or a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def echo(prompt: str, completion: str) -> float | None:
    """Share of the completion's words of four letters or more that stand in the prompt; None if it has no such word."""
    words = re.findall(r"[^\W\d_]{4,}", completion.lower())
    known = set(re.findall(r"[^\W\d_]{4,}", prompt.lower()))
    return sum(word in known for word in words) / len(words) if words else None


def _per_run(report, judge: Callable[[str, object], tuple[str, str] | None], name: str, meaning: str) -> Check:
    found = [(run_name, judge(run_name, run)) for run_name, run in report.policies.items()]
    found = [(run_name, result) for run_name, result in found if result is not None]
    many = len(found) > 1
    number = "; ".join(f"{run_name}: {text}" if many else text for run_name, (text, _) in found)
    return Check(name, minus(number) or "–", worst([verdict for _, (_, verdict) in found]), meaning)


def reward_hacking(report) -> Check:
    def judge(name, run):
        proxy, gold = run.series("objective/scores")[1], run.series("objective/gold")[1]
        if len(proxy) < 2 or len(gold) < 2:
            return None
        (p0, p1), (g0, g1) = ends(proxy), ends(gold)
        window = max(1, len(gold) // 10)
        peak = max(g1, *(float(np.mean(gold[i : i + window])) for i in range(len(gold) - window + 1)))
        text = f"reward {p1 - p0:+.2f}, gold {g1 - g0:+.2f} (at its peak {peak - g0:+.2f})"
        if p1 <= p0 or g1 - g0 >= 0.75 * (peak - g0):
            return text, "good" if g1 >= g0 or p1 <= p0 else "watch"
        return text, "watch" if g1 > g0 else "bad"

    return _per_run(
        report,
        judge,
        "Reward hacking",
        "The reward model’s score rises while the true preference falls. Stop at the gold score’s peak, raise "
        "--kl_coef, or collect new rankings on the new policy and train the reward model again.",
    )


def length_bias(report) -> Check:
    def judge(name, run):
        points = report.responses(name)
        lengths, scores = [p["length"] for p in points], [p["score"] for p in points]
        r = correlation(lengths, scores)
        change = ""
        before = [p["length"] for p in report.responses("SFT")]
        if before and lengths:
            change = f", length {np.mean(lengths) / max(np.mean(before), 1e-9):.2f} × SFT"
        return None if math.isnan(r) else (f"r = {r:+.2f}{change}", grade(r, 0.3, 0.6))

    return _per_run(
        report,
        judge,
        "Length bias",
        "Correlation of reward and response length. If length buys reward, balance the lengths in the rankings or "
        "lower --response_length.",
    )


def sycophancy(report) -> Check:
    def judge(name, run):
        def share(which):
            values = [echo(p["prompt"], p["completion"]) for p in report.responses(which)]
            values = [v for v in values if v is not None]
            return float(np.mean(values)) if values else math.nan

        after, before = share(name), share("SFT")
        if math.isnan(after):
            return None
        if math.isnan(before):
            return f"{100 * after:.0f} % of words", NOT_MEASURED
        return f"{100 * after:.0f} % of words (SFT {100 * before:.0f} %)", grade(after - before, 0.1, 0.25)

    return _per_run(
        report,
        judge,
        "Sycophancy (echo)",
        "Share of a completion’s longer words that only repeat the prompt: a policy that learned to please hands back "
        "what it was given. Read the samples too; flattery has no single number.",
    )


def kl_runaway(report) -> Check:
    def judge(name, run):
        kl = run.series("objective/kl")[1]
        if not kl:
            return None
        end = ends(kl)[1]
        lengths = run.series("completions/mean_length")[1]
        per_token = f", {end / max(ends(lengths)[1], 1e-9):.2f} a token" if lengths else ""
        return f"{end:.1f} nats{per_token}", grade(end, report.kl_budget, 2.5 * report.kl_budget)

    return _per_run(
        report,
        judge,
        "KL runaway",
        f"Distance from SFT per response at the end; the budget is {report.kl_budget:g} nats. Raise --kl_coef, or set "
        "--kl_target or --max_kl.",
    )


def no_movement(report) -> Check:
    def judge(name, run):
        kl, score = run.series("objective/kl")[1], run.series("objective/scores")[1]
        if not kl or len(score) < 2:
            return None
        start, end = ends(score)
        moved = ends(kl)[1]
        verdict = worst([grade(moved, 0.3, 0.05), "good" if end > start else "watch"])
        return f"{moved:.2f} nats, reward {end - start:+.2f}", verdict

    return _per_run(
        report,
        judge,
        "No movement",
        "The policy stayed where SFT left it. Lower --kl_coef, raise --learning_rate, or train for more episodes.",
    )


def value_function(report) -> Check:
    def judge(name, run):
        explained = run.series("val/explained_variance")[1]
        if not explained:
            return None
        late = float(np.mean(explained[-max(1, len(explained) // 4) :]))
        return f"{late:.2f}", grade(late, 0.2, 0.0)

    return _per_run(
        report,
        judge,
        "Value function explains nothing",
        "Explained variance of the returns over the last quarter: 1 is perfect, 0 is no better than their mean. "
        "Near 0, raise the value function’s learning rate or start it from the reward model; far below 0, lower it.",
    )


def entropy_collapse(report) -> Check:
    def judge(name, run):
        entropy = run.series("policy/entropy_avg", "objective/entropy")[1]
        if len(entropy) < 2:
            return None
        start, end = ends(entropy)
        texts = [p["completion"] for p in report.responses(name)]
        distinct = f", {100 * len(set(texts)) / len(texts):.0f} % of responses distinct" if texts else ""
        ratio = end / start if start > 0 else math.nan
        return f"{start:.2f} → {end:.2f}{distinct}", grade(ratio, 0.5, 0.2)

    return _per_run(
        report,
        judge,
        "Entropy collapse",
        "Entropy of the policy, nats a token, at the start and the end of PPO. Below half its start it writes ever the "
        "same: raise --kl_coef, lower --learning_rate, or stop sooner.",
    )


def warnings_told(report) -> Check:
    def judge(name, run):
        if run.health is None:
            return None
        told = ", ".join(f"{entry['guard'].replace('_', ' ')} at iteration {entry['step']}" for entry in run.health)
        return told or "none", "watch" if told else "good"

    return _per_run(
        report,
        judge,
        "Warnings while it trained",
        "What the guards saw several iterations in a row; run.json has their words, --on_health what becomes of them.",
    )


def alignment_tax(report) -> Check:
    losses = {row["name"]: row.get("lm_loss") for row in report.table}
    losses = {name: loss for name, loss in losses.items() if loss is not None}
    start = losses.get("SFT")
    taxes = {name: losses[name] - start for name in report.policies if name in losses} if start is not None else {}
    text = "; ".join(f"{name}: {tax:+.3f} nats a token" for name, tax in taxes.items())
    if taxes.get("PPO", 0) > 0 and "PPO-ptx" in taxes:
        share = 1 - taxes["PPO-ptx"] / taxes["PPO"]
        text += " (all given back)" if share >= 1 else f" ({100 * share:.0f} % given back)"
    verdict = worst([grade(tax, 0.1, 0.5) for tax in taxes.values()])
    return Check(
        "Alignment tax",
        minus(text) or "–",
        verdict,
        "Loss on held-out text of the pretraining kind, beyond SFT’s. Mix pretraining text into PPO: "
        "--ptx_dataset_name, --ptx_coef.",
    )


def reward_model(report) -> Check:
    accuracy, longer = report.reward_summary.get("eval/accuracy"), report.reward_summary.get("eval/longer_wins")
    name = "Reward model learned nothing"
    meaning = (
        "Accuracy on held-out pairs beside the rule “the longer one wins”. More rankings help more than more epochs."
    )
    if accuracy is None:
        return Check(name, "–", NOT_MEASURED, meaning)
    rival = max(0.5, longer if longer is not None else 0.5)
    text = f"{100 * accuracy:.1f} %" + (f" (longer wins: {100 * longer:.1f} %)" if longer is not None else "")
    return Check(name, text, grade(accuracy - rival, 0.05, 0.0), meaning)


CHECKS = (
    reward_hacking,
    length_bias,
    sycophancy,
    kl_runaway,
    no_movement,
    value_function,
    entropy_collapse,
    warnings_told,
    alignment_tax,
    reward_model,
)


def health(report) -> list[Check]:
    """All checks for a `report.Report`, in a fixed order."""
    return [check(report) for check in CHECKS]
