"""Rollout engines as a server would be one, for the tests: weights of their own, answers in another order."""

import copy

import torch
from transformers import AutoModelForCausalLM

from rlhf.rollouts.sampling import Completion, transformers_engine


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


class Elsewhere(Server):
    """As in another process: weights, generator and threads of its own. `meanwhile` is called first in each call."""

    concurrent = True

    def __init__(self):
        super().__init__()
        self.meanwhile = lambda: None

    def update_weights(self, policy):
        if self.model is None:
            with torch.random.fork_rng([]):
                config = copy.deepcopy(policy.config)
                self.model = AutoModelForCausalLM.from_config(config, dtype=policy.dtype, attn_implementation="eager")
        self.load({name: weight.detach().clone() for name, weight in policy.named_parameters()})
        self.updates += 1

    def load(self, weights):
        self.model.load_state_dict(weights, strict=False)  # tied heads have no name of their own

    def __call__(
        self, model, tokenizer, prompt_ids, *, response_length, temperature, stop_token_ids, samples_per_prompt, seed
    ):
        self.meanwhile()
        shape, generator = (len(prompt_ids), samples_per_prompt, response_length), torch.Generator().manual_seed(seed)
        completions = transformers_engine(
            self.model, tokenizer, prompt_ids, response_length=response_length, temperature=temperature,
            stop_token_ids=stop_token_ids, samples_per_prompt=samples_per_prompt, batch_size=None,
            noise=torch.rand(shape, dtype=torch.float64, generator=generator),
        )  # fmt: skip
        for completion in completions[::-1]:
            self.tell_log_probs(completion, temperature)
            yield completion


class Late(Elsewhere):
    """Loads the weights that it was given the time before: one iteration late, without sampling ahead."""

    before = None

    def load(self, weights):
        super().load(self.before or weights)
        self.before = weights


class Forgetful(Elsewhere):
    """Takes weights, and loads the first alone."""

    def load(self, weights):
        if self.updates == 0:
            super().load(weights)


class Unready(Elsewhere):
    """Says nothing of being elsewhere."""

    concurrent = False


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


class Slices:
    """Takes the policy's slices; answers with what follows from the seed, without a forward."""

    reads_slices = True

    def update_weights(self, policy):
        assert all(isinstance(weight, torch.distributed.tensor.DTensor) for weight in policy.parameters())

    def __call__(self, model, tokenizer, prompt_ids, *, response_length, samples_per_prompt, seed, **settings):
        for prompt, ids in enumerate(prompt_ids):
            for sample in range(samples_per_prompt):
                yield Completion(prompt, sample, ids, [4 + (seed + prompt + sample) % 5] * response_length)


constant = 3
