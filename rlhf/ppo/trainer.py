"""PPO and PPO-ptx of InstructGPT (Ouyang et al. 2022, arXiv 2203.02155, section 3.5 and appendix C.4).

    maximise  E_{x ~ prompts, y ~ policy}[ r(x, y) - beta * log(policy(y|x) / SFT(y|x)) ]
              + gamma * E_{x ~ pretraining text}[ log policy(x) ]

One iteration: sample a response to each prompt of a batch; score it with the reward model; take the log-probs of the
response tokens under the policy and the SFT model, and the values; the reward of a token is -beta * its log-ratio, plus
the score at the last token; generalised advantages; then some epochs of minibatch steps on the clipped loss, with the
gradient of gamma times the language-model loss on pretraining text added to each step.

Departures and details (each number stands again at its line, here or in run.py):
 1. Tokens are drawn from softmax(logits / temperature) over the whole vocabulary, and log-probs, KL and entropy belong
    to that same distribution. Settings in generation_config that would cut it (top_p, top_k, ...) have no effect.
 2. Old log-probs are computed by the code that trains, not taken from the sampler; so the first ratio is 1.
 3. A response ends with the first stop token, which is kept and scored. One that reaches response_length without it is
    a finished episode too: score at the last token, no bootstrapping; `missing_eos_penalty` is taken off its score.
 4. The value network is a network of its own, started from the reward model (paper). It reads the state before each
    token. It shares the optimizer with the policy, with its own learning rate and gradient clip.
 5. Advantages are whitened over the whole batch of an iteration, on all processes (OpenAI's code; not in the paper).
 6. The loss is a mean over the response tokens of a minibatch, however it is cut into micro-batches and processes.
 7. gamma multiplies the mean -log p per token of `ptx_batch_multiplier` texts an episode (paper: 8; gamma 27.8). Both
    gradients go into one optimizer step. With gamma 0 nothing of it runs.
 8. The learning rate rises from a tenth over the first iterations, linearly by optimizer step.
 9. The average of the policy's weights moves once an iteration, and is the model that the run hands on (paper: 0.992).
10. beta is fixed (paper: 0.02), or steered to `kl_target`, with the sampled KL of the iteration just done.
11. `max_kl` ends the run at the first iteration whose samples lie farther than that from the SFT model, without a step,
    and hands on the policy of the iteration before, the last one that was measured to be near enough.
12. With `num_responses` above 1, the responses to a prompt that meet in a batch share one copy of it, where all
    networks can take such rows and it is less work.
13. With several processes each one samples and scores its share of the prompts; then all hold the whole experience, and
    each takes its share of every minibatch. Noise and order follow from the seed, the iteration and the place in it, so
    that samples and steps are those of one process, and a run goes on between any two steps of an iteration.
14. A reward function may reward steps of a response or each of its tokens (process rewards). They are added to the
    tokens' rewards before the advantages are made; reward_clip_range does not touch them.
15. A reward model with another tokenizer, where `reward_tokenizer` allows it, reads the decoded response, encoded as in
    its training. A response that was cut off gets no end token there either.
16. Log-probs that a rollout engine gives are compared with those of 2. Where `rollout_correction` asks for it, each
    token's loss is weighted by the ratio of the two.
17. With `use_peft` policy and value network are LoRA adapters on frozen weights (the value network's head trains in
    full), and the SFT model of the KL is the policy with its adapters off.
18. No step is made from numbers that are not finite: the run stops and leaves the batch behind. Numbers that look
    unhealthy are told, and end the run where that is asked for.
19. Asked for FSDP2, each process holds a slice of every network, and of the optimizer. For sampling alone the policy is
    whole on each, since they sample unequally long, but for an engine that gathers the slices itself (vLLM); each
    micro-batch adds its gradient to the slices.
20. With `bf16` (or accelerate's mixed precision) every forward, of all networks and in sampling too, makes its products
    in bf16 of weights in fp32: the ratio of an unchanged policy stays 1, and small steps are not rounded away.
21. With an advantage other than gae a response is compared with others, of its prompt or of the batch; there is no
    value network, no value loss, and `whiten_advantages` has no meaning. The KL may be a term of the loss instead of
    the rewards, and the objective any of `rlhf_kernels.policy_loss`.
22. With `rollout_ahead` an engine that samples elsewhere draws the samples of the next iteration while this one trains,
    from the weights that this one began with (ahead.py). 2 stays: old log-probs are those of the policy whose turn it
    is, and the first ratio is 1; that the samples are one iteration older is for 16 to weigh, in the loss alone: the
    KL of 10 and 11 is the mean over these samples. `rollout_gap_limit` ends the run in the first iteration only, where
    sampler and trainer have the same weights; later it warns.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm.auto import tqdm

from rlhf_kernels import gae, masked_whiten, rlhf_advantages, value_loss

from .. import locks
from ..interrupt import deferred
from ..metrics import Averages
from ..models.sequences import response_log_probs, response_values
from ..rollouts.sampling import Rollouts, sample
from .ahead import next_samples
from .config import PPOConfig
from .guards import compare_engine, finite_experience, prompts_kept, stop_if_not_finite
from .iteration import Experience, Iteration
from .objective import advantages_without_values, importance_weights, kl_term, objective_of
from .run import PPORun
from .sharding import trained_weights, whole_tensor
from .state import in_run_precision, timed

__all__ = ["PPOConfig", "PPOTrainer", "train_ppo"]


class PPOTrainer(PPORun):
    """The loop: `PPOTrainer(args, tokenizer, policy, reward_model=reward, train_dataset=rows).train()`.

    Arguments come in the order of TRL 1.12. What is not given is loaded from the paths in `args`.

    Args:
        args: the settings; None = the defaults.
        processing_class: the tokenizer, or its path.
        model: the policy, a causal language model that is trained, or its path.
        ref_model: the SFT model of the KL, or its path; it is frozen. None = the policy as it is now.
        reward_model: a sequence classifier of one label, or its path; it is frozen.
        train_dataset: rows with `prompt`, in a list or a `datasets.Dataset`, or a file.
        value_model: the value network, or its path. None = a copy of the reward model, or of the policy with a new
            head.
        data_collator, optimizers: None; they have no meaning here. eval_dataset is not used.
        callbacks: functions `callback(trainer, step, metrics)`, called after each iteration, of which one that returns
            True ends the run; or transformers' TrainerCallbacks.
        peft_config: a `peft.LoraConfig`: train adapters on the policy, and such as `args` say on the value network.
        reward_fn: `reward_fn(prompts, completions, completion_ids, **columns)`, or a list of such functions, joins or
            replaces the reward model; `rlhf/rewards/scoring.py` says what they return.
    Raises:
        ValueError: names the argument or setting that is wrong, or the row of the data.
    """

    def train(self) -> Path:
        """Run the iterations that are left, save, and return the run directory.

        Raises:
            Interrupted: the command got SIGTERM or SIGINT; a checkpoint was written after the step.
        """
        with deferred() as self.signals, locks.released(self.output_dir):
            return self._train()

    def _train(self) -> Path:
        hidden = self.args.disable_tqdm or not self.accelerator.is_main_process
        bar = tqdm(total=self.iterations, initial=self.step, desc="ppo", unit="it", disable=hidden, dynamic_ncols=True)
        metrics = {}
        self.callbacks.tell("on_train_begin")
        while self.step < self.iterations and self.stopped is None:
            metrics = self.iteration()
            self._log(metrics)
            bar.set_postfix(kl=f"{metrics['objective/kl']:.3f}", score=f"{metrics['objective/scores']:.3f}")
            bar.update()
            if self.callbacks.iteration(metrics):
                self.stopped = "callback"
            last = self.step == self.iterations or self.stopped is not None
            signal = 0 if last else self.signal()
            if signal or (self.args.save_steps > 0 and (last or self.step % self.args.save_steps == 0)):
                self.save_checkpoint()
                self.callbacks.tell("on_save")
            self.end_if(signal)
        bar.close()
        self.save(metrics)
        self.callbacks.tell("on_train_end")
        return self.output_dir

    def iteration(self) -> dict[str, float]:
        """Sample, score, and improve policy and value function once; return the metrics, means over kept tokens."""
        begun = self.begun or self.begin()
        if self.stopped is None:
            for chosen in self.minibatches(begun):  # 13
                self.update(begun.experience, chosen, begun.averages)
                begun.updates += 1
                self.save_inside(begun)
        self.begun = None
        if self.ema is not None:
            self.ema.update(self.policy)  # 9
        metrics = {**begun.averages.read(self._sum), "objective/kl_coef": self.kl.value}
        stop_if_not_finite(self, self.must_be_finite(metrics), begun.experience, begun.averages)  # 18
        episodes = len(begun.experience.mask)
        self.kl.update(metrics["objective/kl"], episodes)  # 10
        self.step, self.episode = self.step + 1, self.episode + episodes
        self._log_samples(begun.experience)
        return {**metrics, **self.weights_moved(begun.updates), **self._counters(begun.experience.rollouts, metrics)}

    def begin(self) -> Iteration:
        """Sample, score, and estimate the advantages of the responses that this iteration learns from."""
        self.seconds, self.tokens_trained, averages = {}, 0, Averages()
        older = bool(self.ahead)
        rows, rollouts = next_samples(self, averages)  # 22
        raw_scores = self.score(rows, rollouts, averages)
        experience = self.gather(self.evaluate(rollouts), rows, raw_scores)  # 13
        scores = self.shape_scores(experience.raw_scores, experience.rollouts)
        self.estimate_advantages(experience, scores, averages)
        stop_if_not_finite(self, finite_experience(experience, scores), experience, averages)  # 18
        averages.add(compare_engine(self, experience, older), 1)  # 16
        experience.weights, found = importance_weights(self.args, experience)
        averages.add(found, 1)
        self.check_kl_budget(averages)  # 11
        begun = Iteration(experience, averages)
        self.save_inside(begun)
        return begun

    @in_run_precision  # 20
    def sample(self, rows: list[dict]) -> Rollouts:
        prompts = rows[:: self.args.num_responses]
        draw = self.sampling(prompts, self.engine, self.engine_seed(self.step), noise=self.noise(len(prompts)))
        with prompts_kept(self, prompts), self.sharding.for_engine(self.policy, self.engine):  # 18, 19
            return draw()

    def sampling(self, prompts: list[dict], engine, seed: int, noise=None) -> Callable[[], Rollouts]:
        """What draws the responses to these prompts when it is called."""
        args = self.args
        return functools.partial(
            sample, self.policy, self.tokenizer, [row["prompt_ids"] for row in prompts],
            response_length=args.response_length, temperature=args.temperature, stop_token_ids=self.stop_ids,
            samples_per_prompt=args.num_responses, batch_size=args.local_rollout_batch_size, noise=noise,
            engine=engine, seed=seed,
        )  # fmt: skip

    @timed("score")
    @in_run_precision  # 20
    @torch.no_grad()
    def score(self, rows: list[dict], rollouts: Rollouts, averages: Averages | None = None) -> torch.Tensor:
        """Return the reward of each response, [B] fp32; rewards of its steps go into `rollouts.step_rewards`."""
        return self.scorer(rows, rollouts, averages)

    def shape_scores(self, scores: torch.Tensor, rollouts: Rollouts) -> torch.Tensor:
        """Clip the scores, then take the penalty off those of responses that did not end with a stop token."""
        if self.args.reward_clip_range is not None:
            scores = scores.clamp(*self.args.reward_clip_range)
        ended = torch.tensor(rollouts.ended, device=scores.device)
        return torch.where(ended, scores, scores - (self.args.missing_eos_penalty or 0.0))  # 3

    @timed("evaluate")
    @in_run_precision  # 20
    @torch.no_grad()
    def evaluate(self, rollouts: Rollouts) -> Experience:
        """Compute log-probs under policy and reference, entropies and values of all response tokens."""
        kinds = 4 if self.value is None else 5
        shape, device = (kinds, len(rollouts.response_ids), self.args.response_length), self.accelerator.device
        found = torch.zeros(shape, dtype=torch.float32, device=device)
        for chunk in self._all_chunks(rollouts):
            batch = self._join(rollouts, chunk)
            log_probs, entropy = response_log_probs(self.policy, batch, temperature=self.args.temperature)  # 1, 2
            ref_log_probs, _ = response_log_probs(self.reference, batch, temperature=self.args.temperature)
            packed = [torch.ones_like(entropy), log_probs, ref_log_probs, entropy]
            packed += [] if self.value is None else [response_values(self.value, batch)]
            for kind, numbers in enumerate(packed):
                found[kind, chunk] = batch.unpack(numbers).float()
        return Experience(rollouts, found[0].bool(), *found[1:])

    def estimate_advantages(self, experience: Experience, scores: torch.Tensor, averages: Averages) -> None:
        """Fill in advantages and returns, and note what the rewards were made of."""
        args, mask, steps = self.args, experience.mask, experience.rollouts.step_rewards
        again = args.whiten_rewards or steps is not None
        values = torch.zeros_like(experience.log_probs) if self.value is None else experience.values
        result = rlhf_advantages(
            scores, experience.log_probs, experience.ref_log_probs, values, mask, kl_coef=self.reward_kl_coef(),
            gamma=args.gamma, lam=args.lam, kl_estimator=args.kl_estimator,
            whiten=args.whiten_advantages and not again,
        )  # fmt: skip
        advantages, returns = result.advantages, result.returns
        if self.value is None:  # 21
            rewards = result.rewards if steps is None else result.rewards + steps
            advantages, returns = advantages_without_values(args, rewards, mask, scores), None
        elif again:
            rewards = result.rewards if steps is None else result.rewards + steps  # 14
            if args.whiten_rewards:
                rewards = masked_whiten(rewards, mask, center=False)
            advantages, returns = gae(rewards, experience.values, mask, gamma=args.gamma, lam=args.lam)
            if args.whiten_advantages:
                advantages = masked_whiten(advantages, mask)  # 5
        experience.advantages, experience.returns = advantages, returns
        totals = scores if steps is None else scores + steps.sum(-1)
        self._describe(experience, totals, result.kl.sum(-1), averages)

    def reward_kl_coef(self) -> float:
        """What multiplies the KL in the rewards."""
        return self.kl.value if self.args.kl_in == "reward" else 0.0

    def _describe(self, experience: Experience, scores, kl_reward, averages: Averages) -> None:
        mask, episodes, ended = experience.mask, len(scores), sum(experience.rollouts.ended)
        kl = torch.where(mask, experience.log_probs - experience.ref_log_probs, 0).sum(-1)
        coef, explained = self.reward_kl_coef(), {}
        if self.value is not None:
            unexplained = (experience.returns - experience.values)[mask].var(correction=0)
            explained["val/explained_variance"] = 1 - unexplained / experience.returns[mask].var(correction=0)
        averages.add({
            "objective/kl": kl.mean(), "objective/scores": scores.mean(),
            "objective/entropy": -torch.where(mask, experience.log_probs, 0).sum(-1).mean(),
            "objective/non_score_reward": -coef * kl_reward.mean(),
            "objective/rlhf_reward": (scores - coef * kl_reward).mean(), **explained, "val/num_eos_tokens": ended,
            "completions/mean_length": mask.sum() / episodes, "completions/clipped_ratio": 1 - ended / episodes,
        }, episodes)  # fmt: skip

    def check_kl_budget(self, averages: Averages) -> None:
        """Stop where the samples lie beyond `max_kl`, and go back to the last weights that did not."""
        if self.args.max_kl is None:
            return
        if averages.read(self._sum)["objective/kl"] <= self.args.max_kl:
            self.within_budget = {name: x.detach().clone() for name, x in trained_weights(self.policy).items()}
            return
        self.stopped = f"max_kl: the KL per response exceeded {self.args.max_kl} nats"
        if self.within_budget is not None:
            self.policy.load_state_dict(self.within_budget, strict=False)

    @timed("update")
    def update(self, experience: Experience, chosen: list[int], averages: Averages) -> None:
        """Make one optimizer step from the rows `chosen` (and the next pretraining texts)."""
        texts = self.next_texts(len(chosen))
        self.accumulate_gradients(experience, chosen, texts, averages)
        norms = {}
        for name, network in self.trained().items():  # 4
            limit = math.inf if self.args.max_grad_norm is None else self.args.max_grad_norm
            norm = self.accelerator.clip_grad_norm_(network.parameters(), limit)
            norms[f"grad_norm/{name}"] = whole_tensor(norm)  # 19
        averages.add({**norms, "lr": self.scheduler.get_last_lr()[0]}, 1)
        stop_if_not_finite(self, self.must_be_finite(norms), experience, averages, chosen)  # 18
        self.tokens_trained += self._count_tokens(experience.rollouts, chosen) + sum(map(len, texts))
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def accumulate_gradients(self, experience: Experience, chosen, texts, averages: Averages) -> None:
        """Add the gradient of the PPO loss of the chosen rows + gamma * the loss of `texts`; nothing is stepped."""
        args, size, sums = self.args, self.args.per_device_train_batch_size, Averages()
        words = self._sum(torch.tensor(sum(len(ids) - 1 for ids in texts)))
        for start in range(0, len(texts), size):  # 7
            with self.accelerator.no_sync(self.model):
                loss = self.model(texts=texts[start : start + size], num_items_in_batch=words)
                self.accelerator.backward(args.ptx_coef * loss * self.world)
            sums.add({"loss/ptx_avg": loss}, 1)
        tokens = experience.mask[chosen].sum()
        items = self._sum(tokens if args.loss_agg_mode == "token-mean" else torch.tensor(len(chosen)))  # 6
        items = None if args.loss_agg_mode == "token-sum" else items
        shares = {"loss_agg_mode": args.loss_agg_mode, "num_items_in_batch": items}
        bonus = {"entropy_agg_mode": args.loss_agg_mode, "entropy_num_items_in_batch": items}
        kl, objective = kl_term(args, self.kl.value), objective_of(args)  # 21
        chunks = self._chunks(experience.rollouts, chosen, size)
        for rows in chunks:
            batch = self._join(experience.rollouts, rows)
            with contextlib.nullcontext() if rows is chunks[-1] else self.accelerator.no_sync(self.model):
                policy, values = self.model(
                    batch, experience.log_probs[rows], experience.advantages[rows], temperature=args.temperature,
                    objective=objective, kl=kl, ref_log_probs=None if kl is None else experience.ref_log_probs[rows],
                    weights=None if experience.weights is None else experience.weights[rows],
                    log_ratio_clamp=args.log_ratio_clamp, entropy_coef=args.entropy_coef, **shares, **bonus,
                )  # fmt: skip
                loss, found = policy.loss, dict(policy.metrics)
                sums.add({_LOSSES[name]: found[name] for name in _LOSSES if name in found}, 1)
                if values is not None:
                    value = value_loss(
                        values, experience.values[rows], experience.returns[rows], batch.response_mask,
                        cliprange_value=args.cliprange_value, **shares,
                    )  # fmt: skip
                    loss, found = loss + args.vf_coef * value.loss, {**value.metrics, **found}
                    sums.add({"loss/value_avg": value.loss.detach()}, 1)
                self.accelerator.backward(loss * self.world)
            averages.add(_token_means(found), batch.response_mask.sum())
        averages.add({name: total * self.world for name, total in sums.totals().items()}, 1)

    def _counters(self, rollouts: Rollouts, metrics: dict[str, float]) -> dict[str, float]:
        seconds = sum(self.seconds.values())
        times = {f"time/{phase}": value for phase, value in self.seconds.items()}
        rates = {"eps": len(rollouts.ended) / seconds, "tokens_per_sec": sum(map(len, rollouts.response_ids)) / seconds}
        rates |= self._throughput(rollouts, metrics.get("rollout/seconds_sampled"))
        return {"episode": self.episode, **rates, **times}


_LOSSES = {"policy_loss": "loss/policy_avg", "kl_loss": "loss/kl_avg"}


def _token_means(metrics: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {
        "approx_kl": "policy/approxkl_avg", "clip_fraction": "policy/clipfrac_avg", "entropy": "policy/entropy_avg",
        "ratio_mean": "val/ratio", "ratio_var": "val/ratio_var", "ratio_max": "val/ratio_max",
        "value_clip_fraction": "val/clipfrac_avg", "clip_fraction_low": "policy/clipfrac_low",
        "clip_fraction_high": "policy/clipfrac_high", "approx_kl_k1": "policy/kl_k1", "approx_kl_k3": "policy/kl_k3",
    }  # fmt: skip
    return {names[name]: value for name, value in metrics.items() if name in names}


def train_ppo(args: PPOConfig, *, reward_fn=None, callbacks=()) -> Path:
    """Run PPO as `args` say and return the run directory; see `PPOTrainer`."""
    return PPOTrainer(args, reward_fn=reward_fn, callbacks=callbacks).train()
