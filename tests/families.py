"""Tiny causal LMs of families that keep something else than keys and values, or find their positions by themselves."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

V, CONTEXT = 13, 48
IDS = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": CONTEXT, "initializer_range": 0.4,
}  # fmt: skip
BART = {
    "d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "init_std": 0.4,
    "max_position_embeddings": CONTEXT, "is_decoder": True, "is_encoder_decoder": False, "dropout": 0.0,
}  # fmt: skip
BERT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "is_decoder": True,
    "max_position_embeddings": CONTEXT + 2, "initializer_range": 0.4, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "type_vocab_size": 1,
}  # fmt: skip
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
FAMILIES = {
    "llama": LLAMA,
    "lfm2": {**LLAMA, "layer_types": ["conv", "full_attention"]},
    "falcon_h1": {**LLAMA, **MAMBA, "mamba_chunk_size": 8},
    "mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 2},
    "mamba2": {
        "hidden_size": 16, "num_hidden_layers": 2, "state_size": 8, "num_heads": 4, "head_dim": 8, "n_groups": 1,
        "chunk_size": 8,
    },
    "llama4_text": {
        **LLAMA, "intermediate_size_mlp": 24, "num_local_experts": 2, "attention_chunk_size": 64, "floor_scale": 2,
        "attn_scale": 1.0, "no_rope_layer_interval": 2, "interleave_moe_layer_step": 2,
    },
    "mixtral": {**LLAMA, "num_local_experts": 2},
    "bart": BART,
    "roberta": BERT,
    "rwkv": {"hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 2, "context_length": CONTEXT},
    "openai-gpt": {
        "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT, "initializer_range": 0.4, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
}  # fmt: skip


def family_model(family, seed=0, **changes):
    """A random model of two layers and width 16, in fp32 and eval mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**IDS, **FAMILIES[family], **changes})).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape) * 0.1)  # no bias, norm or state stays at its trivial value
    return model
