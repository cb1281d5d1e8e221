"""What a reward model's scores are worth: held-out accuracy, its calibration, and what length has to do with it.

Everything is measured on decided pairs, those that are no ties, of whole rankings. Beside each accuracy stands that of
the rule "the longer one wins". Pairs of one prompt are not independent, so the intervals go by prompts.
"""

import json
import math
from itertools import combinations
from typing import NamedTuple

import numpy as np

from ..data import as_text
from ..data.rankings import decided_pairs
from ..metrics import wilson_interval
from .runs import PAIR_GROUPS, pair_rows

CALIBRATION_BINS = 10
LENGTH_BINS = 8


class Pair(NamedTuple):
    """A decided pair of one ranking: what the scores and the lengths say about it."""

    prompt: str
    k: int
    gap: int
    """worse rank - better rank; 1 = neighbours"""
    lead: float
    """score of the better one - score of the worse one"""
    longer: int
    """length of the better one - length of the worse one, in characters"""
    labeler: str | None
    labeler_group: str | None
    """"in training" or "held out" """


def pairs_of(scores, rows, known_labelers=frozenset(), *, judged=False):
    """All decided pairs of ranked rows; with `judged`, those of their field `pairs` instead."""
    found = []
    for score, row in zip(scores, rows, strict=True):
        labeler = row.get("labeler")
        who = (labeler, labeler and ("in training" if labeler in known_labelers else "held out"))
        lengths = [len(as_text(text, roles=False)) for text in row["completions"]]
        for better, worse in row.get("pairs", ()) if judged else decided_pairs(row["ranks"]):
            lead, longer = score[better] - score[worse], lengths[better] - lengths[worse]
            gap = row["ranks"][worse] - row["ranks"][better]
            found.append(Pair(as_text(row["prompt"]), len(score), gap, lead, longer, *who))
    return found


def ranking_report(scores, rows, known_labelers=frozenset()):
    """How often the scores order the decided pairs of ranked rows right, and by which pairs.

    Args:
        scores: one list of K numbers for each row.
        rows: ranked rows of `load_rows`. Length is counted in characters; equal scores or lengths count half.
        known_labelers: labelers of the training rankings.
    Returns:
        accuracy and its 95 % interval accuracy_low, accuracy_high; longer_wins, the accuracy of the longer response;
        prefers_longer, how often the scores side with it; pairs. accuracy_by_X, longer_wins_by_X and pairs_by_X for X =
        k, gap (difference of ranks) and, where rows name them, labeler and labeler_group ("in training", "held out");
        accuracy_judged, longer_wins_judged, pairs_judged where rows hold `pairs`. What `calibration` and
        `score_by_length` return.
    """
    pairs = pairs_of(scores, rows, known_labelers)
    prompts = [pair.prompt for pair in pairs]
    low, high = share_interval(_wins(pairs, "lead"), prompts)
    sides = np.sign([pair.lead for pair in pairs]) * np.sign([pair.longer for pair in pairs])
    report = {
        **_shares(pairs),
        "accuracy_low": low,
        "accuracy_high": high,
        "prefers_longer": float((sides + 1).mean() / 2),
        **calibration([pair.lead for pair in pairs], prompts),
        **score_by_length(scores, rows),
    }
    for name in PAIR_GROUPS:
        groups = {}
        for pair in pairs:
            groups.setdefault(getattr(pair, name), []).append(pair)
        groups.pop(None, None)
        found = {str(group): _shares(groups[group]) for group in sorted(groups)}
        for key in ("accuracy", "longer_wins", "pairs") if found else ():
            report[f"{key}_by_{name}"] = {group: shares[key] for group, shares in found.items()}
    judged = _shares(pairs_of(scores, rows, judged=True))
    return report | ({f"{key}_judged": value for key, value in judged.items()} if judged["pairs"] else {})


def _wins(pairs, name):
    """[N] 1, 0.5 or 0: the sign of each pair's `name`."""
    return (np.sign([getattr(pair, name) for pair in pairs]) + 1) / 2


def _shares(pairs):
    if not pairs:
        return {"accuracy": math.nan, "longer_wins": math.nan, "pairs": 0}
    accuracy, longer = (float(_wins(pairs, name).mean()) for name in ("lead", "longer"))
    return {"accuracy": accuracy, "longer_wins": longer, "pairs": len(pairs)}


def share_interval(wins, clusters):
    """95 % Wilson interval of the mean of `wins`, with as many effective comparisons as their clusters allow.

    Comparisons of one cluster (pairs of one prompt) may go right or wrong together. So the variance of the share is the
    jackknife's over clusters, and the interval is Wilson's for the n at which independent comparisons vary as much, at
    most as many as there are.

    Args:
        wins: N numbers 0, 0.5 or 1.
        clusters: N labels.
    Returns:
        (low, high), within [0, 1].
    """
    wins = np.asarray(wins, dtype=np.float64)
    share, n = float(wins.mean()), float(len(wins))
    _, place = np.unique(np.asarray(clusters), return_inverse=True)
    count = place.max() + 1
    if count > 1 and 0 < share < 1:
        changes = np.bincount(place, wins - share) / (n - np.bincount(place))  # of the share without a cluster
        variance = (count - 1) / count * (changes**2).sum()
        n = min(n, share * (1 - share) / max(variance, 1e-12))
    return wilson_interval(share, n)


def calibration(leads, prompts):
    """How far sigmoid(r_i - r_j) is the share of pairs in which i is the better one.

    The scores' favourite of each pair is i, so predictions lie in [0.5, 1]; they are put into bins of equal width.

    Args:
        leads: N score differences, better minus worse; 0 counts half.
        prompts: N labels, as `share_interval` takes them.
    Returns:
        calibration_error, the mean of |predicted - observed| weighted by the counts; and calibration, of each bin that
        holds a pair: predicted, the mean prediction; observed, the share of favourites that were the better ones, with
        its 95 % interval low, high; pairs, the count.
    """
    leads, prompts = np.asarray(leads, dtype=np.float64), np.asarray(prompts)
    predicted, won = 1 / (1 + np.exp(-np.abs(leads))), (np.sign(leads) + 1) / 2
    place = np.minimum((predicted - 0.5) * 2 * CALIBRATION_BINS, CALIBRATION_BINS - 1).astype(int)
    curve = {"predicted": [], "observed": [], "low": [], "high": [], "pairs": []}
    for index in np.unique(place):
        inside = place == index
        low, high = share_interval(won[inside], prompts[inside])
        found = (float(predicted[inside].mean()), float(won[inside].mean()), low, high, int(inside.sum()))
        for values, value in zip(curve.values(), found, strict=True):
            values.append(value)
    gaps = [abs(p - o) * n for p, o, n in zip(curve["predicted"], curve["observed"], curve["pairs"])]
    return {"calibration_error": sum(gaps) / len(leads), "calibration": curve}


def score_by_length(scores, rows):
    """length_correlation; and score_by_length, the responses in up to 8 bins of equal count, from short to long.

    A bin holds the mean length in characters, the mean score above that of all responses (which calibration does not
    move), its standard deviation, and the count.
    """
    lengths = np.array(
        [len(as_text(text, roles=False)) for row in rows for text in row["completions"]], dtype=np.float64
    )
    flat = np.array([value for group in scores for value in group], dtype=np.float64)
    flat = flat - flat.mean()
    varies = len(flat) > 1 and lengths.std() > 0 and flat.std() > 0
    order = np.argsort(lengths, kind="stable")
    bins = [inside for inside in np.array_split(order, LENGTH_BINS) if len(inside)]
    return {
        "length_correlation": float(np.corrcoef(flat, lengths)[0, 1]) if varies else math.nan,
        "score_by_length": {
            "characters": [float(lengths[inside].mean()) for inside in bins],
            "score": [float(flat[inside].mean()) for inside in bins],
            "deviation": [float(flat[inside].std()) for inside in bins],
            "responses": [len(inside) for inside in bins],
        },
    }


def labeler_agreement(rows):
    """How often two labelers who ranked the same prompt agree, over the pairs that both of them decided.

    A labeler's own `pairs` count where a row holds them, and otherwise the pairs of the ranking.

    Args:
        rows: ranked rows of `load_rows`; those without a `labeler` do not take part.
    Returns:
        labeler_agreement, with its 95 % interval labeler_agreement_low, labeler_agreement_high, and
        labeler_agreement_pairs; {} if no pair was decided by two labelers.
    """
    decided = {}
    for row in rows:
        if "labeler" not in row:
            continue
        texts = [json.dumps(text) for text in row["completions"]]
        for better, worse in row.get("pairs", decided_pairs(row["ranks"])):
            pair = (json.dumps(row["prompt"]), *sorted((texts[better], texts[worse])))
            decided.setdefault(pair, {}).setdefault(row["labeler"], texts[better])
    agreed = [
        (pair[0], float(first == second))
        for pair, winners in decided.items()
        if pair[1] != pair[2]
        for first, second in combinations(winners.values(), 2)
    ]
    if not agreed:
        return {}
    prompts, wins = zip(*agreed)
    low, high = share_interval(wins, prompts)
    found = {"": float(np.mean(wins)), "_low": low, "_high": high, "_pairs": len(wins)}
    return {f"labeler_agreement{end}": value for end, value in found.items()}


def report_table(summary):
    """The held-out accuracy, by what it depends on, beside the longer-wins rule, as lines of text."""
    lines = ["held-out pairs         pairs  accuracy  longer wins"]
    for row in pair_rows(summary):
        lines.append(f"{row.title[:21]:<21} {row.pairs:>6}  {row.accuracy:>8.3f}  {row.longer_wins:>11.3f}")
    names = ("accuracy_low", "accuracy_high", "calibration_error", "prefers_longer", "length_correlation")
    low, high, error, longer, correlation = (summary[f"eval/{name}"] for name in names)
    lines.append(f"95 % interval of the accuracy: {low:.3f} to {high:.3f}; calibration error: {error:.3f}")
    lines.append(
        f"the scores prefer the longer one of {longer:.3f} of the pairs; correlation with length {correlation:+.2f}"
    )
    if "labeler_agreement" in summary:
        share, low, high, count = (summary[f"labeler_agreement{end}"] for end in ("", "_low", "_high", "_pairs"))
        lines.append(f"labelers agree on {share:.3f} ({low:.3f} to {high:.3f}) of {count} pairs that two decided")
    return "\n".join(lines)
