"""Measuring policies: win rates and their intervals, KL, held-out loss, and `rlhf best-of-n` on tiny models."""

import json
import math

import numpy as np
import pytest
import torch

from rlhf import data, evaluate
from rlhf.models import make_room, save_model
from rlhf.rollouts.sampling import Rollouts
from tests.tiny import language_model, model_folder, word_tokenizer


@pytest.mark.parametrize(
    ("rate", "n", "low", "high"),
    [
        # Wilson 1927; values as in the tables of Newcombe 1998 (81/263, 15/148, 0/20, 1/29), method 3
        (81 / 263, 263, 0.2553, 0.3662),
        (15 / 148, 148, 0.0624, 0.1605),
        (0 / 20, 20, 0.0000, 0.1611),
        (1 / 29, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_beside_published_values(rate, n, low, high):
    assert evaluate.wilson_interval(rate, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_covers_as_promised():
    """Over many draws the interval holds the truth in about 95 % of them."""
    rng = np.random.default_rng(0)
    for p in (0.5, 0.72, 0.9):
        hits = [
            low <= p <= high for low, high in (evaluate.wilson_interval(k / 80, 80) for k in rng.binomial(80, p, 4000))
        ]
        assert 0.93 < np.mean(hits) < 0.975


def test_win_rate_counts_ties_half():
    won = evaluate.win_rate([1.0, 2.0, 3.0, 3.0], [0.0, 2.0, 4.0, 1.0])
    assert (won.rate, won.wins, won.ties, won.n) == (0.625, 2, 1, 4)
    assert (won.low, won.high) == evaluate.wilson_interval(0.625, 4)
    same = evaluate.win_rate([1.0] * 10, [1.0] * 10)
    assert same.rate == 0.5 and same.low < 0.5 < same.high


def test_win_rate_knows_that_answers_to_one_prompt_are_alike():
    """Where the prompt decides everything, 4 answers each to 50 prompts are 50 comparisons, not 200."""
    rng = np.random.default_rng(0)
    by_prompt = np.repeat(rng.random(50) < 0.7, 4).astype(float)
    won = evaluate.win_rate(by_prompt.tolist(), [0.5] * 200, per_prompt=4)
    assert won.n == 200 and won.n_effective == pytest.approx(49, abs=1.5)
    independent = (rng.random(200) < 0.7).astype(float)
    assert evaluate.win_rate(independent.tolist(), [0.5] * 200, per_prompt=4).n_effective > 140


def test_bad_input():
    with pytest.raises(ValueError, match="rate must lie in"):
        evaluate.wilson_interval(1.2, 10)
    with pytest.raises(ValueError, match="scores and rivals must have one length"):
        evaluate.win_rate([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="a multiple of per_prompt = 2"):
        evaluate.win_rate([1.0] * 3, [1.0] * 3, per_prompt=2)
    with pytest.raises(ValueError, match="reference must be one of the policies"):
        evaluate.evaluate_policies({"PPO": "x"}, ["a"])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of two tiny policies and a reward model over a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models")
    words = ["<pad>", "<s>", "</s>", "<unk>", *["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=len(words),
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **size,
    )
    paths = {}
    for name, seed in (("SFT", 0), ("PPO", 1)):
        torch.manual_seed(seed)
        paths[name] = folder / name
        LlamaForCausalLM(config).save_pretrained(paths[name])
    config.num_labels = 1
    paths["reward"] = folder / "reward"
    LlamaForSequenceClassification(config).save_pretrained(paths["reward"])
    for path in paths.values():
        tokenizer.save_pretrained(path)
    return paths


def test_log_probs_and_loss_are_those_of_a_plain_forward(models):
    from rlhf.models import load_policy, load_tokenizer

    model, tokenizer = load_policy(models["SFT"]).eval(), load_tokenizer(models["SFT"])
    rollouts = Rollouts([[4, 5], [6], [7, 8, 9]], [[10, 2], [11, 12, 13], [4]], [True, False, False])
    sums = evaluate.response_log_probs(model, rollouts, batch_size=2)
    for prompt, response, total in zip(rollouts.prompt_ids, rollouts.response_ids, sums, strict=True):
        with torch.no_grad():
            log_p = model(torch.tensor([prompt + response])).logits[0].double().log_softmax(-1)
        expected = sum(log_p[len(prompt) - 1 + t, token].item() for t, token in enumerate(response))
        assert total == pytest.approx(expected, abs=1e-5)
    texts = ["a b c", "d e f g h i"]
    total = count = 0
    for text in texts:
        ids = torch.tensor([[*tokenizer(text).input_ids, 2]])
        with torch.no_grad():
            log_p = model(ids).logits[0].double().log_softmax(-1)
        total -= log_p[:-1].gather(1, ids[0, 1:, None]).sum().item()
        count += ids.shape[1] - 1
    assert evaluate.held_out_loss(model, tokenizer, texts) == pytest.approx(total / count, abs=1e-5)


def test_evaluate_policies(models):
    """KL is 0 for the reference and, on average over samples, close to the exact one for the other policy."""
    policies = {"SFT": models["SFT"], "PPO": models["PPO"]}
    options = {"reward_model": models["reward"], "texts": ["a b c d"], "response_length": 4, "samples_per_prompt": 50}
    found = evaluate.evaluate_policies(
        policies, ["a b", "c", "d e f"], gold=lambda p, text, ended: text.count("a"), **options
    )
    sft, ppo = found["policies"]
    assert sft["kl"] == 0.0 and sft["win_rate"] is None
    assert ppo["kl"] > -3 * ppo["kl_error"]
    assert found["comparisons"] == 150 and ppo["win_rate"]["n"] == 150
    rows = found["responses"]["PPO"]
    assert [row["prompt"] for row in rows] == ["a b"] * 50 + ["c"] * 50 + ["d e f"] * 50
    assert all(1 <= row["length"] <= 4 and row["gold"] == row["completion"].count("a") for row in rows)
    assert all(row["ended"] or row["length"] == 4 for row in rows)
    again = evaluate.evaluate_policies(policies, ["a b", "c", "d e f"], **options)
    assert [row["completion"] for row in again["responses"]["PPO"]] == [row["completion"] for row in rows]
    assert again["judge"] == "reward" and "the very model that PPO trained against" in again["note"]
    json.dumps(found)


def test_best_of_n_command(models, tmp_path, capsys):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "best.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("a b", "c d", "e")))
    flags = ["--model_name_or_path", str(models["SFT"]), "--reward_model_path", str(models["reward"])]
    flags += ["--dataset_name", str(prompts), "--response_length", "6", "--n", "1", "4", "8"]
    assert evaluate.main([*flags, "--output_file", str(out)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:4]]
    assert [line[0] for line in lines] == ["1", "4", "8"]
    assert [line[1] for line in lines] == [f"{math.log(n) - (n - 1) / n:.3f}" for n in (1, 4, 8)]
    chosen = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in chosen] == ["a b", "c d", "e"]
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*flags[:1], str(tmp_path / "none"), *flags[2:]])
    assert stop.value.code == 2
    assert "does not exist" in capsys.readouterr().err


LONG = ["a b c d e f g", "c", "a b c d"]


def test_prompts_that_are_too_long_are_cut_dropped_or_an_error(models, caplog):
    """In best-of-n and in an evaluation, by the models' context of 32 and by a limit of one's own."""
    seen = []

    def gold(prompt, text, ended):
        seen.append(prompt)
        return 0.0

    best = {"n_values": (1,), "gold": gold}
    policies = {"SFT": models["SFT"]}
    for call in (
        lambda **options: evaluate.best_of_n(models["SFT"], models["reward"], LONG, **best, **options),
        lambda **options: evaluate.evaluate_policies(policies, LONG, gold=gold, **options),
    ):
        for options, asked, told in (
            ({"response_length": 28}, LONG, "cut 1 of 3 prompts: 4 tokens fit"),
            ({"response_length": 2, "max_prompt_length": 3}, LONG, "cut 2 of 3 prompts: 3 tokens fit"),
            ({"response_length": 28, "long_prompts": "drop"}, LONG[1:], "dropped 1 of 3 prompts: 4 tokens fit"),
        ):
            seen.clear(), caplog.clear()
            with caplog.at_level("WARNING"):
                call(**options)
            assert seen == asked and f"long_prompts: {told}" in caplog.text
        with pytest.raises(
            ValueError, match=r"prompts\[0\]: the prompt has 7 tokens, .*\nprompts\[2\]: the prompt has 4"
        ):
            call(response_length=29, long_prompts="error")
        with pytest.raises(ValueError, match=r"response_length: got 32, which leaves no room .* a context of 32"):
            call(response_length=32)
        with pytest.raises(ValueError, match="long_prompts: got 'keep', wants truncate, drop or error"):
            call(response_length=2, long_prompts="keep")
    options = {"response_length": 2, "max_prompt_length": 1, "long_prompts": "drop"}
    with pytest.raises(ValueError, match=r"prompts\[1\]: the prompt has 2 tokens, longer than the 1 that fit"):
        evaluate.best_of_n(models["SFT"], models["reward"], ["a b", "c d"], **options)


def test_best_of_n_reads_columns_and_leaves_bad_rows_out(models, tmp_path, capsys):
    rows = [{"q": "a b"}, {"q": ""}, {"q": "c d e"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model_name_or_path", models["SFT"], "--reward_model_path", models["reward"], "--response_length", 6]
    flags += ["--dataset_name", tmp_path / "p.jsonl", "--n", 1, "--columns", "prompt=q", "--bad_rows", "skip"]
    flags += ["--max_prompt_length", 2, "--long_prompts", "drop", "--output_file", tmp_path / "best.jsonl"]
    assert evaluate.main(list(map(str, flags))) == 0
    assert [json.loads(line)["prompt"] for line in (tmp_path / "best.jsonl").read_text().splitlines()] == ["a b"]


def test_best_of_n_keeps_what_the_reward_model_likes(models):
    table, choices = evaluate.best_of_n(
        models["SFT"], models["reward"], ["a", "b c"], n_values=(1, 16), response_length=5
    )
    assert table[1]["reward"] > table[0]["reward"]
    assert table[0]["kl"] == 0.0 and len(choices) == 2


@pytest.mark.parametrize("reference", ["chat", "base"])
def test_a_base_model_beside_one_that_got_a_chat_template(tmp_path, reference):
    """The template's tokens are beyond the base model's embeddings."""
    plain, tokenizer = word_tokenizer(), data.with_chat_template(word_tokenizer(), "chatml")
    model_folder(tmp_path / "base", tokenizer=plain)
    grown = language_model(plain)
    make_room(grown, tokenizer, seed=0)
    save_model(grown, tokenizer, tmp_path / "chat")
    found = evaluate.evaluate_policies(
        {"base": tmp_path / "base", "chat": tmp_path / "chat"},
        [[{"role": "user", "content": word}] for word in ("dog", "cat")],
        reference=reference,
        response_length=3,
    )
    assert [row["name"] for row in found["policies"]] == ["base", "chat"] and len(found["responses"]["base"]) == 2
    assert all(math.isfinite(row["kl"]) for row in found["policies"])
