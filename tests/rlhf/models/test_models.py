"""Loading, scoring and saving models: nothing unsafe is opened, and a score depends on its own row alone."""

import errno
import json
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, MistralConfig, MistralForCausalLM

from rlhf import data, models
from rlhf.training import make_batch
from tests.rlhf.data.test_encoding import CHAT
from tests.roundings import assert_same
from tests.tiny import language_model, model_folder, word_tokenizer

FAMILIES = ("llama", "gpt2")


@pytest.fixture
def folder(tmp_path):
    return model_folder(tmp_path / "model")


def reward_model(tmp_path, family="llama", tokenizer=None, seed=0):
    path = model_folder(tmp_path / f"{family}-policy", family=family, tokenizer=tokenizer)
    pad = (tokenizer or word_tokenizer()).pad_token_id
    return models.reward_model_from_policy(path, seed, pad_token_id=pad)


def test_model_path_does_not_exist(tmp_path):
    for path in (tmp_path / "nothing", "org/no-such-model", "no-such-model"):
        with pytest.raises(ValueError, match=r"does not exist: .*hf download"):
            models.load_policy(str(path))


def test_model_path_without_config_or_weights(tmp_path, folder):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        models.resolve_model_path(tmp_path)
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no weights \(\*\.safetensors\)"):
        models.resolve_model_path(folder)


def test_pickles_are_not_opened(tmp_path, folder):
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds pickled weights \(pytorch_model\.bin\).*only safetensors"):
        models.load_policy(folder)


def test_remote_code_needs_trust(tmp_path, folder):
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"model_type": "homemade", "auto_map": {"AutoModelForCausalLM": "modeling.Homemade"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"wants to run its own code; if you trust it, pass --trust_remote_code"):
        models.load_policy(folder)
    del config["auto_map"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="type 'homemade', which transformers does not know"):
        models.load_policy(folder)
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json that is not JSON"):
        models.load_policy(folder)


def test_truncated_weights(tmp_path, folder):
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(ValueError, match="cannot be loaded as AutoModelForCausalLM"):
        models.load_policy(folder)


@pytest.mark.parametrize(("name", "hint"), [("pad", r"--pad_token '</s>'"), ("eos", "--eos_token")])
def test_tokenizer_without_pad_or_eos(tmp_path, name, hint):
    path = model_folder(tmp_path / "model")
    word_tokenizer(**{name: None}).save_pretrained(path)
    with pytest.raises(ValueError, match=f"has no {name}_token; .*{hint}"):
        models.load_tokenizer(path)
    assert getattr(models.load_tokenizer(path, **{f"{name}_token": "dog"}), f"{name}_token") == "dog"
    with pytest.raises(ValueError, match=f"{name}_token: got 'missing', which is not a token"):
        models.load_tokenizer(path, **{f"{name}_token": "missing"})


def test_folder_without_tokenizer(tmp_path):
    language_model(word_tokenizer()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no tokenizer that can be read"):
        models.load_tokenizer(tmp_path)


def test_policy_is_no_reward_model(folder, caplog, capfd):
    with pytest.raises(ValueError, match=r"is not a reward model: it lacks score\.weight"):
        models.load_reward_model(folder)
    with caplog.at_level(logging.WARNING):
        models.reward_model_from_policy(folder, 0)
    printed = capfd.readouterr()
    assert "LOAD REPORT" not in caplog.text + printed.out + printed.err


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_what_the_head_reads(tmp_path, family):
    model = models.load_policy(model_folder(tmp_path, family=family))
    ids = torch.arange(1, 11).view(2, 5)
    head = models.linear_head(model)
    assert head.bias is None and head.softcap is None and head.scale == 1.0
    torch.testing.assert_close(models.hidden_states(model, ids) @ head.weight.T, model(ids).logits)


def test_head_that_is_no_linear_map():
    model = language_model(word_tokenizer())
    model.lm_head = torch.nn.Sequential(model.lm_head, torch.nn.ReLU())
    assert models.linear_head(model) is None


def test_head_init_standard_deviation(tmp_path):
    """N(0, 1/sqrt(d + 1)) with d = 1024; the default of transformers would be 0.02."""
    path = model_folder(tmp_path, hidden_size=1024, intermediate_size=8)
    weight = models.reward_model_from_policy(path, seed=1).score.weight
    assert weight.std().item() == pytest.approx(1025**-0.5, rel=0.1)
    assert torch.equal(weight, models.reward_model_from_policy(path, seed=1).score.weight)
    assert not torch.equal(weight, models.reward_model_from_policy(path, seed=2).score.weight)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pad", ["<pad>", "</s>"])
def test_trap_01_score_is_read_at_the_end_token(tmp_path, family, pad):
    tokenizer = word_tokenizer(pad=pad)
    model = reward_model(tmp_path, family, tokenizer)
    row = data.encode_prompt(tokenizer, "the dog") + data.encode_completion(tokenizer, "ran")
    assert row[-1] == tokenizer.eos_token_id
    model = model.double()
    alone = models.token_scores(model, torch.tensor([row]))[0, -1]
    ids, mask = data.pad_batch([row, [*row, *row]], tokenizer.pad_token_id)
    padded = models.sequence_scores(model, ids, mask, models.last_index_from_mask(mask))
    assert_same(padded[0], alone)
    if pad == "</s>":  # the trap: transformers pools at the last id that is not pad, one token too early
        pooled = model(ids, attention_mask=mask).logits[0, 0]
        assert abs(pooled - alone).item() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_trap_02_score_does_not_depend_on_the_batch(tmp_path, family):
    tokenizer = word_tokenizer()
    model = reward_model(tmp_path, family, tokenizer).double()
    texts = {"the dog": ["ran", "sat down and ran up", "was good a b c d"], "a b c d e": ["f", "up up up"]}
    examples, alone = [], []
    for prompt, answers in texts.items():
        prompt = data.encode_prompt(tokenizer, prompt)
        answers = [data.encode_completion(tokenizer, answer) for answer in answers]
        examples.append({"prompt": prompt, "responses": answers})
        alone += [models.token_scores(model, torch.tensor([prompt + answer]))[0, -1] for answer in answers]
    alone = torch.stack(alone)
    assert alone.std() > 0.01
    rows = [ex["prompt"] + answer for ex in examples for answer in ex["responses"]]
    for side in ("left", "right"):
        ids, mask = data.pad_batch(rows, tokenizer.pad_token_id, side)
        ids = torch.where(mask, ids, 7)  # whatever stands under the mask
        scores = models.sequence_scores(model, ids, mask, models.last_index_from_mask(mask))
        assert_same(scores, alone)
    for packed in (False, True):
        batch = make_batch(examples, tokenizer.pad_token_id, packed=packed)
        names = ("input_ids", "attention_mask", "position_ids")
        scores = models.token_scores(model, *(batch[name] for name in names)).flatten()[batch["last_token_rows"]]
        assert_same(scores, alone)


def test_trap_02_left_padding_needs_positions(tmp_path):
    """Negative: GPT-2's own positions, which count the padding, move the score; ours do not."""
    tokenizer = word_tokenizer()
    model = reward_model(tmp_path, "gpt2", tokenizer)
    ids, mask = data.pad_batch([[5, 6, 7], [5, 6, 7, 8, 9, 10]], tokenizer.pad_token_id, "left")
    naive = model.score(model.transformer(ids, attention_mask=mask).last_hidden_state)[0, -1, 0]
    alone = models.token_scores(model, torch.tensor([[5, 6, 7]]))[0, -1]
    assert abs(naive - alone) > 1e-3


def test_packed_mask_needs_positions(tmp_path):
    with pytest.raises(ValueError, match="position_ids: got None with a packed"):
        models.hidden_states(reward_model(tmp_path), torch.ones(1, 2).long(), torch.ones(1, 1, 2, 2).bool())


def test_supports_packing():
    tokenizer = word_tokenizer()
    for family in FAMILIES:
        assert models.supports_packing(language_model(tokenizer, family=family))
        assert not models.supports_packing(language_model(tokenizer, family=family, attn_implementation="eager"))
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    window = MistralForCausalLM(MistralConfig(vocab_size=20, num_key_value_heads=1, sliding_window=4, **shape))
    assert not models.supports_packing(window)


DROPOUTS = {
    "llama": {"attention_dropout": 0.1},
    "gpt2": {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_trap_17_no_dropout_in_train_mode(tmp_path, family):
    path = model_folder(tmp_path / "dropping", family=family, **DROPOUTS[family])
    ids = torch.arange(1, 21).view(2, 10)
    plain = AutoModelForCausalLM.from_pretrained(path).train()
    assert not torch.equal(plain(ids).logits, plain(ids).logits)  # the trap is armed
    policy = models.load_policy(path)
    assert policy.training and torch.equal(policy(ids).logits, policy(ids).logits)
    scorer = models.reward_model_from_policy(path, 0)
    assert scorer.training
    assert torch.equal(models.token_scores(scorer, ids), models.token_scores(scorer, ids))
    models.save_model(scorer, word_tokenizer(), tmp_path / "scorer")
    again = models.load_reward_model(tmp_path / "scorer")
    assert torch.equal(models.token_scores(again, ids), models.token_scores(again, ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_trap_17_residual_dropout_for_sft(tmp_path, family):
    path = model_folder(tmp_path, family=family)
    ids = torch.arange(1, 21).view(2, 10)
    model = models.load_policy(path, dropout=0.2)
    assert not torch.equal(model(ids).logits, model(ids).logits)
    model.eval()
    assert torch.equal(model(ids).logits, models.load_policy(path)(ids).logits)


def test_positions_count_the_tokens():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert models.position_ids_from_mask(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]
    assert models.last_index_from_mask(mask).tolist() == [3, 2]


def test_trap_34_all_end_tokens_stop():
    """As Llama 3 has it: EOS, two ids in the generation config, and an end of turn that is none of them."""
    tokenizer = word_tokenizer(extra=("<|user|>", "<|bot|>", "<|end|>"), chat_template=CHAT)
    model = language_model(tokenizer)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 9]
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert models.stop_token_ids(tokenizer, model) == sorted({tokenizer.eos_token_id, 9, end})
    assert models.stop_token_ids(tokenizer, model, ["dog", 11]) == sorted(
        {tokenizer.eos_token_id, 9, end, 11, tokenizer.convert_tokens_to_ids("dog")}
    )
    assert models.stop_token_ids(word_tokenizer(), language_model(word_tokenizer())) == [2]
    with pytest.raises(ValueError, match="stop token: got 'missing'"):
        models.stop_token_ids(tokenizer, model, "missing")


def test_saved_reward_model_is_a_plain_checkpoint(tmp_path):
    tokenizer = word_tokenizer()
    model = reward_model(tmp_path, tokenizer=tokenizer)
    model.config.reward_bias = 1.25
    models.save_model(model, tokenizer, tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.bin"))
    ids = torch.tensor([[5, 6, 7, tokenizer.eos_token_id]])
    ours = models.token_scores(models.load_reward_model(tmp_path / "saved"), ids)[0, -1]
    assert torch.equal(ours, models.token_scores(model, ids)[0, -1])
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert plain(ids).logits.item() - 1.25 == pytest.approx(ours.item(), abs=1e-6)
    assert models.is_reward_model(tmp_path / "saved") and not models.is_reward_model(tmp_path / "llama-policy")


def test_full_disk_while_saving(tmp_path, monkeypatch):
    """The first file is written, the second fails: nothing is left that could be taken for a model."""
    model = language_model(word_tokenizer())
    tokenizer = word_tokenizer()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", full)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    for target in ("new", "run"):
        with pytest.raises(OSError, match="No space left"):
            models.save_model(model, tokenizer, tmp_path / target)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_saving_into_a_run_keeps_its_files(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    models.save_model(language_model(word_tokenizer()), word_tokenizer(), tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"metrics.jsonl", "config.json", "model.safetensors", "tokenizer.json"} <= names
    models.load_policy(tmp_path / "run")
