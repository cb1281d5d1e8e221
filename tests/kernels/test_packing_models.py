"""Packed responses through the models of transformers: traps 2 and 3 for each architecture and each attention."""

import gc
import subprocess
import sys

import pytest
import torch

from rlhf_kernels import bradley_terry_loss, pack_responses

transformers = pytest.importorskip("transformers", reason="needs the package transformers")
from rlhf_kernels.integrations.transformers import (  # noqa: E402 - it imports transformers
    ATTENTION,
    check_packing,
    mask_for,
    packed_inputs,
    takes_shared_prefix,
    use_shared_prefix_attention,
)
from tests.roundings import assert_same  # noqa: E402

VOCABULARY = 50
LONGEST = 16  # tokens of the longest prompt with its response, and the sliding windows
IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**WIDTH, "intermediate_size": 64, "max_position_embeddings": 64}
GROUPED = {**DECODER, "num_key_value_heads": 2}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GPT2 |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
GEMMA = {**GROUPED, "head_dim": 8}
WINDOWED = {**GEMMA, "sliding_window": LONGEST, "query_pre_attn_scalar": 8}
NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
CONFIGS = {
    "llama": ("Llama", GROUPED),
    "qwen2": ("Qwen2", GROUPED),
    "qwen3": ("Qwen3", GEMMA),
    "gpt2": ("GPT2", GPT2),
    "gpt_neox": ("GPTNeoX", {**DECODER, **NO_DROPOUT}),
    "gemma": ("Gemma", GEMMA),
    "gemma2": ("Gemma2", WINDOWED),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": LONGEST}),
    "opt": ("OPT", {**WIDTH, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0, "attention_dropout": 0.0}),
    "phi": ("Phi", GROUPED),
    "falcon": ("Falcon", {**WIDTH, "max_position_embeddings": 64, "alibi": False}),
}
FORMS = ("two_part", "dense", "eager")
EAGER_ONLY = ("gemma2",)  # its soft cap on attention scores is not to be had in SDPA
OWN_SDPA = ("falcon",)  # takes the dense mask alone
QUICK = ("llama", "gpt2", "gemma2", "falcon")
CASES = [
    pytest.param(family, form, marks=() if family in QUICK else pytest.mark.slow)
    for family in CONFIGS
    for form in FORMS
    if form == "eager" or not (family in EAGER_ONLY or (family in OWN_SDPA and form == "two_part"))
]


def tiny_model(family, form="dense", dtype=torch.float32, **options):
    """A random two-layer model; its weights are so large that every token in sight matters."""
    name, shape = CONFIGS[family]
    torch.manual_seed(0)
    kind = "ForSequenceClassification" if "num_labels" in options else "ForCausalLM"
    config = getattr(transformers, f"{name}Config")(**shape, **IDS, **options)
    implementation = "eager" if form == "eager" else "sdpa"
    model = getattr(transformers, f"AutoModel{kind}").from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape) * 0.1)
    model = model.to(dtype)
    return use_shared_prefix_attention(model, LONGEST) if form == "two_part" else model


def example(seed=0):
    """Prompts and responses, one of them empty, of at most LONGEST tokens together."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(5, [2, 4, 3, 1]), (1, [6, 2]), (7, [9]), (2, [1, 0, 2])]
    prompts = [torch.randint(3, VOCABULARY, (prompt,), generator=generator).tolist() for prompt, _ in sizes]
    responses = [[torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in ns] for _, ns in sizes]
    return prompts, responses


def inputs_for(model, packed, form):
    return packed_inputs(model, packed, attention="two_part" if form == "two_part" else "dense")


def read_log_probs(logits, packed):
    """Log-probs [N] of the response tokens, read through label_rows."""
    rows = logits.flatten(0, 1).log_softmax(-1)[packed.label_rows]
    return rows.gather(1, packed.labels[:, None])[:, 0]


def separate_log_probs(model, prompts, responses):
    """The same from one unpadded row for each response."""
    result = []
    for prompt, group in zip(prompts, responses, strict=True):
        for response in group:
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
            result.append(logits[len(prompt) - 1 : -1].gather(1, torch.tensor(response).long()[:, None])[:, 0])
    return torch.cat(result)


def assert_same_gradients(model, actual, expected):
    """Of two scalars, in all weights; to STORED of the largest entry of all."""
    weights, options = list(model.parameters()), {"allow_unused": True, "retain_graph": True}
    got, wanted = (torch.autograd.grad(x, weights, **options) for x in (actual, expected))
    assert [g is None for g in got] == [w is None for w in wanted]
    got, wanted = (torch.cat([g.flatten() for g in grads if g is not None]) for grads in (got, wanted))
    largest = wanted.abs().max()
    assert_same(got / largest, wanted / largest)


@pytest.mark.parametrize("max_tokens", [None, 24])
@pytest.mark.parametrize(("family", "form"), CASES)
def test_trap_03_shared_prefix_equals_separate_rows(family, form, max_tokens):
    """Log-probs and their gradients as from one row for each response."""
    model = tiny_model(family, form, dtype=torch.float64)
    prompts, responses = example()
    packed = pack_responses(prompts, responses, max_tokens=max_tokens)
    assert len(packed.input_ids) < len(prompts) if max_tokens else len(packed.input_ids) >= 2
    expected = separate_log_probs(model, prompts, responses)
    actual = read_log_probs(model(**inputs_for(model, packed, form)).logits, packed)
    assert_same(actual, expected)
    weights = torch.linspace(-1, 1, len(expected), dtype=torch.float64)
    assert_same_gradients(model, actual @ weights, expected @ weights)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_trap_03_no_mask_is_wrong(family):
    """With attention_mask=None the segments are guessed from the positions: the log-probs differ."""
    model = tiny_model(family, dtype=torch.float64).eval()
    prompts, responses = [[5, 6, 7, 8]], [[[9, 10, 11], [12, 13], [14, 15]]]
    packed = pack_responses(prompts, responses)
    inputs = inputs_for(model, packed, "dense")
    with torch.no_grad():
        expected = separate_log_probs(model, prompts, responses)
        naive = read_log_probs(model(**{**inputs, "attention_mask": None}).logits, packed)
        good = read_log_probs(model(**inputs).logits, packed)
    second = slice(packed.cu_responses[1], None)  # responses from the second on
    assert (naive - expected)[second].abs().max() > 0.01
    assert_same(good, expected)


@pytest.mark.parametrize(("family", "form"), CASES)
def test_trap_02_scores_do_not_depend_on_the_batch(family, form):
    """Reward-model scores and loss: alone, behind a shared prompt, and with several prompts in one row."""
    model = tiny_model(family, form, num_labels=1, dtype=torch.float64).eval()
    prompts, responses = example(seed=1)
    rows = [prompt + response for prompt, group in zip(prompts, responses, strict=True) for response in group]
    ranks = torch.tensor([0, 2, 1, 0, 1, 0, 0, 2, 0, 1])
    cu_groups = torch.tensor([0, 4, 6, 7, 10])

    def loss(scores):
        return bradley_terry_loss(scores, ranks, cu_groups).loss

    alone = torch.cat([model.score(model.base_model(input_ids=torch.tensor([row]))[0])[0, -1] for row in rows])
    assert alone.std() > 0.1
    for max_tokens, number_of_rows in ((None, 3), (64, 1)):
        packed = pack_responses(prompts, responses, max_tokens=max_tokens)
        assert len(packed.input_ids) == number_of_rows and torch.equal(packed.cu_groups, cu_groups)
        hidden = model.base_model(**inputs_for(model, packed, form))[0]
        scores = model.score(hidden).flatten()[packed.last_token_rows]
        assert_same(scores, alone)
        assert_same_gradients(model, loss(scores), loss(alone))


@pytest.mark.parametrize("form", FORMS)
def test_masked_garbage(form):
    """A pad id that is also a real token changes nothing; what the model computes at padding is finite and unread."""
    model = tiny_model("llama", form).eval()
    prompts, responses = [[5, 6], [7]], [[[8, 2], [9, 10, 2]], [[2]]]
    with torch.no_grad():
        runs = []
        for pad_token_id in (0, 2, 49):
            packed = pack_responses(prompts, responses, max_tokens=7, pad_token_id=pad_token_id)
            assert packed.input_ids.shape == (2, 7) and packed.input_ids[1, 2:].eq(pad_token_id).all()
            logits = model(**inputs_for(model, packed, form)).logits
            assert logits.isfinite().all()
            runs.append(read_log_probs(logits, packed))
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_under_checkpointing(family, use_reentrant):
    """Activations that are computed again in the backward, where no context of the forward is left."""
    model = tiny_model(family, "two_part").train()
    packed = pack_responses(*example())
    inputs = inputs_for(model, packed, "two_part")
    weights = torch.linspace(-1, 1, len(packed.labels))

    def gradients():
        model.zero_grad()
        (read_log_probs(model(**inputs, use_cache=False).logits, packed) @ weights).backward()
        return [weight.grad for weight in model.parameters()]

    expected = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    for got, wanted in zip(gradients(), expected, strict=True):
        assert torch.equal(got, wanted)


def test_gradients_under_ddp(tmp_path):
    """DDP hands the layout on like any other mask."""
    model = tiny_model("llama", "two_part")
    packed = pack_responses(*example())
    inputs = inputs_for(model, packed, "two_part")
    read_log_probs(model(**inputs).logits, packed).sum().backward()
    expected = [weight.grad.clone() for weight in model.parameters()]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        model.zero_grad()
        read_log_probs(wrapped(**inputs).logits, packed).sum().backward()
        assert mask_for(wrapped, packed.layout) is packed.layout
    finally:
        # DDP must not outlive its group: it would end gloo's threads while it holds the GIL that they may wait for.
        wrapped = None
        gc.collect()
        torch.distributed.destroy_process_group()
    for weight, wanted in zip(model.parameters(), expected, strict=True):
        assert torch.equal(weight.grad, wanted)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_other_rows_go_through_sdpa(family):
    """The switched model gives SDPA's bits: padded rows, no mask, the dense packed mask, generation with a cache."""
    plain, switched = tiny_model(family).eval(), tiny_model(family, "two_part").eval()
    assert switched.config._attn_implementation == ATTENTION and ATTENTION not in switched.config.to_json_string()
    ids = torch.arange(3, 23).view(2, 10)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    packed = pack_responses(*example())
    rows = [{"input_ids": ids, "attention_mask": mask}, {"input_ids": ids}, packed_inputs(plain, packed)]
    with torch.no_grad():
        for inputs in rows:
            assert torch.equal(plain(**inputs).logits, switched(**inputs).logits)
        options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
        assert torch.equal(plain.generate(ids, **options), switched.generate(ids, **options))


def test_contract_no_state_is_left_by_an_error():
    """After a forward that raised, the model and another one compute as if nothing had been."""
    model, other = tiny_model("gpt2", "two_part"), tiny_model("gpt2", "two_part")
    packed = pack_responses(*example())
    inputs = inputs_for(model, packed, "two_part")
    expected = model(**inputs).logits
    model.transformer.h[1].attn.attn_dropout.p = 0.1
    with pytest.raises(ValueError, match=r"dropout: got 0.1, but the attention of packed responses has none"):
        model.train()(**inputs)
    model.transformer.h[1].attn.attn_dropout.p = 0.0
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(**inputs).logits, expected)
    assert torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits)


def test_contract_autocast():
    """Under bf16 autocast the two forms differ by roundings of bf16."""
    model = tiny_model("llama", "two_part").eval()
    packed = pack_responses(*example())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        two, dense = (model(**inputs_for(model, packed, form)).logits for form in ("two_part", "dense"))
    assert two.dtype == torch.bfloat16
    two, dense = (read_log_probs(logits.float(), packed) for logits in (two, dense))
    assert 0 < (two - dense).abs().max() <= 0.1


def test_contract_forms_chosen_by_size():
    """Two parts for long rows, the dense mask for short ones; mask_for keeps a layout where it is served."""
    model, plain = tiny_model("llama", "two_part"), tiny_model("llama")
    short, long = pack_responses(*example()), pack_responses([[5] * 8], [[[6] * 500] * 4])
    assert torch.equal(packed_inputs(model, short)["attention_mask"], short.attention_mask)
    assert packed_inputs(model, long)["attention_mask"] is long.layout
    assert packed_inputs(plain, long)["attention_mask"].dtype == torch.bool
    assert mask_for(model, short.layout) is short.layout
    assert torch.equal(mask_for(plain, short.layout), short.attention_mask)
    assert mask_for(plain, None) is None and mask_for(plain, short.attention_mask) is short.attention_mask
    flex = tiny_model("llama")
    flex.set_attn_implementation("flex_attention")
    assert type(packed_inputs(flex, short)["attention_mask"]).__name__ == "BlockMask"


@pytest.mark.parametrize("logit_scale", [1.0, 0.25])
@pytest.mark.parametrize("switched", [False, True])
def test_batches_of_the_stages(logit_scale, switched):
    """A long batch holds the layout; a model with or without the attention for it reads the same log-probs from it."""
    from rlhf import training

    config = transformers.CohereConfig(**GROUPED, **IDS, logit_scale=logit_scale)  # other than 1: through the logits
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double().eval()
    model = use_shared_prefix_attention(model) if switched else model
    examples = [{"prompt": [5, 6, 7, 8], "responses": torch.randint(3, VOCABULARY, (4, 300)).tolist()}]
    packed, padded = (training.make_batch(examples, 0, packed=packed, hidden_size=32) for packed in (True, False))
    assert packed.keys() == padded.keys() and packed["attention_mask"].shape == (1, 1, 2, 1204)
    with torch.no_grad():
        found, wanted = (training.response_log_probs(model, batch) for batch in (packed, padded))
    assert wanted.std() > 1e-3
    assert_same(found, wanted)


def test_import_of_the_losses_leaves_transformers_alone():
    script = "import sys, rlhf_kernels; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


REFUSED = {
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, "ALiBi biases follow the index in the row"),
    "mpt": ("Mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4}, "ALiBi biases follow the index in the row"),
    "falcon": ("Falcon", {**WIDTH, "alibi": True}, "ALiBi biases follow the index in the row"),
    "mamba": ("Mamba", {"hidden_size": 32, "num_hidden_layers": 2}, r"its layers \(linear_attention\) carry a"),
    "rwkv": ("Rwkv", {"hidden_size": 32, "num_hidden_layers": 2}, "its layers carry a state along the row"),
    "recurrent_gemma": (
        "RecurrentGemma", {**WIDTH, "lru_width": 32, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 64},
        r"its layers \(linear_attention\) carry a state",
    ),
    "lfm2": ("Lfm2", {**GROUPED, "layer_types": ["conv", "full_attention"]}, r"its layers \(conv\) carry a state"),
    "qwen3_next": ("Qwen3Next", GROUPED, r"its layers \(linear_attention\) carry a state"),
    "gpt_neo": (
        "GPTNeo", {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        "its local attention looks back by the index in the row",
    ),
    "mistral": (
        "Mistral", {**GROUPED, "sliding_window": 15},
        r"windows of 15 tokens \(sliding_window\), and a prompt with its response may have 64",
    ),
    "qwen2": (
        "Qwen2", {**GROUPED, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
        r"windows of 8 tokens \(sliding_window\)",
    ),
    "gemma3": ("Gemma3Text", {**WINDOWED, "sliding_window": 8}, r"windows of 8 tokens \(sliding_window\)"),
    "xlnet": ("XLNet", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 32}, "it takes no position_ids"),
}  # fmt: skip


@pytest.mark.parametrize("family", REFUSED)
def test_bad_input_models(family):
    """Models that cannot give the same results packed are refused, with the reason."""
    name, shape, message = REFUSED[family]
    config = getattr(transformers, f"{name}Config")(**{**IDS, **shape})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=rf"^{type(model).__name__} cannot take packed responses: .*{message}"):
        check_packing(model)
    with pytest.raises(ValueError, match=message):
        use_shared_prefix_attention(model)


def test_bad_input_windows_that_are_long_enough():
    """A window is no obstacle to texts that fit into it, and the forward says so where they do not."""
    model = tiny_model("mistral", "two_part")
    with pytest.raises(ValueError, match="windows of 16 tokens"):
        check_packing(model)
    check_packing(model, longest=LONGEST)
    fitting, long = (pack_responses([[5] * 9], [[[6] * n, [7] * n, [8]]]) for n in (7, 8))
    assert packed_inputs(model, fitting, attention="two_part")["attention_mask"] is fitting.layout
    with pytest.raises(ValueError, match=r"windows of 16 tokens .* may have 17"):
        packed_inputs(model, long)
    model(fitting.input_ids, position_ids=fitting.position_ids, attention_mask=fitting.layout)
    with pytest.raises(ValueError, match="sliding_window is 16, but a prompt with its response is longer"):
        model(long.input_ids, position_ids=long.position_ids, attention_mask=long.layout)


def test_bad_input_attention():
    """An attention that does not know the layout raises, whatever it is; so does a wish that cannot be met."""
    packed = pack_responses(*example())
    layout = {"input_ids": packed.input_ids, "position_ids": packed.position_ids, "attention_mask": packed.layout}
    for form in ("dense", "eager"):
        with pytest.raises(RuntimeError):
            tiny_model("llama", form)(**layout)
    with pytest.raises(ValueError, match="attention is 'two_part', but the model has 'sdpa' and the tokens are on"):
        packed_inputs(tiny_model("llama"), packed, attention="two_part")
    with pytest.raises(ValueError, match="attention must be one of 'auto', 'two_part', 'dense', got 'flash'"):
        packed_inputs(tiny_model("llama"), packed, attention="flash")
    with pytest.raises(ValueError, match="model has the attention 'eager', expected 'sdpa'"):
        use_shared_prefix_attention(tiny_model("llama", "eager"))
    with pytest.raises(ValueError, match="FalconForCausalLM has an attention of its own"):
        use_shared_prefix_attention(tiny_model("falcon"))
    assert takes_shared_prefix(tiny_model("gpt2")) and not takes_shared_prefix(tiny_model("falcon"))
    capped = tiny_model("gemma2", "eager")
    capped.config._attn_implementation_internal = ATTENTION
    with pytest.raises(ValueError, match=r"it caps its attention scores, .* load it with 'eager'"):
        packed_inputs(capped, packed)
    with pytest.raises(ValueError, match="softcap: Gemma2Attention wants it"):
        capped(**layout)
    flash = tiny_model("llama")
    flash.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="its attention 'flash_attention_2' takes no mask of this kind"):
        check_packing(flash)
