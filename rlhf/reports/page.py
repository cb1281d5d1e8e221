"""The HTML of report.html: tables, health, samples and plots on one page that needs nothing outside itself."""

import html
import json
import re
from collections.abc import Sequence

from . import plots
from .engine import engine_figures
from .health import NOT_MEASURED, Check, health, minus
from .runs import COLUMNS, Report, cell, finite, pair_rows


def figures(report: Report) -> list[plots.Figure]:
    """All figures that the data at hand allow, in reading order."""
    policies, table = report.policies, report.table
    judge = "gold score" if any(row.get("gold") is not None for row in table) else "reward model’s score"

    def of(*keys):
        return {name: run.series(*keys) for name, run in policies.items()}

    found = [
        plots.dots(
            [
                (row["name"], *(100 * w[k] for k in ("rate", "low", "high")))
                for row in table
                if (w := row.get("win_rate"))
            ],
            x=f"wins over SFT by {judge}, % of held-out comparisons",
            title="Win rate over SFT",
            caption="Ties count half. Bars: 95 % interval (Wilson). Right of the dotted line the policy beats SFT.",
            line=50.0,
            number="{:.0f}".format,
        ),
        plots.dots(
            [(row["name"], row.get("lm_loss"), None, None) for row in table],
            x="loss on held-out text, nats a token",
            title="Alignment tax",
            caption="What training for preference cost as a language model: further right is worse. PPO-ptx mixes "
            "pretraining text in.",
            number="{:.3f}".format,
        ),
        plots.lines(
            [("reward model", of("objective/scores")), ("gold score", of("objective/gold"))],
            title="Score in PPO",
            caption="Mean over the episodes of an iteration; pale: raw, strong: moving average. Gold is what the "
            "reward model stands in for.",
        ),
        plots.score_against_kl(
            {
                name: {
                    "kl": run.series("objective/kl"),
                    "score": run.series("objective/scores"),
                    "gold": run.series("objective/gold"),
                }
                for name, run in policies.items()
            }
        ),
        plots.lines(
            [("KL from SFT (nats)", of("objective/kl")), ("KL coefficient", _varying(of("objective/kl_coef")))],
            title="KL from SFT",
            caption="Summed over the tokens of a response, mean over the episodes of an iteration.",
            zero=True,
        ),
        plots.lines(
            [("entropy (nats a token)", of("policy/entropy_avg", "objective/entropy"))],
            title="Entropy of the policy",
            caption="A fall to near 0 is a collapse: one answer for every prompt.",
        ),
        plots.lines(
            [
                ("length (tokens)", of("completions/mean_length")),
                ("cut at the limit", of("completions/clipped_ratio")),
            ],
            title="Response length",
            caption="Mean length, and the share of responses that hit the length limit without ending.",
        ),
        plots.lines(
            [("explained variance", of("val/explained_variance"))],
            title="What the value function explains",
            caption="Share of the variance of the returns: 1 is perfect, 0 no better than their mean.",
            zero=True,
        ),
        *engine_figures(report),
        *_reward_model(report),
        *_lengths(report),
        *_losses(report),
    ]
    return [figure for figure in found if figure is not None]


def _varying(named: dict[str, plots.Series]) -> dict[str, plots.Series]:
    """Only the series that change: a constant coefficient needs no plot."""
    return {name: series for name, series in named.items() if len(set(series[1])) > 1}


def _reward_model(report: Report) -> list[plots.Figure | None]:
    """What the reward stage measured on held-out pairs."""
    summary = report.reward_summary
    accuracy = summary.get("eval/accuracy")
    if not finite(accuracy):
        return []
    named = {
        "perfect judge, noisy labels": report.evaluation.get("labeler", {}).get("ceiling"),
        "labelers with each other": summary.get("labeler_agreement"),
    }
    interval = tuple(summary.get(f"eval/accuracy_{end}") for end in ("low", "high"))
    options = {
        "interval": interval if all(map(finite, interval)) else None,
        "lines": {name: value for name, value in named.items() if finite(value)},
    }
    overall = ("all", accuracy, summary.get("eval/longer_wins"))
    texts = {
        "k": ("K, responses ranked together", "Reward model: right on held-out pairs", "by the size of their ranking"),
        "gap": ("difference of ranks", "Reward model: near and far pairs", "by how far apart the labeler put them"),
    }
    made = []
    for name, (x, title, how) in texts.items():
        found = [(row.group, row.accuracy, row.longer_wins) for row in pair_rows(summary, name)]
        caption = f"Share of held-out pairs in the labelers’ order, {how}; on the bars in %. Black: 95 % interval."
        if found or name == "k":
            made.append(plots.accuracy_bars([overall, *found], x=x, title=title, caption=caption, **options))
    curve, bins = summary.get("eval/calibration") or {}, summary.get("eval/score_by_length") or {}
    points = zip(*(curve.get(name, ()) for name in ("predicted", "observed", "low", "high", "pairs")))
    made.append(plots.calibration_curve(list(points)))
    points = zip(*(bins.get(name, ()) for name in ("characters", "score", "deviation")))
    correlation = summary.get("eval/length_correlation")
    return [*made, plots.score_by_length(list(points), correlation if finite(correlation) else None)]


def _lengths(report: Report) -> list[plots.Figure | None]:
    names = [name for name in ("SFT", *report.policies) if report.responses(name)]
    rows = {name: report.responses(name) for name in names}
    made = [
        plots.score_against_length(
            {name: ([r["length"] for r in rows[name]], [r["score"] for r in rows[name]]) for name in names},
            y="reward model’s score",
            title="Reward against length",
        )
    ]
    gold = {name: [r for r in rows[name] if finite(r.get("gold"))] for name in names}
    if any(gold.values()):
        made.append(
            plots.score_against_length(
                {name: ([r["length"] for r in g], [r["gold"] for r in g]) for name, g in gold.items()},
                y="gold score",
                title="Gold score against length",
            )
        )
    return made


_LOSSES = {
    "sft": "Cross-entropy of the responses, nats a token.",
    "reward": "Loss of the pairs, nats a prompt (a coin has 0.69), and the share of pairs in the labelers’ order.",
}


def _losses(report: Report) -> list[plots.Figure | None]:
    made = []
    for name, run in report.runs.items():
        if run.stage == "ppo":
            continue
        panels = [
            ("loss", {"training": run.series("loss", "train/loss"), "held out": run.series("eval_loss", "eval/loss")})
        ]
        if run.stage == "reward":
            panels.append(
                (
                    "accuracy",
                    {"training": run.series("accuracy"), "held out": run.series("eval_accuracy", "eval/accuracy")},
                )
            )
        made.append(plots.lines(panels, title=f"{name}: loss", caption=_LOSSES.get(run.stage, "In nats."), x="step"))
    policies = report.policies
    panels = [
        (label, {name: run.series(key) for name, run in policies.items()})
        for label, key in (("policy", "loss/policy_avg"), ("value", "loss/value_avg"), ("pretraining", "loss/ptx_avg"))
    ]
    made.append(
        plots.lines(
            panels,
            title="PPO: losses",
            caption="Clipped policy loss, value loss, and (PPO-ptx) nats a token of pretraining text.",
        )
    )
    return made


def _table_html(report: Report) -> str:
    columns = [column for column in COLUMNS if any(row.get(column[0]) is not None for row in report.table)]
    if not columns:
        return ""
    head = "".join(f"<th scope=col>{html.escape(row['name'])}</th>" for row in report.table)
    rows = []
    for key, title, form in columns:
        texts = (minus(cell(key, form, row.get(key))) for row in report.table)
        cells = (text.replace(" (", "<br><small>").replace(")", "</small>") for text in texts)
        rows.append(f"<tr><th scope=row>{title}</th>" + "".join(f"<td>{text}</td>" for text in cells) + "</tr>")
    note = report.evaluation.get("note", "")
    return (
        f"<div class=scroll><table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f"<p class=note>{html.escape(note)}</p>"
    )


def _stage_html(report: Report) -> str:
    """The numbers that each stage summarises itself with."""
    parts = []
    for name, run in report.runs.items():
        rows = [(key, value) for key, value in run.summary.items() if finite(value)]
        if rows:
            texts = ((html.escape(key), minus(f"{value:,.4g}")) for key, value in rows)
            body = "".join(f"<tr><th scope=row>{key}</th><td>{text}</td></tr>" for key, text in texts)
            parts.append(f"<h3>{html.escape(name)}</h3><div class=scroll><table>{body}</table></div>")
        pairs = pair_rows(run.summary)
        if pairs:
            heads = "".join(f"<th scope=col>{title}</th>" for title in ("pairs", "accuracy", "longer wins"))
            body = "".join(
                f"<tr><th scope=row>{html.escape(row.title)}</th><td>{row.pairs:,}</td><td>{row.accuracy:.3f}</td>"
                f"<td>{row.longer_wins:.3f}</td></tr>"
                for row in pairs
            )
            table = f"<table><thead><tr><th></th>{heads}</tr></thead><tbody>{body}</tbody></table>"
            parts.append(f"<h3>{html.escape(name)}: held-out pairs</h3><div class=scroll>{table}</div>")
    return "<div class=stages>" + "".join(f"<div>{part}</div>" for part in parts) + "</div>" if parts else ""


def _health_html(checks: Sequence[Check]) -> str:
    rows = "".join(
        f"<li class='{check.verdict.split()[0]}'><span class=verdict>{WORDS.get(check.verdict, check.verdict)}</span>"
        f"<div><b>{html.escape(check.name)}</b>"
        + "".join(f"<span class=number>{html.escape(line)}</span>" for line in check.number.split("; "))
        + f"<p>{_flags(html.escape(check.meaning))}</p></div></li>"
        for check in checks
    )
    return f"<ul class=health>{rows}</ul>"


def _flags(text: str) -> str:
    """Options of the command line in one unbroken piece each."""
    return re.sub(r"--\w+", r"<code>\g<0></code>", text)


def _samples_html(report: Report, count: int = 8) -> str:
    responses = report.evaluation.get("responses", {})
    names = [row["name"] for row in report.table if responses.get(row["name"])]
    if not names:
        return _training_samples_html(report, count)
    blocks = []
    for rows in list(zip(*(responses[name] for name in names)))[:count]:
        cards = []
        for name, row in zip(names, rows):
            found = [(key, row.get(key)) for key in ("gold", "reward")]
            scores = [minus(f"{key} {value:z.2f}") for key, value in found if finite(value)]
            cut = "" if row.get("ended", True) else " <span class=cut>[cut]</span>"
            cards.append(
                f"<div class=card style='border-color:{plots.colour(name)}'><b>{html.escape(name)}</b> "
                f"<small>{', '.join(scores)}</small><p>{html.escape(row['completion'].strip())}{cut}</p></div>"
            )
        blocks.append(
            f"<blockquote>{html.escape(rows[0]['prompt'])}</blockquote><div class=cards>{''.join(cards)}</div>"
        )
    return "".join(blocks)


def _training_samples_html(report: Report, count: int) -> str:
    blocks = []
    for name, run in report.runs.items():
        if run.samples:
            first, last = run.samples[: count // 2], run.samples[-(count // 2) :]
            for row in first + [r for r in last if r not in first]:
                score = f", score {row['score']:.2f}" if finite(row.get("score")) else ""
                blocks.append(
                    f"<blockquote>{html.escape(str(row['prompt']))}</blockquote><div class=cards><div class=card>"
                    f"<small>{html.escape(name)}, step {row['step']}{score}</small>"
                    f"<p>{html.escape(row['completion'].strip())}</p></div></div>"
                )
    return "".join(blocks)


STYLE = """
:root { color-scheme: light }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; color: #1c1c1c; background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
h1 { font-size: 1.6rem; margin: .5rem 0 }
h2 { font-size: 1.25rem; margin: 2rem 0 .6rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem }
h3 { font-size: 1rem; margin: .8rem 0 .2rem }
.lead { color: #444; margin: .2rem 0 1rem }
.note, small, figcaption, .health p { color: #555; font-size: .86rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .7rem; border-bottom: 1px solid #e5e5e5; text-align: right; vertical-align: top }
td, th[scope=col] { white-space: nowrap }
th[scope=row] { text-align: left; font-weight: 500 }
.stages { display: flex; flex-wrap: wrap; gap: 0 3rem }
.health { list-style: none; padding: 0; margin: 0; display: grid; gap: .5rem 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)) }
.health li { display: flex; gap: .8rem; align-items: flex-start; padding: .3rem 0 }
.health p { margin: .1rem 0 }
.verdict { flex: 0 0 5.4rem; text-align: center; font-size: .8rem; font-weight: 600; border-radius: .4rem;
  padding: .15rem .2rem; margin-top: .15rem; background: #eee; color: #555 }
.good .verdict { background: #d9f0e3; color: #0b5a36 }
.watch .verdict { background: #fff0c9; color: #6b4a00 }
.bad .verdict { background: #fbdcd3; color: #8c2500 }
.number { display: block; font-variant-numeric: tabular-nums }
blockquote { margin: 1.2rem 0 .4rem; padding-left: .7rem; border-left: 3px solid #bbb; font-style: italic }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); gap: .6rem }
.card { border-top: 3px solid #bbb; background: #f7f7f7; padding: .4rem .7rem }
.card p { margin: .2rem 0; overflow-wrap: anywhere; white-space: pre-line }
.cut { color: #8c2500 }
code { white-space: nowrap; font-size: .95em }
.plots { columns: 22rem; column-gap: 1.5rem }
figure { margin: 0 0 1.6rem; break-inside: avoid }
figure h3 { margin: 0 0 .3rem }
figure img { width: 100%; height: auto }
figcaption { margin-top: .2rem }
details pre { overflow-x: auto; background: #f7f7f7; padding: .6rem; font-size: .8rem }
@media (max-width: 40rem) {
  body { padding: .7rem }
  th, td { padding: .3rem .35rem; font-size: .85rem }
  .verdict { flex-basis: 4.6rem }
}
"""
WORDS = {"good": "fine", "watch": "watch", "bad": "alarm"}
"""How the page calls a verdict: it stands beside the name of a failure, where "good" could be misread."""


def render(report: Report) -> str:
    """The report as one HTML page that refers to nothing outside itself."""
    checks = health(report)
    alarms = [check.name for check in checks if check.verdict == "bad"]
    measured = sum(check.verdict != NOT_MEASURED for check in checks)
    lead = (
        f"{measured} of {len(checks)} failure modes measured; "
        + (f"{len(alarms)} sounding: {', '.join(alarms)}." if alarms else "none is sounding.")
        if measured
        else ""
    )
    plot_html = "".join(
        f"<figure><h3>{html.escape(f.title)}</h3><img src='{f.source}' alt='{html.escape(f.title, quote=True)}'>"
        f"<figcaption>{html.escape(f.caption)}</figcaption></figure>"
        for f in figures(report)
    )
    samples = _samples_html(report)
    sections = [
        ("Result", _table_html(report) or _stage_html(report)),
        ("Health", _health_html(checks) if measured else ""),
        ("Plots", f"<div class=plots>{plot_html}</div>" if plot_html else ""),
        ("The same prompts, every policy" if report.table else "Samples", samples),
        ("Stages", _stage_html(report) if report.table else ""),
        ("Configuration", _config_html(report)),
    ]
    body = "".join(f"<h2>{title}</h2>{text}" for title, text in sections if text)
    title = html.escape(report.evaluation.get("title") or f"{', '.join(report.runs)}: {report.title}")
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>"
        f"<p class=lead>{html.escape(lead)}</p>{body}</body></html>\n"
    )


def _config_html(report: Report) -> str:
    return "".join(
        f"<details><summary>{html.escape(name)}</summary>"
        f"<pre>{html.escape(json.dumps(run.config, indent=2, default=str))}</pre></details>"
        for name, run in report.runs.items()
        if run.config
    )
