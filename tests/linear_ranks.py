"""One rank of the vocabulary-parallel tests of test_linear_training.py.

    python linear_ranks.py RANK CUTS BACKEND RENDEZVOUS_FILE

Each rank holds its shard of a head of VOCAB tokens, cut at CUTS ("5,6": tokens 0-4, 5, 6-11), and compares itself with
the head in one piece: values and gradients.
"""

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F

import rlhf_kernels as rk

VOCAB = 12


def problem(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden": (9, 6), "weight": (VOCAB, 6), "bias": (VOCAB,), "ref_hidden": (9, 3), "ref_weight": (VOCAB, 3)}
    shapes |= {"lora_a": (2, 6), "lora_b": (VOCAB, 2)}
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    tensors["bias"][:5] = -torch.inf  # with a cut at 5 everything in the first rank's shard is banned
    tensors["ref_bias"] = torch.where(torch.arange(VOCAB) < 5, -torch.inf, 0.0).to(dtype)
    labels = torch.tensor([5, 11, -100, 6, 7, 10, 2, 9, 8])
    return tensors, labels


def sharded(tensors, lines):
    """Copies that require grad: hidden states and A of LoRA whole, what belongs to heads cut to these lines."""
    cut = {name: x if name.endswith(("hidden", "lora_a")) else x[lines] for name, x in tensors.items()}
    return {name: x.detach().clone().requires_grad_(not name.startswith("ref")) for name, x in cut.items()}


def compare(loss_function, tensors, lines, tolerance):
    """Values and gradients of the shard against the whole."""
    results = []
    for part, group in ((slice(None), None), (lines, dist.group.WORLD)):
        leaves = sharded(tensors, part)
        outputs = loss_function(leaves, {"process_group": group}, {"vocab_start_index": part.start or 0})
        finite = [torch.where(x.isfinite(), x, 0.0) for x in outputs]
        weighted = sum((x * torch.linspace(0.5, 2.0, x.numel()).view(x.shape)).sum() for x in finite)
        wanted = [x for x in leaves.values() if x.requires_grad]
        grads = torch.autograd.grad(weighted, wanted, allow_unused=True)
        results.append(([x.detach() for x in outputs], grads))
    (whole, grads), (split, split_grads) = results
    grads = [x if x is None or x.shape[0] != VOCAB else x[lines] for x in grads]
    for expected, actual in zip((*whole, *grads), (*split, *split_grads), strict=True):
        torch.testing.assert_close(actual, expected, **tolerance, msg=lambda text: f"{loss_function.__name__}: {text}")


def losses(labels):
    """Functions of (tensors, group, start) to compare, each returning a tuple of tensors."""
    rows = torch.tensor([0, 3, 3, 3, 8, 1, 2, 2, 5])

    def logprobs(t, group, start):
        return rk.linear_logprobs(
            t["hidden"], t["weight"], labels, bias=t["bias"], rows=rows, temperature=torch.linspace(0.5, 1.5, 9),
            softcap=3.0, return_entropy=True, chunk_size=4, **group, **start,
        )  # fmt: skip

    def token_statistics(t, group, start):
        found = rk.linear_token_statistics(
            t["hidden"], t["weight"], labels, bias=t["bias"], rows=rows, softcap=3.0, chunk_size=4, **group, **start
        )
        tops = rk.linear_token_statistics(
            t["hidden"], t["weight"], torch.arange(9) + 3, rows=rows, **group, **start
        )  # of which some are the most likely
        return *found[:5], found.is_top1.float(), tops.is_top1.float()

    def entropy_alone(t, group, start):
        options = {"bias": t["bias"], "return_entropy": True}
        return rk.linear_logprobs(t["hidden"], t["weight"], labels, **options, **group, **start)[1:]

    def frozen(t, group, start):
        head, bias = t["weight"].detach(), t["bias"].detach()
        options = {"bias": bias, "rows": rows, "chunk_size": 4}
        return (rk.linear_logprobs(t["hidden"], head, labels, **options, **group, **start),)

    def cross_entropy(t, group, start):
        kept = torch.where(labels == 2, -100, labels)
        loss = rk.linear_cross_entropy(t["hidden"], t["weight"], kept, bias=t["bias"], chunk_size=3, **group, **start)
        return (loss,)

    def smoothed(t, group, start):
        """What needs sums over all columns that are not banned: the mean, and one loss a label."""
        kept, weights = torch.where(labels == 2, -100, labels), torch.linspace(-1.0, 2.0, 9)
        options = {"bias": t["bias"], "label_smoothing": 0.2, "z_loss": 0.01, "softcap": 4.0, "chunk_size": 3}
        each = rk.linear_cross_entropy(
            t["hidden"], t["weight"], kept, **options, weights=weights, reduction="none", **group, **start
        )
        return each, rk.linear_cross_entropy(t["hidden"], t["weight"], kept, **options, **group, **start)

    def frozen_smoothed(t, group, start):
        heads, options = (t["hidden"], t["weight"].detach()), {"label_smoothing": 0.2, "reduction": "none"}
        return (rk.linear_cross_entropy(*heads, labels, rows=rows, **options, **group, **start),)

    def tied(t, group, start):
        """The head's weight is the embedding too: each rank looks up its own tokens, the sum is everybody's."""
        ids = torch.tensor([0, 3, 11, 5, 7, 6, 8, 1, 2]) - start["vocab_start_index"]
        here = (ids >= 0) & (ids < len(t["weight"]))
        found = torch.where(here[:, None], F.embedding(ids.clamp(0, len(t["weight"]) - 1), t["weight"]), 0.0)
        hidden = torch.tanh(SumOverRanks.apply(found, group["process_group"]) + t["hidden"])
        return (rk.linear_cross_entropy(hidden, t["weight"], labels, **group, **start),)

    def ppo(t, group, start):
        old, advantages = torch.full((3, 3), -2.0), torch.linspace(-1, 1, 9).view(3, 3)
        mask = ((labels != 2) & (labels != -100)).view(3, 3)
        loss = rk.linear_ppo_loss(
            t["hidden"].view(3, 3, -1), t["weight"], labels.view(3, 3), old, advantages, mask, bias=t["bias"],
            entropy_coef=0.1, chunk_size=2, **group, **start,
        )  # fmt: skip
        return loss.loss, *loss.metrics.values()

    def kl(t, group, start):
        """KL(policy || reference), the policy bans a shard."""
        heads = (t["hidden"], t["weight"], t["ref_hidden"], t["ref_weight"])
        return (rk.linear_kl(*heads, bias=t["bias"], rows=rows, chunk_size=4, softcap=4.0, **group),)

    def forward_kl(t, group, start):
        """KL(reference || policy), the reference bans a shard that the policy allows."""
        heads = (t["hidden"], t["weight"], t["ref_hidden"], t["ref_weight"])
        options = {"direction": "forward", "temperature": 0.7, "ref_bias": t["ref_bias"]}
        return (rk.linear_kl(*heads, chunk_size=4, **options, **group),)

    def infinite_kl(t, group, start):
        """Where the reference gives 0 to what the policy may say: +inf, on every rank, without a gradient."""
        heads = (t["hidden"], t["weight"], t["ref_hidden"], t["ref_weight"])
        return (rk.linear_kl(*heads, ref_bias=t["ref_bias"], **group),)

    def frozen_kl(t, group, start):
        heads = (t["hidden"], t["weight"].detach(), t["ref_hidden"], t["ref_weight"])
        return (rk.linear_kl(*heads, rows=rows, **group),)

    def nearly_certain(t, group, start):
        """Logs of what other tokens than the likeliest get, and of the KL of two such rows: relative errors."""
        peak = 40.0 * (torch.arange(VOCAB) == 7)[start["vocab_start_index"] :][: len(t["weight"])].to(t["bias"].dtype)
        heads = (t["hidden"], t["weight"], t["ref_hidden"], t["ref_weight"])
        options = {"bias": t["bias"] + peak, "return_entropy": True}
        log_probs, entropy = rk.linear_logprobs(*heads[:2], torch.full((9,), 7), **options, **group, **start)
        kl = rk.linear_kl(*heads, bias=t["bias"] + peak, ref_bias=t["ref_bias"] + 0.9 * peak, **group)
        logs = (-log_probs).log(), entropy.log(), kl.log()
        assert all(x.isfinite().all() for x in logs)
        return logs

    def lora(t, group, start):
        """A LoRA layer on a frozen head: B is the rank's shard, the gradient of A everybody's."""
        head = (t["hidden"], t["weight"].detach())
        options = {"lora": (t["lora_a"], t["lora_b"], 0.7), "rows": rows, "chunk_size": 4}
        mean = rk.linear_cross_entropy(*head, labels, **options, **group, **start)
        return *rk.linear_logprobs(*head, labels, return_entropy=True, **options, **group, **start), mean

    of_labels = (
        logprobs,
        token_statistics,
        entropy_alone,
        frozen,
        cross_entropy,
        smoothed,
        frozen_smoothed,
        tied,
        ppo,
        lora,
    )
    return *of_labels, kl, forward_kl, infinite_kl, frozen_kl, nearly_certain


class SumOverRanks(torch.autograd.Function):
    """The sum of all ranks' tensors; its gradient is the same on all ranks already."""

    @staticmethod
    def forward(ctx, x, group):
        x = x.clone()
        if group is not None:
            dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def main():
    rank, cuts, backend, rendezvous = int(sys.argv[1]), [int(x) for x in sys.argv[2].split(",")], *sys.argv[3:5]
    lines = [slice(a, b) for a, b in zip([0, *cuts], [*cuts, VOCAB])]
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=len(lines))
    lines = lines[rank]
    with rk.backend(backend):
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
            tensors, labels = problem(dtype)
            for function in losses(labels):
                compare(function, tensors, lines, {"atol": tolerance, "rtol": tolerance})
        try:
            rk.linear_logprobs(
                tensors["hidden"], tensors["weight"][lines], torch.full((9,), VOCAB),
                process_group=dist.group.WORLD, vocab_start_index=lines.start,
            )  # fmt: skip
        except ValueError as error:
            assert f"expected values in [0, {VOCAB})" in str(error)
        else:
            raise AssertionError("a label beyond the whole vocabulary must raise on every rank")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
