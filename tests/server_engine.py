"""Rollout engines as a server would be one, for the tests: weights of their own, answers in another order."""

import copy

import torch

from rlhf.rollouts.sampling import transformers_engine


class Server:
    """Samples from a copy of the policy, which `update_weights` brings up to date, and tells its log-probs."""

    top_p = 1.0

    def __init__(self):
        self.model, self.updates = None, 0

    def update_weights(self, policy):
        if self.model is None:
            self.model = copy.deepcopy(policy)
        self.model.load_state_dict(policy.state_dict())
        self.updates += 1

    def __call__(self, model, tokenizer, prompt_ids, *, temperature, seed, **settings):
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            completions = transformers_engine(
                self.model, tokenizer, prompt_ids, temperature=temperature, batch_size=None, **settings
            )
        for completion in completions[::-1]:
            self.tell_log_probs(completion, temperature)
            yield completion

    @torch.no_grad()
    def tell_log_probs(self, completion, temperature):
        """By the whole logits in float64, row by row; under top_p of the tokens that are left, as servers tell them."""
        ids = torch.tensor([completion.prompt_ids + completion.response_ids])
        logits = self.model(ids).logits[0, len(completion.prompt_ids) - 1 : -1].double() / temperature
        probs, order = logits.softmax(-1).sort(descending=True)
        kept = torch.zeros_like(probs, dtype=torch.bool).scatter(-1, order, probs.cumsum(-1) - probs < self.top_p)
        kept.scatter_(-1, ids[0, len(completion.prompt_ids) :, None], True)
        log_probs = logits.masked_fill(~kept, -torch.inf).log_softmax(-1)
        completion.log_probs = log_probs.gather(-1, torch.tensor(completion.response_ids)[:, None])[:, 0].tolist()


class Stale(Server):
    """Forgets to load any weights but the first."""

    def update_weights(self, policy):
        if self.model is None:
            super().update_weights(policy)


class TopP(Server):
    top_p = 0.8


def silent(model, tokenizer, prompt_ids, *, seed, **settings):
    """The built-in sampler, without log-probs."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return transformers_engine(model, tokenizer, prompt_ids, batch_size=None, **settings)


class Uneven:
    """The built-in sampler, after more forwards on one process than on the other; wants to read whole weights."""

    def update_weights(self, policy):
        assert all(type(weight) is torch.nn.Parameter for weight in policy.parameters())

    def __call__(self, model, *arguments, **settings):
        with torch.no_grad():
            for _ in range(3 * torch.distributed.get_rank()):
                model(torch.tensor([[1, 2]], device=model.device))
        return silent(model, *arguments, **settings)


constant = 3
