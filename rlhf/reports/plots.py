"""The figures of report.html: each function takes what a run left behind and returns one figure, or None without data.

A figure is an SVG made by matplotlib (no display needed), embedded as a data address so that the report stays one file.
Policies keep their colour and marker in every figure; the palette is Okabe and Ito's (2008), made for colour-blind
readers.
"""

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

COLOURS = {"base": "#6b6b6b", "SFT": "#0072B2", "PPO": "#D55E00", "PPO-ptx": "#009E73"}
MARKERS = {"base": "D", "SFT": "s", "PPO": "o", "PPO-ptx": "^"}
OTHER_COLOURS = ("#CC79A7", "#56B4E9", "#E69F00", "#000000")
WIDTH, HEIGHT = 5.0, 3.1
MOST_POINTS = 600
"""Of a curve or a cloud: a figure has fewer pixels, and each point costs some 40 bytes of the page."""
Series = tuple[list[float], list[float]]


@dataclass(frozen=True)
class Figure:
    title: str
    caption: str
    source: str
    """data: address of the SVG"""


def colour(name: str, index: int = 0) -> str:
    return COLOURS.get(name) or OTHER_COLOURS[index % len(OTHER_COLOURS)]


def smooth(values: Sequence[float]) -> np.ndarray:
    """Centred moving average over about a tenth of the series (at the ends: over what there is of the window)."""
    v = np.asarray(values, dtype=np.float64)
    half = max(1, len(v) // 20)
    return np.array([np.nanmean(v[max(0, i - half) : i + half + 1]) for i in range(len(v))])


def extremes(x: Sequence[float], y: Sequence[float]) -> Series:
    """A long series without the points that no reader could tell apart: of a stretch the lowest and the highest."""
    if len(x) <= MOST_POINTS:
        return x, y
    kept, start = set(), 0
    for part in np.array_split(np.asarray(y, dtype=np.float64), MOST_POINTS // 2):
        kept |= {start + int(part.argmin()), start + int(part.argmax())}
        start += len(part)
    return [x[i] for i in sorted(kept)], [y[i] for i in sorted(kept)]


def means(values: Sequence[float]) -> np.ndarray:
    """A long series as the means of stretches of equal length; a short one as it is."""
    v = np.asarray(values, dtype=np.float64)
    return v if len(v) <= MOST_POINTS else np.array([part.mean() for part in np.array_split(v, MOST_POINTS)])


def every(values: Sequence[float]) -> Sequence[float]:
    """At most MOST_POINTS of the values, evenly spaced."""
    return values[:: math.ceil(len(values) / MOST_POINTS)] if len(values) else values


def _canvas(rows: int = 1, height: float = HEIGHT):
    try:
        from matplotlib.figure import Figure as Canvas
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ModuleNotFoundError(
            "report.html needs the package matplotlib for its plots: pip install matplotlib", name=error.name
        ) from None
    canvas = Canvas(figsize=(WIDTH, height if rows == 1 else height * 1.55), layout="constrained")
    axes = canvas.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=10, colors="#333333")
        ax.locator_params(axis="y", nbins=5)
    return canvas, axes


def _label(ax, *, x: str | None = None, y: str | None = None) -> None:
    if x:
        ax.set_xlabel(x, fontsize=11)
    if y:
        ax.set_ylabel(y, fontsize=11)


def _legend(ax, **options) -> None:
    handles, labels = ax.get_legend_handles_labels()
    if labels:
        ax.legend(handles, labels, fontsize=10, frameon=False, **options)


def _finish(canvas, title: str, caption: str) -> Figure:
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "rlhf"}):
        canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return Figure(title, caption, "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode())


def _line(ax, series: Series, *, label: str, color: str, style: str = "-") -> None:
    x, y = series
    if len(x) >= 20:
        ax.plot(*extremes(x, y), color=color, linewidth=0.8, alpha=0.3)
        ax.plot(means(x), smooth(means(y)), style, color=color, linewidth=2, label=label)
    else:
        ax.plot(x, y, style, color=color, linewidth=2, marker="o" if len(x) < 3 else None, label=label)


def lines(
    panels: Sequence[tuple[str, dict[str, Series]]],
    *,
    title: str,
    caption: str,
    x: str = "iteration",
    zero: bool = False,
) -> Figure | None:
    """One panel per (y label, {name: (x, y)}), below each other on one x axis; panels without data are left out."""
    panels = [(label, {k: s for k, s in named.items() if s[0]}) for label, named in panels]
    panels = [(label, named) for label, named in panels if named]
    if not panels:
        return None
    canvas, axes = _canvas(len(panels))
    for ax, (label, named) in zip(axes, panels):
        for i, (name, series) in enumerate(named.items()):
            _line(ax, series, label=name, color=colour(name, i))
        if zero:
            ax.axhline(0, color="#333333", linewidth=0.8)
        _label(ax, y=label)
        if len(named) > 1 and ax is axes[0]:
            _legend(ax, loc="best")
    _label(axes[-1], x=x)
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    return _finish(canvas, title, caption)


def score_against_kl(runs: dict[str, dict[str, Series]]) -> Figure | None:
    """Reward and gold score against sqrt(KL), the axes in which over-optimisation shows (Gao et al., 2022)."""
    points = {}
    for name, series in runs.items():
        kl = dict(zip(*series["kl"]))
        for key, label in (("score", "reward model"), ("gold", "gold score")):
            common = [(math.sqrt(max(0.0, kl[s])), v) for s, v in zip(*series[key]) if s in kl]
            if len(common) > 1:
                points[name, label] = tuple(np.array(c) for c in zip(*common))
    if not points:
        return None
    labels = [label for label in ("reward model", "gold score") if any(key[1] == label for key in points)]
    canvas, axes = _canvas(len(labels))
    for ax, label in zip(axes, labels):
        for i, name in enumerate(runs):
            if (name, label) in points:
                x, y = points[name, label]
                ax.scatter(every(x), every(y), s=9, color=colour(name, i), alpha=0.35, linewidths=0)
                ax.plot(smooth(means(x)), smooth(means(y)), color=colour(name, i), linewidth=2, label=name)
        _label(ax, y=label)
    if len(runs) > 1:
        _legend(axes[0], loc="best")
    _label(axes[-1], x="√KL from SFT (√nats per response)")
    return _finish(
        canvas,
        "Score against distance from SFT",
        "Each point is one iteration. If the upper curve still rises where the lower one falls, the policy exploits "
        "the reward model.",
    )


def score_against_length(
    points: dict[str, tuple[Sequence[float], Sequence[float]]], *, y: str, title: str
) -> Figure | None:
    points = {name: p for name, p in points.items() if len(p[0])}
    if not points:
        return None
    canvas, (ax,) = _canvas()
    for i, (name, (length, score)) in enumerate(points.items()):
        ax.scatter(
            every(length),
            every(score),
            s=14,
            marker=MARKERS.get(name, "o"),
            color=colour(name, i),
            alpha=0.45,
            linewidths=0,
            label=name,
        )
    _label(ax, x="response length (tokens)", y=y)
    _legend(ax, ncols=len(points), loc="lower center", bbox_to_anchor=(0.5, 1.0), handletextpad=0.1, columnspacing=0.9)
    return _finish(
        canvas,
        title,
        "One point per held-out response. A cloud that climbs to the right means that length buys reward.",
    )


def accuracy_bars(
    bars: Sequence[tuple[str, float, float | None]],
    *,
    x: str,
    title: str,
    caption: str,
    interval: tuple[float, float] | None = None,
    lines: dict[str, float] | None = None,
) -> Figure | None:
    """Bars (name, accuracy, longer-wins baseline or None) of held-out pair accuracy, numbers on the bars in %.

    `interval` belongs to the first bar; `lines` are named heights to compare with.
    """
    if not bars or not all(math.isfinite(value) for _, value, _ in bars):
        return None
    canvas, (ax,) = _canvas()
    base = [math.nan if longer is None else longer for _, _, longer in bars]
    width = 0.4 if any(map(math.isfinite, base)) else 0.6
    at = np.arange(len(bars))
    left = at - (width / 2 if width < 0.5 else 0)
    ax.bar(left, [value for _, value, _ in bars], width, color="#0072B2", label="reward model")
    if width < 0.5:
        ax.bar(at + width / 2, base, width, color="#b9b9b9", label="“the longer one wins”")
    for place, (_, value, _) in zip(left, bars):
        ax.annotate(f"{100 * value:.0f}", (place, 0.02), ha="center", va="bottom", fontsize=9, color="white")
    if interval is not None:
        ax.plot([left[0]] * 2, interval, color="#000000", linewidth=1.5)
    ax.axhline(0.5, color="#333333", linewidth=1, linestyle=":", label="coin")
    for (name, height), color, style in zip((lines or {}).items(), ("#D55E00", "#009E73"), ("--", "-.")):
        ax.axhline(height, color=color, linewidth=1.2, linestyle=style, label=name)
    ax.set_ylim(0, 1)
    ax.set_xticks(at, [name for name, _, _ in bars])
    _label(ax, x=x, y="accuracy on held-out pairs")
    _legend(ax, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return _finish(canvas, title, caption)


def calibration_curve(points: Sequence[tuple[float, float, float, float, int]]) -> Figure | None:
    """Points (predicted share, observed share, its interval's low, high, pairs) beside the diagonal."""
    if not points:
        return None
    canvas, (ax,) = _canvas()
    ax.plot([0.5, 1], [0.5, 1], color="#333333", linewidth=1, linestyle=":", label="as sure as it is right")
    ax.plot(*list(zip(*points))[:2], color="#0072B2", linewidth=1, alpha=0.6)
    for predicted, observed, low, high, count in points:
        ax.plot([predicted] * 2, [low, high], color="#0072B2", linewidth=2, alpha=0.4)
        ax.plot([predicted], [observed], "o", color="#0072B2", markersize=6)
        offset = {"xytext": (5, 4), "textcoords": "offset points", "fontsize": 9, "color": "#555555"}
        ax.annotate(str(count), (predicted, observed), **offset)
    ax.set_xlim(0.49, 1.01)
    ax.set_ylim(0, 1.03)
    _label(ax, x="predicted: sigmoid of the scores’ difference", y="share in that order")
    _legend(ax, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return _finish(
        canvas,
        "Reward model: calibration",
        "How sure the scores are of a pair, and how often the labelers’ order was theirs. Numbers: pairs; bars: 95 % "
        "interval. Below the dotted line the model is too sure of itself.",
    )


def score_by_length(points: Sequence[tuple[float, float, float]], correlation: float | None = None) -> Figure | None:
    """Points (length in characters, mean score, its standard deviation), from short to long."""
    if len(points) < 2:
        return None
    canvas, (ax,) = _canvas()
    x, y, deviation = (np.array(column) for column in zip(*points))
    ax.fill_between(x, y - deviation, y + deviation, color="#0072B2", alpha=0.15, linewidth=0)
    ax.plot(x, y, "-o", color="#0072B2", linewidth=2, markersize=5)
    ax.axhline(0, color="#333333", linewidth=0.8)
    _label(ax, x="length of the response (characters)", y="score above the mean")
    found = f" Correlation over all responses: {correlation:+.2f}.".replace("-", "−") if correlation is not None else ""
    return _finish(
        canvas,
        "Reward model: score against length",
        "Held-out responses from short to long, in groups of one size: mean score and its standard deviation. A line "
        f"that climbs means that length buys reward.{found}",
    )


def dots(
    rows: Sequence[tuple[str, float, float | None, float | None]],
    *,
    x: str,
    title: str,
    caption: str,
    line: float | None = None,
    number: Callable[[float], str] = "{:.2f}".format,
) -> Figure | None:
    """One dot with its interval per policy, names on the y axis; `line` marks a value to compare with."""
    rows = [row for row in rows if row[1] is not None and math.isfinite(row[1])]
    if not rows:
        return None
    canvas, (ax,) = _canvas(height=1.2 + 0.38 * len(rows))
    ax.grid(axis="y", visible=False)
    ax.grid(axis="x", color="#dddddd", linewidth=0.6)
    for i, (name, value, low, high) in enumerate(rows):
        if low is not None and high is not None:
            ax.plot([low, high], [i, i], color=colour(name, i), linewidth=3, alpha=0.5, solid_capstyle="round")
        ax.plot([value], [i], MARKERS.get(name, "o"), color=colour(name, i), markersize=7)
        ax.annotate(number(value), (value, i), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=10)
    if line is not None:
        ax.axvline(line, color="#333333", linewidth=1, linestyle=":")
    ax.set_yticks(range(len(rows)), [row[0] for row in rows], fontsize=11)
    ax.set_ylim(len(rows) - 0.5, -0.8)
    ax.margins(x=0.12)
    _label(ax, x=x)
    return _finish(canvas, title, caption)
