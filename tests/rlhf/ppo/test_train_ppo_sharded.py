"""PPO sharded by FSDP2 over two gloo processes: the run of one process, slices in memory, whole tensors on the disk."""

import json
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.ppo import PPOConfig, sharding
from tests.tiny_ppo import (
    ROOT,
    SAME_AVERAGE,
    SAME_WEIGHTS,
    Home,
    assert_equal_runs,
    assert_same_run,
    equal,
    farthest,
    forked,
    own_home,
    same_config,
)

PEFT = find_spec("peft") is not None
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
KEPT = SHARDED | {"FSDP_RESHARD_AFTER_FORWARD": "false"}
SAVING = {"max_kl": 1e6, "save_steps": 5}


@pytest.fixture(scope="module")
def runs(ppo_files, tmp_path_factory) -> Home:
    """One process and two that shard, killed ones too, some with weights that stay whole up to the backward."""
    home = own_home(ppo_files, tmp_path_factory.mktemp("sharded"))

    def plan(out, processes, environment=(), kills=0, **changes):
        options = vars(same_config(home, out, processes, **SAVING | changes))
        return {"options": options, "ranks": processes, "environment": dict(environment), "kills": kills, "seed": 3}

    tied = {"kind": "gpt2", "max_steps": 2, "save_steps": 0}
    lora = {"use_peft": True, "lora_r": 2, "lora_alpha": 4}
    uneven = {"rollout_engine": f"{ROOT / 'tests' / 'server_engine.py'}:Uneven", "max_steps": 2}
    home.hits = forked(home, [
        plan("one", 1),
        plan("two", 2, SHARDED),
        plan("killed", 2, SHARDED, kills=3, save_steps=1, save_updates=1, save_total_limit=1),
        plan("tied-one", 1, **tied),
        plan("tied-two", 2, SHARDED, **tied),
        plan("uneven", 2, SHARDED, **uneven),
        plan("stopped-one", 1, max_kl=3.0),
        plan("stopped-two", 2, KEPT, max_kl=3.0),
        *([
            plan("lora-one", 1, **lora),
            plan("lora-two", 2, SHARDED, **lora),
            plan("lora-again", 2, KEPT, **lora | {"max_steps": 2, "save_steps": 2}),
            plan("lora-again", 2, KEPT, **lora, resume_from_checkpoint="true"),
        ] if PEFT else []),
    ])  # fmt: skip
    return home


@pytest.mark.slow
def test_sharded_processes_equal_one(runs):
    assert_equal_runs(runs, "one", "two")


@pytest.mark.slow
def test_a_run_goes_back_to_the_last_weights_within_its_budget(runs):
    assert_equal_runs(runs, "stopped-one", "stopped-two", iterations=3)
    summary = json.loads((runs.path / "stopped-two" / "run.json").read_text())["summary"]
    assert summary["stopped"].startswith("max_kl")


@pytest.mark.slow
def test_trap_28_sharded_processes_killed(runs):
    assert len(runs.hits[2]) >= 2, runs.hits
    assert_same_run(runs, "two", "killed")


@pytest.mark.slow
def test_tied_weights(runs):
    """GPT-2's head is its embedding: one weight, in one unit, written once."""
    for name in ("model", "value/model"):
        first, second = (load_file(runs.path / out / f"{name}.safetensors") for out in ("tied-one", "tied-two"))
        assert first.keys() == second.keys() and "lm_head.weight" not in first
        assert farthest(first, second) < (SAME_AVERAGE if name == "model" else SAME_WEIGHTS)
        before = load_file(runs.path / ("gpt2" if name == "model" else "gpt2-rm") / "model.safetensors")
        assert farthest(first, {key: before[key] for key in first}) > 1e-4


@pytest.mark.slow
def test_processes_sample_unequally_often(runs):
    """Three forwards more on one process would wait for the other one for ever, were the policy not whole there."""
    assert len(runs.rows("uneven")) == 2


@pytest.mark.slow
@pytest.mark.skipif(not PEFT, reason="the package peft is not installed: pip install peft")
def test_adapters(runs):
    """LoRA on sharded weights: the merged models of one process; and the same bits in two parts, where weights stay
    whole up to the backward."""
    assert_equal_runs(runs, "lora-one", "lora-two")
    adapters = [f"checkpoint-5/{name}" for name in ("adapter_model", "value/adapter_model", "ema", "within_budget")]
    for name in ("model", "value/model", *adapters):
        files = [load_file(runs.path / out / f"{name}.safetensors") for out in ("lora-one", "lora-two", "lora-again")]
        assert files[0].keys() == files[1].keys() and equal(*files[1:]), name
        assert farthest(*files[:2]) < max(SAME_AVERAGE, SAME_WEIGHTS), name


@pytest.mark.slow
@pytest.mark.parametrize("out", ["two", "stopped-two", "uneven"])
def test_each_process_holds_half(runs, out):
    """Of every weight of all four networks, and of its two moments: the first half of the rows, and the second."""
    first, second = (json.loads((runs.path / f"{out}-weights-{rank}.json").read_text()) for rank in (0, 1))
    assert {name.partition(".")[0] for name in first} == {"policy", "reference", "value", "reward_model"}
    for name in first:
        *held, rows = first[name]
        *rest, _ = second[name]
        trains = name.startswith(("policy", "value"))
        assert held == [-(-rows // 2)] * (3 if trains else 1) and rest == [rows // 2] * len(held), name


@pytest.mark.slow
def test_files_are_whole(runs):
    """The tensors that one process writes, by name, shape and dtype, up to rounding; and transformers reads them."""
    last = "checkpoint-5"
    files = ["model", "value/model", *(f"{last}/{name}" for name in ("model", "value/model", "ema", "within_budget"))]
    for file in files:
        one, two = (load_file(runs.path / out / f"{file}.safetensors") for out in ("one", "two"))
        assert {name: (x.shape, x.dtype) for name, x in one.items()} == {
            name: (x.shape, x.dtype) for name, x in two.items()
        }
        assert farthest(one, two) < max(SAME_AVERAGE, SAME_WEIGHTS), file
    one, two = (torch.load(runs.path / out / last / "optimizer.pt", weights_only=True) for out in ("one", "two"))
    assert one["param_groups"] == two["param_groups"] and one["state"].keys() == two["state"].keys()
    for number, state in one["state"].items():
        for name, x in state.items():
            torch.testing.assert_close(two["state"][number][name], x, rtol=1e-4, atol=1e-6)
    for folder, kind in (("two", AutoModelForCausalLM), (f"two/{last}", AutoModelForCausalLM)):
        for path, auto in ((folder, kind), (f"{folder}/value", AutoModelForSequenceClassification)):
            model, info = auto.from_pretrained(runs.path / path, output_loading_info=True)
            assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
            assert model.config.architectures == [type(model).__name__]
            written = load_file(runs.path / path / "model.safetensors")
            assert equal({name: x for name, x in model.state_dict().items() if name in written}, written)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version: got 1, want 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params: got True, want False"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading: got True, want False"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "fsdp_activation_checkpointing: got True, want False"),
        ({"FSDP_IGNORED_MODULES": "lm_head"}, "fsdp_ignored_modules: got 'lm_head', want none"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "fsdp_auto_wrap_policy: got SIZE_BASED_WRAP, want TRANSF"),
        ({}, "num_processes: got 1 under FSDP, want at least 2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, r"distributed_type: got DeepSpeed, .*fsdp2\.yaml.*one gradient limit"),
    ],
)  # fmt: skip
def test_what_is_asked_and_would_not_be_done_is_refused(home, monkeypatch, variables, message):
    for name, value in (SHARDED | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=rf"^{message}"):
        home.trainer()
    assert not (home.path / "run").exists()


def test_another_type_than_that_of_the_weights_is_refused(monkeypatch):
    for name, value in SHARDED.items():
        monkeypatch.setenv(name, value)
    two = SimpleNamespace(num_processes=2, distributed_type=None, mixed_precision="bf16")
    monkeypatch.setattr(sharding, "Accelerator", lambda **options: two)
    with pytest.raises(ValueError, match=r"^mixed_precision: got bf16 under FSDP, want no"):
        sharding.start(PPOConfig(bf16=True))


def test_blocks_that_a_network_does_not_have_are_refused(home):
    policy = home.trainer().policy
    with pytest.raises(ValueError, match="fsdp_transformer_layer_cls_to_wrap: got Nothing, want the class of the tra"):
        sharding.Sharding(mesh=object(), block_names=("Nothing",))(policy)
    sharding.Sharding()(policy)  # nothing to do
    assert type(policy).__name__ == "LlamaForCausalLM"
