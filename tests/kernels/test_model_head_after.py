"""What a model does to its logits after its head: measured where it is a factor and a soft cap, else refused."""

import pytest
import torch
import transformers
from torch import nn
from transformers import LlamaForCausalLM

import rlhf_kernels as rk
from tests.kernels.test_model_head import SHAPE, from_logits, make, tokens
from tests.roundings import assert_same

LOWEST = torch.finfo(torch.float32).min


def changed(change):
    """A Llama whose forward ends with change(its output)."""

    class Changed(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            change(self, output)
            return output

    return Changed(make("Llama").config).eval()


def halve(model, output):
    output.logits.mul_(0.5)


def divide(model, output):
    logits = output.logits
    logits /= 0.25


def cap(model, output):
    output.logits.div_(3.0).tanh_()
    output.logits = 3.0 * output.logits


def ban_first(model, output):
    output.logits[..., 5] = LOWEST


def ban_late(model, output):
    output.logits[..., 30:] = -torch.inf


def cut(model, output):
    output.logits = output.logits[..., :32]


def shift(model, output):
    output.logits = output.logits + torch.linspace(-2, 2, SHAPE["vocab_size"])


def roll(model, output):
    output.logits = output.logits.roll(12, -1)


def pick(model, output):
    output.logits[..., torch.tensor([100])] = 0.0


def spoil(model, output):
    output.logits.fill_(torch.nan)


IN_PLACE = [(halve, 0.5, None), (divide, 4.0, None), (cap, 1.0, 3.0)]
REFUSED = [
    (ban_first, "turns -0.5625 into -3.403e+38 in column 5, the first of 1 such columns among 40"),
    (ban_late, "into -inf in column 30, the first of 10 such columns among 40"),
    (cut, "it returns 32 for the 40 columns of its head"),
    (shift, "such columns among 40"),
    (roll, "such columns among 40"),
    (spoil, "into nan in column 0, the first of 40 such columns among 40"),
]


@pytest.mark.parametrize(("change", "scale", "softcap"), IN_PLACE, ids=lambda x: getattr(x, "__name__", None))
def test_logits_changed_in_place(change, scale, softcap):
    """The probe has memory of its own: what is done to it in place is seen, and reaches no result."""
    model, ids, labels = changed(change).double(), tokens(), tokens(seed=1)
    head = rk.find_head(model)
    assert head.scale == pytest.approx(scale, rel=1e-6) and head.softcap == softcap
    found = rk.linear_logprobs_from_model(model, ids, labels)
    wanted, _ = from_logits(model, ids, labels)
    assert_same(found, wanted)
    ours, theirs = (torch.autograd.grad(x.sum(), list(model.parameters())) for x in (found, wanted))
    for got, want in zip(ours, theirs, strict=True):
        assert_same(got, want)


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda x: getattr(x, "__name__", None))
def test_what_is_refused(change, message):
    """Columns that are banned, cut, shifted or moved, wherever they stand; the refusal is kept like a finding."""
    model, calls = changed(change), []
    model.register_forward_hook(lambda *args: calls.append(1))
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"^Changed does something else to its logits than a factor and a soft cap"
        ) as error:
            rk.linear_logprobs_from_model(model, tokens())
        assert message in str(error.value) and "\n" not in str(error.value)
    assert len(calls) == 1


def test_numbers_written_into_the_zeros_reach_nothing():
    """What a model writes in place where its logits would be changes neither results nor gradients."""
    spoils, ids = [], tokens()
    model = changed(lambda model, output: output.logits.fill_(torch.nan) if spoils else None).double()
    wanted = rk.linear_logprobs_from_model(model, ids)
    wanted_grads = torch.autograd.grad(wanted.sum(), list(model.parameters()))
    spoils.append(True)
    assert model(ids).logits.isnan().all()
    found = rk.linear_logprobs_from_model(model, ids)
    assert torch.equal(found, wanted)
    for got, want in zip(torch.autograd.grad(found.sum(), list(model.parameters())), wanted_grads, strict=True):
        assert torch.equal(got, want)


def test_errors_inside_the_probe_are_refusals():
    message = r"^Changed fails on one token with numbers in the place of its logits \(IndexError: index 100 is out of "
    with pytest.raises(ValueError, match=message):
        rk.find_head(changed(pick))


def test_a_factor_that_is_trained():
    """A scale among the parameters would go on changing after it was measured."""
    model = changed(lambda model, output: setattr(output, "logits", output.logits * model.factor))
    model.factor = nn.Parameter(torch.tensor(0.5))
    with pytest.raises(ValueError, match="it changes them by weights that are trained"):
        rk.find_head(model)
    model.factor.requires_grad_(False)
    model.config.vocab_size = SHAPE["vocab_size"] + 1  # any number of the config: it is measured again
    assert rk.find_head(model).scale == 0.5


@pytest.mark.parametrize("family", ["Gemma2", "Cohere"])
def test_changed_settings_are_seen(family):
    """A number of the config, or a factor of the model, that changes after the first call."""
    model, ids, labels = make(family).double(), tokens(), tokens(seed=1)
    before = rk.linear_logprobs_from_model(model, ids, labels)
    if family == "Gemma2":
        model.config.final_logit_softcapping = 3.5
    else:
        model.logit_scale = 3.5
    found = rk.linear_logprobs_from_model(model, ids, labels)
    assert (found - before).abs().max() > 1e-2
    assert_same(found, from_logits(model, ids, labels)[0])


def test_a_cap_set_to_none():
    model = make("Gemma2")
    assert rk.find_head(model).softcap == 2.0
    model.config.final_logit_softcapping = None
    assert rk.find_head(model).softcap is None


def test_weights_that_accelerate_keeps_elsewhere():
    """Offloaded weights lie on no device until a module runs; the head's are there while the function runs."""
    accelerate = pytest.importorskip("accelerate", reason="needs the package accelerate")
    model, ids = make("Llama").double(), tokens()
    wanted = rk.linear_logprobs_from_model(model, ids).detach()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.lm_head.weight.device.type == "meta"
    with torch.no_grad():
        assert torch.equal(rk.linear_logprobs_from_model(model, ids), wanted)
    assert model.lm_head.weight.device.type == "meta"
    unknown = make("Llama")
    accelerate.cpu_offload(unknown, execution_device=torch.device("cpu"))
    assert rk.find_head(unknown).scale == 1.0


MOE = {**SHAPE, "num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 1, "pad_token_id": 0}


def test_router_losses_are_not_computed():
    """output_router_logits in the config: nobody reads the routers' loss here, which packed rows would break."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**MOE, output_router_logits=True)
    model = transformers.MixtralForCausalLM._from_config(config, experts_implementation="eager").double().eval()
    packed = rk.pack_responses([[5, 6, 7]], [[[8, 9], [10, 11, 12]]])
    inputs = {"attention_mask": packed.attention_mask, "position_ids": packed.position_ids}
    found = rk.linear_logprobs_from_model(model, packed.input_ids, packed.labels, rows=packed.label_rows, **inputs)
    wanted = [from_logits(model, torch.tensor([row[:-1]]), torch.tensor([row[1:]]))[0][0, 2:]
              for row in ([5, 6, 7, 8, 9], [5, 6, 7, 10, 11, 12])]  # fmt: skip
    assert_same(found, torch.cat(wanted))
    outputs = []
    model.register_forward_hook(lambda module, args, output: outputs.append(output.aux_loss))
    rk.linear_logprobs_from_model(model, tokens())
    rk.linear_logprobs_from_model(model, tokens(), output_router_logits=True)
    assert outputs[0] is None and outputs[1] is not None


class TwoStreams(LlamaForCausalLM):
    """Its head reads hidden states with a dimension more, as ProphetNet's does."""

    def forward(self, input_ids, use_cache=False):
        hidden = self.model(input_ids, use_cache=use_cache).last_hidden_state
        logits = self.lm_head(torch.stack([hidden, hidden], 1))[:, 0]
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits)


def test_hidden_states_of_another_shape():
    message = r"the head of TwoStreams reads hidden states of shape \[1, 2, 1, 16\] for one token, not \[1, 1, H\]"
    with pytest.raises(ValueError, match=message):
        rk.find_head(TwoStreams(make("Llama").config))


def test_adapters():
    """On the head they are named, if not a plain LoRA; tokens of their own before the text are refused in the call."""
    peft = pytest.importorskip("peft", reason="needs the package peft")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"], use_dora=True)
    message = r"the LM head of LlamaForCausalLM is a peft\.tuners\.lora\.layer\.Linear, which adapters put in its place"
    with pytest.raises(ValueError, match=message):
        rk.find_head(peft.get_peft_model(make("Llama"), lora))
    prompt = peft.get_peft_model(make("Llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    message = r"reads hidden states of shape \[3, 11, 16\] for input_ids of shape \[3, 7\], .* as prompt tuning does"
    with pytest.raises(ValueError, match=message):
        rk.linear_logprobs_from_model(prompt, tokens())
