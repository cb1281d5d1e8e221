"""A head with a LoRA adapter of peft: the log-probs and gradients of the model's own logits, or a refusal."""

import pytest
import torch

import rlhf_kernels as rk
from tests.kernels.test_model_head import from_logits, make, tokens
from tests.roundings import assert_same

peft = pytest.importorskip("peft", reason="needs the package peft")


def adapted(family="Llama", name="default", **options):
    """A model in float64 with adapters that matter on its head and on one other layer."""
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=3,
        lora_alpha=6,
        target_modules=["lm_head", "q_proj"],
        init_lora_weights=False,
        **options,
    )
    torch.manual_seed(0)
    return peft.get_peft_model(make(family), lora, adapter_name=name).double().eval()


def trained(model):
    return {name: x for name, x in model.named_parameters() if x.requires_grad}


@pytest.mark.parametrize("family", ("Llama", "Phi", "Gemma2", "Cohere"))
def test_same_as_logits(family):
    """Log-probs, entropy and the gradients of all adapters, with a bias, a soft cap and a factor after the head."""
    model, ids, labels = adapted(family), tokens(), tokens(seed=1)
    head = rk.find_head(model)
    a, b, scaling = head.lora
    assert (a.shape, b.shape, scaling) == ((3, 16), (40, 3), 2.0) and head.options()["lora"] == head.lora
    found = rk.linear_logprobs_from_model(model, ids, labels, temperature=0.7, return_entropy=True)
    wanted = from_logits(model, ids, labels, temperature=0.7)
    weights, parameters = torch.linspace(-1, 2, ids.numel()).double().view(ids.shape), trained(model)
    assert sum("lora_" in name and "lm_head" in name for name in parameters) == 2
    ours, theirs = (
        torch.autograd.grad(((log_probs + 0.5 * entropy) * weights).sum(), list(parameters.values()))
        for log_probs, entropy in (found, wanted)
    )
    for got, want in zip((*found, *ours), (*wanted, *theirs), strict=True):
        assert_same(got, want)
    with model.disable_adapter():
        base = from_logits(model, ids, labels)[0]
        assert head.lora is None
        assert_same(rk.linear_logprobs_from_model(model, ids, labels), base)
    assert (base - from_logits(model, ids, labels)[0]).abs().max() > 0.1


def test_losses_in_the_place_of_the_head():
    model, ids = adapted("Granite"), tokens()

    def loss(hidden, head):
        return rk.linear_cross_entropy(hidden.flatten(0, 1), head.weight, ids.flatten(), **head.options())

    parameters = list(trained(model).values())
    found = rk.call_with_head(model, loss, input_ids=ids)
    wanted = torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), ids.flatten())
    assert_same(found, wanted)
    ours, theirs = (torch.autograd.grad(x, parameters) for x in (found, wanted))
    for got, want in zip(ours, theirs, strict=True):
        assert_same(got, want)

    def kl(hidden, head):
        return rk.linear_kl(hidden, head.weight, hidden, head.weight, **head.options())

    with pytest.raises(TypeError, match="lora"):
        rk.call_with_head(model, kl, input_ids=ids)
    assert "forward" not in vars(model.get_output_embeddings())


def test_the_adapter_that_is_active():
    """Of two adapters the one that is chosen, at each call; rank-stabilised ones have another scaling."""
    model, ids = adapted(), tokens()
    model.add_adapter("other", peft.LoraConfig(
        r=4, target_modules=["lm_head"], init_lora_weights=False, use_rslora=True, lora_alpha=8
    ))  # fmt: skip
    model.double().eval()
    for name, rank, scaling in (("default", 3, 2.0), ("other", 4, 4.0)):
        model.set_adapter(name)
        head = rk.find_head(model)
        assert head.lora[0].shape[0] == rank and head.lora[2] == pytest.approx(scaling)
        assert_same(rk.linear_logprobs_from_model(model, ids, ids), from_logits(model, ids, ids)[0])


def test_dropout_is_refused_while_it_acts():
    model, ids = adapted(lora_dropout=0.1), tokens()
    assert_same(rk.linear_logprobs_from_model(model, ids, ids), from_logits(model, ids, ids)[0])
    model.train()
    with pytest.raises(ValueError, match="single active LoRA adapter of peft, which is not merged and has no dropout"):
        rk.find_head(model)


REFUSED = {"dora": {"use_dora": True}, "bias": {"lora_bias": True}, "merged": {}, "two": {}, "saved": {}, "hooked": {}}


@pytest.mark.parametrize("how", REFUSED)
def test_what_is_more_than_a_plain_adapter_is_refused(how):
    model, kind = adapted(**REFUSED[how]), r"peft\.tuners\.lora\.layer\.Linear"
    if how == "merged":
        model.merge_adapter()
    if how == "two":
        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["lm_head"]))
        model.base_model.set_adapter(["default", "other"])
    if how == "hooked":  # as what gathers a sharded weight
        model.get_output_embeddings().lora_B["default"].register_forward_pre_hook(lambda module, args: None)
    if how == "saved":
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
        model, kind = peft.get_peft_model(make("Llama"), config), r"peft\.utils\.other\.ModulesToSaveWrapper"
    with pytest.raises(ValueError, match=f"the LM head of LlamaForCausalLM is a {kind}, which adapters put in its"):
        rk.find_head(model)


def test_compiled_caller():
    model, ids = adapted(), tokens()
    torch.compiler.reset()

    def log_probs(ids):
        return rk.linear_logprobs_from_model(model, ids)

    wanted = from_logits(model, ids[:, :-1], ids[:, 1:])[0]
    whole = torch.compile(log_probs, backend="eager", fullgraph=True)
    assert_same(whole(ids), wanted)
