"""The formulas of docs/scale.md against published sizes, what autograd keeps, a PPO run's tensors, and the page."""

import json
import os
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import scale, scale_run
from rlhf import models
from tests.processes import run

PUBLISHED = {
    scale.LLAMA_1B: 1_235_814_400, scale.LLAMA_8B: 8_030_261_248, scale.LLAMA_70B: 70_553_706_496,
    scale.SMALL: 134_515_008,
}  # fmt: skip


def test_weights_are_those_of_the_published_models():
    assert {shape: shape.policy for shape in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_those_of_transformers(tied):
    shape = scale.Shape("", 96, 320, 3, 4, 2, 32, 64, tied)
    model = AutoModelForCausalLM.from_config(llama(shape))
    assert shape.policy == sum(weight.numel() for weight in model.parameters())
    assert shape.scalar == sum(weight.numel() for weight in model.model.parameters()) + shape.hidden
    assert shape.block == sum(weight.numel() for weight in model.model.layers[0].parameters())


def test_cache_of_a_token():
    """By hand: 2 * 32 layers * 8 heads * 128 * 2 bytes = 128 KiB; 80 layers: 320 KiB."""
    assert scale.LLAMA_8B.kv_bytes() == 128 * 1024 and scale.LLAMA_70B.kv_bytes() == 320 * 1024
    shape = scale.Shape("", 96, 320, 3, 4, 2, 32, 64, tied=False)
    model = AutoModelForCausalLM.from_config(llama(shape), dtype=torch.bfloat16)
    cache = model(torch.ones(1, 5, dtype=torch.long), use_cache=True).past_key_values
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) == 5 * shape.kv_bytes()


def llama(shape):
    return LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        vocab_size=shape.vocab, tie_word_embeddings=shape.tied,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_autograd_keeps(dtype):
    """Of padded rows, a storage once: two blocks more keep twice what one keeps."""
    kept, counted = [], []
    for layers in (1, 3):
        shape = scale.Shape("", 96, 320, layers, 4, 2, 32, 64, tied=False)
        model = AutoModelForCausalLM.from_config(llama(shape), dtype=dtype)
        mask = torch.ones(2, 48, dtype=torch.long)
        mask[1, 40:] = 0
        found = storages(model, torch.full((2, 48), 7), mask, (mask.cumsum(-1) - 1).clamp(min=0))
        kept.append(sum(storage.nbytes() for storage in found))
        counted.append(scale.activations(shape, 96, 48, dtype.itemsize))
    assert kept[1] - kept[0] == counted[1] - counted[0]
    checkpointed = scale.activations(shape, 96, 48, dtype.itemsize, checkpointing=True)
    assert checkpointed == counted[0] + 3 * 96 * 96 * dtype.itemsize


def storages(model, *inputs):
    weights, found = {weight.untyped_storage().data_ptr() for weight in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        models.hidden_states(model, *inputs)
    return found.values()


def test_the_chunk_of_logits_is_that_of_the_kernels():
    linear = pytest.importorskip("rlhf_kernels.triton.linear")
    for labels in (1, 512, 2048, 4096):
        shape = scale.LLAMA_8B
        rows = min(labels, min(max(linear.WIDE_BYTES // (4 * shape.vocab), linear.LEAST_TOKENS), linear.TOKENS))
        assert scale.head_workspace(shape, labels, trained=False) == 4 * shape.vocab * rows
    assert scale.head_workspace(scale.LLAMA_8B, 1) == 4 * 128256 * (1 + 4096)


@pytest.mark.parametrize("layout", scale_run.LAYOUTS)
def test_a_run_holds_what_the_formula_says(layout, tmp_path):
    """Bytes of weights, gradients and moments behind an optimizer step, of the demo's model."""
    if layout == "lora":
        pytest.importorskip("peft")
    shape, layout = scale.DEMO, scale_run.LAYOUTS[layout]
    scale_run.write_models(shape, tmp_path)
    found = scale_run.iterate(
        shape, layout, tmp_path, lambda dtype, clock: (1e9, 1e9), rollout_batch_size=4, response_length=4, max_steps=1
    )
    assert found["bytes"] == scale.states(shape, layout)
    assert all(measured > 0 and formula > 0 for measured, formula in found["seconds"].values())
    shown = "\n".join(scale_run.lines(shape, layout, [found]))
    assert f"moments: {found['bytes']['moments']} = " in shown and "update: " in shown


@pytest.mark.slow
@pytest.mark.parametrize("layout", scale_run.LAYOUTS)
@pytest.mark.parametrize("name", scale_run.SHAPES)
def test_two_processes_hold_it_together(name, layout, tmp_path):
    """FSDP2 on gloo: half each, but for heads of one row, which the first process has."""
    if layout == "lora":
        pytest.importorskip("peft")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    command += ["benchmarks.scale_run", name, "--layout", layout, "--json"]
    environment = {**os.environ, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "OMP_NUM_THREADS": "1"}
    done = run(command, cwd=scale.PAGE.parent.parent, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    processes = json.loads(done.stdout.splitlines()[-1])
    shape, wanted = scale_run.SHAPES[name], scale.states(scale_run.SHAPES[name], scale_run.LAYOUTS[layout])
    for part, size in wanted.items():
        first, second = (process["bytes"][part] for process in processes)
        assert first + second == size
        assert 0 <= first - second <= 4 * shape.hidden * 4, part


def test_seconds_by_hand():
    """One layer of 10 weights under a vocabulary of 4: operations and bytes counted by hand."""
    shape = scale.Shape("", 1, 1, 1, 1, 1, 1, 4, tied=False)
    assert (shape.block, shape.policy, shape.scalar) == (9, 18, 15)
    assert scale.forward_flops(shape, 100, 10) == 2 * (9 * 100 + 4 * 10)
    work = scale.Work(responses=8, prompt=3, response=2, rows=4)
    reached, link = 0.4 * 989e12, 0.8 * 450e9
    one = scale.seconds(shape, scale.BFLOAT16, 1, 4, work=work)
    assert one["update"] == pytest.approx(3 * (2 * (9 * 40 + 4 * 16) + 2 * 9 * 40) / reached)
    assert one["score"] == pytest.approx(2 * 9 * 40 / reached)
    assert one["evaluate"] == pytest.approx((2 * 2 * (9 * 40 + 4 * 16) + 2 * 9 * 40) / reached)
    two = scale.seconds(shape, scale.BFLOAT16, 2, 4, work=work)  # one step of 4 rows each: two gathers, gradients back
    assert two["update"] == pytest.approx((2 * 2 * 33 + 2 * 33) / link)
    assert one["transfer"] == pytest.approx(2 * 2 * 18 / 2e9)
    step = (2 * 18 + 8 * 4 * shape.kv_bytes()) / (0.6 * 4.8e12)  # 3 + 1 tokens in the cache, in the mean
    assert one["rollout"] == pytest.approx(2 * (9 * 8 * 3 + 4 * 8) / reached + 2 * step)


def test_what_fits():
    """8 billion weights in bf16 with fp32-free moments: 8 bytes for each that trains, 2 for each that does not."""
    states = scale.states(scale.LLAMA_8B, scale.BFLOAT16)
    trained = scale.LLAMA_8B.policy + scale.LLAMA_8B.scalar
    assert sum(states.values()) == 8 * trained + 2 * trained > scale.H200.memory
    assert scale.most_rows(scale.LLAMA_8B, scale.BFLOAT16, 1) == 0 < scale.most_rows(scale.LLAMA_8B, scale.BFLOAT16, 8)
    whole = scale.handing_over(scale.LLAMA_70B, scale.BFLOAT16, 64)
    assert whole > 141e9 and scale.most_rows(scale.LLAMA_70B, scale.BFLOAT16, 64) == 1
    found = scale.per_gpu(scale.LLAMA_8B, scale.BFLOAT16, 8, 7, 1024, 512)
    assert sum(found.values()) > 0.9 * 141e9 > sum(found.values()) - found["activations"] / 7


def test_the_page_shows_the_tables(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scale"])
    scale.main()
    printed = capsys.readouterr().out
    shown = scale.PAGE.read_text().partition(scale.BEGIN)[2].partition(scale.END)[0]
    assert shown.lstrip("\n") == printed, "run `python -m benchmarks.scale --write`"
