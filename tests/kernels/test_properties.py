"""Every op of the public API on random shapes, strides, dtypes, masks and special values, against float64.

Hypothesis draws what a call looks like; its numbers come from a generator with a drawn seed. Each call runs on one of
the machine's instruction sets, or on the reference in fp32, and is compared with the definition in float64 on the same
numbers: results and gradients. It also runs twice, and must give the same bits.
"""

import contextlib
import math
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rlhf_kernels
from rlhf_kernels import dispatch
from rlhf_kernels.reference.ppo import AGG_MODES
from rlhf_kernels.reference.preference import TERMS
from tests.conftest import machine_isas

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("dense", "dense", "transposed", "every second", "inside", "one row for all")
SERVERS = ("reference", *machine_isas())
property_test = settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SIZES = st.sampled_from([0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 130])


@contextlib.contextmanager
def served_by(name):
    """The reference, or the native kernels of one instruction set."""
    before = os.environ.get("RLHF_KERNELS_CPU_ISA")
    os.environ["RLHF_KERNELS_CPU_ISA"] = "" if name == "reference" else name
    try:
        with dispatch.backend(name) if name == "reference" else contextlib.nullcontext():
            yield
    finally:
        os.environ.pop("RLHF_KERNELS_CPU_ISA")
        if before is not None:
            os.environ["RLHF_KERNELS_CPU_ISA"] = before


class Drawn:
    """What one example draws: choices from hypothesis, numbers from a seeded generator."""

    def __init__(self, data):
        self.data = data
        self.server = self.choose(*SERVERS)
        self.dtype = self.choose(*DTYPES)
        self.generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 20)))

    def choose(self, *options):
        return self.data.draw(st.sampled_from(options))

    def size(self, *, least=0, most=130):
        return self.data.draw(SIZES.filter(lambda size: least <= size <= most))

    def normal(self, *shape, scale=1.0):
        return scale * torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def integers(self, low, high, *shape):
        return torch.randint(low, high, shape, generator=self.generator)

    def coin(self, *shape, share=0.5):
        return torch.rand(shape, generator=self.generator) < share

    def mask(self, *shape):
        """1 = keep: all, none, a prefix of each row, or any."""
        kind = self.choose("all", "none", "prefix", "any")
        if kind in ("all", "none"):
            return torch.full(shape, kind == "all")
        if kind == "prefix":
            return torch.arange(shape[-1]) < self.integers(0, shape[-1] + 1, *shape[:-1], 1)
        return self.coin(*shape, share=0.7)

    def laid_out(self, x, dtype=None):
        """x in the drawn (or the given) dtype and a drawn layout; the entries between hold garbage."""
        x = x.to((dtype or self.dtype) if x.is_floating_point() else x.dtype)
        layout = self.choose(*LAYOUTS)
        if layout == "transposed" and x.dim() > 1:
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        if layout == "every second" and x.dim() > 0:
            return torch.stack([x, garbage_like(x)], -1).flatten(-2)[..., ::2]
        if layout == "inside" and x.dim() > 0:
            return torch.cat([garbage_like(x)[..., :1], x, garbage_like(x)[..., :1]], -1)[..., 1 : 1 + x.shape[-1]]
        if layout == "one row for all" and x.dim() > 1 and x.shape[0] > 0:
            return x[:1].expand(x.shape)
        return x.contiguous()


def garbage_like(x):
    return torch.full_like(x, math.nan) if x.is_floating_point() else torch.full_like(x, 1)


def in_fp64(x):
    return x.detach().double().contiguous() if torch.is_tensor(x) and x.is_floating_point() else x


# Metrics that jump where two numbers tie, or divide by a variance that may be 0.
JUMPS = ("rewards/accuracies", "explained_variance", "clip_fraction", "dual_clip_fraction", "value_clip_fraction")


def tensors_of(result):
    """All tensors of a result, the metrics' too."""
    if torch.is_tensor(result):
        return [result]
    parts = [x for name, x in result.items() if name not in JUMPS] if isinstance(result, dict) else result
    return [tensor for part in parts if part is not None for tensor in tensors_of(part)]


@pytest.fixture
def check(assert_close_to_fp64):
    def compare(actual, expected, dtype, scale):
        assert torch.equal(actual.isnan(), expected.isnan()), "NaN in one of the two only"
        actual, expected = (torch.where(x.isnan(), 0, x) for x in (actual, expected))
        assert_close_to_fp64(actual, expected, dtype, scale)

    def check(drawn, function, inputs, differentiable=(), scale=1.0, **options):
        """function(**inputs) in the drawn dtypes equals itself in float64, with the gradients of `differentiable`."""
        inputs = {name: x for name, x in inputs.items() if x is not None}
        runs = []
        for server in (drawn.server, drawn.server, "reference"):
            exact = len(runs) == 2
            arguments = {name: in_fp64(x) if exact else x for name, x in inputs.items()}
            for name in differentiable:
                arguments[name] = same_layout(arguments[name]).requires_grad_()
            with served_by(server):
                results = [x for x in tensors_of(function(**arguments, **options)) if x.is_floating_point()]
                leaves = [arguments[name] for name in differentiable]
                roots = [x for x in results if x.requires_grad]
                upstream = [torch.linspace(-1, 1.5, x.numel()).view(x.shape).to(x.dtype) for x in roots]
                grads = torch.autograd.grad(roots, leaves, upstream, allow_unused=True) if roots else ()
            runs.append(([x.detach() for x in results], grads))
        for first, second in zip(*(results + list(grads) for results, grads in runs[:2])):
            assert (first is None and second is None) or same_bits(first, second), "another run gives other bits"
        (results, grads), _, (results64, grads64) = runs
        assert len(results) == len(results64)
        for actual, expected in zip(results, results64):
            assert actual.dtype == torch.float32
            compare(actual, expected, torch.float32, scale)
        for name, actual, expected in zip(differentiable, grads, grads64):
            assert actual.dtype == inputs[name].dtype and actual.shape == inputs[name].shape
            compare(actual, expected, actual.dtype, scale)

    return check


def same_layout(x):
    """A copy with the strides of x, also where entries overlap."""
    out = torch.empty(0, dtype=x.dtype)
    return out.set_(x.untyped_storage().clone(), x.storage_offset(), x.shape, x.stride())


def same_bits(a, b):
    integer = torch.int32 if a.itemsize == 4 else torch.int16
    return torch.equal(a.clone().view(integer), b.clone().view(integer))


def logits_of(drawn, shape, largest=2000.0):
    """Logits with banned tokens, rows without any token, and large ones; and the bound's factor for these."""
    scale = drawn.choose(1.0, 3.0, 3.0, largest)
    x = drawn.normal(*shape, scale=scale)
    if drawn.choose(False, True):
        x[drawn.coin(*shape, share=0.4)] = -math.inf
        x[drawn.coin(*shape[:-1], share=0.2)] = -math.inf
    return x, max(1.0, scale / 32)  # a rounding of the largest logit moves all of them


@property_test
@given(st.data())
def test_logits(check, data):
    drawn = Drawn(data)
    shape = (*drawn.choose((), (3,), (2, 3), (0,), (1,)), drawn.choose(1, 2, 7, 16, 17, 63, 130, 2047, 2048, 4099))
    x, slack = logits_of(drawn, shape)
    labels = drawn.integers(0, shape[-1], *shape[:-1])
    ignored = drawn.coin(*shape[:-1], share=0.3)
    labels[ignored] = -100
    x[ignored] = drawn.choose(math.nan, math.inf)
    options = {"temperature": drawn.choose(1.0, 0.7, 1.3), "softcap": drawn.choose(None, None, 5.0)}
    kind = drawn.choose("logprobs", "both", "entropy")
    if kind == "entropy":
        logits = drawn.laid_out(torch.where(x.isfinite(), x, -math.inf))
        check(drawn, rlhf_kernels.entropy_from_logits, {"logits": logits}, ["logits"], scale=slack, **options)
        return
    function = rlhf_kernels.logprobs_from_logits
    if kind == "both":
        function = rlhf_kernels.logprobs_and_entropy_from_logits
    logits = drawn.laid_out(x)
    if logits.dim() > 1 and logits.shape[0] > 1 and logits.stride(0) == 0:
        labels = torch.where(labels[:1] == -100, -100, labels.clamp(min=0))
    options["inplace_backward"] = drawn.choose(False, True)
    inputs = {"logits": logits, "labels": drawn.laid_out(labels)}
    check(drawn, function, inputs, ["logits"], scale=slack, **options)


@property_test
@given(st.data())
def test_kl_from_logits(check, data):
    drawn = Drawn(data)
    shape = (*drawn.choose((), (3,), (2, 3), (0,)), drawn.choose(1, 2, 7, 16, 33, 130, 2049))
    (p, _), (q, _) = logits_of(drawn, shape, 50.0), logits_of(drawn, shape, 50.0)
    if drawn.choose(False, True):
        q = torch.where(p == -math.inf, q, torch.where(q == -math.inf, 0.0, q))  # nothing impossible: finite
    inputs = {"logits": drawn.laid_out(p), "ref_logits": drawn.laid_out(q, drawn.choose(*DTYPES))}
    options = {"temperature": drawn.choose(1.0, 0.7), "direction": drawn.choose("reverse", "forward")}
    check(drawn, rlhf_kernels.kl_from_logits, inputs, ["logits", "ref_logits"], scale=50, **options)


@property_test
@given(st.data())
def test_approx_kl(check, data):
    drawn = Drawn(data)
    shape = drawn.choose((), (0,), (1,), (19,), (3, 33), (2, 0, 5), (130, 2))
    p = -drawn.normal(*shape).abs()
    q = torch.where(drawn.coin(*shape, share=0.3), p, p + drawn.normal(*shape, scale=drawn.choose(0.01, 0.5, 2.0)))
    both = drawn.coin(*shape, share=0.1)
    p, q = p.masked_fill(both, -math.inf), q.masked_fill(both, -math.inf)
    inputs = {"log_probs": drawn.laid_out(p), "ref_log_probs": drawn.laid_out(q, drawn.choose(*DTYPES))}
    if any(0 in x.stride() and x.numel() > 1 for x in inputs.values()):
        inputs = {name: torch.where(x == -math.inf, -1.0, x) for name, x in inputs.items()}  # no pair of -inf is split
    estimator = drawn.choose("k1", "k2", "k3")
    check(drawn, rlhf_kernels.approx_kl, inputs, list(inputs), scale=4, estimator=estimator)


def rows_of_tokens(drawn):
    """(shape, mask or None, cu_seqlens or None) of responses, padded or packed, some of them empty."""
    if drawn.choose(False, True):
        lengths = drawn.integers(0, drawn.size(least=1), drawn.size(most=9))
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(drawn.choose(torch.int64, torch.int32))
        shape = (int(cu_seqlens[-1]),)
    else:
        cu_seqlens, shape = None, (drawn.size(most=9), drawn.size())
    mask = drawn.mask(*shape) if shape[-1] and drawn.choose(True, True, False) else None
    return shape, mask, cu_seqlens


def tokens(drawn, mask, *tensors):
    """Each tensor in a drawn layout, with garbage under the mask's zeros; the mask last."""
    garbage = drawn.choose(math.nan, math.inf)
    tensors = [drawn.laid_out(x) for x in tensors]
    if mask is None:
        return *tensors, None
    mask = drawn.laid_out(mask)
    return *(x if 0 in x.stride() else fill(x, mask, garbage) for x in tensors), mask


def fill(x, mask, garbage):
    """x with garbage where the mask is 0, in its own layout."""
    out = same_layout(x)
    return out.masked_fill_(~mask, garbage)


@property_test
@given(st.data())
def test_gae(check, data):
    drawn = Drawn(data)
    shape, mask, cu_seqlens = rows_of_tokens(drawn)
    rewards, values, mask = tokens(drawn, mask, drawn.normal(*shape), drawn.normal(*shape))
    rows = shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    inputs = {"rewards": rewards, "values": values, "mask": mask, "cu_seqlens": cu_seqlens}
    inputs["last_values"] = drawn.laid_out(drawn.normal(rows)) if drawn.choose(False, True) else None
    options = {"gamma": drawn.choose(1.0, 0.99, 0.5, 0.0), "lam": drawn.choose(0.95, 1.0, 0.0)}
    check(drawn, rlhf_kernels.gae, inputs, scale=4, **options)


@property_test
@given(st.data())
def test_rlhf_advantages(check, data):
    drawn = Drawn(data)
    shape, mask, cu_seqlens = rows_of_tokens(drawn)
    log_probs = -drawn.normal(*shape).abs()
    ref = log_probs + drawn.normal(*shape, scale=0.3)
    log_probs, ref, values, mask = tokens(drawn, mask, log_probs, ref, drawn.normal(*shape))
    rows = shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    inputs = {"scores": drawn.laid_out(drawn.normal(rows)), "log_probs": log_probs, "ref_log_probs": ref}
    inputs |= {"values": values, "cu_seqlens": cu_seqlens}
    options = {"kl_coef": drawn.choose(0.0, 0.02, 1.0), "kl_estimator": drawn.choose("k1", "k2", "k3")}
    options |= {"gamma": drawn.choose(1.0, 0.9), "lam": drawn.choose(0.95, 1.0, 0.0), "response_mask": mask}
    options |= {"reward_clip": drawn.choose(None, 0.5), "whiten": drawn.choose(False, True)}
    check(drawn, rlhf_kernels.rlhf_advantages, inputs, scale=8, **options)


@property_test
@given(st.data())
def test_ppo_loss(check, data):
    drawn = Drawn(data)
    shape = drawn.size(most=9), drawn.size()
    mask = drawn.mask(*shape) if shape[-1] else torch.ones(shape, dtype=torch.bool)
    old = -drawn.normal(*shape).abs()
    log_probs = old + drawn.normal(*shape, scale=drawn.choose(0.2, 2.0))
    tensors = {"log_probs": log_probs, "old_log_probs": old, "advantages": drawn.normal(*shape)}
    options = {"cliprange": drawn.choose(0.2, 0.0, 1.0), "cliprange_high": drawn.choose(None, 0.28)}
    options |= {"dual_clip": drawn.choose(None, 1.5), "vf_coef": drawn.choose(0.1, 1.0)}
    options["loss_agg_mode"] = drawn.choose(*AGG_MODES)
    if options["loss_agg_mode"] != "token-sum":
        options["num_items_in_batch"] = drawn.choose(None, 7, 3.5)
    if drawn.choose(False, True):
        returns = drawn.normal(*shape)
        moved = returns + drawn.normal(*shape, scale=0.5)
        tensors |= {"returns": returns, "old_values": moved, "values": moved + drawn.normal(*shape, scale=0.3)}
        options["cliprange_value"] = drawn.choose(None, 0.2)
    if drawn.choose(False, True):
        tensors["entropy"] = drawn.normal(*shape).abs()
        options["entropy_coef"] = drawn.choose(0.0, 0.1)
    *laid_out, mask = tokens(drawn, mask, *tensors.values())
    inputs = {**dict(zip(tensors, laid_out)), "response_mask": mask}
    differentiable = [name for name in ("log_probs", "values") if name in inputs]
    check(drawn, rlhf_kernels.ppo_loss, inputs, differentiable, scale=4 * (1 + mask.numel() ** 0.5), **options)


def groups_of(drawn):
    """(scores, ranks, cu_groups or None) of ranked responses: ties, absent ones, prompts of any size."""
    if drawn.choose(False, True):
        sizes = drawn.integers(0, drawn.size(least=1, most=33) + 1, drawn.size(most=9))
        cu_groups = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
        shape = (int(cu_groups[-1]),)
    else:
        cu_groups, shape = None, (drawn.size(most=9), drawn.size(most=33))
    scores = drawn.normal(*shape, scale=drawn.choose(1.0, 30.0))
    ranks = drawn.integers(drawn.choose(-1, 0), drawn.choose(1, 3, 40), *shape)
    scores, ranks = drawn.laid_out(scores), drawn.laid_out(ranks)
    if 0 not in scores.stride():
        scores = fill(scores, ranks >= 0, drawn.choose(math.nan, math.inf))
    return scores, ranks, cu_groups


@property_test
@given(st.data())
def test_ranking_losses(check, data):
    drawn = Drawn(data)
    scores, ranks, cu_groups = groups_of(drawn)
    inputs = {"scores": scores, "ranks": ranks, "cu_groups": cu_groups}
    options = {"reduction": drawn.choose("mean", "sum", "none")}
    if options["reduction"] == "mean":
        options["num_items_in_batch"] = drawn.choose(None, 5)
    scale = 1.0 + scores.numel() ** 0.5
    if drawn.choose(False, True):
        check(drawn, rlhf_kernels.plackett_luce_loss, inputs, ["scores"], scale, **options)
        return
    prompts = scores.shape[0] if cu_groups is None else len(cu_groups) - 1
    form = drawn.choose(None, "number", "prompt", "pair")
    if form == "prompt":
        inputs["margins"] = drawn.laid_out(drawn.normal(prompts).abs(), torch.float32)
    elif form == "pair":
        largest = max(int(cu_groups.diff().max()) if prompts else 0, 1) + 2 if cu_groups is not None else 0
        shape = (*scores.shape, scores.shape[1]) if cu_groups is None else (scores.shape[0], largest)
        inputs["margins"] = drawn.laid_out(drawn.normal(*shape), torch.float32)
    elif form == "number":
        options["margins"] = 0.5
    options["ties"] = drawn.choose("drop", "half")
    check(drawn, rlhf_kernels.bradley_terry_loss, inputs, ["scores"], scale, **options)


@property_test
@given(st.data())
def test_preference_loss(check, data):
    drawn = Drawn(data)
    kind = drawn.choose("sigmoid", "ipo", "hinge", "orpo", "simpo", "kto", "robust", *TERMS[5:])
    sizes = [drawn.size()] * 2 if kind != "kto" else [drawn.size(), drawn.size()]
    lengths = [drawn.integers(1, 30, size) for size in sizes]
    log_probs = [
        -length * torch.rand(length.shape, generator=drawn.generator, dtype=torch.float64) for length in lengths
    ]
    names = ("policy_chosen_logps", "policy_rejected_logps")
    inputs = {name: drawn.laid_out(x) for name, x in zip(names, log_probs)}
    options = {"loss_type": kind, "beta": drawn.choose(0.1, 0.5, 2.0), "reduction": drawn.choose("mean", "sum", "none")}
    if kind not in ("orpo", "simpo"):
        ref = [x + drawn.normal(*x.shape, scale=drawn.choose(0.1, 5.0)) for x in log_probs]
        inputs |= {name: drawn.laid_out(x) for name, x in zip(("ref_chosen_logps", "ref_rejected_logps"), ref)}
    if kind in ("orpo", "simpo") or drawn.choose(False, True):
        inputs |= {name: drawn.laid_out(x) for name, x in zip(("chosen_lengths", "rejected_lengths"), lengths)}
    if kind in ("sigmoid", "simpo", "robust", "exo_pair"):
        options["label_smoothing"] = drawn.choose(1e-3 if kind == "exo_pair" else 0.0, 0.1)
    if kind in ("sigmoid", "ipo", "hinge", "robust", "exo_pair", "discopop"):
        options["divergence"] = drawn.choose("reverse_kl", "js_divergence")
    if kind == "kto":
        options |= {"kl": drawn.choose(0.0, 0.3, -0.2), "desirable_weight": 1.2, "undesirable_weight": 0.8}
    scale = 50.0 if options["reduction"] == "none" else 50.0 + sum(sizes)
    check(drawn, rlhf_kernels.preference_loss, inputs, names, scale, **options)


def head_of(drawn, count):
    """Hidden states of `count` tokens, an LM head, and a bias that may ban tokens."""
    width, vocab = drawn.choose(1, 3, 8), drawn.choose(1, 2, 7, 17, 65, 4099)
    hidden, weight = drawn.normal(count, width), drawn.normal(vocab, width)
    bias = None
    if drawn.choose(False, True):
        bias = drawn.normal(vocab)
        bias[1:][drawn.coin(vocab - 1, share=drawn.choose(0.0, 0.3))] = -math.inf
    return hidden, weight, bias


def laid_out_head(drawn, inputs):
    return {name: None if x is None else drawn.laid_out(x) for name, x in inputs.items()}


def scaling(drawn):
    softcap, chunk = drawn.choose(None, None, 5.0), drawn.choose(None, 1, 3)
    return {"temperature": drawn.choose(1.0, 0.7), "softcap": softcap, "chunk_size": chunk}


@property_test
@given(st.data())
def test_linear_logprobs_and_cross_entropy(check, data):
    drawn = Drawn(data)
    count = drawn.size(most=33)
    hidden, weight, bias = head_of(drawn, count)
    inputs = laid_out_head(drawn, {"hidden_states": hidden, "weight": weight, "bias": bias})
    places = count
    if count and drawn.choose(False, True):
        places = drawn.size(most=33)
        inputs["rows"] = drawn.laid_out(drawn.integers(0, count, places))
    labels = drawn.integers(0, weight.shape[0], places)
    if bias is not None:
        labels = torch.where(bias[labels] == -math.inf, 0, labels)
    ignored = drawn.coin(places, share=0.3)
    inputs["labels"] = drawn.laid_out(labels.masked_fill(ignored, -100))
    if "rows" not in inputs and 0 not in inputs["hidden_states"].stride():
        inputs["hidden_states"] = fill(inputs["hidden_states"], ~ignored[:, None], drawn.choose(math.nan, math.inf))
    leaves = [name for name in ("hidden_states", "weight", "bias") if inputs[name] is not None]
    options = scaling(drawn)
    if drawn.choose(False, True):
        options["return_entropy"] = drawn.choose(False, True)
        check(drawn, rlhf_kernels.linear_logprobs, inputs, leaves, 32, **options)
        return
    options["reduction"] = drawn.choose("mean", "sum", "none")
    check(drawn, rlhf_kernels.linear_cross_entropy, inputs, leaves, 32 + places, **options)


@property_test
@given(st.data())
def test_linear_ppo_loss(check, data):
    drawn = Drawn(data)
    shape = drawn.size(most=5), drawn.size(most=9)
    hidden, weight, bias = head_of(drawn, shape[0] * shape[1])
    hidden = hidden.view(*shape, hidden.shape[-1])
    mask = drawn.mask(*shape) if shape[1] else torch.ones(shape, dtype=torch.bool)
    inputs = laid_out_head(drawn, {"hidden_states": hidden, "weight": weight, "bias": bias})
    labels = drawn.integers(0, weight.shape[0], *shape)
    if bias is not None:
        labels = torch.where(bias[labels] == -math.inf, 0, labels)
    old = rlhf_kernels.linear_logprobs(**inputs, labels=labels).detach() + drawn.normal(*shape, scale=0.3)
    tensors = tokens(drawn, mask, old, drawn.normal(*shape))
    inputs |= dict(zip(("old_log_probs", "advantages", "response_mask"), tensors))
    inputs["labels"] = drawn.laid_out(labels)
    options = scaling(drawn)
    options |= {"entropy_coef": drawn.choose(0.0, 0.1), "dual_clip": drawn.choose(None, 1.5)}
    options["loss_agg_mode"] = drawn.choose(*AGG_MODES)
    leaves = [name for name in ("hidden_states", "weight", "bias") if inputs[name] is not None]
    check(drawn, rlhf_kernels.linear_ppo_loss, inputs, leaves, 32 + mask.numel(), **options)


@property_test
@given(st.data())
def test_linear_kl(check, data):
    drawn = Drawn(data)
    count = drawn.size(most=33)
    hidden, weight, bias = head_of(drawn, count)
    width = drawn.choose(1, 5)
    inputs = {"hidden_states": hidden, "weight": weight, "bias": bias}
    inputs |= {"ref_hidden_states": drawn.normal(count, width), "ref_weight": drawn.normal(weight.shape[0], width)}
    if drawn.choose(False, True):
        inputs["ref_bias"] = bias
    inputs = laid_out_head(drawn, inputs)
    leaves = [name for name in ("hidden_states", "weight", "bias") if inputs[name] is not None]
    options = scaling(drawn) | {"direction": drawn.choose("reverse", "forward")}
    check(drawn, rlhf_kernels.linear_kl, inputs, leaves, 32, **options)


@property_test
@given(st.data())
def test_pack_responses(data):
    """Every label is read from the row that holds the token before it, in a context of exactly its own past."""
    drawn = Drawn(data)
    prompts = [drawn.integers(0, 9, drawn.size(least=1, most=9)).tolist() for _ in range(drawn.choose(0, 1, 2, 5))]
    responses = [
        [drawn.integers(0, 9, drawn.size(most=9)).tolist() for _ in range(drawn.choose(1, 2, 4))] for _ in prompts
    ]
    room = max((len(p) + sum(map(len, group)) for p, group in zip(prompts, responses)), default=1)
    packed = rlhf_kernels.pack_responses(prompts, responses, max_tokens=drawn.choose(None, room, 2 * room))
    ids, positions = packed.input_ids.flatten(), packed.position_ids.flatten()
    length = packed.input_ids.shape[1] if prompts else 1
    flat = [(prompt, response) for prompt, group in zip(prompts, responses) for response in group]
    assert packed.cu_groups.diff().tolist() == [len(group) for group in responses]
    assert packed.cu_responses.diff().tolist() == [len(response) for _, response in flat]
    for s, (prompt, response) in enumerate(flat):
        part = slice(int(packed.cu_responses[s]), int(packed.cu_responses[s + 1]))
        assert packed.labels[part].tolist() == response
        whole = prompt + response
        last = int(packed.last_token_rows[s])
        for step, row in enumerate([*packed.label_rows[part].tolist(), last]):
            seen = packed.attention_mask[row // length, 0, row % length].nonzero().flatten() + row // length * length
            assert ids[seen].tolist() == whole[: len(prompt) + step]
            assert positions[seen].tolist() == list(range(len(prompt) + step))
