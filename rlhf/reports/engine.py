"""Figures of PPO runs that a rollout engine samples for: how far its samples lie from the policy that learns."""

from . import plots
from .runs import Report


def engine_figures(report: Report) -> list[plots.Figure | None]:
    """Gap, effective sample size and share of weights out of bounds, by iteration, and how
    long a loop whose samples are drawn ahead waited for them; None where nothing was logged.
    """
    runs = report.policies
    outside = {  # a weight outside of its bounds is held there or, under `_mask`, becomes 0
        name: "filtered" if str(run.config.get("rollout_correction")).endswith("_mask") else "truncated"
        for name, run in runs.items()
    }
    distance = [
        ("gap (nats)", {name: run.series("rollout/logprob_gap_mean") for name, run in runs.items()}),
        ("ESS (share)", {name: run.series("rollout/effective_sample_size") for name, run in runs.items()}),
        ("clipped (share)", {name: run.series(f"rollout/{outside[name]}_fraction") for name, run in runs.items()}),
    ]
    seconds = {
        f"{name}, {what}" if len(runs) > 1 else what: run.series(f"rollout/seconds_{what}")
        for name, run in runs.items()
        for what in ("sampled", "waited")
    }
    return [
        plots.lines(
            distance,
            title="Samples of the rollout engine",
            caption="Gap: mean distance of the engine’s log-probs from the trainer’s, a token; rounding alone keeps it "
            "small, one that grows comes of older weights or of another distribution. ESS, effective sample size: so "
            "much of the batch would say as much, were it the policy’s own; 1 is all of it. Clipped: share of the "
            "tokens whose weight --rollout_correction held at a bound, or set to 0.",
        ),
        plots.lines(
            [("seconds", seconds)],
            title="Samples drawn ahead",
            caption="What the engine took for the samples of an iteration, and what of it training waited for "
            "(--rollout_ahead): the less is waited, the more of the sampling is hidden behind the training.",
            zero=True,
        ),
    ]
