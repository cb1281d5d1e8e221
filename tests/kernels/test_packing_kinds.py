"""Kinds of models beside the usual decoder: what `packed_inputs` gives them equals separate rows, or is refused."""

import pytest
import torch

from rlhf_kernels import pack_responses

transformers = pytest.importorskip("transformers", reason="needs the package transformers")
from rlhf_kernels.integrations.transformers import (  # noqa: E402 - it imports transformers
    ATTENTION,
    check_packing,
    mask_for,
    packed_inputs,
    packing_obstacle,
    takes_shared_prefix,
    use_shared_prefix_attention,
)
from tests.kernels.test_packing_models import (  # noqa: E402
    DECODER,
    GROUPED,
    WINDOWED,
    example,
    read_log_probs,
    separate_log_probs,
    tiny_model,
)
from tests.kernels.test_packing_positions import packed_and_separate, random_model  # noqa: E402
from tests.roundings import assert_same  # noqa: E402


@pytest.mark.parametrize("attention", ["auto", "dense"])
def test_flex_attention_always_gets_a_block_mask(attention):
    """It would add a boolean mask to the scores as 0 and 1."""
    model, packed = tiny_model("llama", dtype=torch.float64).eval(), pack_responses(*example())
    with torch.no_grad():
        wanted = separate_log_probs(model, *example())
        model.set_attn_implementation("flex_attention")
        inputs = packed_inputs(model, packed, attention=attention)
        masks = [inputs["attention_mask"], mask_for(model, packed.layout), mask_for(model, packed.attention_mask)]
        with torch.compiler.set_stance("force_eager"):
            for mask in masks:
                found = read_log_probs(model(**{**inputs, "attention_mask": mask}).logits, packed)
                assert_same(found, wanted)


def test_eager_attention_gets_an_additive_mask():
    """From the layout and from the boolean mask; a mask [B, T] stays what it is."""
    model, packed = tiny_model("llama", "eager", dtype=torch.float64).eval(), pack_responses(*example())
    inputs = packed_inputs(model, packed)
    with torch.no_grad():
        wanted = separate_log_probs(model, *example())
        for mask in (inputs["attention_mask"], mask_for(model, packed.layout), mask_for(model, packed.attention_mask)):
            assert_same(read_log_probs(model(**{**inputs, "attention_mask": mask}).logits, packed), wanted)
    padding = torch.ones(2, 5, dtype=torch.bool)
    assert mask_for(model, padding) is padding


LLAMA4 = {**GROUPED, "head_dim": 8, "intermediate_size_mlp": 64, "num_local_experts": 2, "attn_scale": 0.1}
LLAMA4 |= {"no_rope_layers": [1, 0], "attention_chunk_size": 64, "interleave_moe_layer_step": 3}


def test_queries_scaled_by_the_index_in_the_row():
    """Llama 4 packs rows that end before the first scaled index; longer ones are refused."""
    prompts, responses = example()
    rows = pack_responses(prompts, responses).input_ids.shape[1]
    fitting = random_model("Llama4Text", **LLAMA4, floor_scale=rows + 1)
    found, wanted = packed_and_separate(fitting)
    assert_same(found, wanted)
    short = random_model("Llama4Text", **LLAMA4, floor_scale=rows)
    message = rf"scales queries by their index in the row from {rows} on .*, and a packed row may have {rows} tokens"
    with pytest.raises(ValueError, match=message):
        packed_and_separate(short)
    with pytest.raises(ValueError, match="a packed row may have any number of tokens"):
        check_packing(fitting)
    assert packing_obstacle(fitting, 64, rows) is None
    for options in ({"attn_temperature_tuning": False}, {"no_rope_layers": [1, 1]}):
        assert packing_obstacle(random_model("Llama4Text", **{**LLAMA4, **options, "floor_scale": 4}), 64) is None


@pytest.mark.parametrize("name", ["Bert", "Roberta", "Electra"])
def test_models_that_attend_both_ways(name):
    message = "it attends both ways, and a token sees those behind it; is_decoder=True in its config makes it causal"
    with pytest.raises(ValueError, match=message):
        check_packing(random_model(name, **DECODER))
    assert packing_obstacle(random_model(name, **DECODER, is_decoder=True)) is None


def test_gemmas_that_attend_both_ways():
    model = random_model("Gemma3Text", **WINDOWED, use_bidirectional_attention=True)
    with pytest.raises(ValueError, match=r"it attends both ways, and a token sees those behind it$"):
        check_packing(model, 16)


MOE = {**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1}


def test_router_losses_are_not_asked_for():
    """The loss of the routers takes no 4-D mask; where the config asks for it, packed rows do not."""
    config = transformers.MixtralConfig(**MOE, vocab_size=50, output_router_logits=True)
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM._from_config(config, experts_implementation="eager").double().eval()
    packed = pack_responses(*example())
    inputs = packed_inputs(model, packed)
    with torch.no_grad():
        found = read_log_probs(model(**inputs).logits, packed)
        assert_same(found, separate_log_probs(model, *example()))
        hidden = model.model(**inputs).last_hidden_state
        assert_same(read_log_probs(model.lm_head(hidden), packed), found)
    model.config.output_router_logits = False
    assert packed_inputs(model, packed).keys() == {"input_ids", "position_ids", "attention_mask"}


def test_a_mask_of_its_own():
    """Doge makes its own mask from a dense one: it packs, but not in two parts."""
    model = random_model("Doge", **GROUPED, keep_window_size=64)
    assert not takes_shared_prefix(model)
    assert_same(*packed_and_separate(model))
    with pytest.raises(ValueError, match=r"DogeForCausalLM has an attention of its own, .* makes its own mask"):
        use_shared_prefix_attention(model, 16)
    model.set_attn_implementation(ATTENTION)
    assert_same(*packed_and_separate(model))
    packed = pack_responses(*example())
    assert torch.equal(mask_for(model, packed.layout), packed.attention_mask)
    with pytest.raises(ValueError, match="attention is 'two_part', but"):
        packed_inputs(model, packed, attention="two_part")


NEMOTRON = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
}
NEMOTRON |= {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "mlp_hidden_act": "relu2"}


def test_layers_without_a_state():
    """Layers that do nothing along the row are no obstacle in a class that may also have others."""
    model = random_model("NemotronH", **NEMOTRON, layers_block_type=["attention", "mlp", "attention", "mlp"])
    assert_same(*packed_and_separate(model))
    mixed = random_model("NemotronH", **NEMOTRON, layers_block_type=["attention", "mlp", "mamba"])
    with pytest.raises(ValueError, match=r"its layers \(linear_attention\) carry a state along the row"):
        check_packing(mixed, 16)


OPENAI = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
XLM = {"emb_dim": 32, "n_layers": 1, "n_heads": 4, "n_langs": 1, "max_position_embeddings": 64}
REFORMER = {"hidden_size": 32, "attention_head_size": 8, "num_attention_heads": 4, "feed_forward_size": 32}
REFORMER |= {"attn_layers": ["local"], "axial_pos_shape": (8, 8), "axial_pos_embds_dim": (16, 16), "is_decoder": True}
BYTES = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "intermediate_size": 32,
    "vocab_size": 260,
}
BLT = {"encoder_config": {**BYTES, "hidden_size_global": 64}, "decoder_config": {**BYTES, "hidden_size_global": 64}}
BLT |= {"global_config": {**BYTES, "hidden_size": 64}, "patcher_config": BYTES, "encoder_hash_byte_group_vocab": 50}
OTHERS = {
    "OpenAIGPT": (OPENAI, "masks of two dimensions alone"),
    "XLM": (XLM, "masks of two dimensions alone"),
    "Reformer": (REFORMER, "hashes and chunks the row"),
    "Blt": ({**BLT, "vocab_size": 260}, "joins the bytes of a row to patches"),
    "DeepseekV32": ({**GROUPED, "num_key_value_heads": 4}, r"its layers \(indexed_attention\) choose or compress keys"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_are_refused_with_the_reason(name):
    shape, message = OTHERS[name]
    config = getattr(transformers, f"{name}Config")(**shape)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with pytest.raises(ValueError, match=message):
        packed_inputs(model, pack_responses(*example()))


def test_diffusion_models_are_refused():
    experts = {"num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 16}
    text = {"hidden_size": 32, "num_hidden_layers": 1, "layer_types": ["full_attention"], **experts}
    with torch.device("meta"):
        config = transformers.DiffusionGemmaConfig(text_config=text)
        model = transformers.AutoModelForImageTextToText.from_config(config)
    assert packing_obstacle(model, 16) == "it denoises blocks of tokens, and is no causal language model"
