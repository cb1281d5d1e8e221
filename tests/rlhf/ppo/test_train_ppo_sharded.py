"""PPO sharded by FSDP2 over gloo processes: the run of one process, in slices in memory, whole or not on the disk."""

import json
import shutil
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.disk import WriteError
from rlhf.ppo import PPOConfig, PPOTrainer, sharding, shards
from rlhf.ppo.checkpoint import save_checkpoint
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
    joined,
    own_home,
    same_config,
)

PEFT = find_spec("peft") is not None
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
SLICES = SHARDED | {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
KEPT = SHARDED | {"FSDP_RESHARD_AFTER_FORWARD": "false"}
LORA = {"use_peft": True, "lora_r": 2, "lora_alpha": 4}
SAVING = {"max_kl": 1e6, "save_steps": 5}


def planned(home, out, processes, environment=(), kills=0, dies=None, **changes):
    """A run for `forked`."""
    options = vars(same_config(home, out, processes, **SAVING | changes))
    killed = {"dies": dies} if dies else {"kills": kills, "seed": 3}
    return {"options": options, "ranks": processes, "environment": dict(environment), **killed}


@pytest.fixture(scope="module")
def runs(ppo_files, tmp_path_factory) -> Home:
    """One process and two or four that shard, some with weights that stay whole up to the backward."""
    home = own_home(ppo_files, tmp_path_factory.mktemp("sharded"))

    def plan(*args, **changes):
        return planned(home, *args, **changes)

    tied = {"kind": "gpt2", "max_steps": 2, "save_steps": 0}
    uneven = {"rollout_engine": f"{ROOT / 'tests' / 'server_engine.py'}:Uneven", "max_steps": 2}
    home.hits = forked(home, [
        plan("one", 1),
        plan("two", 2, SHARDED),
        plan("killed", 2, SHARDED, kills=3, save_steps=1, save_updates=1, save_total_limit=1),
        plan("four", 4, SHARDED),
        plan("recomputed", 2, SHARDED, gradient_checkpointing=True),
        plan("tied-one", 1, **tied),
        plan("tied-two", 2, SHARDED, **tied),
        plan("uneven", 2, SHARDED, **uneven),
        plan("reads-slices", 2, SHARDED, rollout_engine=f"{ROOT / 'tests' / 'server_engine.py'}:Slices", max_steps=2),
        plan("stopped-one", 1, max_kl=3.0),
        plan("stopped-two", 2, KEPT, max_kl=3.0),
        *([
            plan("lora-one", 1, **LORA),
            plan("lora-two", 2, SHARDED, **LORA),
            plan("lora-again", 2, KEPT, **LORA | {"max_steps": 2, "save_steps": 2}),
            plan("lora-again", 2, KEPT, **LORA, resume_from_checkpoint="true"),
        ] if PEFT else []),
    ])  # fmt: skip
    return home


@pytest.fixture(scope="module")
def sliced(runs) -> Home:
    """The run of two processes with checkpoints in slices; killed, all processes or one; and gone on by one process."""
    often = {"save_steps": 1, "save_updates": 1, "save_total_limit": 1}
    runs.sliced_hits = forked(runs, [
        planned(runs, "slices", 2, SLICES, save_steps=3),
        planned(runs, "slices-killed", 2, SLICES, kills=3, **often),
        planned(runs, "slices-update", 2, SLICES, dies=[1, "update", 7], save_steps=1),
        planned(runs, "slices-write", 2, SLICES, dies=[1, "slices", 4], **often),
        planned(runs, "slices-main", 2, SLICES, dies=[0, "slices", 7], **often),
        planned(runs, "mixed", 2, SLICES, max_steps=2, save_steps=2),
        planned(runs, "mixed", 2, SHARDED, max_steps=4, save_steps=2, resume_from_checkpoint="true"),
        planned(runs, "mixed", 2, SLICES, resume_from_checkpoint="true"),
        *([
            planned(runs, "lora-slices", 2, SLICES, **LORA | {"max_steps": 2, "save_steps": 2}),
            planned(runs, "lora-slices", 2, SLICES, **LORA, resume_from_checkpoint="true"),
        ] if PEFT else []),
    ])  # fmt: skip
    runs.left = sorted(path.name for path in runs.path.glob("slices-*/.*"))
    folder = runs.path / "moved" / "checkpoint-3"
    shutil.copytree(runs.path / "slices" / "checkpoint-3", folder)
    state = json.loads((folder / "trainer_state.json").read_text())
    state["run"] |= {"num_processes": 1, "per_device_train_batch_size": 4}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    forked(runs, [planned(runs, "moved", 1, resume_from_checkpoint=str(folder))])
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("out", ["two", "four"])
def test_sharded_processes_equal_one(runs, out):
    assert_equal_runs(runs, "one", out)


@pytest.mark.slow
def test_checkpoints_in_slices(sliced):
    """The tensors of the whole checkpoint of the same run, to the bit; the final models are whole all the same."""
    for name in ("model", "value/model"):
        assert equal(*(load_file(sliced.path / out / f"{name}.safetensors") for out in ("two", "slices")))
    last = sliced.path / "two" / "checkpoint-5"
    whole = {
        f"{part}.{name}": tensor
        for part, file in (("policy", "model"), ("value", "value/model"), ("ema", "ema"), ("within_budget",) * 2)
        for name, tensor in load_file(last / f"{file}.safetensors").items()
    }
    optimizer = torch.load(last / "optimizer.pt", weights_only=True)
    for number, moments in optimizer["state"].items():
        whole |= {f"optimizer.{number}.{name}": moment for name, moment in moments.items()}
    folder = sliced.path / "slices" / "checkpoint-5"
    assert equal(joined(folder / "shards"), whole)
    assert sorted(path.name for path in (folder / "shards").iterdir()) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    sizes = [(folder / "shards" / f"__{rank}_0.distcp").stat().st_size for rank in (0, 1)]
    assert max(sizes) < 1.3 * min(sizes)
    assert torch.load(folder / "optimizer.pt", weights_only=True) == optimizer | {"state": {}}


@pytest.mark.slow
@pytest.mark.parametrize("out", ["slices-killed", "slices-update", "slices-write", "slices-main"])
def test_trap_28_killed_with_checkpoints_in_slices(sliced, out):
    """All processes at random moments; one in an optimizer step; one between its slices and the checkpoint's name."""
    number = ["slices-killed", "slices-update", "slices-write", "slices-main"].index(out) + 1
    assert sliced.sliced_hits[number] and not sliced.left, (sliced.sliced_hits, sliced.left)
    assert_same_run(sliced, "slices", out, slices=True)


@pytest.mark.slow
@pytest.mark.parametrize(("out", "whole"), [("mixed", "two"), *([("lora-slices", "lora-two")] if PEFT else [])])
def test_a_run_goes_on_from_slices_and_from_whole_files(sliced, out, whole):
    """From slices, then from whole files, and back; and adapters from slices: the models of the run in one go."""
    for name in ("model", "value/model"):
        assert equal(*(load_file(sliced.path / run / f"{name}.safetensors") for run in (whole, out))), name


@pytest.mark.slow
def test_another_number_of_processes_reads_the_slices(sliced):
    """Two processes wrote them, one goes on, and ends as the run of one; by itself the run refuses that."""
    for name in ("model", "value/model"):
        one, moved = (load_file(sliced.path / out / f"{name}.safetensors") for out in ("one", "moved"))
        assert farthest(one, moved) < (SAME_AVERAGE if name == "model" else SAME_WEIGHTS)
    with pytest.raises(ValueError, match=r"num_processes: .* was written by a run with 2, this run has 1"):
        PPOTrainer(same_config(sliced, "slices", 1, **SAVING, resume_from_checkpoint="true"))


@pytest.mark.slow
def test_activations_that_are_computed_again(runs):
    assert_equal_runs(runs, "one", "recomputed")


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
def test_an_engine_that_reads_slices_gets_them(runs):
    assert len(runs.rows("reads-slices")) == 2


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
        ({"FSDP_STATE_DICT_TYPE": "LOCAL_STATE_DICT"}, "FSDP2 does not support LOCAL_STATE_DICT"),
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


@pytest.mark.parametrize(("asked", "wanted"), [(None, False), ("FULL_STATE_DICT", False), ("SHARDED_STATE_DICT", True)])
def test_checkpoints_are_whole_unless_slices_are_asked_for(monkeypatch, asked, wanted):
    for name, value in SHARDED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("FSDP_STATE_DICT_TYPE", raising=False)
    if asked is not None:
        monkeypatch.setenv("FSDP_STATE_DICT_TYPE", asked)
    two = SimpleNamespace(num_processes=2, distributed_type=None, mixed_precision="no", device=torch.device("cpu"))
    monkeypatch.setattr(sharding, "Accelerator", lambda **options: two)
    monkeypatch.setattr(sharding, "init_device_mesh", lambda device, shape: (device, shape))
    assert sharding.start(PPOConfig())[1] == sharding.Sharding(("cpu", (2,)), shards=wanted)


def test_what_fails_in_writing_slices_names_the_checkpoint(home, tmp_path, monkeypatch):
    """What torch wraps in an exception of its own, no `Exception`, comes out as the error of the disk."""
    trainer = home.trainer()
    trainer.sharding = sharding.Sharding(shards=True)

    def full(*args, **options):
        raise CheckpointException("", {1: (OSError(28, "No space left on device"), None)})

    monkeypatch.setattr(shards.dcp, "save", full)
    with pytest.raises(WriteError, match=r"checkpoint-1: cannot be written \(No space left on device\)"):
        save_checkpoint(trainer, tmp_path / "checkpoint-1")
    assert not list(tmp_path.glob("*checkpoint*"))
