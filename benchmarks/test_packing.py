"""A reward model's step on one prompt of P tokens with K ranked responses of R: layout, forward, loss, backward.

ours   One row, [prompt | response_1 | ... | response_K]: P + K R tokens, with the attention that `rlhf reward` chooses.
dense  The same row under the dense mask of (P + K R)^2 entries.
rows   K rows of prompt and response, under the same loss: K (P + R) tokens. `rlhf reward --packing false`.
pairs  K (K - 1) / 2 pairs, each with two rows of its own: K (K - 1) (P + R) tokens. What trainers that take chosen and
       rejected texts make of a ranking, PAIRS at a time, their gradients summed.
trl    The same pairs through TRL's RewardTrainer: its collator, its loss with its metrics, its backward.

All give the same scores and gradients; the judge is transformers' own classifier on separate rows in float64. The
optimizer's step, the same for all, is left out. The model is random: two layers of GPT-2 small's width under a scalar
head, with a small vocabulary. Each layer costs the same, so the ratios do not depend on their number; they grow a
little with the width.

shared_prefix_attention alone, forward and backward, stands beside SDPA with the boolean mask.
"""

from __future__ import annotations

import copy

import torch
from torch.nn.functional import logsigmoid
from transformers import LlamaConfig, LlamaForSequenceClassification

import rlhf_kernels as rk
from benchmarks import peers
from benchmarks.cases import Bench, Case, Skip, doubled, faster
from rlhf import models, reward, training
from rlhf_kernels.integrations.transformers import use_shared_prefix_attention
from rlhf_kernels.reference.packing import shared_prefix_mask

VOCAB, LAYERS = 1024, 2
PAIRS = 2  # at a time: as fast as one, faster than 4 or 12; all 36 take twice as long, in fresh memory of gigabytes


def make_model(hidden: int) -> LlamaForSequenceClassification:
    heads = max(1, hidden // 64)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=hidden * 8 // 3, num_hidden_layers=LAYERS,
        num_attention_heads=heads, num_key_value_heads=heads // 3 if heads % 3 == 0 else heads,
        max_position_embeddings=2048, num_labels=1, pad_token_id=0, attn_implementation="sdpa",
    )  # fmt: skip
    return use_shared_prefix_attention(LlamaForSequenceClassification(config))


def matmul_flops(model, tokens: int, seen: int) -> int:
    """Forward and backward are three products: 2 for each weight of the layers and token, 4 H for each token seen."""
    weights = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    return 3 * (2 * weights * tokens + 4 * model.config.hidden_size * LAYERS * seen)


def build(case: Case) -> Bench:
    prompt_tokens, tokens, k, hidden = case.sizes.values()
    model = make_model(hidden)
    prompt, *responses = (torch.randint(1, VOCAB, (n,)).tolist() for n in [prompt_tokens] + [tokens] * k)
    ranks = torch.randperm(k)
    example = [{"prompt": prompt, "responses": responses}]

    better, worse = torch.combinations(ranks.argsort()).unbind(1)

    def result(model, scores):
        return (scores,), tuple(p.grad for p in model.parameters())

    def step(packed, dense=False):
        """The two ways of `rlhf reward`, and the first of them under the dense mask."""
        model.zero_grad()
        batch = training.make_batch(example, 0, packed=packed, hidden_size=hidden)
        if dense and batch["attention_mask"].dtype != torch.bool:
            batch["attention_mask"] = shared_prefix_mask(*batch["attention_mask"][:, 0].unbind(1))
        scores = reward.batch_scores(model, batch)
        rk.bradley_terry_loss(scores, ranks, batch["cu_groups"]).loss.backward()
        return result(model, scores)

    def pairs():
        model.zero_grad()
        scores = torch.empty(k)
        for chosen, rejected in zip(better.split(PAIRS), worse.split(PAIRS)):
            which = torch.cat([chosen, rejected])
            input_ids = torch.tensor([prompt + responses[i] for i in which.tolist()])
            found = models.token_scores(model, input_ids, torch.ones_like(input_ids))[:, -1]
            high, low = found.chunk(2)
            (-logsigmoid(high - low).sum() / len(better)).backward()
            scores[which] = found.detach()
        return result(model, scores)

    def trl_pairs():
        make = peers.trl_reward_trainer()
        if isinstance(make, Skip):
            return make
        texts = [prompt + response for response in responses]
        chosen, rejected = ([texts[i] for i in which.tolist()] for which in (better, worse))
        judged = copy.deepcopy(model)
        run = make(judged, chosen, rejected, min(PAIRS, len(better)))

        def whole():
            judged.zero_grad()
            scores = torch.empty(k)
            scores[better], scores[worse] = run()
            return result(judged, scores)

        return whole

    def exact():
        judge = copy.deepcopy(model).double()
        input_ids = torch.tensor([prompt + response for response in responses])
        hidden = judge.model(input_ids=input_ids, use_cache=False).last_hidden_state
        scores = judge.score(hidden[:, -1])[:, 0]
        (-logsigmoid(scores[better] - scores[worse]).mean()).backward()
        return result(judge, scores)

    return Bench(
        calls={
            "ours": lambda: step(True),
            "dense": lambda: step(True, dense=True),
            "rows": lambda: step(False),
            "pairs": pairs,
            "trl": trl_pairs(),
        },
        exact=exact,
        flops=matmul_flops(
            model,
            prompt_tokens + k * tokens,
            prompt_tokens * (prompt_tokens + 1) // 2 + k * tokens * (2 * prompt_tokens + tokens + 1) // 2,
        ),
    )


def build_attention(case: Case) -> Bench:
    prompt, tokens, k, heads = case.sizes.values()
    packed = rk.pack_responses([[1] * prompt], [[[1] * tokens] * k])
    length = prompt + k * tokens
    inputs = [torch.randn(1, length, heads, 64).transpose(1, 2).requires_grad_() for _ in range(3)]
    upstream = torch.randn(1, length, heads, 64).transpose(1, 2)
    mask = packed.attention_mask

    def attend(function, dtype=torch.float32):
        tensors = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = function(*tensors)
        return (out,), torch.autograd.grad(out, tensors, upstream.to(dtype))

    def dense(query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    pairs = prompt * (prompt + 1) // 2 + k * tokens * (2 * prompt + tokens + 1) // 2
    return Bench(
        calls={
            "ours": lambda: attend(lambda *x: rk.shared_prefix_attention(*x, packed.layout, form="two_part")),
            "eager": lambda: attend(dense),
            "flex_attention": Skip("FlexAttention has no backward on a CPU"),
        },
        exact=lambda: attend(dense, torch.float64),
        flops=3 * 4 * 64 * heads * pairs,
    )


IMPLS = ("ours", "dense", "rows", "pairs", "trl")
SIZES = {"prompt": 512, "response": 64, "K": 9, "H": 768}
CASES = [
    Case(
        "pack_responses", "fwdbwd", "fp32", SIZES, IMPLS, build,
        (faster("rows", 4), faster("pairs", 25)),
        seconds=6.0,
    )
]  # fmt: skip
# Pairs of the longest prompts take minutes; they are left out where the ratio is known from shorter ones.
GRID = [
    (64, 32, 2),
    (64, 32, 9),
    (64, 256, 4),
    (256, 64, 4),
    (512, 256, 4),
    (1024, 32, 9),
    (1024, 256, 2),
    (1024, 256, 9),
]
CASES += [
    Case(
        "pack_responses", "fwdbwd", "fp32", {**SIZES, "prompt": prompt, "response": tokens, "K": k},
        IMPLS if k * k * (prompt + tokens) < 10_000 else IMPLS[:3], build,
    )
    for prompt, tokens, k in GRID
]  # fmt: skip
GROWING, VALUES = doubled(K=2)
CASES += [
    Case("pack_responses", "fwdbwd", "fp32", {**SIZES, GROWING: value}, IMPLS[:3], build, scale=GROWING)
    for value in VALUES
]
CASES += [
    Case(
        "shared_prefix_attention", "fwdbwd", "fp32", {"prompt": prompt, "response": tokens, "K": 9, "heads": 12},
        ("ours", "eager", "flex_attention"), build_attention, (faster("eager", bound),),
    )
    for prompt, tokens, bound in ((512, 64, 1.5), (1024, 256, 2.5))
]  # fmt: skip


def test_pack_responses(row, measure):
    measure(row)


def test_shared_prefix_attention(row, measure):
    measure(row)
