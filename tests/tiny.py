"""Models of a few thousand parameters and tokenizers of a few words, made in the process: no test needs a network."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [*"abcdefghijklmnopqrstuvwxy", "the", "dog", "cat", "ran", "sat", "up", "down", "and", "was", "good", "bad"]
CONTEXT = 64


def word_tokenizer(*, pad="<pad>", eos="</s>", bos=None, extra=(), chat_template=None):
    """One token a word, split at white space. `pad` and `eos` may be None, or the same token; `bos` is put first."""
    special = [token for token in dict.fromkeys(["<unk>", pad, eos, bos, *extra]) if token]
    vocabulary = {token: index for index, token in enumerate([*special, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, vocabulary[bos])]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token=pad, eos_token=eos, bos_token=bos
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(extra)}) if extra else None
    if chat_template:
        tokenizer.chat_template = chat_template
    return tokenizer


def language_model(tokenizer, *, family="llama", seed=0, **changes):
    """A random language model of two layers and width 16, in fp32."""
    torch.manual_seed(seed)
    size = len(tokenizer)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    if family == "gpt2":
        config = {"vocab_size": size, "n_positions": CONTEXT, "n_embd": 16, "n_layer": 2, "n_head": 2, **ids, **changes}
        model = GPT2LMHeadModel(GPT2Config(**config))
    else:
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        size = {"vocab_size": size, "max_position_embeddings": CONTEXT, "num_key_value_heads": 1}
        model = LlamaForCausalLM(LlamaConfig(**{**size, **shape, **ids, **changes}))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape) * 0.1)  # the default initialisation of 0.02 hides mistakes
    return model


def model_folder(folder, *, family="llama", tokenizer=None, seed=0, **changes):
    """The folder, as a string, of a saved tiny model with its tokenizer."""
    tokenizer = tokenizer or word_tokenizer()
    language_model(tokenizer, family=family, seed=seed, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_jsonl(path, rows):
    """The path, as a string, of a file with these rows; a row that is a string is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def words(generator, low, high):
    """A few random words, `good` and `bad` not among them."""
    return " ".join(generator.choice(WORDS[:-2]) for _ in range(generator.randint(low, high)))


def config_maker(config_class, folder, rows, **fixed):
    """make(**changes) -> settings of a stage, on a tiny policy and the given rows."""
    policy, path = model_folder(folder / "policy"), write_jsonl(folder / "rows.jsonl", rows)

    def make(**changes):
        options = {
            "model_name_or_path": policy,
            "dataset_name": path,
            "output_dir": str(folder / "run"),
            "use_cpu": True,
            "disable_tqdm": True,
            "learning_rate": 1e-2,
            "logging_steps": 1,
        }
        return config_class(**{**options, **fixed, **changes})

    return make
