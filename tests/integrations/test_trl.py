"""TRL on these kernels: the same losses and gradients, closer to float64, and TRL's own functions back afterwards."""

import contextlib
import copy
import gc
import importlib
import sys

import pytest
import torch

pytest.importorskip("trl", reason="the package trl is not installed: make test-integrations-trl")
import trl
import trl.trainer.utils as trl_utils
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from rlhf_kernels.integrations import trl as rk_trl
from tests.tiny import language_model, model_folder, word_tokenizer

if trl.__version__ not in rk_trl.TESTED:
    pytest.skip(f"trl {trl.__version__} is installed, tested is {', '.join(rk_trl.TESTED)}", allow_module_level=True)

OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
NAMES = tuple(rk_trl._SIGNATURES)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(dtype=torch.float32):
    hidden, weight, bias = normal(9, 16, dtype=dtype, seed=1), normal(50, 16, dtype=dtype, seed=2), normal(50, seed=3)
    return hidden, weight, bias.to(dtype), torch.arange(9) * 5


def scores(function, tensors, options, outputs=OUTPUTS, frozen=False):
    """(outputs, gradients) of a head; the last tensor holds the labels."""
    hidden, weight, bias, labels = tensors
    leaves = [x.clone().requires_grad_(i == 0 or not frozen) for i, x in enumerate((hidden, weight, bias))]
    found = function(*leaves, labels, *options, outputs)
    total = found[0].sin().sum() + (found[1].cos().sum() if found[1] is not None else 0.0)
    return found, torch.autograd.grad(total, leaves[:1] if frozen else leaves)


@pytest.mark.parametrize("frozen", (False, True), ids=("trained", "frozen"))
@pytest.mark.parametrize("outputs", (OUTPUTS, OUTPUTS[:1], OUTPUTS[:2], (OUTPUTS[0], OUTPUTS[4])), ids=len)
@pytest.mark.parametrize(
    "options", ((1.0, 32), (0.7, 32, None, 0.25), (0.7, 16, 5.0, 0.5), (1.3, 64, 3.0, 1.0)), ids=str
)
def test_the_head_gives_what_trl_does(options, outputs, frozen):
    """In fp32, with bias, temperature, soft cap and scale at once; what is not asked for is None."""
    options = (*options, *(None, 1.0)[len(options) - 2 :])
    theirs, their_gradients = scores(trl_utils._ChunkedLogProbFunction.apply, problem(), options, outputs, frozen)
    with rk_trl.patched():
        ours, gradients = scores(trl_utils._ChunkedLogProbFunction.apply, problem(), options, outputs, frozen)
    for x, y in zip(ours, theirs, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=2e-6, atol=2e-6)
    for x, y in zip(gradients, their_gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("autocast", (False, True), ids=("bf16", "autocast"))
def test_half_precision_is_closer_to_float64(autocast):
    """Against float64 of the same bf16 inputs: TRL rounds its logits, this does not."""
    tensors = problem(torch.float32 if autocast else torch.bfloat16)
    rounded = [x.bfloat16() if i < 2 else x for i, x in enumerate(tensors)]
    exact = [x.double() if x.is_floating_point() else x for x in rounded]
    logits = exact[0] @ exact[1].t() + exact[2]
    wanted = torch.log_softmax(logits, -1).gather(-1, exact[3][:, None]).squeeze(-1)
    errors = []
    for context in (rk_trl.patched, lambda: torch.autocast("cpu", enabled=False)):
        with context(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            found = trl_utils._ChunkedLogProbFunction.apply(*tensors, 1.0, 32)[0]
        errors.append((found.double() - wanted).abs().max().item())
    assert errors[0] < 1e-5 < 1e-3 < errors[1]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("results", rk_trl.RESULTS)
def test_functions_from_logits(dtype, results):
    logits, index, several = normal(2, 3, 40, dtype=dtype), torch.arange(6).view(2, 3), torch.arange(24).view(2, 3, 4)
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]])
    calls = [
        ("selective_log_softmax", (logits, index, 0.7, mask)),
        ("selective_log_softmax", (logits, several)),
        ("entropy_from_logits", (logits, 2)),
        ("selective_log_softmax_and_entropy", (logits, index, False, 0.9, mask)),
    ]
    for name, arguments in calls:
        theirs = getattr(trl_utils, name)(*arguments)
        exact = getattr(trl_utils, name)(logits.double(), *arguments[1:])
        with rk_trl.patched(results=results):
            ours = getattr(trl_utils, name)(*arguments)
        groups = [x if isinstance(x, tuple) else (x,) for x in (ours, theirs, exact)]
        for x, y, z in zip(*groups, strict=True):
            assert x.shape == y.shape
            assert x.dtype == (dtype if results == "input" else torch.float32)
            bound = 1e-2 if results == "input" and dtype == torch.bfloat16 else 2e-6
            torch.testing.assert_close(x.double(), z, rtol=bound, atol=bound)
            x[..., 0] = 0.0  # what they return may be written in place


def test_everything_comes_back():
    from trl.experimental.cpo import cpo_trainer

    before = {name: getattr(trl_utils, name) for name in NAMES}
    assert cpo_trainer.selective_log_softmax is before["selective_log_softmax"]
    with rk_trl.patched():
        assert all(getattr(trl_utils, name) is not before[name] for name in NAMES)
        assert cpo_trainer.selective_log_softmax is rk_trl.selective_log_softmax
        assert trl.trainer.sft_trainer.add_fused_lm_head is trl_utils.add_fused_lm_head
        sys.modules.pop("trl.experimental.orpo.orpo_trainer", None)
        late = importlib.import_module("trl.experimental.orpo.orpo_trainer")
        assert late.selective_log_softmax is rk_trl.selective_log_softmax
        with rk_trl.patched(precision="fast"):
            with rk_trl.patched(results="input"):
                assert rk_trl._options[-1] == ("exact", "input")
            assert rk_trl._options[-1] == ("fast", "float32")
        assert rk_trl._options[-1] == ("exact", "float32")
        assert cpo_trainer.selective_log_softmax is rk_trl.selective_log_softmax
    rk_trl.disable()  # one too many
    assert rk_trl._options == [("exact", "float32")]
    assert {name: getattr(trl_utils, name) for name in NAMES} == before
    assert cpo_trainer.selective_log_softmax is late.selective_log_softmax is before["selective_log_softmax"]


def test_what_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="precision"):
        rk_trl.enable(precision="bf16")
    with pytest.raises(ValueError, match="results"):
        rk_trl.enable(results="half")
    monkeypatch.setattr(trl_utils, "entropy_from_logits", lambda logits, size: None)
    with pytest.raises(RuntimeError, match="entropy_from_logits takes logits, size, expected logits, chunk_size"):
        rk_trl.enable()
    monkeypatch.undo()
    monkeypatch.setattr(rk_trl._patches, "tested", ("0.1.0",))
    with pytest.raises(RuntimeError, match=r"trl is 1\.16\.0, expected .*0\.1\.0"):
        rk_trl.enable()
    assert not rk_trl._patches.enabled


def options(folder, **more):
    return {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1, "seed": 0,
        "learning_rate": 0.1, "optim": "sgd", "per_device_train_batch_size": 4, "save_strategy": "no",
        "gradient_checkpointing": False, "disable_tqdm": True, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
        **more,
    }  # fmt: skip


TEXTS = ("a b c the dog ran", "the cat sat down and was good", "b a d e f", "the dog was bad and up")
PROMPTS = ("the dog", "the cat sat", "a b", "was")
LENGTHS = {"max_length": 16}


def sft(model, tokenizer, folder, **changes):
    rows = [{"prompt": p + " ", "completion": t} for p, t in zip(PROMPTS, TEXTS)]
    config = SFTConfig(**options(folder, **LENGTHS, **changes))
    return SFTTrainer(model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def dpo(model, tokenizer, folder, **changes):
    rows = [{"prompt": p + " ", "chosen": t, "rejected": t[::-1]} for p, t in zip(PROMPTS, TEXTS)]
    config = DPOConfig(**options(folder, **LENGTHS, **changes))
    return DPOTrainer(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def kto(model, tokenizer, folder, **changes):
    rows = [{"prompt": p + " ", "completion": t, "label": i % 2 == 0} for i, (p, t) in enumerate(zip(PROMPTS, TEXTS))]
    config = KTOConfig(**options(folder, **LENGTHS, **changes))
    return KTOTrainer(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def grpo(model, tokenizer, folder, **changes):
    config = GRPOConfig(**options(folder, num_generations=2, max_completion_length=6, **changes))
    rows = Dataset.from_list([{"prompt": p} for p in PROMPTS])
    return GRPOTrainer(model, reward_funcs=lengths, args=config, train_dataset=rows, processing_class=tokenizer)


def rloo(model, tokenizer, folder, **changes):
    config = trl.RLOOConfig(**options(folder, num_generations=2, max_completion_length=6, **changes))
    rows = Dataset.from_list([{"prompt": p} for p in PROMPTS])
    return trl.RLOOTrainer(model, reward_funcs=lengths, args=config, train_dataset=rows, processing_class=tokenizer)


def lengths(completions, **_):
    return [float(len(set(text))) for text in completions]


STEPS = {
    "sft": (sft, {}),
    "sft-dft": (sft, {"loss_type": "dft"}),
    "dpo": (dpo, {}),
    "dpo-wpo": (dpo, {"use_weighting": True, "loss_type": ["ipo"]}),
    "kto": (kto, {}),
    "grpo": (grpo, {}),
    "grpo-kl": (grpo, {"beta": 0.1, "loss_type": "bnpo", "temperature": 0.7}),
    "rloo": (rloo, {"beta": 0.1}),
}


def adapted(model, lora):
    """The model with adapters whose factors are the same on every call; B, which begins at 0, is drawn too."""
    torch.manual_seed(1)
    model = get_peft_model(model, copy.deepcopy(lora))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return model


def step(make, changes, folder, lora=None):
    """(log of one step, weights after it) of a trainer on the same tiny model."""
    tokenizer = word_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(model_folder(folder / "model", tokenizer=tokenizer))
    if lora is not None:
        model = adapted(model, lora)
    torch.manual_seed(3)
    trainer = make(model, tokenizer, folder, **changes)
    log = trainer.train().metrics | {k: v for row in trainer.state.log_history for k, v in row.items()}
    return log, {k: x.detach().clone() for k, x in trainer.model.named_parameters()}


def skipped(name):
    return any(word in name for word in ("runtime", "per_second", "time", "flos", "mfu"))


@pytest.mark.parametrize("name", STEPS)
def test_one_step_of_the_trainers(name, tmp_path):
    """Loss, every metric and every weight after one step of SGD, with and without."""
    make, changes = STEPS[name]
    theirs, their_weights = step(make, changes, tmp_path / "theirs")
    with rk_trl.patched():
        ours, weights = step(make, changes, tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if isinstance(value, float) and not skipped(key):
            assert ours[key] == pytest.approx(value, rel=2e-5, abs=2e-6), key
    moved = 0.0
    for key, weight in their_weights.items():
        torch.testing.assert_close(
            weights[key], weight, rtol=1e-5, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}"
        )
        moved = max(moved, float((weight - language_model(word_tokenizer()).state_dict()[key]).abs().max()))
    assert moved > 1e-4, "a step that moves nothing compares nothing"


def test_a_callback_serves_training_alone(tmp_path):
    seen = []
    callback = rk_trl.KernelsCallback()
    tokenizer = word_tokenizer()
    trainer = sft(language_model(tokenizer), tokenizer, tmp_path)
    trainer.add_callback(callback)
    original = rk_trl._Scores.apply
    before = trl_utils._ChunkedLogProbFunction
    try:
        rk_trl._Scores.apply = staticmethod(lambda *args: seen.append(len(args[5])) or original(*args))
        trainer.train()
    finally:
        del rk_trl._Scores.apply
    assert len(seen) == 1
    assert seen[0] < 4 * 16, "prompts and padding are not scored"
    assert trl_utils._ChunkedLogProbFunction is before


class _Stop(TrainerCallback):
    """Ends a training by an exception, once."""

    raised = False

    def on_step_end(self, args, state, control, **kwargs):
        if not self.raised:
            self.raised = True
            raise KeyboardInterrupt


def stopped(folder, callback):
    """A trainer whose training with `callback` has ended by an exception that is forgotten."""
    tokenizer = word_tokenizer()
    trainer = sft(language_model(tokenizer), tokenizer, folder)
    trainer.add_callback(callback)
    trainer.add_callback(_Stop())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return trainer


def test_a_training_that_raises_is_over_when_its_trainer_is_gone(tmp_path):
    before = trl_utils._ChunkedLogProbFunction
    trainer = stopped(tmp_path, rk_trl.KernelsCallback())
    assert trl_utils._ChunkedLogProbFunction is not before
    del trainer
    gc.collect()
    assert trl_utils._ChunkedLogProbFunction is before
    assert not rk_trl._patches.enabled


@pytest.mark.parametrize("same", (True, False), ids=("same trainer", "another"))
def test_a_training_that_raised_is_over_with_the_next(same, tmp_path):
    """Also where something holds the trainer that raised."""
    before = trl_utils._ChunkedLogProbFunction
    trainer = following = stopped(tmp_path, rk_trl.KernelsCallback())
    if not same:
        tokenizer = word_tokenizer()
        following = sft(language_model(tokenizer), tokenizer, tmp_path / "other")
        following.add_callback(rk_trl.KernelsCallback(precision="fast"))
    following.train()
    assert trl_utils._ChunkedLogProbFunction is before
    assert not rk_trl._patches.enabled
    del trainer, following
    gc.collect()
    with rk_trl.patched():
        assert trl_utils._ChunkedLogProbFunction is not before, "what is over is not taken back twice"


def test_patched_puts_back_at_once_what_raises(tmp_path):
    before = trl_utils._ChunkedLogProbFunction
    tokenizer = word_tokenizer()
    trainer = sft(language_model(tokenizer), tokenizer, tmp_path)
    trainer.add_callback(_Stop())
    with pytest.raises(KeyboardInterrupt), rk_trl.patched():
        trainer.train()
    assert trl_utils._ChunkedLogProbFunction is before


@pytest.mark.parametrize("make", (sft, dpo), ids=("sft", "dpo"))
def test_a_lora_adapter_on_the_head_counts(make, tmp_path):
    """As the model whose head has the adapter merged. TRL by itself refuses it, because its head would leave it out."""
    lora = LoraConfig(target_modules=["lm_head", "q_proj"], r=2, lora_dropout=0.0, task_type="CAUSAL_LM")
    tokenizer = word_tokenizer()
    with rk_trl.patched():
        log, weights = step(make, {}, tmp_path / "ours", lora)
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        step(make, {}, tmp_path / "theirs", lora)
    if make is sft:
        merged = adapted(language_model(tokenizer), lora)
        torch.manual_seed(3)
        trainer = sft(merged.merge_and_unload().requires_grad_(True), tokenizer, tmp_path / "merged")
        wanted = trainer.train().metrics["train_loss"]
        assert log["train_loss"] == pytest.approx(wanted, rel=1e-5)
    changed = [k for k, x in weights.items() if "lm_head.lora_" in k and ".default." in k and x.abs().max() > 0]
    assert len(changed) == 2


def test_an_adapter_that_is_no_product_is_refused(tmp_path):
    lora = LoraConfig(target_modules=["lm_head"], r=2, lora_dropout=0.5, task_type="CAUSAL_LM")
    with rk_trl.patched(), pytest.raises(NotImplementedError, match="without dropout, bias or DoRA"):
        step(sft, {}, tmp_path, lora)


def test_gradient_checkpointing_and_accumulation(tmp_path):
    changes = {"gradient_checkpointing": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    theirs, their_weights = step(sft, changes, tmp_path / "theirs")
    with rk_trl.patched():
        ours, weights = step(sft, changes, tmp_path / "ours")
    assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-5)
    for key, weight in their_weights.items():
        torch.testing.assert_close(weights[key], weight, rtol=1e-5, atol=2e-6)


def test_a_batch_without_labels_gives_a_zero_that_has_a_gradient():
    tokenizer = word_tokenizer()
    model = language_model(tokenizer)
    with rk_trl.patched():
        trl_utils.add_fused_lm_head(model)
        ids = torch.ones(2, 5, dtype=torch.int64)
        loss = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True).loss
        loss.backward()
    assert loss.item() == 0.0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("frozen", (False, True), ids=("trained", "frozen"))
def test_a_head_in_parts_is_gathered_again_in_the_backward(frozen, monkeypatch):
    """A stand-in for ZeRO-3, which holds the head's weight outside of TRL's context in parts, here not at all."""
    hidden, weight, bias, labels = problem()
    leaves = [hidden.requires_grad_(), *(torch.nn.Parameter(x, requires_grad=not frozen) for x in (weight, bias))]
    wanted = torch.autograd.grad(
        trl_utils._ChunkedLogProbFunction.apply(*leaves, labels, 1.0, 32)[0].sin().sum(), leaves[: 1 if frozen else 3]
    )
    entered = []

    @contextlib.contextmanager
    def gathered(*params):
        entered.append(len(params))
        for param, whole in zip(params, (weight, bias), strict=True):
            param.data = whole
        yield
        for param in params:
            param.data = torch.empty(0)

    monkeypatch.setattr(trl_utils, "maybe_gather_lm_head_ctx", gathered)
    with rk_trl.patched():
        with gathered(*leaves[1:]):
            found = trl_utils._ChunkedLogProbFunction.apply(*leaves, labels, 1.0, 32, None, 1.0, OUTPUTS[:1])[0]
        assert leaves[1].numel() == 0
        gradients = torch.autograd.grad(found.sin().sum(), leaves[: 1 if frozen else 3])
    assert len(entered) == 1 + (not frozen), "a frozen head's gradient is there since the forward"
    for x, y in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=5e-6)


def test_compiled_head():
    """torch.compile takes the head whole."""
    hidden, weight, bias, labels = problem()

    def loss(h, w):
        found = trl_utils._ChunkedLogProbFunction.apply(h, w, bias, labels, 1.0, 32, None, 1.0, OUTPUTS)
        return found[0].sum() + found[1].sum()

    gradients = []
    with rk_trl.patched():
        for function in (loss, torch.compile(loss, backend="aot_eager")):
            leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
            gradients.append(torch.autograd.grad(function(*leaves), leaves))
    for x, y in zip(*gradients):
        torch.testing.assert_close(x, y)
