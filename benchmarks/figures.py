"""The figures of the README and the docs: bars of speed, curves of cost. Plain data of a results file goes in."""

from __future__ import annotations

from pathlib import Path

ROOFS = ("read", "copy", "matmuls", "backbone")
PASSES = {"fwd": "forward", "fwdbwd": "forward + backward"}
NAMES = {
    "ours": "ours", "eager": "eager PyTorch", "compile": "torch.compile", "trl": "TRL", "openrlhf": "OpenRLHF",
    "rows": "K rows", "eager-loop": "a loop", "pairs": "all pairs", "torch": "torch's own",
    "trl-labels": "TRL on labels",
}  # fmt: skip
"""How a row of the results file is called where people read it; a peer that is missing here keeps its name."""
THEMES = {
    "light": {"text": "#1f2328", "quiet": "#59636e", "grid": "#d1d9e0", "ours": "#0969da", "compile": "#848d97",
              "peer": "#bc6c25"},
    "dark": {"text": "#f0f6fc", "quiet": "#9198a1", "grid": "#3d444d", "ours": "#4493f8", "compile": "#848d97",
             "peer": "#e09b5a"},
}  # fmt: skip


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.hashsalt": "rlhf-kernels", "svg.fonttype": "none", "font.size": 8})
    return pyplot


def _save(figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    _pyplot().close(figure)


def bars(group: dict, than: str) -> list[tuple[str, float]]:
    """(implementation, times as fast as `than`): ours, torch.compile, then the peers that ran."""
    rows = {name: row for name, row in group["rows"].items() if "ms" in row and name not in (than, *ROOFS)}
    apart = ("eager", "ours", "dense", "pairs", "rows")  # other ways of ours and of PyTorch are told in the tables
    names = [name for name in rows if name == "ours" or name.partition("-")[0] not in apart]
    names.sort(key=lambda name: ["ours", "compile"].index(name) if name in ("ours", "compile") else 2)
    return [(name, group["rows"][than]["ms"] / rows[name]["ms"]) for name in names]


def draw_bars(shown: list[tuple[dict, str]], machine: str, path: Path, theme: str) -> None:
    """How many times as fast as its baseline each implementation is: an op has a group of bars; theme: of THEMES."""
    if not shown:
        path.unlink(missing_ok=True)
        return
    plt, colours = _pyplot(), THEMES[theme]
    places, at = [], 0.0
    for group, than in shown:
        every = bars(group, than)
        places.append((at + (len(every) - 1) / 2, group, than, [(at + i, *bar) for i, bar in enumerate(every)]))
        at += len(every) + 0.9
    figure, axes = plt.subplots(figsize=(9, 0.185 * at + 0.5), layout="constrained")
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    for middle, group, than, every in places:
        for y, name, times in every:
            colour = colours.get(name, colours["peer"])
            axes.barh(y, times - 1, left=1, height=0.86, color=colour)
            text = f"{NAMES.get(name, name)} {times:.3g} ×"
            axes.annotate(
                text, (times, y), (4 if times >= 1 else -4, 0), textcoords="offset points", va="center",
                ha="left" if times >= 1 else "right", color=colours["ours" if name == "ours" else "text"],
                weight="bold" if name == "ours" else "normal",
            )  # fmt: skip
        what = (
            f"{PASSES[group['direction']]}, {group['shape']}"
            if than == "eager"
            else f"{group['shape']}, 1 = {NAMES[than]}"
        )
        for line, size, colour, shift in ((group["function"], 8.5, "text", 5), (what, 7, "quiet", -5)):
            axes.annotate(
                line, (0, middle), (-6, shift), xycoords=("axes fraction", "data"), textcoords="offset points",
                ha="right", va="center", size=size, color=colours[colour], annotation_clip=False,
            )  # fmt: skip
    reach = [times for *_, every in places for *_, times in every]
    axes.set(xscale="log", xlim=(min(reach) / 4, max(reach) * 4), ylim=(at - 0.9, -0.9), yticks=[])
    ticks = [tick for tick in (0.1, 1, 10, 100, 1000) if min(reach) / 4 < tick < max(reach) * 4]
    axes.set_xticks(ticks, [f"{tick:g} ×" for tick in ticks], color=colours["quiet"])
    axes.minorticks_off()
    axes.tick_params(length=0)
    axes.grid(axis="x", color=colours["grid"], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.axvline(1, color=colours["text"], linewidth=1)
    title = f"times as fast as eager PyTorch (= 1), logarithmic; {machine}"
    axes.set_title(title, size=8.5, color=colours["quiet"], loc="left")
    for spine in axes.spines.values():
        spine.set_visible(False)
    _save(figure, path)


def curves(groups: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """{(title, size that grows): groups in ascending order}."""
    found: dict[tuple[str, str], list[dict]] = {}
    for group in groups:
        if group["scale"]:
            fixed = ", ".join(f"{k} = {v}" for k, v in group["sizes"].items() if k != group["scale"])
            title = f"{group['function']}, {PASSES[group['direction']]}, {group['dtype']}\n{fixed}"
            found.setdefault((title, group["scale"]), []).append(group)
    return {key: sorted(points, key=lambda g: g["sizes"][key[1]]) for key, points in found.items()}


def draw_curves(groups: list[dict], path: Path) -> None:
    """Time and peak memory of every curve, log-log, side by side."""
    every = curves(groups)
    if not every:
        path.unlink(missing_ok=True)
        return
    plt = _pyplot()
    size = (8.5, 2.7 * len(every))
    figure, axes = plt.subplots(len(every), 2, figsize=size, squeeze=False, layout="constrained")
    names = list(dict.fromkeys(name for points in every.values() for g in points for name in g["rows"]))
    others = [name for name in names if name.partition("-")[0] not in ("ours", *ROOFS)]
    colours = {name: f"C{i % 9 + 1}" for i, name in enumerate(others)}
    for pair, ((title, size), points) in zip(axes, every.items()):
        for panel, key, label in zip(pair, ("ms", "peak_mib"), ("ms", "extra peak memory, MiB")):
            for name in points[0]["rows"]:
                line = [(g["sizes"][size], g["rows"].get(name, {}).get(key)) for g in points]
                line = [(x, max(y, 0.05) if key == "peak_mib" else y) for x, y in line if y is not None]
                if not line or (key == "peak_mib" and name in ROOFS):
                    continue
                if name in ROOFS:
                    style = {"color": "grey", "linestyle": ":"}
                elif name.startswith("ours"):
                    style = {"color": "black", "linewidth": 2.2, "linestyle": "-" if name == "ours" else "--"}
                else:
                    style = {"color": colours[name]}
                panel.plot(*zip(*line), marker="o", markersize=3, label=name, **style)
            panel.set(xscale="log", yscale="log", xlabel=size, ylabel=label)
            ticks = [g["sizes"][size] for g in points]
            panel.set_xticks(ticks, [str(tick) for tick in ticks])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
        pair[0].set_title(title, loc="left")
        pair[0].legend(fontsize=7, frameon=False)
    _save(figure, path)
