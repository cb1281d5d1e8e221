"""Every causal language model that the installed transformers knows, as small as it can be and with nothing left out.

A config is shrunk by what its fields mean, which their names tell (`SIZES`), and its factors, caps, biases and dropouts
are set to values that matter (`FLAVOURS`). One layer of each kind is kept. What no rule can know about a type of model
stands in `SPECIAL`.
"""

import itertools
import math
import re

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, WIDTH, CONTEXT = 100, 32, 64
PAD, EOS = 0, 1
WIDE, NARROW = 14, 6
"""Windows of sliding attention, longer and shorter than the longest text of the checks, which has 12 tokens."""
WINDOWS = r"sliding_window(_size)?|attention_(chunk|window)_size|window_size|local_attention|keep_window_size"

SIZES = (  # of a field whose whole name matches: the first that does, where the config has a number there
    (r"(num_)?(nextn_predict|mtp|kv_shared)_layers|num_nextn_predict_layers", 0),
    (r"\w*type_vocab_size", 2),
    (r"\w*vocab_size(_per_layer_input)?", VOCABULARY),
    (r"max_(position_embeddings|seq_len|(source|target)_positions)|n_(positions|ctx)", CONTEXT),
    (r"context_length|seq_length|model_max_length", CONTEXT),
    (WINDOWS, WIDE),
    (r"mamba_d_head|d_head", 8),
    (r"n_mamba_heads|linear_num_key_heads", 2),
    (r"index_n_heads", 8),  # of fewer, all give a key the score 0 so often that keys tie
    (r"mamba_(n|num)_heads", 8),
    (r"\w*(key_value|kv)_heads|kv_n_heads|num_query_groups|o_groups", 2),
    (r"\w*_heads?", 4),
    (r"(global|qk)_head_dim", 16),
    (r"\w*head_?dim|head_size|attention_head_size|kv_channels|d_kv|dim_head|query_pre_attn_scalar", 8),
    (r"(num|n|moe_num|num_\w+)_(local_|routed_)?experts", 4),
    (r"n_shared_experts|(moe_)?num_shared_experts|n_group|topk_group|num_expert_group|zero_expert_num", 1),
    (r"num_experts_per_tok(en)?|moe_(topk|k|top_k)|top_k_experts", 2),
    (r"first_k_dense_replace|num_dense_layers|decoder_sparse_step", 1),
    (r"(num_|n_|encoder_|decoder_|num_encoder_|num_decoder_)(hidden_)?layers?|num_blocks|num_layers_per_stack", 2),
    (r"\w*lora_rank|\w*_rank|hidden_size_per_layer_input|d_rel|(mamba_d|ssm)_state(_size)?|state_size", 8),
    (r"time_step_rank|mamba_dt_rank|rotary_dim|hc_lowrank", 4),
    (r"\w*chunk_size|block_size", 8),
    (r"mamba_d_ssm", 64),
    (r"\w*(moe|expert|shared)\w*_(intermediate|hidden)_size|expert_ffn_hidden_size|moe_latent_size", 24),
    (r"\w*intermediate_size\w*|\w*ffn_dim|n_inner|d_inner|d_ff|dff|dim_ff|feed_forward_size|ffn_hidden_size", 48),
    (r"router_hidden_size|dim_model_base", 16),
    (r"hidden_size|n_embd|d_model|(emb_|embedding_)?dim|(input_|output_)?embedding_size", WIDTH),
    (r"lru_width|attention_hidden_size|\w+_embed_dim|word_embed_proj_dim", WIDTH),
    (r"pad_token_id", PAD),
    (r"(eos|eod|sep)_token_id", EOS),
    (r"(bos|cls|decoder_start)_token_id", 2),
    (r"(unk|mask)_token_id", 3),
)  # fmt: skip
FLAVOURS = (  # the same for what does not size a model
    (r"(attention|attention_out|mlp|qkv|use_qkv|lm_head|use|add_linear)_bias|bias|add_bias_linear", True),
    (r"final_logit_softcapping|logits_soft_cap|output_logit_soft_cap", 3.0),
    (r"logit_scale", 0.37),
    (r"logits_scaling", 2.5),
    (r"embedding_multiplier", 1.7),
    (r"residual_multiplier|lm_head_multiplier", 0.6),
    (r"attention_multiplier", 0.3),
    (r"attention_value_scale", 0.9),
    (r"\w*dropout(_prob|_rate|_p)?|\w*pdrop|router_jitter_noise|input_jitter_noise", 0.1),
    (r"floor_scale", 4),
    (r"initializer_range|init_std|\w*_init_std|embedding_initializer_range", 0.2),
    (r"use_mamba_kernels|output_router_logits", False),
)
OWN_CHOICE = ("head_dim", "num_key_value_heads", "num_experts_per_tok", "n_routed_experts", "n_shared_experts")
OWN_CHOICE += ("pad_token_id",)
"""What a config may leave open by None, and what is set here all the same."""

KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")  # lists that name the kind of each layer

DECODER = {"is_decoder": True}
MLA = {"num_key_value_heads": 4}  # heads of a compressed cache are all the model's own
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
SPECIAL = {
    **dict.fromkeys(("bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie"), DECODER),
    **dict.fromkeys(("megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer"), DECODER),
    **dict.fromkeys(("xlm-roberta", "xlm-roberta-xl"), DECODER),
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "minicpm3"), MLA),
    **dict.fromkeys(("sarvam_mla", "youtu", "bailing_hybrid", "kimi_linear"), MLA),
    **{family: {**MLA, "index_topk": 4} for family in ("axk2", "deepseek_v32", "glm_moe_dsa")},
    "bamba": {"attn_layer_indices": [1], "attn_rotary_emb": 8},
    "big_bird": {**DECODER, "attention_type": "original_full"},
    "blt": {"encoder_hash_byte_group_vocab": 50, "encoder_hash_byte_group_size": [3, 4]},
    "blt_global_transformer": {"hidden_size": 64, "head_dim": 16, "num_key_value_heads": 4},
    "blt_local_decoder": {"hidden_size_global": 64, "num_key_value_heads": 4},
    "blt_local_encoder": {"hidden_size_global": 64, "num_key_value_heads": 4},
    "blt_patcher": {"num_key_value_heads": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": MROPE, "sliding_attention": MROPE}},
    "cpmant": {"prompt_length": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "diffllama": {"attention_dropout": 0.0},  # it refuses more
    "dory": {
        "num_hidden_layers": 4, "n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    },
    "dots3_note_text": {
        **MLA, "num_attention_heads": 4, "head_dim": 16, "use_dsa": False, "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
        "swa_q_lora_rank": 8, "swa_kv_lora_rank": 8,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hrm_text": {"num_hidden_layers": 16},  # 2 layers a stack, in 2 cycles of 1 and 3 passes
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"no_rope_layer_interval": 2, "interleave_moe_layer_step": 2},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "mpt": {"expansion_ratio": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
        "indexer_compress_ratio": 2, "ple_layer_ids": [1], "heads_per_ngram": 2, "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 2, "eos_token_id": EOS,
    },
    "reformer": {
        **DECODER, "axial_pos_shape": (8, 8), "axial_pos_embds_dim": (16, 16), "attn_layers": ["local", "lsh"],
        "lsh_attn_chunk_length": 4, "local_attn_chunk_length": 4, "num_buckets": 2,
        "chunk_size_lm_head": 0, "hash_seed": 1,
    },
    "xlm": {"causal": True},
    "xmod": {**DECODER, "default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["mamba", "mamba", "hybrid"] * 2, "num_hidden_layers": 6, "attention_hidden_size": 64,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 2, "num_hidden_layers": 4, "attention_hidden_size": 64,
        "attention_head_dim": 16, "n_mamba_heads": 8, "num_key_value_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def families():
    """The types of all causal language models of the installed transformers."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(family, **changes):
    """The smallest config of a model type; `changes` are of its own fields, or of its text config's."""
    return CONFIG_MAPPING[family](**_shrunk(CONFIG_MAPPING[family](), changes))


def narrowed(family, changes):
    """The changes that make every window NARROW as well; None where the model looks through none."""
    config = tiny_config(family, **changes).get_text_config(decoder=True).to_dict()
    windows = {name: NARROW for name, size in config.items() if re.fullmatch(WINDOWS, name) and size == WIDE}
    return {**changes, **windows} if windows else None


def tiny_model(family, dtype=torch.float64, **changes):
    """A random model in eval mode, of the class that AutoModelForCausalLM takes."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=dtype)
    return _randomised(model).to(dtype).eval()


def _shrunk(config, changes):
    fields = config.to_dict()
    parts = {name: getattr(config, name) for name in config.sub_configs if getattr(config, name, None) is not None}
    small = {name: _small(name, value) for name, value in fields.items() if name not in parts}
    small = {name: value for name, value in small.items() if value is not None} | _layers(fields)
    small |= SPECIAL.get(config.model_type, {})
    for name, part in parts.items():
        if part.model_type:
            ours = changes if name == "text_config" else {}
            small[name] = {**_shrunk(part, ours), "model_type": part.model_type}
    return small if "text_config" in parts else small | changes


def _small(name, value):
    """What stands in the place of a field's value; None: the value stays."""
    for rules, kinds in ((SIZES, int), (FLAVOURS, (int, float))):
        for pattern, small in rules:
            if re.fullmatch(pattern, name):
                first = value[0] if isinstance(value, list) and value else value
                fits = isinstance(first, kinds) and isinstance(first, bool) == isinstance(small, bool)
                return small if fits or (value is None and name in OWN_CHOICE) else None
    return None


def _layers(fields):
    """One layer of each kind, and two at least; where windows can be switched off, they are on, from layer 1."""
    if "use_sliding_window" in fields:
        return {"use_sliding_window": True, "sliding_window": WIDE, "max_window_layers": 1}
    kinds = {name: list(dict.fromkeys(fields[name])) for name in KINDS if fields.get(name)}
    if not kinds:
        return {}
    number = max(2, *map(len, kinds.values()))
    cycled = {name: list(itertools.islice(itertools.cycle(each), number)) for name, each in kinds.items()}
    return {"num_hidden_layers": number, **cycled}


@torch.no_grad()
def _randomised(model, seed=0):
    """Weights that all matter: none is 0 or 1, none so small that a mistake would hide behind it.

    Those of state-space and convolution layers stay near where they began, since others let their states explode.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if not weight.isfinite().all():
            weight.zero_()
        if weight.dim() < 2 or name.endswith(("A_log", "conv1d.weight", ".A")):
            weight.add_(0.1 * noise)
        elif "embed" in name or "wte" in name:
            weight.copy_(0.5 * noise)
        else:
            weight.copy_(1.2 / math.sqrt(weight.shape[-1]) * noise)
    for name, buffer in model.named_buffers():
        if name.endswith("bias") and buffer.is_floating_point() and buffer.dim() == 1:  # experts' corrections
            buffer.add_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model
