"""A model that several threads use at once: each gets what it asked for, and the head stays the model's own."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import rlhf_kernels as rk
from tests.kernels.test_model_head import make, tokens
from tests.roundings import assert_same

THREADS = 4


def plain(family):
    model = make(family).double()
    return model, model.get_output_embeddings()


def hooked(family):
    """With a hook of accelerate on the head, which keeps the forward elsewhere."""
    hooks = pytest.importorskip("accelerate.hooks", reason="needs the package accelerate")
    model, head = plain(family)
    hooks.add_hook_to_module(head, hooks.ModelHook())
    return model, head


def adapted(family):
    peft = pytest.importorskip("peft", reason="needs the package peft")
    model, head = plain(family)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, lora).double().eval(), head


def forwards(head):
    return {name: x for name, x in vars(head).items() if name in ("forward", "_old_forward")}


@pytest.mark.parametrize(("build", "family"), [(plain, "GPT2"), (hooked, "Llama"), (adapted, "Llama")])
def test_threads_at_once(build, family):
    """Log-probs and plain forwards, from the first call on, which finds the head."""
    model, head = build(family)
    before, start = forwards(head), threading.Barrier(THREADS)
    batches = [tokens(seed=seed) for seed in range(THREADS)]

    def both(ids):
        return rk.linear_logprobs_from_model(model, ids).detach(), model(input_ids=ids).logits.detach()

    def worker(ids):
        start.wait()
        return [both(ids) for _ in range(5)]

    # The other threads run while this one is between the start of its forward and its head.
    hook = model.get_input_embeddings().register_forward_hook(lambda *_: time.sleep(0.005))
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(worker, batches))
    hook.remove()
    assert forwards(head) == before
    for ids, results in zip(batches, found, strict=True):
        wanted = both(ids)
        for result in results:
            assert_same(result[0], wanted[0])
            assert_same(result[1], wanted[1])


@pytest.mark.parametrize("build", [plain, hooked, adapted])
def test_a_forward_beside_a_call(build):
    """Another thread's forward runs while the function does, and again inside a second call from within the first."""
    model, head = build("Llama")
    ids, before = tokens(), forwards(head)
    wanted, asked, beside = model(input_ids=ids).logits, [], []

    def logits_beside(function):
        asked.append(function)
        with ThreadPoolExecutor(1) as pool:
            beside.append(pool.submit(lambda: model(input_ids=ids).logits).result(timeout=60))

    def inner(hidden, head):
        if inner not in asked:
            logits_beside(inner)
        return hidden

    def outer(hidden, head):
        if outer not in asked:
            logits_beside(outer)
            return rk.call_with_head(model, inner, input_ids=ids)
        return hidden

    hidden = rk.call_with_head(model, outer, input_ids=ids)
    assert_same(hidden @ head.weight.T, wanted)
    assert len(beside) == 2
    for logits in beside:
        assert_same(logits, wanted)
    assert forwards(head) == before


def test_probes_of_two_models_at_once():
    """Both draw dropout; the random numbers after them are those before, whichever ends first."""
    first, second = make("GPT2").train(), make("GPT2").train()
    drawn, entered, ended = (threading.Event() for _ in range(3))
    # Without turns: the first draws, the second begins, the first ends, the second ends.
    first.transformer.register_forward_hook(lambda *_: meet(drawn, entered))
    second.register_forward_pre_hook(lambda *_: meet(entered, ended))

    def meet(here, there):
        here.set()
        there.wait(0.5)

    state = torch.get_rng_state()
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(rk.find_head, first)
        one.add_done_callback(lambda _: ended.set())
        assert drawn.wait(60)
        two = pool.submit(rk.find_head, second)
        assert one.result(60).scale == two.result(60).scale == 1.0
    assert torch.equal(torch.get_rng_state(), state)
