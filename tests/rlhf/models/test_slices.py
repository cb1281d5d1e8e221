"""Networks that are read in slices: those of transformers' own load on every process, at a share of its memory."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rlhf.models.slices import NotSliced, load_slices
from tests.families import family_model
from tests.tiny_ppo import make_config, make_tokenizer

FAMILIES = ("llama", "lfm2", "mixtral", "rwkv", "bart")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models by name: some in one file, some in many; tied ones; and one of 160 MB."""
    path = tmp_path_factory.mktemp("slices")
    for family in FAMILIES:
        family_model(family).save_pretrained(path / family, max_shard_size="6KB" if family == "lfm2" else "1GB")
    torch.manual_seed(0)
    tied = AutoModelForCausalLM.from_config(make_config("gpt2"))
    tied.generation_config.eos_token_id = [2, 3]
    for name in ("tied", "both"):
        tied.save_pretrained(path / name)
    file = path / "both" / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {"lm_head.weight": weights["transformer.wte.weight"].clone()}, file, {"format": "pt"})
    config = LlamaConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=2048, num_hidden_layers=10, num_attention_heads=8,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(path / "large", max_shard_size="50MB")
    for model in path.iterdir():
        make_tokenizer().save_pretrained(model)
    return path


@pytest.mark.slow
def test_slices_are_those_of_the_whole_and_memory_is_a_share(folder, gloo_ranks, monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # so that glibc gives back what is freed, at once
    gloo_ranks("slices_ranks.py", 2, str(folder))


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_weights(folder, change):
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda folder: change_weights(folder, lambda weights: weights.pop(NORM)), f"it holds no {NORM}"),
        (
            lambda folder: change_weights(folder, lambda weights: weights.update({NORM: torch.zeros(3)})),
            rf"its {NORM} is \[3\], that of the model \[16\]",
        ),
        (lambda folder: change_config(folder, quantization_config={"load_in_8bit": True}), "quantized"),
        (lambda folder: change_config(folder, transformers_weights="other.safetensors"), "names the file"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "it holds adapters"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "other.safetensors"), "it lacks files"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"0" * 16), "header"),
        (lambda folder: None, "the caller says so"),
    ],
)
def test_what_is_loaded_whole(folder, tmp_path, caplog, change, reason):
    """Nothing is cut, but where the caller's `cut` refuses; the debug line says why."""
    copied = shutil.copytree(folder / "llama", tmp_path / "llama")
    change(copied)

    def cut(model):
        assert reason == "the caller says so"
        raise NotSliced(reason)

    with caplog.at_level("DEBUG", logger="rlhf"):
        config = AutoConfig.from_pretrained(copied)
        assert load_slices(AutoModelForCausalLM, copied, config, cut, dtype=torch.float32) is None
    (line,) = [record.getMessage() for record in caplog.records if "is loaded whole" in record.getMessage()]
    assert re.search(reason, line), line


def test_weights_that_stay_in_fp32_are_loaded_whole(folder, monkeypatch, caplog):
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["norm"])
    config, cut = AutoConfig.from_pretrained(folder / "llama"), pytest.fail
    with caplog.at_level("DEBUG", logger="rlhf"):
        assert load_slices(AutoModelForCausalLM, folder / "llama", config, cut, dtype=torch.bfloat16) is None
    assert "some weights of LlamaForCausalLM stay in fp32" in caplog.text
