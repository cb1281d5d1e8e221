"""Log-probs from any causal language model: the head that is found, and what it gives, beside the model's logits."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import rlhf_kernels as rk
from tests.roundings import STORED, assert_same

SHAPE = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {  # what the model does after its head: (scale, softcap)
    "Llama": ({"num_key_value_heads": 1}, 1.0, None),
    "Qwen2": ({"num_key_value_heads": 1, "tie_word_embeddings": True}, 1.0, None),
    "Qwen3": ({"num_key_value_heads": 1, "head_dim": 8}, 1.0, None),
    "Mistral": ({"num_key_value_heads": 1}, 1.0, None),
    "Gemma": ({"num_key_value_heads": 1, "head_dim": 8}, 1.0, None),
    "Gemma2": ({"num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": 2.0}, 1.0, 2.0),
    "GPT2": ({}, 1.0, None),
    "GPTNeoX": ({}, 1.0, None),
    "OPT": ({"ffn_dim": 32, "max_position_embeddings": 32, "word_embed_proj_dim": 8}, 1.0, None),
    "Phi": ({"num_key_value_heads": 1}, 1.0, None),  # its head has a bias
    "Cohere": ({"num_key_value_heads": 1, "logit_scale": 0.25}, 0.25, None),
    "Granite": ({"num_key_value_heads": 1, "logits_scaling": 0.5}, 2.0, None),
}


def make(family):
    """A random model whose every token matters, in eval mode."""
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{family}Config")
    config = config_class(**{**SHAPE, **IDS, **FAMILIES[family][0]})
    model = getattr(transformers, family + ("LMHeadModel" if family == "GPT2" else "ForCausalLM"))(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape) * 0.2)
    return model


def tokens(rows=3, length=7, seed=0):
    return torch.randint(3, SHAPE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def from_logits(model, ids, labels, temperature=1.0, **inputs):
    """(log-probs, entropy) of labels under the model's own logits, in float64 from there on."""
    z = F.log_softmax(model(input_ids=ids, **inputs).logits.double() / temperature, -1)
    return z.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -(z.exp() * z).sum(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_same_as_logits(family):
    """Log-probs, entropy and the gradients of all parameters, for every kind of head."""
    model, ids = make(family).double(), tokens()
    head = rk.find_head(model)
    _, scale, softcap = FAMILIES[family]
    assert head.scale == pytest.approx(scale, rel=1e-6) and head.softcap == softcap
    assert (head.bias is not None) == (family == "Phi")
    labels = tokens(seed=1)
    found = rk.linear_logprobs_from_model(model, ids, labels, temperature=0.7, return_entropy=True)
    wanted = from_logits(model, ids, labels, temperature=0.7)
    grads = []
    for logprobs, entropy in (found, wanted):
        weights = torch.linspace(-1, 2, ids.numel(), dtype=logprobs.dtype).view(ids.shape)
        grads.append(torch.autograd.grad(((logprobs + 0.5 * entropy) * weights).sum(), list(model.parameters())))
    for ours, theirs in zip(found, wanted, strict=True):
        assert_same(ours, theirs)
    for ours, theirs in zip(*grads, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("side", ("right", "left"))
def test_next_tokens(side):
    """Without labels each position predicts the next token; padding on either side does not count."""
    model, ids, mask = make("Llama").double(), tokens(2, 6), torch.ones(2, 6, dtype=torch.int64)
    pad = slice(4, None) if side == "right" else slice(0, 2)
    mask[1, pad] = 0
    found = rk.linear_logprobs_from_model(model, ids, attention_mask=mask)
    full, _ = from_logits(model, ids[:, :-1], ids[:, 1:], attention_mask=mask[:, :-1])
    assert found.shape == (2, 5)
    assert found[1].ne(0).sum() == 3 and not found[1][mask[1, 1:] * mask[1, :-1] == 0].any()
    kept = (mask[:, 1:] * mask[:, :-1]).bool()
    assert_same(found[kept], full[kept])
    assert_same(found[0], rk.linear_logprobs_from_model(model, ids[:1])[0])


def test_rows_and_ignored_labels():
    """K responses behind one prompt: several labels read one position of a packed row."""
    model = make("GPT2").double()
    packed = rk.pack_responses([[5, 6, 7]], [[[8, 9], [10, 11, 12]]])
    inputs = {"attention_mask": packed.attention_mask, "position_ids": packed.position_ids}
    labels = torch.cat([packed.labels[:-1], torch.tensor([-100])])
    found = rk.linear_logprobs_from_model(model, packed.input_ids, labels, rows=packed.label_rows, **inputs)
    wanted = [from_logits(model, torch.tensor([row[:-1]]), torch.tensor([row[1:]]))[0][0, 2:]
              for row in ([5, 6, 7, 8, 9], [5, 6, 7, 10, 11, 12])]  # fmt: skip
    wanted = torch.cat(wanted)
    wanted[-1] = 0.0
    assert_same(found, wanted)


def test_frozen_head_and_gradient_checkpointing():
    model, ids = make("Llama").double(), tokens()
    wanted = torch.autograd.grad(
        rk.linear_logprobs_from_model(model, ids).mean(), model.model.layers[0].mlp.parameters()
    )
    model.lm_head.weight.requires_grad_(False)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = rk.linear_logprobs_from_model(model, ids).mean()
    grads = torch.autograd.grad(found, model.model.layers[0].mlp.parameters())
    torch.testing.assert_close(grads, wanted, atol=STORED * max(x.abs().max().item() for x in wanted), rtol=0)


def test_call_with_head():
    """Any function in the head's place; a tuple of results; the model is as before, also after an error."""
    model, ids = make("Granite"), tokens()
    reference = model(ids).logits
    generator = torch.get_rng_state()

    def sft_and_kl(hidden, head):
        flat, options = hidden.flatten(0, 1), head.options()
        loss = rk.linear_cross_entropy(flat, head.weight, ids.flatten(), bias=head.bias, **options)
        return loss, rk.linear_kl(flat, head.weight, flat.flip(0), head.weight, **options)

    loss, kl = rk.call_with_head(model, sft_and_kl, input_ids=ids)
    torch.testing.assert_close(loss, F.cross_entropy(reference.flatten(0, 1), ids.flatten()))
    log_p = reference.flatten(0, 1).log_softmax(-1)
    torch.testing.assert_close(kl, (log_p.exp() * (log_p - log_p.flip(0))).sum(-1), atol=1e-6, rtol=1e-5)
    with pytest.raises(ZeroDivisionError):
        rk.call_with_head(model, lambda hidden, head: 1 / 0, input_ids=ids)
    assert torch.equal(model(ids).logits, reference) and "forward" not in vars(model.lm_head)
    assert torch.equal(generator, torch.get_rng_state())


def test_other_wrappers():
    """A head whose forward somebody else has replaced keeps that; PEFT-like wrappers are looked into."""
    model, ids = make("Llama"), tokens()
    wanted = rk.linear_logprobs_from_model(model, ids)
    calls = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: calls.append(output.shape))
    model.lm_head.forward = mine = lambda hidden: F.linear(hidden, model.lm_head.weight)

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.wrapped = model

        def forward(self, **inputs):
            return self.wrapped(**inputs)

        def get_base_model(self):
            return self.wrapped

    assert torch.equal(rk.linear_logprobs_from_model(Wrapper(), ids), wanted)
    assert model.lm_head.forward is mine and len(calls) == 1
    handle.remove()


@pytest.mark.slow
def test_compiled_model():
    model, ids = make("Llama"), tokens()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(
        rk.linear_logprobs_from_model(compiled, ids), rk.linear_logprobs_from_model(model, ids), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize(("family", "known"), [("GPT2", False), pytest.param("Gemma2", True, marks=pytest.mark.slow)])
def test_compiled_caller(family, known):
    """torch.compile around the call is one graph, whether the head was found before or not; a changed cap is seen."""
    model, ids = make(family), tokens()
    # As a new process compiles: other tests have compiled other models' forwards.
    torch.compiler.reset()

    def log_probs(ids):
        return rk.linear_logprobs_from_model(model, ids)

    whole = torch.compile(log_probs, backend="eager", fullgraph=True)
    wanted = log_probs(ids) if known else from_logits(model, ids[:, :-1], ids[:, 1:])[0].float()
    torch.testing.assert_close(whole(ids), wanted, atol=1e-6, rtol=1e-5)
    ours, theirs = (torch.autograd.grad(x.sum(), list(model.parameters())) for x in (whole(ids), log_probs(ids)))
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6 * want.abs().max().item(), rtol=1e-5)
    assert "forward" not in vars(model.get_output_embeddings())
    if family == "Gemma2":
        for cap in (0.5, 0.7, None):
            model.config.final_logit_softcapping = cap
            changed = log_probs(ids)
            assert (changed - wanted).abs().max() > 0.1
            torch.testing.assert_close(whole(ids), changed, atol=1e-6, rtol=1e-5)


class Squared(transformers.LlamaForCausalLM):
    """A model that does to its logits what no factor and no soft cap does."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * output.logits.abs()
        return output


def test_bad_input():
    model, ids = make("Llama"), tokens()
    strange = Squared(model.config)
    headless = transformers.LlamaModel(model.config)
    quantised = make("Llama")
    quantised.lm_head = nn.Sequential(quantised.lm_head)
    t5 = {"vocab_size": 8, "d_model": 8, "d_ff": 8, "d_kv": 4, "num_layers": 1, "num_heads": 2}
    seq2seq = transformers.T5ForConditionalGeneration(transformers.T5Config(**t5))
    bad = [
        (lambda: rk.find_head(strange), "Squared does something else to its logits than a factor and a soft cap"),
        (lambda: rk.find_head(nn.Linear(2, 2)), "model is a Linear, expected a causal language model"),
        (
            lambda: rk.find_head(headless),
            "the LM head of LlamaModel is a NoneType, expected a torch.nn.Linear, or one with a single active LoRA",
        ),
        (
            lambda: rk.find_head(quantised),
            "the LM head of LlamaForCausalLM is a torch.nn.modules.container.Sequential, expected a torch.nn.Linear",
        ),
        (lambda: rk.find_head(seq2seq), "an encoder and a decoder"),
        (lambda: rk.linear_logprobs_from_model(model, ids.float()), "input_ids has dtype float32"),
        (lambda: rk.linear_logprobs_from_model(model, ids[0]), "input_ids has shape [7], expected [*, *] ([B, T])"),
        (lambda: rk.linear_logprobs_from_model(model, ids, ids[:, 1:]), "labels has shape [3, 6], expected [3, 7]"),
        (lambda: rk.linear_logprobs_from_model(model, ids, rows=ids[0]), "rows is given without labels"),
        (lambda: rk.linear_logprobs_from_model(model, ids, attention_mask=ids[:1]), "attention_mask has shape [1, 7]"),
        (lambda: rk.linear_logprobs_from_model(model, ids, logits_to_keep=1), "logits_to_keep cannot be given"),
    ]
    for call, message in bad:
        with pytest.raises(ValueError) as error:
            call()
        assert message in str(error.value)


@pytest.mark.slow
def test_sharded_models(gloo_ranks):
    """Two gloo ranks with FSDP2 (whole, head apart, tied, with an adapter) and DDP: the gradients of one process."""
    gloo_ranks("model_head_ranks.py", 2)
