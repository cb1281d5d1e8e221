"""A call of every function, for the tests that ask the same of all of them; and a backend to serve it."""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch

import rlhf_kernels as rk
from tests.conftest import GPU, ON_GPU
from tests.on_gpu import OnGPU

OBJECTIVES = {"clip": rk.Clip(), "gspo": rk.GSPO(), "gmpo": rk.GMPO(), "dppo": rk.DPPO("kl"), "kl_cov": rk.KLCov()}
COMPOSED = "packing"  # of PyTorch's own ops: served like the op that has the reference alone
LOSS_TYPES = ("sigmoid", "ipo", "hinge", "orpo", "simpo", "kto", "exo_pair", "discopop", "nca_pair", "bco_pair")
LOSS_TYPES += ("sppo_hard", "aot", "apo_zero", "apo_down")


class Call(NamedTuple):
    """function(*leaves) -> tensors; the leaves are what it is differentiated in, if `differentiable`."""

    op: str
    function: Callable
    leaves: list[torch.Tensor]
    differentiable: bool = True


def numbers_of(loss) -> list[torch.Tensor]:
    """The tensors in one of our named tuples: losses and metrics."""
    found = []
    for x in loss:
        found += x.values() if isinstance(x, dict) else [x] if x is not None else []
    return found


def build(dtype: torch.dtype = torch.float32) -> dict[str, Call]:
    """{what is called: Call} with fresh inputs of this dtype."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    mask = torch.rand(3, 5, generator=generator, dtype=torch.float32) < 0.8
    labels = torch.tensor([3, 0, -100, 6], dtype=torch.int64)
    kept = torch.tensor([[3, 1, 5], [0, 2, -1], [1, 2, 3], [6, -1, -1]], dtype=torch.int64)
    tokens = torch.tensor([[1, 4, 0, 2, 6], [5, 3, 1, 1, 0], [2, 2, 6, 4, 3]], dtype=torch.int64)
    ranks = torch.tensor([[0, 1, 2, 3], [2, 0, 1, 1]], dtype=torch.int64)
    cu_groups = torch.tensor([0, 3, 3, 8], dtype=torch.int64)
    offsets = torch.tensor([0, 6, 6, 15], dtype=torch.int64)
    counts = torch.tensor([3, 1, 7, 2], dtype=torch.int64)
    old, other, third, fourth = (randn(3, 5) for _ in range(4))
    head, bias, ref_hidden, ref_head = randn(7, 4), randn(7), randn(4, 4), randn(7, 4)
    lora = [torch.linspace(-1, 2, 8, dtype=dtype).view(2, 4), torch.linspace(1, -2, 14, dtype=dtype).view(7, 2)]
    warmth = torch.tensor([0.5, 1.5, 1.0, 2.0], dtype=torch.float32)
    scores, ref = randn(3), [-randn(4).abs() for _ in range(2)]
    packed = rk.pack_responses([[5, 6]], [[[7, 8], [9]]])
    layout = packed.layout.to(head.device)
    calls = {
        "logprobs_from_logits": Call("logprobs", lambda x: [rk.logprobs_from_logits(x, labels)], [randn(4, 7)]),
        "logprobs_from_logits in place": Call(
            "logprobs", lambda x: [rk.logprobs_from_logits(x * 1.0, labels, inplace_backward=True)], [randn(4, 7)]
        ),
        "logprobs_and_entropy_from_logits": Call(
            "logprobs",
            lambda x: rk.logprobs_and_entropy_from_logits(x, labels, temperature=0.7, softcap=5.0),
            [randn(4, 7)],
        ),
        "logprobs_and_entropy_from_logits of several labels": Call(
            "logprobs",
            lambda x: rk.logprobs_and_entropy_from_logits(x, torch.stack((labels, counts % 7, labels), -1)),
            [randn(4, 7)],
        ),
        "logprobs_and_entropy_from_logits of planes": Call(
            "logprobs",
            lambda x: rk.logprobs_and_entropy_from_logits(x[:, :-1], tokens[:2, :2], temperature=warmth.view(2, 2)),
            [randn(2, 3, 7)],
        ),
        "entropy_from_logits": Call("logprobs", lambda x: [rk.entropy_from_logits(x)], [randn(4, 7)]),
        "cross_entropy_from_logits": Call(
            "cross_entropy",
            lambda x: [rk.cross_entropy_from_logits(x, labels, label_smoothing=0.1, z_loss=0.1, weights=ref[0])],
            [randn(4, 7)],
        ),
        "cross_entropy_from_logits dft": Call(
            "cross_entropy",
            lambda x: [rk.cross_entropy_from_logits(x, labels, loss_type="dft", reduction="none", softcap=3.0)],
            [randn(4, 7)],
        ),
        "entropy_from_logits of some rows": Call(
            "logprobs", lambda x: [rk.entropy_from_logits(x, row_mask=labels < 5)], [randn(4, 7)]
        ),
        "kl_from_logits": Call("kl", lambda x, y: [rk.kl_from_logits(x, y)], [randn(4, 7), randn(4, 7)]),
        "kl_from_logits forward": Call(
            "kl", lambda x, y: [rk.kl_from_logits(x, y, direction="forward")], [randn(4, 7), randn(4, 7)]
        ),
        "gae": Call(
            "advantages", lambda r, v: rk.gae(r, v, mask, last_values=scores), [randn(3, 5), randn(3, 5)], False
        ),
        "gae packed": Call("advantages", lambda r, v: rk.gae(r, v, cu_seqlens=offsets), [randn(15), randn(15)], False),
        "rlhf_advantages": Call(
            "advantages",
            lambda p, v: rk.rlhf_advantages(scores, p, old, v, mask, kl_coef=0.1, reward_clip=1.0),
            [randn(3, 5), randn(3, 5)],
            False,
        ),
        "gae of a critic's own": Call(
            "advantages",
            lambda r, v: rk.gae(r, v, mask, critic_lam=1.0, masked="zero"),
            [randn(3, 5), randn(3, 5)],
            False,
        ),
        "masked_whiten": Call("advantages", lambda x: [rk.masked_whiten(x, mask)], [randn(3, 5)], False),
        "masked_whiten biased": Call(
            "advantages",
            lambda x: [rk.masked_whiten(x, mask, correction=0, eps=0.0, min_variance=1e-8)],
            [randn(3, 5)],
            False,
        ),
        "group_advantages": Call(COMPOSED, lambda x: [rk.group_advantages(x)], [randn(3, 5)], False),
        "group_advantages flat": Call(
            COMPOSED, lambda x: [rk.group_advantages(x, cu_groups, estimator="rloo")], [randn(8)], False
        ),
        "importance_weights": Call(
            COMPOSED,
            lambda p: numbers_of(rk.importance_weights(p, old, mask, high=2.0, gates=rk.Gate("tv", high=0.5))),
            [randn(3, 5)],
            False,
        ),
        "off_policy_mask": Call(
            COMPOSED, lambda p: [rk.off_policy_mask(p, old, other, mask, threshold=0.1)], [randn(3, 5)], False
        ),
        "high_entropy_mask": Call(COMPOSED, lambda x: [rk.high_entropy_mask(x, mask, 0.8)], [randn(3, 5)], False),
        "aggregate_loss": Call(
            COMPOSED, lambda x: [rk.aggregate_loss(x, mask, loss_agg_mode="seq-mean-token-mean")], [randn(3, 5)]
        ),
        "ppo_loss": Call("ppo", lambda p: numbers_of(rk.ppo_loss(p, old, other, mask)), [old + 0.1 * randn(3, 5)]),
        "ppo_loss of everything": Call(
            "ppo",
            lambda p, v, e: numbers_of(
                rk.ppo_loss(
                    p,
                    old,
                    other,
                    mask,
                    values=v,
                    old_values=third,
                    returns=fourth,
                    entropy=e,
                    entropy_coef=0.1,
                    dual_clip=2.0,
                    num_items_in_batch=11,
                    loss_agg_mode="seq-mean-token-sum",
                )
            ),
            [old + 0.1 * randn(3, 5), third + 0.3 * randn(3, 5), randn(3, 5).abs()],
        ),
        "value_loss": Call(
            "policy", lambda v: numbers_of(rk.value_loss(v, third, fourth, mask)), [third + 0.3 * randn(3, 5)]
        ),
        "linear_kept_logprobs": Call(
            "kept",
            lambda h, w, b: rk.linear_kept_logprobs(h, w, labels, kept, bias=b, return_entropy=True),
            [randn(4, 4), randn(7, 4), randn(7)],
        ),
        "kept_logprobs_from_logits": Call(
            "kept", lambda x: [rk.kept_logprobs_from_logits(x, labels, kept)], [randn(4, 7)]
        ),
        "linear_jsd": Call(
            "distillation",
            lambda h, w, b: [rk.linear_jsd(h, w, ref_hidden, ref_head, bias=b, beta=0.3)],
            [randn(4, 4), randn(7, 4), randn(7)],
        ),
        "bradley_terry_loss": Call(
            "bradley_terry",
            lambda s: numbers_of(rk.bradley_terry_loss(s, ranks, margins=0.2, ties="half")),
            [randn(2, 4)],
        ),
        "bradley_terry_loss centred": Call(
            "bradley_terry",
            lambda s: numbers_of(rk.bradley_terry_loss(s, ranks.reshape(-1), cu_groups, center_coef=0.3)),
            [randn(8)],
        ),
        "bradley_terry_loss flat": Call(
            "bradley_terry",
            lambda s: numbers_of(rk.bradley_terry_loss(s, ranks.reshape(-1), cu_groups, reduction="none")),
            [randn(8)],
        ),
        "plackett_luce_loss of each prompt": Call(
            "bradley_terry",
            lambda s: numbers_of(rk.plackett_luce_loss(s, ranks.reshape(-1), cu_groups, reduction="none")),
            [randn(8)],
        ),
        "plackett_luce_loss": Call(
            "bradley_terry", lambda s: numbers_of(rk.plackett_luce_loss(s, ranks)), [randn(2, 4)]
        ),
        "linear_logprobs": Call(
            "linear",
            lambda h, w, b: [rk.linear_logprobs(h, w, labels, bias=b, softcap=3.0)],
            [randn(4, 4), randn(7, 4), randn(7)],
        ),
        "linear_logprobs with entropy": Call(
            "linear",
            lambda h, w: rk.linear_logprobs(h, w, labels, temperature=warmth, return_entropy=True),
            [randn(4, 4), randn(7, 4)],
        ),
        "linear_logprobs of a frozen head": Call(
            "linear", lambda h: [rk.linear_logprobs(h, head, labels, rows=counts % 4, bias=bias)], [randn(4, 4)]
        ),
        "token_statistics_from_logits": Call(
            "logprobs",
            lambda x: rk.token_statistics_from_logits(x, labels, temperature=0.7, softcap=5.0)[:2],
            [randn(4, 7)],
        ),
        "linear_logprobs of several labels": Call(
            "linear",
            lambda h, w, b: rk.linear_logprobs(
                h, w, torch.stack((labels, counts % 7, labels), -1), bias=b, temperature=warmth, return_entropy=True
            ),
            [randn(4, 4), randn(7, 4), randn(7)],
        ),
        "linear_token_statistics": Call(
            "linear",
            lambda h, w, b: rk.linear_token_statistics(h, w, labels, bias=b, temperature=warmth)[:2],
            [randn(4, 4), randn(7, 4), randn(7)],
        ),
        "linear_logprobs with lora": Call(
            "linear",
            lambda h, w, a, b: rk.linear_logprobs(h, w, labels, rows=counts % 4, return_entropy=True, lora=(a, b, 0.5)),
            [randn(4, 4), randn(7, 4), lora[0], lora[1]],
        ),
        "linear_logprobs of a frozen head with lora": Call(
            "linear",
            lambda h, a, b: [rk.linear_logprobs(h, head, labels, bias=bias, lora=(a, b, 2.0))],
            [randn(4, 4), lora[0], lora[1]],
        ),
        "linear_kept_logprobs with lora": Call(
            "kept",
            lambda h, a, b: [rk.linear_kept_logprobs(h, head, labels, kept, lora=(a, b, 0.5))],
            [randn(4, 4), lora[0], lora[1]],
        ),
        "linear_cross_entropy with lora": Call(
            "cross_entropy",
            lambda h, a, b: [rk.linear_cross_entropy(h, head, labels, label_smoothing=0.1, lora=(a, b, 0.5))],
            [randn(4, 4), lora[0], lora[1]],
        ),
        "linear_cross_entropy with lora, each": Call(
            "cross_entropy",
            lambda h, a, b: [rk.linear_cross_entropy(h, head, labels, reduction="none", lora=(a, b, 0.5))],
            [randn(4, 4), lora[0], lora[1]],
        ),
        "linear_token_statistics with lora": Call(
            "linear",
            lambda h, a, b: rk.linear_token_statistics(h, head, labels, rows=counts % 4, lora=(a, b, 0.5))[:2],
            [randn(4, 4), lora[0], lora[1]],
        ),
        "linear_cross_entropy": Call(
            "cross_entropy",
            lambda h, w: [rk.linear_cross_entropy(h, w, labels, rows=counts % 4)],
            [randn(4, 4), randn(7, 4)],
        ),
        "linear_cross_entropy with smoothing": Call(
            "cross_entropy",
            lambda h, w: [rk.linear_cross_entropy(h, w, labels, label_smoothing=0.1, z_loss=0.1, weights=ref[0])],
            [randn(4, 4), randn(7, 4)],
        ),
        "linear_cross_entropy dft, each": Call(
            "cross_entropy",
            lambda h, w: [rk.linear_cross_entropy(h, w, labels, loss_type="dft", z_loss=0.1, reduction="none")],
            [randn(4, 4), randn(7, 4)],
        ),
        "linear_cross_entropy of a frozen head, each": Call(
            "cross_entropy",
            lambda h: [rk.linear_cross_entropy(h, head, labels, bias=bias, label_smoothing=0.3, reduction="none")],
            [randn(4, 4)],
        ),
        "linear_cross_entropy fast": Call(
            "cross_entropy",
            lambda h: [rk.linear_cross_entropy(h, head, labels, precision="fast", num_items_in_batch=3)],
            [randn(4, 4)],
        ),
        "linear_ppo_loss": Call(
            "linear",
            lambda h, w: numbers_of(rk.linear_ppo_loss(h, w, tokens, old, other, mask, entropy_coef=0.1)),
            [randn(3, 5, 4), randn(7, 4)],
        ),
        "linear_ppo_loss with lora": Call(
            "linear",
            lambda h, a, b: numbers_of(
                rk.linear_ppo_loss(h, head, tokens, old, other, mask, entropy_coef=0.1, lora=(a, b, 0.5))
            ),
            [randn(3, 5, 4), lora[0], lora[1]],
        ),
        "linear_policy_loss with lora": Call(
            "linear",
            lambda h, a, b: numbers_of(
                rk.linear_policy_loss(h, head, tokens, old, other, mask, objective=rk.KLCov(), lora=(a, b, 0.5))
            ),
            [randn(3, 5, 4), lora[0], lora[1]],
        ),
        "linear_kl": Call(
            "linear",
            lambda h, w: [rk.linear_kl(h, w, ref_hidden, ref_head, softcap=4.0)],
            [randn(4, 4), randn(7, 4)],
        ),
        "linear_kl of a frozen head": Call(
            "linear", lambda h: [rk.linear_kl(h, head, ref_hidden, ref_head, direction="forward")], [randn(4, 4)]
        ),
        "shared_prefix_attention": Call(
            "packing",
            lambda q, k, v: [rk.shared_prefix_attention(q, k, v, layout)],
            [randn(1, 2, 5, 4) for _ in range(3)],
        ),
        "PackedResponses.per_response": Call(
            "packing", lambda x: rk.PackedResponses(*(f.to(x.device) for f in packed)).per_response(x), [randn(3)]
        ),
    }
    for name, objective in OBJECTIVES.items():
        calls[f"policy_loss {name}"] = Call(
            "policy",
            lambda p, e, o=objective: numbers_of(
                rk.policy_loss(
                    p, old, other, mask, objective=o, ref_log_probs=third, kl=rk.KLTerm(0.1), weights=fourth.abs(),
                    log_ratio_clamp=20.0, entropy=e, entropy_coef=0.1, loss_agg_mode="seq-mean-token-mean",
                )
            ),
            [old + 0.1 * randn(3, 5), randn(3, 5).abs()],
        )  # fmt: skip
    for estimator in ("k1", "k2", "k3", "abs"):
        calls[f"approx_kl {estimator}"] = Call(
            "kl", lambda p, q, e=estimator: [rk.approx_kl(p, q, estimator=e)], [randn(3, 5), randn(3, 5)]
        )
    calls["approx_kl clamped"] = Call(
        "kl",
        lambda p, q: [rk.approx_kl(p, q, estimator="k3", gradient="straight_through", clamp_input=2, clamp_output=1)],
        [randn(3, 5), randn(3, 5)],
    )
    for loss_type in LOSS_TYPES:
        options = {"loss_type": loss_type}
        if loss_type in ("orpo", "simpo"):
            options |= {"chosen_lengths": counts, "rejected_lengths": counts}
        else:
            options |= {"ref_chosen_logps": ref[0], "ref_rejected_logps": ref[1]}
        if loss_type == "kto":
            options |= {"kl": 0.3, "undesirable_weight": 0.8}
        if loss_type == "exo_pair":
            options |= {"label_smoothing": 0.01, "divergence": "js_divergence"}
        calls[f"preference_loss {loss_type}"] = Call(
            "preference",
            lambda c, r, o=options: numbers_of(rk.preference_loss(c, r, **o)),
            [-randn(4).abs() - 0.1, -randn(4).abs() - 0.1],
        )
    calls["preference_loss of several"] = Call(
        "preference",
        lambda c, r: numbers_of(
            rk.preference_loss(
                c, r, *ref, loss_type=[("hinge", 0.5), "sft"], chosen_lengths=counts, rejected_lengths=counts,
                divergence="forward_kl", weights=warmth,
            )
        ),
        [-randn(4).abs() - 0.1, -randn(4).abs() - 0.1],
    )  # fmt: skip
    singles = torch.arange(5, dtype=torch.int64)
    pairs = torch.cat([tokens, tokens.flip(1)])[:4]
    calls["linear_preference_loss"] = Call(
        "linear",
        lambda h, w: numbers_of(
            rk.linear_preference_loss(
                h, w, pairs, old.repeat(2, 1)[:4], loss_type=["hinge", "sft"], ld_alpha=0.3, wpo=True
            )
        ),
        [randn(4, 5, 4), randn(7, 4)],
    )
    calls["linear_preference_loss of a frozen head"] = Call(
        "linear",
        lambda h: numbers_of(rk.linear_preference_loss(h, head, labels.abs() % 7, ref[0], cu_responses=singles)),
        [randn(4, 4)],
    )
    calls["wpo_weights"] = Call("preference", lambda x: [rk.wpo_weights(x, third, mask)], [old - third.abs()], False)
    calls["unpaired_preference_loss"] = Call(
        "preference",
        lambda x: numbers_of(
            rk.unpaired_preference_loss(x, counts % 2 == 1, ref[0], kl=0.3, undesirable_weight=0.8, lengths=counts)
        ),
        [-randn(4).abs() - 0.1],
    )
    return calls


NAMES = list(build())
ON_BACKENDS = [
    (name, backend)
    for name, call in build().items()
    for backend, state in rk.backends()[call.op].items()
    if state == "available"
]


@contextlib.contextmanager
def serving(backend: str):
    """The backend serves what is called inside, and what is created inside lies where it takes it."""
    with rk.backend(backend), OnGPU() if GPU and backend in ON_GPU else contextlib.nullcontext():
        yield


def upstream_of(x: torch.Tensor) -> torch.Tensor:
    """A gradient for each entry of an output."""
    return torch.linspace(-1.0, 2.0, x.numel(), dtype=x.dtype, device=x.device).view(x.shape)


def differentiated(outputs) -> list[torch.Tensor]:
    """Those that autograd knows of."""
    return [x for x in outputs if x.requires_grad]


def results(call: Call) -> list[torch.Tensor]:
    """Outputs of a call and, for upstream gradients that differ, the gradients of its leaves."""
    leaves = [x.clone().requires_grad_(call.differentiable) for x in call.leaves]
    outputs = list(call.function(*leaves))
    known = differentiated(outputs)
    assert bool(known) == call.differentiable
    if known:
        outputs += torch.autograd.grad(known, leaves, [upstream_of(x) for x in known], allow_unused=True)
    return [x if x is None else x.detach() for x in outputs]
