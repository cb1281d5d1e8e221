"""Room in the embeddings for the tokens of chatml."""

import pytest
import torch

from rlhf import data, models
from tests.tiny import language_model, word_tokenizer


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_near_the_mean_and_repeat(tied):
    plain, tokenizer = word_tokenizer(), data.with_chat_template(word_tokenizer(), "chatml")
    model, again = (language_model(plain, tie_word_embeddings=tied) for _ in range(2))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert models.make_room(model, tokenizer, seed=3) == models.make_room(again, tokenizer, seed=3) == 2
    assert torch.equal(torch.get_rng_state(), state)
    for name, weight in model.state_dict().items():
        old, size = before[name], len(before[name])
        assert torch.equal(weight[:size], old) and torch.equal(weight, again.state_dict()[name])
        assert len(weight) in (size, size + 2) and (len(weight) > size) == ("embed" in name or "lm_head" in name)
        for row in weight[size:]:
            assert (row - old.mean(0)).abs().max() < 0.1 * old.std()
        assert len(weight) == size or not torch.equal(weight[-1], weight[-2])
    assert model.config.vocab_size == len(tokenizer) == models.embedded_ids(model)
    ids = torch.tensor([[len(tokenizer) - 1, len(tokenizer) - 2]])
    assert model(ids).logits.shape[-1] == len(tokenizer)
    tables = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (tables[0] is tables[1]) == tied
    assert models.make_room(model, tokenizer, seed=3) == 0


def test_a_model_with_room_stays():
    tokenizer = data.with_chat_template(word_tokenizer(), "chatml")
    model = language_model(tokenizer)
    before = model.get_input_embeddings().weight.clone()
    assert models.make_room(model, tokenizer, seed=3, adapters=True) == 0
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_adapters_do_not_train_new_rows():
    tokenizer, model = data.with_chat_template(word_tokenizer(), "chatml"), language_model(word_tokenizer())
    with pytest.raises(
        ValueError, match=r"chat_template: the policy has no embeddings for <\|im_start\|>, <\|im_end\|>"
    ):
        models.make_room(model, tokenizer, 3, "policy", adapters=True)
