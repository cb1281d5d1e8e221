"""PPO with its reward model on a server: the scores of the local one, and what a server may get wrong."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlhf import models, servers
from rlhf.ppo import PPOTrainer, train_ppo
from rlhf.ppo.contract import ContractError
from rlhf.rewards.server import RewardServer
from rlhf.servers import JsonClient, Refused, ServerError, Unreachable
from tests.fake_server import Died, Fake
from tests.rlhf.ppo.test_train_ppo_rewards import write_other_reward_model
from tests.tiny_ppo import HAND_MADE, TIMINGS, bananas, own_home

pytest.importorskip("requests", reason="needs the package requests")
ROWS = [{"prompt": prompt, "at": f"file:{line}"} for line, prompt in enumerate(("the cat", "a dog", "it", "the a"), 1)]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(servers.time, "sleep", lambda seconds: None)


def classifier(folder, *, context=48, activation=False):
    """What `vllm serve --runner pooling` answers, computed by transformers, a text at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()

    @torch.no_grad()
    def answer(method, path, body):
        if path == "/v1/models":
            return 200, {"data": [{"id": "reward", "max_model_len": context}]}
        assert (method, path) == ("POST", "/classify") and body.keys() == {"input", "use_activation"}
        data = []
        for index, ids in enumerate(body["input"]):
            if len(ids) > context:
                return 400, {"error": {"message": f"maximum context length is {context} tokens"}}
            score = model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1])
            probs = (score.sigmoid() if activation or body["use_activation"] else score).tolist()
            data.append({"index": index, "label": "LABEL_0", "probs": probs, "num_classes": 1})
        return 200, {"data": data, "usage": {"prompt_tokens": sum(map(len, body["input"]))}}

    return answer


def says(*scores, **changes):
    """A server with these scores, whatever it is asked."""
    data = [{"index": index, "probs": [score]} for index, score in enumerate(scores)]
    return lambda method, path, body: (200, {"data": data, **changes})


def asked(server, texts=((5, 6), (7,), (8, 9)), *, bias=0.0, **options):
    client = JsonClient("reward_server", server.url, timeout=5.0, attempts=2)
    return RewardServer(client, bias, **options)(list(map(list, texts)), [f"file:{row}" for row in range(len(texts))])


def test_a_run_has_the_scores_of_the_local_reward_model(home):
    train_ppo(home.config("local"))
    with Fake(classifier(home.path / "llama-rm")) as server:
        train_ppo(home.config("served", reward_server=server.url))
        texts = [body["input"] for _, path, body in server.asked if path == "/classify"]
    assert max(map(len, texts)) == 8
    first, second = (home.rows(out) for out in ("local", "served"))
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - set(TIMINGS):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), name
    run = json.loads((home.path / "served" / "run.json").read_text())
    assert run["rewards"]["reward_server_bias"] == 0.75
    assert run["contract"]["value_at_end"] < 1e-5 and "reward_ids" in run["contract"]


def test_the_bias_is_subtracted_once(home):
    local = home.trainer("local").score(ROWS, HAND_MADE)
    options = {"value_model_path": str(home.path / "llama")}
    with Fake(classifier(home.path / "llama-rm")) as server:
        served = [
            home.trainer("path", reward_server=server.url).score(ROWS, HAND_MADE),
            home.trainer("both", reward_server=server.url, reward_server_bias=0.75).score(ROWS, HAND_MADE),
            home.trainer(
                "alone", reward_server=server.url, reward_server_bias=0.75, reward_model_path=None, **options
            ).score(ROWS, HAND_MADE),
        ]
    for scores in served:
        torch.testing.assert_close(scores, local, rtol=0, atol=1e-5)


def test_with_weights_and_functions(home):
    options = {"reward_weights": [2.0, 0.5], "advantage": "rloo", "num_responses": 2}
    local = home.trainer("local", reward_function=None, **options | {"reward_weights": [2.0]}).score(ROWS, HAND_MADE)
    with Fake(classifier(home.path / "llama-rm")) as server:
        config = home.config("served", reward_server=server.url, **options)
        trainer = PPOTrainer(config, reward_fn=bananas)
        served = trainer.score(ROWS, HAND_MADE)
        assert trainer.scorer.weights == {"reward_model": 2.0, "bananas": 0.5} and trainer.reward_model is None
    counted = torch.tensor([1.0, 0.0, 0.0, 2.0])
    torch.testing.assert_close(served, local + 0.5 * counted, rtol=0, atol=1e-5)


def test_a_run_goes_on_at_another_address(home):
    answer = classifier(home.path / "llama-rm")
    with Fake(answer) as server:
        train_ppo(home.config(reward_server=server.url, max_steps=1, save_steps=1))
    with Fake(answer) as other:
        train_ppo(home.config(reward_server=other.url, save_steps=1, resume_from_checkpoint="true"))
        assert other.asked
    assert [row["step"] for row in home.rows()] == [1, 2]


def test_scores_come_in_the_order_of_the_texts():
    def turned(method, path, body):
        data = [{"index": index, "probs": [float(ids[0])]} for index, ids in enumerate(body["input"])]
        return 200, {"data": data[::-1], "usage": None}

    texts = [[number, 1] for number in range(2, 25)]
    with Fake(turned) as server:
        assert asked(server, texts, bias=1.5, batch_size=4) == [number - 1.5 for number in range(2, 25)]
        assert sorted(len(body["input"]) for _, _, body in server.asked) == [3, 4, 4, 4, 4, 4]


@pytest.mark.parametrize(("answer", "message"), [
    (says(1.0, 2.0), r"got 2 scores, want 3"),
    (says(1.0, 2.0, 3.0, 4.0), r"got 4 scores, want 3"),
    (says(1.0, float("nan"), 3.0), r"got the score nan for the row file:1, want a finite number"),
    (says(1.0, 2.0, float("-inf")), r"got the score -inf for the row file:2"),
    (says(1.0, None, 3.0), r"got the score None for the row file:1"),
    (says(1.0, 2.0, True), r"got the score True for the row file:2"),
    (lambda *_: (200, {"data": [{"index": 0, "probs": [1.0]}] * 3}), r"got scores of the texts 0, 0, 0, want each"),
    (lambda *_: (200, {"data": [{"index": n, "probs": [1.0]} for n in (1, 2, 3)]}), r"got scores of the texts 1, 2"),
    (lambda *_: (200, {"data": [{"index": n, "probs": [0.5, 0.5]} for n in range(3)]}), r"got 2 numbers for a text"),
    (lambda *_: (200, {"data": [{"index": n} for n in range(3)]}), r"got None numbers for a text, want 1"),
    (lambda *_: (200, [1.0, 2.0, 3.0]), r"want \{'data': .*got \[1\.0, 2\.0, 3\.0\]"),
    (lambda *_: (200, {"scores": [1.0]}), r"want \{'data'"),
    (lambda *_: (200, None), r"want \{'data'.*got null"),
    (says(1.0, 2.0, 3.0, usage={"prompt_tokens": 4}), r"read 4 tokens, want the 5 that were sent"),
])  # fmt: skip
def test_a_wrong_answer_is_an_error(answer, message):
    with Fake(answer) as server, pytest.raises(ServerError, match=rf"^reward_server: http://127.*/classify: {message}"):
        asked(server)


@pytest.mark.parametrize("fault", [(500, {"error": "out of memory"}), (503, b"busy"), Died()])
def test_a_fault_is_asked_again(fault):
    left = [fault]

    def answer(*question):
        if left and isinstance(left[0], Died):
            raise left.pop()
        return left.pop() if left else says(1.0, 2.0, 3.0)(*question)

    with Fake(answer) as server:
        assert asked(server) == [1.0, 2.0, 3.0] and len(server.asked) == 2


def test_a_server_that_is_down(home):
    with Fake(classifier(home.path / "llama-rm")) as server:
        trainer = home.trainer(reward_server=server.url)
        server.stop()
        with pytest.raises(Unreachable, match=r"^reward_server: POST http://.*ConnectionRefusedError.*4 attempts"):
            trainer.score(ROWS, HAND_MADE)
    with pytest.raises(Unreachable, match=r"^reward_server: "):
        home.trainer("again", reward_server=server.url)


def test_what_the_server_cannot_read_is_told_at_the_start(home):
    with Fake(classifier(home.path / "llama-rm", context=12)) as server:
        with pytest.raises(ValueError, match=r"^reward_server: reads at most 12 tokens, .* have up to 14; lower"):
            home.trainer(reward_server=server.url)
        with pytest.raises(Refused, match=r"400, maximum context length is 12"):
            asked(server, [[5] * 13])


def test_probabilities_are_noticed(home, caplog):
    """By the value network, which starts from the same model; else by a warning."""
    with Fake(classifier(home.path / "llama-rm", activation=True)) as server:
        with pytest.raises(ContractError, match=r"value_at_end: .*not the reward model's score"):
            home.trainer(reward_server=server.url)
        alone = {"reward_model_path": None, "reward_server_bias": 0.0, "advantage": "rloo", "num_responses": 2}
        home.trainer("alone", reward_server=server.url, **alone)
    assert "its scores are probabilities, not rewards" in caplog.text
    caplog.clear()
    with Fake(classifier(home.path / "llama-rm")) as server:
        home.trainer("raw", reward_server=server.url, **alone)
    assert "probabilities" not in caplog.text


def test_a_server_of_another_model_is_noticed(home):
    with Fake(classifier(home.path / "llama-rm")) as server:
        folder = home.path / "changed-rm"
        model = AutoModelForSequenceClassification.from_pretrained(home.path / "llama-rm")
        with torch.no_grad():
            model.score.weight.mul_(1.5)
        model.save_pretrained(folder)
        home.trainer("tokenizer").tokenizer.save_pretrained(folder)
        with pytest.raises(ContractError, match="value_at_end"):
            home.trainer(reward_model_path=str(folder), reward_server=server.url)


@pytest.mark.parametrize(("changes", "message"), [
    ({"reward_server": None, "reward_server_bias": 1.0}, r"reward_server_bias: got 1\.0, want none without"),
    ({"reward_server_bias": 0.5}, r"reward_server_bias: got 0\.5, want 0\.75, the reward_bias of .*llama-rm, or none"),
    ({"reward_model_path": None}, r"reward_server_bias: got none, want what is subtracted"),
    ({"reward_model_path": None, "reward_server_bias": 0.0}, r"value_model_path: got none, and the value network "
     r"cannot start from a reward model on a server; give .*llama to start from the policy, with a new head"),
    ({"reward_model_path": None, "reward_tokenizer": "auto"}, r"reward_tokenizer: got auto, want same with"),
    ({"reward_server": "localhost:8000"}, r"reward_server: got 'localhost:8000', want http://host:port"),
    ({"reward_server_timeout": 0.0}, r"reward_server_timeout: got 0\.0"),
])  # fmt: skip
def test_settings_that_cannot_be(home, changes, message):
    with pytest.raises(ValueError, match=rf"^{message}"):
        home.trainer(**{"reward_server": "http://127.0.0.1:9", **changes})


def test_a_folder_or_a_model_beside_the_server(home):
    with pytest.raises(ValueError, match=r"^reward_model_path: .* is not a reward model"):
        home.trainer(reward_server="http://127.0.0.1:9", reward_model_path=str(home.path / "llama"))
    config = home.config(reward_server="http://127.0.0.1:9", reward_model_path=None)
    with pytest.raises(ValueError, match=r"^reward_server: got an address and a reward_model, want one of them"):
        PPOTrainer(config, reward_model=models.load_reward_model(home.path / "llama-rm"))


def test_another_tokenizer(ppo_files, tmp_path):
    """The server reads the ids of its own tokenizer: the scores of the local model that does."""
    home = own_home(ppo_files, tmp_path)
    write_other_reward_model(home.path)
    options = {
        "reward_tokenizer": "auto", "value_model_path": str(home.path / "llama"),
        "reward_model_path": str(home.path / "other-rm"),
    }  # fmt: skip
    local = home.trainer("local", **options).score(ROWS, HAND_MADE)
    with Fake(classifier(home.path / "other-rm")) as server:
        served = home.trainer("served", reward_server=server.url, **options).score(ROWS, HAND_MADE)
    torch.testing.assert_close(served, local, rtol=0, atol=1e-5)
