"""Where the samples of an iteration come from: drawn now, or, with `rollout_ahead`, while the one before trained.

    iteration t:  wait for samples t | weights to the engine | start samples t + 1 | score, evaluate, train on samples t

So samples t + 1 come from the weights that iteration t began with, one iteration older than those that train on them.
Samples 0 are drawn first, from the weights of the start. The numbers are those of the list in `rlhf/ppo/trainer.py`.
"""

import logging
import time

from ..metrics import Averages
from ..rollouts.ahead import Drawn
from ..rollouts.sampling import Rollouts
from .guards import prompts_kept
from .state import timed

logger = logging.getLogger("rlhf")


def check_ahead(args, engine) -> None:
    """Refuse `rollout_ahead` of an engine that could not sample while the policy trains; warn where nothing corrects.

    Raises:
        ValueError: the engine does not say that it is `concurrent`, or takes no weights.
    """
    if not args.rollout_ahead:
        return
    lacking = [name for name in ("concurrent", "update_weights") if not getattr(engine, name, None)]
    if lacking:
        raise ValueError(
            f"rollout_ahead: got 1 with rollout_engine {args.rollout_engine}, which has no {' and no '.join(lacking)}; "
            "want an engine that samples elsewhere, from weights of its own, and says so: `concurrent = True` and "
            "update_weights (see rlhf.rollouts.RolloutEngine)"
        )
    if args.rollout_correction == "none":
        logger.warning(
            "rollout_ahead: the samples come from weights one iteration old, and rollout_correction none does not "
            "weigh them; --rollout_correction token does"
        )


@timed("rollout")
def next_samples(trainer, averages: Averages) -> tuple[list[dict], Rollouts]:
    """Return the prompts and samples of the iteration; with `rollout_ahead`, set the engine on those of the next.

    The metrics tell whether the samples were drawn ahead, how long the loop waited for them and the engine took.
    """
    begun, fresh = time.perf_counter(), not trainer.ahead
    if fresh:
        rows = trainer.next_prompts()
        drawn = Drawn([row["row_number"] for row in rows], trainer.sample(rows), time.perf_counter() - begun)
    else:
        drawn = samples_ahead(trainer)
        rows = [trainer.prompts[number] for number in drawn.rows]
        trainer.ahead.take()
    if trainer.args.rollout_ahead:
        waited = time.perf_counter() - begun if fresh else trainer.ahead.waited
        seconds = {"seconds_waited": waited, "seconds_sampled": drawn.seconds}
        averages.add({f"rollout/{name}": value for name, value in {"ahead": float(not fresh), **seconds}.items()}, 1)
        if _goes_on(trainer):
            _start(trainer, has_weights=fresh)
    return rows, drawn.rollouts


def _goes_on(trainer) -> bool:
    """Whether there is a next iteration, now or for a run that goes on from a checkpoint of the last one."""
    return trainer.step + 1 < trainer.iterations or trainer.args.save_steps > 0 or trainer.args.save_updates > 0


def _start(trainer, has_weights: bool) -> None:
    """Give the engine the weights, unless it has them, and start its samples of the next iteration."""
    rows = trainer.next_prompts()
    prompts = rows[:: trainer.args.num_responses]
    if not has_weights:
        given = trainer.sharding.for_engine(trainer.policy, trainer.engine)
        with prompts_kept(trainer, prompts, trainer.step + 2), given:  # 18, 19
            trainer.engine.update_weights(trainer.policy)
    alone = trainer.engine.__call__  # without the update_weights that `sample` would call
    draw = trainer.sampling(prompts, engine=alone, seed=trainer.engine_seed(trainer.step + 1))
    trainer.ahead.start([row["row_number"] for row in rows], draw)


def samples_ahead(trainer) -> Drawn | None:
    """Wait for the samples that are drawn ahead; None where there are none. Errors of their thread are raised here."""
    if not trainer.ahead:
        return None
    prompts = [trainer.prompts[number] for number in trainer.ahead.rows[:: trainer.args.num_responses]]
    iteration = trainer.step + (1 if trainer.begun is None else 2)
    with prompts_kept(trainer, prompts, iteration):  # 18
        return trainer.ahead.wait()
