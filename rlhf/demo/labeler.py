"""The simulated labeler of the demo: a gold score, and rankings as noisy as people's.

The gold score says what a tireless labeler would want: a cheerful continuation that comes to a proper end. Real
labelers disagree; the paper's agreed with each other on 72.6 % of the pairs. So each simulated labeler sees the gold
score plus its own Gaussian noise, and the size of that noise is *solved for* on the responses at hand, until two such
labelers agree on 73 % of the pairs (`calibrate_noise`). The reward model sees only the rankings, never the gold score.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np

PAPER_AGREEMENT = 0.73
ENDING_BONUS = 0.5
"""What a proper end is worth, in units of VADER's compound score (which lies in [-1, 1])."""

_CLOSERS = "\"'”’)]"
_SENTENCE_ENDS = (".", "!", "?")


@functools.cache
def _analyzer():
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ModuleNotFoundError as error:
        if error.name != "vaderSentiment":
            raise
        raise ModuleNotFoundError(
            "the demo's labeler needs the package vaderSentiment: pip install vaderSentiment", name=error.name
        ) from None
    return SentimentIntensityAnalyzer()


def sentiment(text: str) -> float:
    """VADER's compound sentiment of `text`, in [-1, 1]; 0 for text without any word that it knows."""
    return float(_analyzer().polarity_scores(text)["compound"])


def ends_properly(completion: str, ended: bool) -> bool:
    """True if the model stopped by itself (`ended`: it emitted its stop token) and did so after a whole sentence."""
    return bool(ended) and completion.rstrip().rstrip(_CLOSERS).endswith(_SENTENCE_ENDS)


def gold_score(prompt: str, completion: str, ended: bool) -> float:
    """What the simulated labeler truly prefers: sentiment of the completion, plus `ENDING_BONUS` for a proper end.

    Args:
        prompt: text before the completion. Only the completion is judged: the prompt's mood is not the policy's merit.
        completion: text without the stop token.
        ended: whether the policy emitted its stop token (False: the response was cut at the length limit).
    Returns:
        float in [-1, 1.5]; higher is better.
    Example:
        >>> gold_score("Tom went out.", " He was happy.", True) > gold_score("Tom went out.", " He was sad.", True)
        True
        >>> gold_score("Tom went out.", " Then he ate.", True), gold_score("Tom went out.", " Then he ate.", False)
        (0.5, 0.0)
    """
    del prompt
    return sentiment(completion) + ENDING_BONUS * ends_properly(completion, ended)


def _pair_gaps(gold_groups: Sequence[Sequence[float]]) -> np.ndarray:
    """|gold gap| of every pair within a group."""
    gaps = [np.zeros(0)]
    for group in gold_groups:
        g = np.asarray(group, dtype=np.float64)
        gaps.append(np.abs(g[:, None] - g[None, :])[np.triu_indices(len(g), k=1)])
    return np.concatenate(gaps)


def _prefers_better(gaps: np.ndarray, noise: float) -> np.ndarray:
    """P(a labeler puts the truly better one first): each score carries N(0, noise^2), so the gap carries 2 noise^2."""
    if noise == 0:
        return np.where(gaps > 0, 1.0, 0.5)
    return 0.5 + 0.5 * np.vectorize(math.erf, otypes=[float])(gaps / (2 * noise))


def expected_agreement(gold_groups: Sequence[Sequence[float]], noise: float) -> float:
    """Expected share of pairs on which two independent labelers of this noise agree: the mean of p^2 + (1 - p)^2."""
    p = _prefers_better(_pair_gaps(gold_groups), noise)
    return float(np.mean(p**2 + (1 - p) ** 2)) if p.size else float("nan")


def expected_ceiling(gold_groups: Sequence[Sequence[float]], noise: float) -> float:
    """Accuracy on one labeler's pairs of a reward model that knows the gold score exactly: the mean of p."""
    p = _prefers_better(_pair_gaps(gold_groups), noise)
    return float(np.mean(p)) if p.size else float("nan")


def calibrate_noise(gold_groups: Sequence[Sequence[float]], target: float = PAPER_AGREEMENT) -> float:
    """Standard deviation of the labelers' noise at which two of them agree on `target` of the pairs.

    Expected agreement falls strictly with the noise, to 1/2 where there is nothing else; bisection finds the one root.

    Args:
        gold_groups: gold scores of the distinct responses to each prompt; pairs are formed within a prompt.
        target: agreement wanted, strictly between 0.5 and 1; the paper: 0.726.
    Returns:
        float > 0, in units of the gold score.
    Raises:
        ValueError: target outside (0.5, 1), or so many pairs have one gold score that no labelers agree so often.
    """
    if not 0.5 < target < 1:
        raise ValueError(f"target must lie strictly between 0.5 and 1 (two labelers' agreement), got {target}")
    most = expected_agreement(gold_groups, 0.0)
    if not most > target:
        raise ValueError(
            f"gold_groups: no two labelers agree on {target:.2f}; even without noise they agree on {most:.2f} "
            "of the pairs, since the others have equal gold scores"
        )
    low, high = 0.0, float(_pair_gaps(gold_groups).max())
    while expected_agreement(gold_groups, high) > target:
        low, high = high, 2 * high
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if expected_agreement(gold_groups, middle) > target else (low, middle)
    return 0.5 * (low + high)


def rank(completions: Sequence[str], gold: Sequence[float], *, noise: float, rng: np.random.Generator) -> list[int]:
    """Ranks of one prompt's completions by one labeler: 0 is best, identical texts share a rank (0, 1, 1, 3).

    Args:
        completions: K texts.
        gold: K gold scores.
        noise: standard deviation of the labeler's error (`calibrate_noise`); 0 ranks by the gold score itself.
        rng: the labeler; another seed is another labeler.
    """
    if len(completions) != len(gold):
        raise ValueError(f"gold must have one score per completion, got {len(gold)} for {len(completions)}")
    seen: dict[str, float] = {}
    for text, score in zip(completions, gold, strict=True):
        error = noise * rng.standard_normal()
        seen.setdefault(text, score + error)
    perceived = [seen[text] for text in completions]
    return [sum(other > mine for other in perceived) for mine in perceived]


def agreement(ranks_a: Sequence[Sequence[int]], ranks_b: Sequence[Sequence[int]]) -> float:
    """Share of the pairs decided by both labelers that they order the same way; `ranks_*` hold one list per prompt."""
    same = decided = 0
    for a, b in zip(ranks_a, ranks_b, strict=True):
        for i in range(len(a)):
            for j in range(i + 1, len(a)):
                if a[i] != a[j] and b[i] != b[j]:
                    decided += 1
                    same += (a[i] < a[j]) == (b[i] < b[j])
    return same / decided if decided else float("nan")
