"""Reward models, hidden states and contexts of architectures that keep their parts in different places."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from rlhf import models
from rlhf.models.classifiers import TrunkClassifier
from rlhf.models.parts import trunk
from tests.roundings import assert_same
from tests.tiny import language_model, word_tokenizer

SIZE = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "initializer_range": 0.2}
WIDE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE = {**SIZE, **WIDE, "num_key_value_heads": 1, "max_position_embeddings": 64}
BART = {
    "d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "encoder_layers": 2,
    "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "max_position_embeddings": 64, "init_std": 0.2,
}  # fmt: skip
LLAMA4 = {"intermediate_size_mlp": 32, "num_local_experts": 2, "head_dim": 8, "no_rope_layer_interval": 2}
MAMBA = {"hidden_size": 16, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 8, "state_size": 8, "n_groups": 1}
CONFIGS = {
    "llama": SHAPE,
    "gpt2": {**SIZE, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "granite": {**SHAPE, "logits_scaling": 2.5, "embedding_multiplier": 1.7},
    "cohere": {**SHAPE, "logit_scale": 0.4},
    "lfm2": {**SHAPE, "layer_types": ["conv", "full_attention"]},
    "mamba2": {**SIZE, **MAMBA, "expand": 2},
    "llama4_text": {**SHAPE, **LLAMA4},
    "gemma2": {**SHAPE, "head_dim": 8, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "bart": {**SIZE, **BART},
    "bert": {**SIZE, **WIDE, "is_decoder": True, "max_position_embeddings": 64},
    "roberta": {**SIZE, **WIDE, "is_decoder": True, "max_position_embeddings": 64},
}  # fmt: skip
NO_CLASS = ("granite", "cohere", "lfm2", "mamba2", "llama4_text")  # in transformers
OTHER_CLASS = ("bart", "bert", "roberta")  # transformers' own pools, or has layers in its head
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])


def policy(family):
    """A random language model of an architecture; zeros of its initialisation are drawn over."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**CONFIGS[family]))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape) * 0.1)
    return model.eval()


@pytest.fixture(params=CONFIGS)
def family(request):
    return request.param


def test_reward_model_of_any_architecture(tmp_path, family):
    """Its trunk is the policy's; its score is the head on the trunk's hidden states; it loads back to the bit."""
    source = policy(family)
    source.save_pretrained(tmp_path / "policy")
    model = models.reward_model_from_policy(tmp_path / "policy", 0, pad_token_id=0).eval()
    theirs, ours = trunk(source).state_dict(), trunk(model).state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    beside = dict(model.named_parameters()).keys() - {f"{model.base_model_prefix}.{name}" for name in ours}
    assert beside == {"score.weight"}

    hidden = trunk(source)(input_ids=IDS, position_ids=None).last_hidden_state
    of_object = models.reward_model_from_policy(source, 0, pad_token_id=0).eval()
    assert type(of_object) is type(model)
    model.config.reward_bias = 0.25
    model.save_pretrained(tmp_path / "reward")
    loaded = models.load_reward_model(tmp_path / "reward").eval()
    assert models.is_reward_model(tmp_path / "reward") and models.is_classifier(loaded)
    assert loaded.state_dict().keys() == model.state_dict().keys() == of_object.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight) and torch.equal(of_object.state_dict()[name], weight)
    assert loaded.config.num_labels == 1 and loaded.config.reward_bias == 0.25
    scores = models.token_scores(loaded, IDS)
    torch.testing.assert_close(scores, models.token_scores(model, IDS))
    if family != "roberta":  # whose own positions start behind its padding index
        torch.testing.assert_close(scores, (hidden @ model.score.weight.T).squeeze(-1) - 0.25, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(IDS).logits.squeeze(-1) - 0.25, scores[:, -1], rtol=1e-4, atol=1e-4)
    scores.sum().backward()
    with_gradient = {name for name, weight in loaded.named_parameters() if weight.grad is not None}
    without = dict(loaded.named_parameters()).keys() - with_gradient
    assert all("encoder_attn" in name for name in without)  # a decoder without its encoder


def test_whose_class_it_is(family):
    model = models.reward_model_from_policy(policy(family), 0)
    made = family in NO_CLASS + OTHER_CLASS
    assert isinstance(model, TrunkClassifier) == made
    assert hasattr(transformers, type(model).__name__) == (not made)
    assert type(model)._can_set_attn_implementation() == type(policy(family))._can_set_attn_implementation()


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "RobertaForSequenceClassification"])
def test_a_classifier_that_does_not_read_tokens_is_refused(name):
    config = CONFIG_MAPPING[name[:-25].lower()](**CONFIGS["bert"], num_labels=1)
    with pytest.raises(ValueError, match=r"in front of its scalar head|no linear scalar head"):
        models.as_reward_model(getattr(transformers, name)(config))


def test_transformers_loads_a_reward_model_of_granite(tmp_path):
    """The lines of docs/models.md, for an architecture that has no classifier in transformers."""
    from transformers.modeling_layers import GenericForSequenceClassification
    from transformers.models.granite.modeling_granite import GranitePreTrainedModel

    model = models.reward_model_from_policy(policy("granite"), 0, pad_token_id=0).eval()
    model.save_pretrained(tmp_path)

    class GraniteForSequenceClassification(GenericForSequenceClassification, GranitePreTrainedModel):
        pass

    loaded, info = GraniteForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in model.state_dict().items())
    torch.testing.assert_close(loaded.eval()(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("family", ["bart", "granite", "llama4_text", "mamba2"])
def test_transformers_loads_any_reward_model_as_a_trunk_and_a_head(tmp_path, family):
    """The other lines of docs/models.md: the language model's own hidden states under `score.weight`."""
    model = models.reward_model_from_policy(policy(family), 0, pad_token_id=0).eval()
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] <= {"lm_head.weight"} and report["unexpected_keys"] == {"score.weight"}
    assert not report["mismatched_keys"]
    head = load_file(tmp_path / "model.safetensors")["score.weight"]
    hidden = loaded.eval()(IDS, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close((hidden @ head.T).squeeze(-1), models.token_scores(model, IDS))


def test_scores_where_the_trunk_is_fp32_and_the_head_bf16():
    """Mamba 2 keeps fp32 hidden states (residual_in_fp32) whatever its weights are."""
    model = models.reward_model_from_policy(policy("mamba2").bfloat16(), 0, pad_token_id=0).eval()
    hidden = trunk(model)(IDS).last_hidden_state
    assert hidden.dtype == torch.float32 and model.score.weight.dtype == torch.bfloat16
    expected = (hidden.bfloat16() @ model.score.weight.T).squeeze(-1).float()
    torch.testing.assert_close(models.token_scores(model, IDS), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(model(IDS).logits.flatten().float(), expected[:, -1], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("family", ["granite", "bart"])
def test_pooled_score_is_that_of_the_last_token_by_the_mask(family):
    model = models.reward_model_from_policy(policy(family), 0, pad_token_id=0).double().eval()
    ids, mask = torch.tensor([[5, 6, 7, 8], [9, 1, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    scores = models.token_scores(model, ids, mask)
    for options in ({"attention_mask": mask}, {}):
        assert_same(model(input_ids=ids, **options).logits.flatten().float(), scores[[0, 1], [3, 1]])
    out = model(input_ids=ids, attention_mask=mask, labels=torch.tensor([0.5, -0.5]), output_hidden_states=True)
    assert out.loss.item() == pytest.approx(((out.logits.flatten() - torch.tensor([0.5, -0.5])) ** 2).mean().item())
    assert len(out.hidden_states) == 3


@pytest.mark.parametrize("family", ["granite", "cohere", "llama4_text"])
def test_packed_scores_are_those_of_rows_alone(family):
    """In float64; 6 tokens are below every window and scale that depends on the length, so is Llama 4's row of 8. The
    trainers, whose rows may have any length, leave Llama 4 unpacked.
    """
    from rlhf_kernels import pack_responses
    from rlhf_kernels.integrations.transformers import packed_inputs

    model = models.reward_model_from_policy(policy(family), 0, pad_token_id=0).double().eval()
    assert models.supports_packing(model, 6) == (family != "llama4_text")
    packed = pack_responses([[5, 6, 7]], [[[8, 9, 1], [10, 1]]])
    inputs = packed_inputs(model, packed)
    scores = models.token_scores(model, inputs["input_ids"], inputs["attention_mask"], inputs["position_ids"])
    alone = [models.token_scores(model, torch.tensor([row]))[0, -1] for row in ([5, 6, 7, 8, 9, 1], [5, 6, 7, 10, 1])]
    assert_same(scores.flatten()[packed.last_token_rows], torch.stack(alone))


@pytest.mark.parametrize("family", ["granite", "bart", "llama4_text"])
def test_adapters_on_a_made_classifier(family):
    peft = pytest.importorskip("peft")
    model = models.reward_model_from_policy(policy(family), 0, pad_token_id=0)
    before = models.token_scores(model, IDS)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"]))
    torch.testing.assert_close(models.token_scores(adapted, IDS), before)
    assert models.hidden_states(adapted, IDS).shape == (*IDS.shape, 16)
    adapted(input_ids=IDS, labels=torch.zeros(2)).loss.backward()
    trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert any("score" in name for name in trained)
    assert all(
        weight.grad is not None
        for name, weight in adapted.named_parameters()
        if name in trained and "encoder_attn" not in name
    )


def test_policy_with_adapters_becomes_a_reward_model(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(
        policy("granite"), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    expected = adapted(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
    model = models.reward_model_from_policy(adapted, 0).eval()
    torch.testing.assert_close(models.hidden_states(model, IDS), expected, rtol=1e-4, atol=1e-5)
    assert isinstance(adapted.get_base_model().lm_head, nn.Linear)  # the policy keeps what it had


@pytest.mark.parametrize("family", CONFIGS)
def test_attention_by_default(tmp_path, family):
    """SDPA where the model supports it; a value that it does not take is refused by the setting's name."""
    source = policy(family)
    source.save_pretrained(tmp_path)
    model = models.load_policy(tmp_path)
    capped = family == "gemma2"
    supported = type(source)._supports_sdpa and not capped
    assert model.config._attn_implementation == ("sdpa" if supported else "eager")
    if not type(source)._supports_sdpa:
        with pytest.raises(ValueError, match=r"attn_implementation: got 'sdpa'.*--attn_implementation eager") as caught:
            models.load_policy(tmp_path, attn_implementation="sdpa")
        assert "\n" not in str(caught.value)
    assert models.load_policy(tmp_path, attn_implementation="eager").config._attn_implementation == "eager"
    with pytest.raises(ValueError, match=r"attn_implementation: got 'spda'.*leave it out"):
        models.reward_model_from_policy(tmp_path, 0, attn_implementation="spda")


def test_context_lengths():
    assert models.context_length(policy("gpt2")) == 64
    assert models.context_length(policy("mamba2")) is None
    assert models.context_length(policy("roberta")) == 63  # positions start at padding_idx + 1
    assert models.context_length(policy("bert")) == 64


def test_token_ids_behind_the_embeddings():
    tokenizer = word_tokenizer()
    model = language_model(tokenizer)
    models.check_token_ids(model, tokenizer, range(len(tokenizer)))
    tokenizer.add_tokens(["unused"])
    models.check_token_ids(model, tokenizer, range(len(tokenizer) - 1))
    with pytest.raises(ValueError, match=r"policy: the token 'unused' has the id 39, but the model embeds ids 0 to 38"):
        models.check_token_ids(model, tokenizer, range(len(tokenizer)), "policy")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(ValueError, match=r"the token '\[PAD\]' has the id 40"):
        models.check_token_ids(model, tokenizer, [1, 2])


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_model_that_looks_at_later_tokens_is_no_policy(tmp_path, family):
    config = CONFIG_MAPPING[family](**CONFIGS[family] | {"is_decoder": False})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="looks at later tokens"):
        models.load_policy(tmp_path)


OWN_CODE = """
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel, LlamaPreTrainedModel

class HomemadeConfig(LlamaConfig):
    model_type = "homemade"

class HomemadeForCausalLM(LlamaForCausalLM):
    config_class = HomemadeConfig

class HomemadeForSequenceClassification(LlamaForSequenceClassification):
    config_class = HomemadeConfig

    def __init__(self, config):
        LlamaPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = LlamaModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()
"""


@pytest.mark.parametrize("classifier", [True, False])
def test_models_with_code_of_their_own(tmp_path, classifier):
    """Their reward model is a classifier of their code; without one it could not be loaded again."""
    policy("llama").save_pretrained(tmp_path)
    names = {"AutoConfig": "HomemadeConfig", "AutoModelForCausalLM": "HomemadeForCausalLM"}
    names |= {"AutoModelForSequenceClassification": "HomemadeForSequenceClassification"} if classifier else {}
    config = json.loads((tmp_path / "config.json").read_text())
    auto_map = {auto: f"homemade_{classifier}.{name}" for auto, name in names.items()}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "homemade", "auto_map": auto_map}))
    (tmp_path / f"homemade_{classifier}.py").write_text(OWN_CODE)
    assert type(models.load_policy(tmp_path, trust_remote_code=True)).__name__ == "HomemadeForCausalLM"
    if classifier:
        model = models.reward_model_from_policy(tmp_path, 0, trust_remote_code=True)
        assert type(model).__name__ == "HomemadeForSequenceClassification"
    else:
        with pytest.raises(ValueError, match=r"no AutoModelForSequenceClassification in it .* not be loaded again"):
            models.reward_model_from_policy(tmp_path, 0, trust_remote_code=True)
