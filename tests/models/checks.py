"""What this package claims of a language model, each claim against something that is not the code under test.

A check answers in a line: "ok"; "refused: ..." where the package declines by an error of its own; "transformers: ..."
where the model contradicts itself, which is then shown without the package; "WRONG ..." with the gap; "CRASH ...".
"""

import contextlib
import inspect
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from rlhf import models
from rlhf.models.sequences import per_token_log_probs
from rlhf.rollouts import sampling
from rlhf_kernels import linear_logprobs_from_model, pack_responses
from rlhf_kernels.integrations.transformers import packed_inputs
from tests.models.tiny_configs import PAD, VOCABULARY, narrowed, tiny_model
from tests.roundings import STORED
from tests.tiny import word_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [[11, 45, 7, 88, 23, 61, 30], [52, 9, 71, 16, 40], [67, 31]]
RESPONSES = [[[33, 80, 14, 96], [95, 27, 64], [19, 58, 6, 74, 41]], [[38, 12, 90, 55], [66, 29], [72]], [[44, 83, 17]]]
TEMPERATURE = 1.7
CACHES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")  # what models call theirs
LONGEST = 12  # tokens of the longest prompt with its response
STOPS = list(range(5, VOCABULARY, 5))  # so many that a likely token is always among them
ROUNDED = {torch.float64: 16 * STORED, torch.float32: 2**10 * 2**-24}
"""How far two forwards of one model may lie apart, by its weights' dtype. float64: norms, ropes and routers compute in
fp32 all the same, one after the other in up to six layers. fp32: sums of other shapes move a network of two layers by
up to 1e-5 on any processor (tests/roundings.py); six times that for six layers."""
MARGIN = 1e-4
"""How far from the ends of its token's slot the sampler's number lies: a distribution that is off by more shows."""


class Wrong(Exception):
    """A value is not what it must be."""


@dataclass
class Case:
    """A tiny model, and the policy that the trainers make of its folder; None where they refuse it."""

    model: nn.Module
    folder: Path
    policy: nn.Module | None = None

    @property
    def dtype(self):
        return self.model.dtype

    @property
    def attention(self):
        return self.model.config._attn_implementation


def check(family, **changes) -> dict[str, str]:
    """{claim: answer} of a model type, its config changed; of models with windows, with short ones too."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            case = _case(family, changes, Path(folder))
        except Exception as error:  # of transformers alone
            return dict.fromkeys(CLAIMS, f"not built: {_where(error)}")
        answers = _check(case, CLAIMS)
    short = narrowed(family, changes)
    if short:
        with tempfile.TemporaryDirectory() as folder:
            narrow = _check(_case(family, short, Path(folder)), ("load", "rows", "packing", "sampler"))
        for claim in ("rows", "packing", "sampler"):
            if narrow[claim].startswith(("WRONG", "CRASH")) and not answers[claim].startswith(("WRONG", "CRASH")):
                answers[claim] = f"{narrow[claim]} [windows shorter than the text]"
    return answers


def _case(family, changes, folder):
    """In float64, or in fp32 where the model's own code takes no float64.

    Nor does eager attention: the lowest number of float64, which it adds under the mask, is -inf in its fp32 softmax.
    """
    model = tiny_model(family, torch.float64, **changes)
    try:
        _logits(model, torch.tensor([PROMPTS[0]]))
        double = model.config._attn_implementation != "eager"
    except RuntimeError:
        double = False
    model = model if double else tiny_model(family, torch.float32, **changes)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return Case(model, folder)


def _check(case, claims):
    answers = {"load": _answer(case, "load")}
    for claim in claims:
        trained = case.policy is not None or claim == "log-probs"  # which need no trainer
        answers[claim] = _answer(case, claim) if trained and claim != "load" else answers["load"]
    return answers


def _answer(case, claim):
    function, own_fault = CHECKS[claim]
    try:
        function(case)
    except Exception as error:
        if _is_refusal(error):
            return f"refused: {error}"
        reason = own_fault and _by_itself(own_fault, case)
        if reason:
            return f"transformers: {reason}"
        if isinstance(error, Wrong):
            return f"WRONG {error}"
        return f"CRASH {_where(error)}"
    return "ok"


def _by_itself(own_fault, case):
    try:
        return own_fault(case)
    except Exception as error:
        return f"by itself it raises {_where(error)}"


def _is_refusal(error):
    """An error that the package raised itself, in a line that one can read."""
    ours = traceback.extract_tb(error.__traceback__)[-1].filename.startswith((f"{ROOT}/rlhf/", f"{ROOT}/rlhf_kernels/"))
    kind = isinstance(error, (ValueError, sampling.RolloutError))
    return ours and kind and "\n" not in str(error) and len(str(error)) <= 500


def _where(error):
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]} ({'/'.join(last.filename.split('/')[-2:])}:{last.lineno})"


def _same(actual, expected, what, dtype):
    """Within ROUNDED of the larger of 1 and the largest expected entry; NaN is never accepted."""
    gap = (actual.detach().double() - expected.detach().double()).abs().max()
    if not gap <= ROUNDED[dtype] * expected.detach().abs().max().clamp(min=1):
        raise Wrong(f"{what}: off by {gap:.1e}")


@torch.no_grad()
def _logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def _alone(model):
    """Log-probs of all responses, each behind its prompt in a row of its own: no mask, no positions, no cache."""
    found = []
    for prompt, group in zip(PROMPTS, RESPONSES, strict=True):
        for response in group:
            logits = _logits(model, torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1]
            found.append(logits.double().log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(found)


def _padded(side):
    """Two rows of random tokens, the second one padded at a side: (ids [2, 9], mask [2, 9])."""
    ids = torch.randint(5, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, {"right": slice(6, None), "left": slice(3)}[side]] = 0
    return ids.where(mask.bool(), PAD), mask


@contextlib.contextmanager
def _evaluating(model):
    training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(training)


def load(case):
    """The policy of a folder by the trainers' defaults, and after it was saved again, computes what was saved."""
    case.policy = models.load_policy(case.folder, dtype=case.dtype)
    with tempfile.TemporaryDirectory() as folder:
        models.save_model(case.policy, word_tokenizer(), folder)
        again = models.load_policy(folder, dtype=case.dtype)
    expected = _logits(case.model, _padded("right")[0])
    for name, model in (("loaded", case.policy), ("saved again", again)):
        with _evaluating(model):
            _same(_logits(model, _padded("right")[0]), expected, name, case.dtype)


def _loses_weights(case):
    ids = _padded("right")[0]
    loaded = type(case.model).from_pretrained(case.folder, dtype=case.dtype).eval()
    gap = (_logits(loaded, ids) - _logits(case.model, ids)).abs().max()
    return f"save_pretrained and from_pretrained move its logits by {gap:.1e}" if gap > 1e-3 else None


def log_probs(case):
    """Log-probs, entropies and gradients without logits, of rows whole and padded, against the model's logits."""
    with _evaluating(case.model if case.policy is None else case.policy) as model:
        for side in ("right", "left"):
            ids, mask = _padded(side)
            kept = mask[:, 1:].bool() & mask[:, :-1].bool()
            inputs = {"input_ids": ids, "attention_mask": mask}
            ours = linear_logprobs_from_model(model, **inputs, temperature=TEMPERATURE, return_entropy=True)
            ours = torch.stack([x[kept] for x in ours])
            logits = model(**inputs, use_cache=False).logits[:, :-1][kept].double()
            expected = _from_logits(logits / TEMPERATURE, ids[:, 1:][kept])
            for name, actual, wanted in zip(("log-probs", "entropies"), ours, expected, strict=True):
                _same(actual, wanted, f"{name}, padded {side}", case.dtype)
            weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(5))
            _same_gradients(model, (weights * ours).sum(), (weights * expected).sum(), case.dtype)


def _has_no_gradient(case):
    """By the model alone: what raises where its own logits are differentiated."""
    case.model(input_ids=torch.tensor([PROMPTS[0]]), use_cache=False).logits.sum().backward()


def _from_logits(logits, labels):
    every = logits.log_softmax(-1)
    entropies = -(every.exp() * every.masked_fill(every.isinf(), 0)).sum(-1)
    return torch.stack([every.gather(-1, labels[:, None])[:, 0], entropies])


def _same_gradients(model, actual, expected, dtype):
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    actual, expected = (torch.autograd.grad(x, list(weights.values()), allow_unused=True) for x in (actual, expected))
    largest = max(x.abs().max() for x in expected if x is not None)
    for name, ours, theirs in zip(weights, actual, expected, strict=True):
        pair = [torch.zeros_like(weights[name]) if x is None else x for x in (ours, theirs)]
        scale = pair[1].abs().max().clamp(min=1e-2 * largest)
        _same(pair[0] / scale, pair[1] / scale, f"gradient of {name}", dtype)


def rows(case):
    """Log-probs of the trainers' padded rows, against each row alone."""
    with _evaluating(case.policy) as model:
        _same(_trainers(model), _alone(model), "padded rows", case.dtype)


@torch.no_grad()
def _trainers(model, share_width=None):
    prompts = [prompt for prompt, group in zip(PROMPTS, RESPONSES, strict=True) for _ in group]
    responses = [response for group in RESPONSES for response in group]
    found, mask, _ = per_token_log_probs(model, prompts, responses, temperature=1.0, share_width=share_width)
    return found[mask]


@torch.no_grad()
def _pads_wrongly(case, side="right"):
    """By the model alone: the texts padded, with their mask and positions, against each without padding."""
    texts = [prompt + response for prompt, group in zip(PROMPTS, RESPONSES, strict=True) for response in group]
    width, takes = max(map(len, texts)), inspect.signature(case.policy.forward).parameters
    with _evaluating(case.policy) as model:
        alone = [_logits(model, torch.tensor([text]))[0] for text in texts]
        pads = [(width - len(text)) * [-1] for text in texts]
        ids = torch.tensor(
            [text + pad if side == "right" else pad + text for text, pad in zip(texts, pads, strict=True)]
        )
        inputs = {"input_ids": ids.clamp(min=PAD), "attention_mask": (ids >= 0).long()}
        if side == "left" and "position_ids" in takes:
            inputs["position_ids"] = ((ids >= 0).cumsum(-1) - 1).clamp(min=0)
        padded = model(**inputs, use_cache=False).logits
    gap = max((row[kept] - one).abs().max() for row, kept, one in zip(padded, ids >= 0, alone, strict=True))
    return None if gap <= 1e-3 else f"padding at the {side} moves its logits by {gap:.1e}"


def packing(case):
    """Responses behind a shared prompt, a row for each prompt and all in one, against each response's own row.

    By the trainers and by `packed_inputs`, with the attention that the model was loaded with and with eager.
    """
    options = {"dtype": case.dtype, "attn_implementation": "eager"}
    eager = case.policy if case.attention == "eager" else models.load_policy(case.folder, **options)
    with _evaluating(case.policy) as model:
        expected = _alone(model)
        for one in (model, eager.eval()):
            for tokens in (None, 64):
                packed = pack_responses(PROMPTS, RESPONSES, max_tokens=tokens)
                found = _packed_log_probs(one, packed)
                _same(found, expected, f"{one.config._attn_implementation}, rows of {tokens or 'a prompt'}", case.dtype)
        if models.share_prompts([model], LONGEST):  # it may change the model's attention: last
            _same(_trainers(model, share_width=1000), expected, "the trainers' packed rows", case.dtype)


@torch.no_grad()
def _packed_log_probs(model, packed):
    logits = model(**packed_inputs(model, packed), use_cache=False).logits.flatten(0, 1)[packed.label_rows]
    return logits.double().log_softmax(-1).gather(-1, packed.labels[:, None])[:, 0]


def sampler(case):
    """Given the numbers that lead to chosen tokens by full forwards without a cache, the sampler takes these tokens."""
    steps, group = 5, 3
    with _evaluating(case.policy) as model:
        plan = [[_planned(model, prompt, steps, start=prompt[0] + k) for k in range(group)] for prompt in PROMPTS]
    noise = torch.tensor([[numbers for _, numbers in each] for each in plan], dtype=torch.float64)
    settings = {"response_length": steps, "temperature": TEMPERATURE, "stop_token_ids": STOPS}
    found = sampling.sample(case.policy, None, PROMPTS, **settings, samples_per_prompt=group, noise=noise)
    wanted = [response for each in plan for response, _ in each]
    off = sum(
        a != b for one, two in zip(found.response_ids, wanted, strict=True) for a, b in zip(one, two, strict=False)
    )
    if found.response_ids != wanted:
        raise Wrong(f"{off} of {sum(map(len, wanted))} tokens are not those of the model's own distribution")


def _planned(model, prompt, steps, start):
    """(response, numbers that lead to it): likely tokens, none the padding; every third response ends early."""
    response, numbers = [], []
    for step in range(steps):
        probs = (_logits(model, torch.tensor([prompt + response]))[0, -1].double() / TEMPERATURE).softmax(-1)
        every = torch.arange(len(probs))
        likely, ends = every.ne(PAD) & (probs > 10 * MARGIN), torch.isin(every, torch.tensor(STOPS))
        goes_on, stops = ((likely & which).nonzero() for which in (~ends, ends))
        end = len(stops) and (not len(goes_on) or (start % 3 == 0 and step >= 2))
        choice = stops if end else goes_on
        token = int(choice[(start + step) % len(choice)])
        response.append(token)
        low, high = float(probs[:token].sum()), float(probs[: token + 1].sum())
        numbers.append(low + MARGIN if step % 2 else high - MARGIN)
        if end:
            break
    return response, numbers + [0.5] * (steps - len(numbers))


@torch.no_grad()
def _decodes_wrongly(case):
    """By the model alone: an unpadded prompt, its response token by token with the cache, against one forward."""
    ids = torch.tensor([PROMPTS[0] + RESPONSES[0][-1]])
    first, logits = len(PROMPTS[0]), []
    with _evaluating(case.policy) as model:
        try:
            made = model(input_ids=ids[:, :first], use_cache=True)
            for step in range(first, ids.shape[1]):
                cache = {name: made[name] for name in CACHES if name in made}
                made = model(input_ids=ids[:, step : step + 1], **cache, use_cache=True)
                logits.append(made.logits[0])
        except Exception as error:
            return f"a forward with its own cache raises {_where(error)}"
        gap = (torch.cat(logits) - _logits(model, ids)[0, first:]).abs().max()
    return f"its own cache moves its logits by {gap:.1e}" if cache and gap > 1e-3 else None


def train_mode(case):
    """The policy computes in train mode what it computes in eval mode, each time."""
    ids, policy = _padded("right")[0], case.policy
    with _evaluating(policy):
        expected = _logits(policy, ids)
    policy.train()
    for _ in range(2):
        _same(_logits(policy, ids), expected, "train mode", case.dtype)


@torch.no_grad()
def reward_model(case):
    """Scores of a new reward model at every token of padded rows: its head on the model's own hidden states, alone.

    Padded at the left too, where the model itself can be. Saved and loaded, they are the same, less the calibration.
    """
    options = {"dtype": case.dtype, "attn_implementation": case.attention}
    scorer = models.reward_model_from_policy(case.folder, 1, **options, pad_token_id=PAD)
    head = [layer for layer in scorer.modules() if isinstance(layer, nn.Linear) and layer.out_features == 1][-1]
    for side in ("right", "left"):
        if side == "left" and _pads_wrongly(case, side):
            break
        ids, mask = _padded(side)
        alone = [head(_last_hidden(case.model, row[kept][None]))[0, :, 0] for row, kept in zip(ids, mask.bool())]
        _same(models.token_scores(scorer, ids, mask)[mask.bool()], torch.cat(alone), f"padded {side}", case.dtype)
    scorer.config.reward_bias = 0.25
    with tempfile.TemporaryDirectory() as folder:
        models.save_model(scorer, word_tokenizer(), folder)
        loaded = models.load_reward_model(folder, **options)
        if not models.is_reward_model(folder):
            raise Wrong("what was saved is not known as a reward model")
    _same(models.token_scores(loaded, ids, mask)[mask.bool()], torch.cat(alone) - 0.25, "loaded", case.dtype)


def _last_hidden(model, ids):
    """What the model itself gives as its last hidden states; what its head reads where those are several streams."""
    read = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda head, args: read.append(args[0]))
    states = model(input_ids=ids, use_cache=False, output_hidden_states=True).get("hidden_states")
    handle.remove()
    return states[-1] if states is not None and states[-1].dim() == 3 else read[0]


CHECKS = {  # claim: the check, and what shows that a failure of it is the model's own
    "load": (load, _loses_weights),
    "log-probs": (log_probs, _has_no_gradient),
    "rows": (rows, _pads_wrongly),
    "packing": (packing, None),
    "sampler": (sampler, _decodes_wrongly),
    "train mode": (train_mode, None),
    "reward model": (reward_model, lambda case: _loses_weights(case) or _pads_wrongly(case)),
}
CLAIMS = tuple(CHECKS)
