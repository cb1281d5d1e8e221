"""The contract of a PPO run, checked on a few real samples before the first iteration. A broken one stops the run."""

import itertools
import logging

import torch

from ..data import encode_prompt, encode_row, encode_within
from ..data.files import Bad
from ..data.showing import MARKS, marked, show, warn_of_template
from ..errors import RunError
from ..models import load_tokenizer
from ..models.sequences import join, response_log_probs, response_scores, response_values
from ..rollouts.engines import gap_complaint, log_prob_gap
from ..rollouts.sampling import sample
from ..training.probes import gap, packs, rounding, sampler_log_probs
from .sharding import local
from .state import in_run_precision

logger = logging.getLogger("rlhf")


class ContractError(RunError):
    """Something that the algorithm takes for granted does not hold; the message says what, with its number."""


@in_run_precision
def check_contract(trainer) -> dict[str, float]:
    """Check that policy and reference agree, the value network is the reward model, and ids are ids everywhere.

    Returns:
        The measured numbers, by name: all 0 but for rounding.
    Raises:
        ContractError: names each check that failed.
    """
    args, policy, reference = trainer.args, trainer.policy, trainer.reference
    dtype = policy.dtype if trainer.accelerator.mixed_precision == "no" else torch.bfloat16
    tolerance, rows = rounding(dtype), _rows(trainer.prompts)
    prompts = [row["prompt_ids"] for row in rows]
    with torch.random.fork_rng(), trainer.sharding.for_engine(policy, trainer.engine):
        rollouts = sample(
            policy, trainer.tokenizer, prompts, response_length=min(args.response_length, 16),
            temperature=args.temperature, stop_token_ids=trainer.stop_ids, engine=trainer.engine,
        )  # fmt: skip
        first, sampled = [ids[0] for ids in rollouts.response_ids], None
        if trainer.engine is None:
            sampled = sampler_log_probs(policy, prompts, first, temperature=args.temperature)
    _show(trainer, rows[0], rollouts)
    batch = join(rollouts.prompt_ids, rollouts.response_ids, policy.device)
    policy.train()
    numbers, failures = {}, []

    def check(name: str, difference, meaning: str, limit: float = tolerance) -> None:
        numbers[name] = float(difference)
        if not numbers[name] <= limit:
            failures.append(f"{name}: {meaning} (off by {numbers[name]:.3g}, at most {limit:g} is rounding)")

    trained = _storage(weight for weight in policy.parameters() if weight.requires_grad)
    shared = trained & _storage(reference.parameters())
    check("reference_storage", len(shared), "the reference shares tensors with the policy, so it would train too", 0)
    trainable = sum(weight.requires_grad for weight in reference.parameters())
    check("reference_frozen", trainable, "the reference has weights that would train", 0)
    with torch.no_grad():
        log_probs, _ = response_log_probs(policy, batch, temperature=args.temperature)
        again, _ = response_log_probs(policy, batch, temperature=args.temperature)
        ref_log_probs, _ = response_log_probs(reference, batch, temperature=args.temperature)
        logits = policy(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        still, _ = response_log_probs(policy.eval(), batch, temperature=args.temperature)
        policy.train()
    check("dropout", (log_probs - again).abs().max(), "two forwards of the policy in train mode differ", 0.0)
    check("eval_mode", (log_probs - still).abs().max(), "the policy computes something else in eval mode")
    check("kl", (log_probs - ref_log_probs).abs().max(), "policy and reference are equal, yet their KL is not 0")
    full = (logits.flatten(0, 1)[batch.rows].double() / args.temperature).log_softmax(-1)
    full = full.gather(-1, batch.labels[:, None]).squeeze(-1)
    check(
        "full_vocabulary", (log_probs - full).abs().max(),
        "log-probs are not the full vocabulary's log-softmax of the model's logits / temperature", 10 * tolerance,
    )  # fmt: skip
    single = join(rollouts.prompt_ids[:1], rollouts.response_ids[:1], policy.device)
    alone, _ = response_log_probs(policy, single, temperature=args.temperature)
    ratio = torch.exp(alone.detach() - log_probs[: len(alone)])
    check("ratio", (ratio - 1).abs().max(), "the unchanged policy's ratio is not 1 in another batch", 10 * tolerance)
    most = max(10 * tolerance, 4 * gap(alone, log_probs[: len(alone)], dtype))
    if sampled is not None:
        off = gap(sampled, batch.unpack(log_probs)[:, 0], dtype)
        check("sampling", off, "samples come from another distribution than the one that is scored", most)
    if trainer.share_width is not None:
        numbers["packing"] = _packing_gap(trainer, rollouts, dtype)
        if not packs(numbers["packing"], most, "log-probs or values", args.packing):
            trainer.share_width = None
    if rollouts.log_probs is not None:
        apart = log_prob_gap(rollouts.log_probs, batch.unpack(log_probs), batch.response_mask)
        limit = torch.inf if args.rollout_gap_limit is None else args.rollout_gap_limit
        check("engine_log_probs", apart["rollout/logprob_gap_mean"], gap_complaint(apart, limit), limit)
    _check_ids(trainer, rows, rollouts, check)
    from_reward = args.value_model_path is None and trainer.given.value_model is None
    served = trainer.reward_server is not None and args.reward_model_path is not None and trainer.own_tokens is None
    if (trainer.reward_model is not None or served) and trainer.value is not None and from_reward:
        with torch.no_grad():
            values = response_scores(trainer.value, batch)
            if served:
                scores = trainer.scorer.reward_model_scores(rows, rollouts)
            else:
                scores = response_scores(trainer.reward_model, batch)
        off = ((values - scores).abs() / scores.abs().clamp(min=1)).max()
        meaning = "the value network's output at the last token is not the reward model's score"
        check("value_at_end", off, meaning, rounding(torch.bfloat16) if served else tolerance)  # of a type of its own
    if failures:
        raise ContractError(f"the start-up check failed: {'; '.join(failures)}")
    return numbers


def _show(trainer, row, rollouts) -> None:
    """Print the first of the rollouts, and tell what the chat template does to the rows."""
    if not trainer.accelerator.is_main_process:
        return
    warn_of_template(trainer.tokenizer, trainer.prompts)
    text = marked(trainer.tokenizer, rollouts.prompt_ids[0], rollouts.response_ids[:1])
    show(f"{row['at']} as the policy is asked; the beginning of its answer stands in {MARKS}:", text)
    if trainer.reward_model is None or trainer.own_tokens is not None or isinstance(row["prompt"], str):
        return
    trained, ids = _trained(trainer.tokenizer, row, "A."), encode_prompt(trainer.tokenizer, row["prompt"])
    if trained and ids == row["prompt_ids"] and trained[: len(ids)] != ids:
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(trained, ids)))
        logger.warning(
            "chat_template: the template asks for an answer with %r, and leaves that out where there is one: the "
            "reward model was trained without it, and reads it now",
            trainer.tokenizer.decode(ids[same:]),
        )


def _rows(prompts) -> list[dict]:
    """The two shortest prompts and the two longest, by length."""
    order = sorted(range(len(prompts)), key=prompts.lengths.__getitem__)
    return [prompts[number] for number in (order if len(order) < 4 else [*order[:2], *order[-2:]])]


@torch.no_grad()
def _packing_gap(trainer, rollouts, dtype) -> float:
    """How far log-probs and values of some responses to the longest prompt lie apart between packed rows and others."""
    responses, found = rollouts.response_ids, []
    prompts = [rollouts.prompt_ids[-1]] * len(responses)
    for width in (trainer.share_width, None):
        batch = join(prompts, responses, trainer.policy.device, share_width=width)
        log_probs, _ = response_log_probs(trainer.policy, batch, temperature=trainer.args.temperature)
        values = [] if trainer.value is None else [response_values(trainer.value, batch)]
        found.append(torch.stack([log_probs, *values]))
    return gap(*found, dtype)


def _storage(weights) -> set[int]:
    """Where the weights lie that this process holds; an empty slice lies nowhere."""
    return {local(weight).data_ptr() for weight in weights if local(weight).numel()}


def _check_ids(trainer, rows, rollouts, check) -> None:
    """The reward model must read the very ids that it was trained on, and those that were sampled."""
    tokenizer, room = trainer.tokenizer, trainer.prompt_room
    wrong = 0
    for row in rows:
        wrong += encode_within(tokenizer, row["prompt"], room)[1] != row["prompt_ids"]
    check("prompt_ids", wrong, "prompts are not the ids that reward training gives them", 0)
    if trainer.own_tokens is not None:
        _check_own_ids(trainer, rows, rollouts, check)
    from_path = trainer.args.reward_model_path is not None and trainer.given.reward_model is None
    if not from_path or trainer.own_tokens is not None:
        return  # no reward model, or one that came without a tokenizer
    other = load_tokenizer(trainer.args.reward_model_path, trust_remote_code=trainer.args.trust_remote_code)
    wrong = int(other.eos_token_id != tokenizer.eos_token_id)
    for row, response in zip(rows, rollouts.response_ids, strict=True):
        text = tokenizer.decode(response, skip_special_tokens=True)
        wrong += encode_within(other, row["prompt"], room)[1] != row["prompt_ids"]
        wrong += _trained(other, row, text) != _trained(tokenizer, row, text)
    meaning = "the reward model's tokenizer gives other ids than the policy's (see --reward_tokenizer auto)"
    check("reward_ids", wrong, meaning, 0)


def _trained(tokenizer, row, answer) -> list[int]:
    """The ids on which a reward model is trained for that answer to the prompt of a row; none if it is refused."""
    row = {"prompt": row["prompt"], "completion": answer if isinstance(answer, str) else [answer]}
    try:
        (found,) = encode_row(tokenizer, row, ("completion",), max_length=2**31)
    except Bad:
        return []
    return found.prompt + found.responses[0]


def _check_own_ids(trainer, rows, rollouts, check) -> None:
    """A reward model with another tokenizer must read what `encode_row` makes of the text, as in its training."""
    own, wrong = trainer.own_tokens, 0
    encoded = own(rows, rollouts)
    for row, *sampled, prompt, response in zip(
        rows, rollouts.prompt_ids, rollouts.response_ids, rollouts.ended, encoded.prompt_ids,
        encoded.response_ids,
    ):  # fmt: skip
        trained, read = _trained(own.tokenizer, row, own.answer(row["prompt"], *sampled)), prompt + response
        if own.room is not None and len(trained) > own.room:  # it reads the prompt cut
            continue
        if not sampled[-1]:  # what ends a turn is left off
            trained, read = (own.tokenizer.decode(ids) for ids in (trained, read))
            trained = trained[: len(read)]
        wrong += trained != read
    check("reward_ids", wrong, "the reward model would read other ids than those of its training", 0)
    if trainer.reward_model is None:
        return  # a server, which refuses such ids itself
    size = trainer.reward_model.get_input_embeddings().num_embeddings
    largest = max(max(ids) for ids in (*encoded.prompt_ids, *encoded.response_ids) if ids)
    check("reward_vocabulary", max(0, largest + 1 - size), "its tokenizer has ids beyond the reward model's table", 0)
