"""Where a model finds a token's position: what `packed_inputs` gives it, and what `check_packing` refuses."""

import pytest
import torch

from rlhf_kernels import pack_responses

transformers = pytest.importorskip("transformers", reason="needs the package transformers")
from rlhf_kernels.integrations.transformers import (  # noqa: E402 - it imports transformers
    ATTENTION,
    check_packing,
    first_position,
    packed_inputs,
    packing_obstacle,
    rope_limit,
    use_shared_prefix_attention,
)
from tests.kernels.test_packing_models import (  # noqa: E402
    DECODER,
    GROUPED,
    IDS,
    LONGEST,
    example,
    read_log_probs,
    separate_log_probs,
)  # fmt: skip
from tests.roundings import assert_same  # noqa: E402

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}


def random_model(name, **options):
    """A float64 causal language model in which every token in sight matters."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**IDS, **options})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape) * 0.1)
    return model.double().eval()


def packed_and_separate(model, max_tokens=None, inputs_of=None):
    """Log-probs of the same responses behind shared prompts, and from rows of their own without position_ids."""
    prompts, responses = example()
    packed = pack_responses(prompts, responses, max_tokens=max_tokens)
    with torch.no_grad():
        found = read_log_probs(model(**packed_inputs(inputs_of or model, packed)).logits, packed)
        return found, separate_log_probs(model, prompts, responses)


@pytest.mark.parametrize(("name", "first"), [("Roberta", 3), ("XLMRobertaXL", 3), ("Bert", 0), ("OPT", 0)])
def test_first_position(name, first):
    """RoBERTa's kin count from padding_idx + 1: packed rows give what rows without position_ids give."""
    decoder = {"is_decoder": True, "pad_token_id": 2} if name != "OPT" else {"word_embed_proj_dim": 32, "ffn_dim": 64}
    model = random_model(name, **DECODER, **decoder)
    assert first_position(model) == first
    found, wanted = packed_and_separate(model, max_tokens=64)
    assert wanted.std() > 0.1
    assert_same(found, wanted)


def longrope_model(original):
    options = {"rope_parameters": {**LONGROPE}, "original_max_position_embeddings": original, "sliding_window": None}
    return random_model("Phi3", **GROUPED, **options)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_ropes_that_follow_the_longest_text(kind):
    """Up to the limit packed rows equal separate ones; beyond it they differ, and are refused."""

    def make(limit):
        if kind == "longrope":
            return longrope_model(limit)
        return random_model("Llama", **{**GROUPED, "max_position_embeddings": limit + 1}, rope_parameters={**DYNAMIC})

    model = make(LONGEST)
    assert rope_limit(model.config) == LONGEST
    assert packing_obstacle(model, LONGEST) is None
    assert_same(*packed_and_separate(model))
    short = make(LONGEST - 4)
    with pytest.raises(ValueError, match=rf"follow the longest text .* more than 12 tokens, .* may have {LONGEST}$"):
        packed_and_separate(short)
    with pytest.raises(ValueError, match="follow the longest text"):
        check_packing(short)
    found, wanted = packed_and_separate(short, inputs_of=model)
    assert (found - wanted).abs().max() > 1e-3


def test_rope_limit():
    """In a text config, for each of its kinds of layers, in a config that holds a text config; None without one."""
    assert rope_limit(transformers.LlamaConfig(**GROUPED)) is None
    assert rope_limit(transformers.GPT2Config()) is None
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 8}
    assert rope_limit(transformers.LlamaConfig(**GROUPED, rope_parameters=yarn)) is None
    alike = {**LONGROPE, "short_factor": LONGROPE["long_factor"]}
    assert rope_limit(transformers.Phi3Config(**GROUPED, rope_parameters=alike)) is None
    by_layer = {"sliding_attention": PLAIN, "full_attention": {**LONGROPE, "original_max_position_embeddings": 20}}
    text = transformers.Gemma3TextConfig(**GROUPED, head_dim=8, rope_parameters=by_layer)
    assert rope_limit(text) == 20
    assert rope_limit(transformers.Gemma3Config(text_config=text.to_dict())) == 20


class Wrapper(torch.nn.Module):
    """As PEFT wraps a model."""

    def __init__(self, model):
        super().__init__()
        self.base = model

    def get_base_model(self):
        return self.base


def test_wrapped_models():
    """A wrapper changes nothing about what can be packed, and the model inside gets the attention."""
    model = random_model("Llama", **GROUPED)
    packed = pack_responses(*example())
    for wrapped in (torch.nn.DataParallel(model), Wrapper(model), torch.nn.DataParallel(Wrapper(model))):
        assert packing_obstacle(wrapped) is None and first_position(wrapped) == 0
        mask = packed_inputs(wrapped, packed)["attention_mask"]
        assert torch.equal(mask, packed.attention_mask)
    assert use_shared_prefix_attention(wrapped) is wrapped
    assert model.config._attn_implementation == ATTENTION
    short = random_model("Mistral", **GROUPED, sliding_window=8)
    with pytest.raises(ValueError, match=r"^MistralForCausalLM cannot take packed responses: it looks through windows"):
        check_packing(Wrapper(short))
