"""PPO with other rewards than a reward model of its own tokenizer: functions, process rewards, another tokenizer."""

import functools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf import cli, data, models
from rlhf.metrics import Averages
from rlhf.ppo import PPOTrainer, train_ppo
from rlhf.ppo.contract import ContractError, check_contract
from rlhf.rewards import math_answer, regex, scoring
from rlhf.rollouts.sampling import Rollouts
from rlhf.training import encode_rows
from tests.tiny_ppo import (
    EOS,
    HAND_MADE,
    PAD,
    STOP,
    WORDS,
    Home,
    bananas,
    make_config,
    make_tokenizer,
    perturb,
    write_files,
)


@pytest.fixture(scope="module")
def ppo_files(tmp_path_factory):
    path = write_files(tmp_path_factory.mktemp("ppo"))
    write_other_reward_model(path)
    return path


OTHER_WORDS = [*WORDS[:3], "new", "old", "red", *reversed(WORDS[3:])]


def write_other_reward_model(path):
    """A reward model with other words, in another order, than the policy's."""
    torch.manual_seed(3)
    config = make_config("llama")
    config.vocab_size = len(OTHER_WORDS)
    models.save_model(AutoModelForCausalLM.from_config(config), make_tokenizer(OTHER_WORDS), path / "other")
    reward_model = models.reward_model_from_policy(path / "other", 1, pad_token_id=PAD)
    reward_model.config.reward_bias = -0.25
    models.save_model(reward_model, make_tokenizer(OTHER_WORDS), path / "other-rm")


ROWS = [{"prompt": prompt, "at": f"file:{line}"} for line, prompt in enumerate(("the cat", "a dog", "it", "the a"), 1)]


def score(home, reward_fn, rows=ROWS, rollouts=HAND_MADE, out="run", **options):
    """(scores, step rewards, metrics) of hand-made responses."""
    rollouts = Rollouts(rollouts.prompt_ids, rollouts.response_ids, rollouts.ended)
    trainer = home.trainer(out, reward_fn, **options)
    averages = Averages()
    scores = trainer.score(rows, rollouts, averages)
    return scores, rollouts.step_rewards, averages.read(lambda tensor: tensor)


def constant(*values):
    return lambda prompts, completions, completion_ids, **columns: list(values)


def test_a_function_gets_prompts_completions_ids_and_columns(home):
    seen = {}

    def reward(prompts, completions, completion_ids, **columns):
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, columns=columns)
        return torch.tensor([1.0, 2.0, 3.0, 4.0])

    rows = [{**row, "answer": number, "prompt_ids": [1]} for number, row in enumerate(ROWS)]
    rows[1]["hint"] = "banana"
    scores, steps, metrics = score(home, reward, rows)
    assert scores.tolist() == [1, 2, 3, 4] and scores.dtype == torch.float32 and steps is None
    assert seen["prompts"] == ["the cat", "a dog", "it", "the a"] and seen["completion_ids"] == HAND_MADE.response_ids
    assert seen["completions"] == ["banana the", "cat cat cat cat cat cat cat cat", "", "banana banana ran on the"]
    assert seen["columns"] == {"answer": [0, 1, 2, 3], "hint": [None, "banana", None, None]}
    assert metrics == {"rewards/reward/mean": 2.5}


def test_columns_of_the_data_reach_the_function(home):
    path = home.path / "columns.jsonl"
    lines = [{"prompt": "the cat", "answer": "1", "at": "here", "prompts": 3}, {"prompt": "it", "other": [2]}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen = []

    def reward(prompts, completions, completion_ids, **columns):
        seen.extend(zip(prompts, columns["answer"], columns["other"], strict=True))
        assert columns.keys() == {"answer", "other"}
        return [0.0] * len(prompts)

    train_ppo(home.config(dataset_name=str(path), reward_model_path=None, max_steps=1), reward_fn=reward)
    assert sorted(seen) == [("it", None, [2])] * 4 + [("the cat", "1", None)] * 4
    assert "answer" not in data.load_rows(path, "prompts")[0]


def test_functions_are_weighted_and_summed_and_None_says_nothing(home):
    first, second = constant(1.0, None, 3, None), constant(None, 10.0, 20.0, True)
    scores, steps, metrics = score(home, [first, second], reward_weights=[2.0, 0.5])
    assert scores.tolist() == [2.0, 5.0, 16.0, 0.5] and steps is None
    assert metrics == {"rewards/<lambda>/mean": 2.0, "rewards/<lambda>_2/mean": pytest.approx(31 / 3)}
    with pytest.raises(ValueError, match="got None from every function for the row file:2"):
        score(home, [first, constant(1.0, None, 1.0, 1.0)], out="none")


def test_a_function_joins_the_reward_model(home):
    trainer = home.trainer("alone")
    alone = trainer.score(ROWS, HAND_MADE)
    args = home.config("both", reward_weights=[0.5, 2.0])
    both = PPOTrainer(args, reward_fn=bananas).score
    averages = Averages()
    found = both(ROWS, HAND_MADE, averages)
    expected = 0.5 * alone.double() + 2 * torch.tensor([1.0, 0.0, 0.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    metrics = averages.read(lambda tensor: tensor)
    assert metrics["rewards/bananas/mean"] == 0.75
    assert metrics["rewards/reward_model/mean"] == pytest.approx(alone.mean().item(), rel=1e-6)
    silent = PPOTrainer(home.config("silent"), reward_fn=constant(None, None, None, None)).score
    averages = Averages()
    assert torch.equal(silent(ROWS, HAND_MADE, averages), alone)
    assert "rewards/<lambda>/mean" not in averages.read(lambda tensor: tensor)  # a mean over nothing


def raising(prompts, completions, completion_ids, **columns):
    for prompt in prompts:
        if prompt == "it":
            raise KeyError(prompt)
    return [0.0] * len(prompts)


def together(prompts, completions, completion_ids, **columns):
    return [1 / (4 - len(prompts))] * len(prompts)


@pytest.mark.parametrize(
    "reward_fn, message",
    [
        (constant(1.0, 2.0), r"got 2 scores, want 4 finite numbers or None \(from <lambda>\)"),
        (
            constant(1.0, math.nan, 0.0, 0.0),
            r"got nan, want a finite number or None \(from <lambda>, for the row file:2\)",
        ),
        (constant(1.0, 0.0, 0.0, math.inf), r"got inf, want a finite number .* file:4"),
        (constant(1.0, 0.0, 0.0, 10**400), r"got 10+, want a finite number .* file:4"),
        (constant(1.0, "2", 0.0, 0.0), r"got '2', want a finite number .* file:2"),
        (constant(1.0, 0.0, 0.0, 1j), "got 1j, want a finite number"),
        (raising, r"raising raised KeyError: 'it' \(for the row file:3\)"),
        (together, r"together raised ZeroDivisionError.* rows file:1 to file:4 together, not for any of them alone"),
        (lambda prompts: [0.0], r"<lambda> raised TypeError: .* \(for the row file:1\)"),
        (constant([1.0], 0.0, 0.0, 0.0), "got 1 rewards of tokens, want 3"),
        (constant({"steps": [(4, 1.0)]}, 0.0, 0.0, 0.0), "got a step that ends after 4 tokens, want 1 to 3"),
        (constant({"steps": [(0, 1.0)]}, 0.0, 0.0, 0.0), "got a step that ends after 0 tokens, want 1 to 3"),
        (constant({"steps": [(1.5, 1.0)]}, 0.0, 0.0, 0.0), r"got a step that ends after 1\.5 tokens"),
        (constant({"steps": [3]}, 0.0, 0.0, 0.0), r"got the step 3, want \(end, reward\)"),
        (constant({"steps": [(1, None)]}, 0.0, 0.0, 0.0), "got None, want a finite number"),
        (constant({"ends": []}, 0.0, 0.0, 0.0), "got a dict with 'ends', want {'steps': "),
    ],
)
def test_what_a_function_must_not_do(home, reward_fn, message):
    with pytest.raises(ValueError, match=f"reward_fn: .*{message}"):
        score(home, reward_fn)


def test_names_of_functions(home):
    def reward_model(**columns):
        return []

    class Judge:
        def __call__(self, *args, **columns):
            return []

    functions = [bananas, functools.partial(bananas, extra=1), Judge(), reward_model]
    assert list(scoring.named(functions)) == ["bananas", "bananas_2", "Judge", "reward_model_2"]
    with pytest.raises(ValueError, match="reward_fn: got 3, want a function"):
        home.trainer(reward_fn=[bananas, 3])
    with pytest.raises(ValueError, match=r"reward_weights: got 1 numbers, want one for each of bananas, regex"):
        home.trainer("weights", reward_fn=[bananas, functools.partial(regex, pattern="a")], reward_weights=[1.0])


def test_functions_from_the_command_line(home):
    file = home.path / "my_rewards.py"
    file.write_text(
        "import os\n\ndef short(prompts, completions, **columns):\n    return [-len(c) for c in completions]\nN = 3\n"
    )
    found = scoring.reward_functions(None, f"{file}:short, math_answer")
    assert found[0](["a"], ["abc"]) == [-3] and found[1] is math_answer
    assert scoring.reward_functions(None, None) == [] and scoring.reward_functions(bananas, None) == [bananas]
    with pytest.raises(ValueError, match=r"reward_function: got 'maths', want math_answer, .* or path/to/file\.py:"):
        scoring.load_function("maths", {})
    with pytest.raises(ValueError, match=r"there is no file nowhere\.py"):
        scoring.load_function("nowhere.py:f", {})
    with pytest.raises(ValueError, match=r"my_rewards\.py defines no function or class 'long'"):
        scoring.load_function(f"{file}:long", {})
    with pytest.raises(ValueError, match="defines no function or class 'N'"):
        scoring.load_function(f"{file}:N", {})
    with pytest.raises(ValueError, match="reward_function: got 'regex' and a reward_fn, want one of them"):
        scoring.reward_functions(bananas, "regex")
    file.write_text("1 / 0")
    with pytest.raises(ValueError, match=r"does not run \(ZeroDivisionError: division by zero\)"):
        scoring.load_function(f"{file}:short", {})


def test_the_command_line_runs_functions(home, capsys):
    file = home.path / "reward_file.py"
    file.write_text(
        "def bananas(prompts, completions, ids, **columns):\n    return [c.count('banana') for c in completions]\n"
    )
    rows = [{"prompt": row["prompt"], "pattern": "cat|dog"} for row in ROWS]
    (home.path / "patterns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {
        "sft_model_path": home.path / "llama", "dataset_name": home.path / "patterns.jsonl", "max_steps": 2,
        "output_dir": home.path / "run", "reward_function": f"{file}:bananas,regex", "response_length": 8,
        "disable_tqdm": "true",
    }  # fmt: skip
    argv = ["ppo", *(f"--{name}={value}" for name, value in flags.items()), "--reward_weights", "1", "0.5"]
    assert cli.main(argv) == 0, capsys.readouterr().err
    for row in home.rows():
        total = row["rewards/bananas/mean"] + 0.5 * row["rewards/regex/mean"]
        assert row["objective/scores"] == pytest.approx(total, rel=1e-6)
    rewards = json.loads((home.path / "run" / "run.json").read_text())["rewards"]
    assert rewards == {"weights": {"bananas": 1.0, "regex": 0.5}, "reward_model_tokens": None}
    argv = [flag for flag in argv if "reward_function" not in flag]
    assert cli.main([*argv, "--reward_function=maths"]) == 2 and "got 'maths'" in capsys.readouterr().err
    cli.main(["ppo", "--help"])
    out = capsys.readouterr().out
    section = out[out.index("\nrewards:") : out.index("\nloss and optimizer:")]
    assert all(
        f"  --{name} " in section for name in ("reward_function", "reward_weights", "reward_tokenizer", "kl_coef")
    )


def process_reward(prompts, completions, completion_ids, **columns):
    """Hand-made: steps, tokens, nothing but an end reward, and two steps at one token beside one at the end."""
    return [
        {"steps": [(1, 0.5), (3, -2.0)]},
        [0.1 * t for t in range(8)],
        1.25,
        {"steps": [(2, 1.0), (2, 0.25), (5, 3.0)]},
    ]


STEPS = torch.zeros(4, 8, dtype=torch.float64)
STEPS[0, [0, 2]] = torch.tensor([0.5, -2.0], dtype=torch.float64)
STEPS[1] = 0.1 * torch.arange(8, dtype=torch.float64)
STEPS[3, [1, 4]] = torch.tensor([1.25, 3.0], dtype=torch.float64)
END_SCORES = [0.0, 0.0, 1.25, 0.0]


def test_process_rewards_are_read(home):
    scores, steps, metrics = score(home, process_reward)
    assert scores.tolist() == END_SCORES
    torch.testing.assert_close(steps, STEPS.float(), rtol=0, atol=1e-7)
    total = STEPS.sum().item() + 1.25
    assert metrics == {"rewards/process_reward/mean": pytest.approx(total / 4, rel=1e-9)}
    both, doubled, _ = score(home, [process_reward, constant(1.0, 1.0, 1.0, 1.0)], out="b", reward_weights=[2.0, 10.0])
    assert both.tolist() == [10.0, 10.0, 12.5, 10.0]
    torch.testing.assert_close(doubled, 2 * STEPS.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("whiten_rewards", [False, True])
@pytest.mark.parametrize("whiten_advantages", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_trap_07_process_rewards_stand_at_their_steps(home, beta, whiten_rewards, whiten_advantages):
    """Against a float64 double loop over the definition of GAE."""
    trainer = home.trainer(
        reward_fn=process_reward, kl_coef=beta, lam=0.9, gamma=0.97, whiten_rewards=whiten_rewards,
        whiten_advantages=whiten_advantages, missing_eos_penalty=0.75,
    )  # fmt: skip
    perturb(trainer.policy)
    rollouts = Rollouts(HAND_MADE.prompt_ids, HAND_MADE.response_ids, HAND_MADE.ended)
    averages = Averages()
    scores = trainer.shape_scores(trainer.score(ROWS, rollouts, averages), rollouts)
    experience = trainer.evaluate(rollouts)
    kept = experience.mask
    rewards = -beta * (experience.log_probs - experience.ref_log_probs).double()
    for row, (response, ended) in enumerate(zip(HAND_MADE.response_ids, HAND_MADE.ended, strict=True)):
        rewards[row, len(response) - 1] += END_SCORES[row] - (0.0 if ended else 0.75)
    rewards += STEPS
    kl = (experience.log_probs - experience.ref_log_probs).sum(-1)
    if whiten_rewards:
        rewards = (rewards - rewards[kept].mean()) / rewards[kept].var().sqrt() + rewards[kept].mean()
    advantages = torch.zeros_like(rewards)
    for row, response in enumerate(HAND_MADE.response_ids):
        values = [*experience.values[row, : len(response)].double(), torch.zeros(())]
        for t in range(len(response)):
            advantages[row, t] = sum(
                (0.97 * 0.9) ** (s - t) * (rewards[row, s] + 0.97 * values[s + 1] - values[s])
                for s in range(t, len(response))
            )
    returns = advantages + experience.values.double()
    if whiten_advantages:
        advantages = (advantages - advantages[kept].mean()) / advantages[kept].var().sqrt()
    trainer.estimate_advantages(experience, scores, averages)
    torch.testing.assert_close(experience.advantages[kept].double(), advantages[kept], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(experience.returns[kept].double(), returns[kept], rtol=1e-4, atol=1e-5)
    metrics = averages.read(lambda tensor: tensor)
    total = (STEPS.sum() + 1.25 - 2 * 0.75).item() / 4  # two of the four responses did not end
    assert metrics["objective/scores"] == pytest.approx(total, abs=1e-6)
    assert metrics["objective/rlhf_reward"] == pytest.approx(total - beta * kl.mean().item(), abs=1e-5)


def test_a_reward_at_the_last_token_is_a_score(home):
    """As numbers, as a last step, or as a token's reward: the same run to the bit."""

    def last_step(prompts, completions, completion_ids, **columns):
        return [{"steps": [(len(ids), float(ids.count(4)))]} for ids in completion_ids]

    def tokens(prompts, completions, completion_ids, **columns):
        return [[0.0] * (len(ids) - 1) + [float(ids.count(4))] for ids in completion_ids]

    runs = {}
    for function in (bananas, last_step, tokens):
        name = function.__name__
        train_ppo(home.config(name, reward_model_path=None, max_steps=2), reward_fn=function)
        skip = ("time", "eps", "tokens_per_sec", "throughput", "rewards/")
        rows = [{key: value for key, value in row.items() if not key.startswith(skip)} for row in home.rows(name)]
        runs[name] = rows, home.rows(name, "samples.jsonl")
    for other in ("last_step", "tokens"):
        assert runs[other][1] == runs["bananas"][1]
        for row, same in zip(runs[other][0], runs["bananas"][0], strict=True):
            assert row == pytest.approx(same, rel=1e-5, abs=1e-6)


def ids_read(trainer, rows, rollouts):
    """The ids that the reward model reads for each response, without padding, and the scores."""
    read = []

    def note(module, args, kwargs):
        for ids, mask in zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True):
            read.append(ids[mask.bool()].tolist())

    hook = trainer.reward_model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        scores = trainer.score(rows, rollouts)
    finally:
        hook.remove()
    return read, scores


DRIFTING = Rollouts(
    [[5, 6], [11, 7], [15], [5]],
    [[4, PAD, 1, 5, EOS], [1, 1, 1], [PAD, EOS], [6, STOP, 7, PAD]],
    [True, False, True, False],
)


@pytest.mark.parametrize("reward_tokenizer", ["same", "auto"])
def test_trap_22_sampled_ids_reach_the_reward_model_unchanged(home, reward_tokenizer):
    """Ids that text cannot carry: <pad> and <unk> in the midst of a response."""
    trainer = home.trainer(reward_tokenizer=reward_tokenizer)
    for prompt, response in zip(DRIFTING.prompt_ids, DRIFTING.response_ids, strict=True):
        text = trainer.tokenizer.decode(response, skip_special_tokens=True)
        assert data.encode_completion(trainer.tokenizer, text) != response and prompt
    read, _ = ids_read(trainer, ROWS, DRIFTING)
    sampled = [p + r for p, r in zip(DRIFTING.prompt_ids, DRIFTING.response_ids, strict=True)]
    assert sorted(read) == sorted(sampled)
    assert trainer.own_tokens is None
    assert trainer.scorer.describe()["reward_model_tokens"] == "the policy's ids, unchanged"


def cross(home, out="run", **options):
    options = {"reward_tokenizer": "auto", "value_model_path": str(home.path / "llama"), **options}
    return home.trainer(out, reward_model_path=str(home.path / "other-rm"), **options)


TEXTS = [
    ["the", "cat", "banana", "the"],
    ["a", "dog", *["cat"] * 8],
    ["it"],
    ["the", "a", "banana", "banana", "ran", "on", "the"],
]


def test_trap_22_another_tokenizer_is_explicit(home, caplog):
    with caplog.at_level("WARNING"):
        trainer = cross(home)
    assert "another tokenizer: responses are decoded, and encoded again" in caplog.text
    other = "the reward model's own: responses are decoded and encoded again"
    assert trainer.scorer.describe()["reward_model_tokens"] == other
    trainer.train()
    assert json.loads((home.path / "run" / "run.json").read_text())["rewards"]["reward_model_tokens"] == other
    with pytest.raises(ContractError, match="reward_ids"):
        cross(home, "same", reward_tokenizer="same", value_model_path=None)


@pytest.mark.parametrize("stop", ["eos", "."])
def test_trap_23_another_tokenizer_scores_the_ids_of_its_training(home, stop):
    """Golden: word by word, its own end token where the response ended and none where it was cut off (trap 21)."""
    trainer = cross(home, stop_token=stop)
    rollouts = Rollouts([trainer.own_tokens.policy_tokenizer(row["prompt"]).input_ids for row in ROWS], [], [])
    rollouts.response_ids, rollouts.ended = list(HAND_MADE.response_ids), HAND_MADE.ended
    if stop == ".":
        rollouts.response_ids[0] = [4, 5, STOP]
    read, scores = ids_read(trainer, ROWS, rollouts)
    number = {word: index for index, word in enumerate(OTHER_WORDS)}
    golden = [[number[word] for word in words] for words in TEXTS]
    golden[0].append(EOS)
    golden[2].append(EOS)
    assert sorted(read) == sorted(golden)
    judge = models.load_reward_model(home.path / "other-rm").double()
    for ids, found in zip(golden, scores, strict=True):
        hidden = judge.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        assert found.item() == pytest.approx((hidden @ judge.score.weight[0]).item() + 0.25, abs=1e-5)
    texts = [" ".join(words[len(row["prompt"].split()) :]) for words, row in zip(TEXTS, ROWS, strict=True)]
    assert trained_ids(OTHER_WORDS, [0], texts) == golden[:1]


def trained_ids(vocabulary, chosen, texts):
    """The ids of prompt and completion that reward training makes of these rows."""
    rows = [{**ROWS[row], "completions": [texts[row]], "ranks": [0]} for row in chosen]
    args = SimpleNamespace(max_length=40, long_prompts="error")
    examples = encode_rows(make_tokenizer(vocabulary), rows, ("completions",), args, what="training")
    return [example["prompt"] + example["responses"][0] for example in examples]


def test_trap_23_ppo_scores_the_ids_of_reward_training(home):
    trainer = home.trainer()
    prompts = [data.encode_prompt(trainer.tokenizer, row["prompt"]) for row in ROWS]
    ended = [[4, 5, EOS], [6, EOS], [7, 8, 9, EOS], [3, 10, EOS]]
    read, _ = ids_read(trainer, ROWS, Rollouts(prompts, ended, [True] * 4))
    texts = trainer._decode(ended)
    assert texts == ["banana the", "cat", "dog sat ran", ". on"]
    assert sorted(read) == sorted(trained_ids(WORDS, range(4), texts))


def test_a_prefix_space_survives_the_way_through_text(home):
    """A tokenizer that drops the space before a text's first word: the response goes on where the prompt ended."""

    class Dropping:
        @staticmethod
        def decode(ids, skip_special_tokens):
            return " ".join(WORDS[i] for i in ids)

    own = scoring.OwnTokens(Dropping, None)
    for ids, ended in (([7, 8, EOS], True), ([7, 8], False)):
        assert own.answer("prompt", [5, 6], ids, ended) == " dog sat"
    assert own.answer("prompt", [5], [EOS], True) == ""


def test_chats_are_encoded_as_chats(home):
    from tests.tiny import word_tokenizer

    template = (
        "{% for m in messages %}<|{{ 'bot' if m.role == 'assistant' else 'user' }}|> {{ m.content }} <|end|> "
        "{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}"
    )
    chat = word_tokenizer(extra=("<|user|>", "<|bot|>", "<|end|>"), chat_template=template)
    own = scoring.OwnTokens(make_tokenizer(), chat)
    rows = [{"prompt": [{"role": "user", "content": "the dog"}]}] * 2
    found = own(rows, Rollouts([[5, 7]] * 2, [[6, 8, EOS], [6, 8]], [True, False]))
    tokens = chat.convert_ids_to_tokens
    assert tokens(found.prompt_ids[0]) == ["<|user|>", "the", "dog", "<|end|>", "<|bot|>"]
    assert tokens(found.response_ids[0]) == ["cat", "sat", "<|end|>"]
    assert tokens(found.response_ids[1]) == ["cat", "sat"]


def test_the_value_network_cannot_start_from_another_tokenizer(home):
    with pytest.raises(ValueError, match=r"value_model_path: got none, .* give .*llama to start from the policy"):
        cross(home, value_model_path=None)
    trainer = cross(home, "fresh")
    trunk = models.load_policy(home.path / "llama").model
    for name, weight in trainer.value.model.named_parameters():
        assert torch.equal(weight, trunk.get_parameter(name))
    given = cross(home, "given", value_model_path=str(home.path / "llama-rm"))
    assert given.value.config.reward_bias == 0.75


def test_the_start_up_check_reads_the_other_ids(home):
    trainer = cross(home)
    assert trainer.contract["reward_ids"] == 0 and trainer.contract["reward_vocabulary"] == 0
    original = scoring.OwnTokens.__call__

    class Losing(scoring.OwnTokens):
        def __call__(self, rows, rollouts):
            found = original(self, rows, rollouts)
            return Rollouts(found.prompt_ids, [ids[:-1] or ids for ids in found.response_ids], found.ended)

    trainer.own_tokens = Losing(trainer.tokenizer, trainer.own_tokens.tokenizer)
    with pytest.raises(ContractError, match="reward_ids: the reward model would read other ids"):
        check_contract(trainer)


def test_another_tokenizer_may_need_more_room(home, caplog):
    short = models.load_reward_model(home.path / "other-rm")
    short.config.max_position_embeddings = 12
    models.save_model(short, make_tokenizer(OTHER_WORDS), home.path / "short-rm")
    options = {"reward_tokenizer": "auto", "value_model_path": str(home.path / "llama")}
    with pytest.raises(
        ValueError, match=r"prompts.jsonl:4: the prompt has 6 tokens of the reward model; .* context of 12"
    ):
        home.trainer(reward_model_path=str(home.path / "short-rm"), long_prompts="error", **options)
    with caplog.at_level("WARNING"):
        cut = home.trainer("cut", reward_model_path=str(home.path / "short-rm"), **options)
    assert "long_prompts: the reward model reads 1 of 6 prompts cut" in caplog.text
    assert cut.contract["reward_ids"] == 0 and len(cut.prompts[3]["prompt_ids"]) == 6
    read, _ = ids_read(cut, cut.prompts[3:4], Rollouts([[0]], [[4] * 8], [False]))
    assert [[OTHER_WORDS[token] for token in ids] for ids in read] == [["and", "the", "cat", "ran", *["banana"] * 8]]
    cut.train()
    rows = [{"prompt": "it", "at": "file:1"}]
    (home.path / "one.jsonl").write_text('{"prompt": "it"}\n')
    trainer = home.trainer(
        "b", reward_model_path=str(home.path / "short-rm"), dataset_name=str(home.path / "one.jsonl"), **options
    )
    trainer.reward_model.config.max_position_embeddings = 8
    with pytest.raises(ValueError, match="file:1: prompt and response have 9 tokens of the reward model"):
        trainer.score(rows, Rollouts([[15]], [[4] * 8], [False]))


def test_same_tokenizer():
    assert scoring.same_tokenizer(make_tokenizer(), make_tokenizer())
    assert not scoring.same_tokenizer(make_tokenizer(), make_tokenizer(OTHER_WORDS))
    templated = make_tokenizer()
    templated.chat_template = "{{ messages }}"
    assert not scoring.same_tokenizer(make_tokenizer(), templated)


DIGITS = ["<pad>", "<unk>", "</s>", *"0123456789", "plus", "and", "what"]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_ppo_learns_to_give_the_right_answer(tmp_path, seed):
    """Two questions with different answers: no single response is right for both."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(DIGITS)
    models.save_model(AutoModelForCausalLM.from_config(make_config("llama")), tokenizer, tmp_path / "llama")
    rows = [{"prompt": "what 1 plus 2", "answer": "3"}, {"prompt": "what 4 and 4", "answer": "8"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    home = Home(tmp_path)
    options = {
        "reward_model_path": None, "reward_function": "math_answer", "response_length": 3, "rollout_batch_size": 64,
        "per_device_train_batch_size": 32, "num_ppo_epochs": 4, "learning_rate": 1e-2, "kl_coef": 0.0, "seed": seed,
        "max_steps": 20,
    }  # fmt: skip
    train_ppo(home.config(**options))
    means = [row["rewards/math_answer/mean"] for row in home.rows()]
    assert [row["objective/scores"] for row in home.rows()] == pytest.approx(means)
    assert sum(means[-3:]) / 3 > 0.7 > 0.4 > sum(means[:2]) / 2


def test_reward_functions_get_what_their_parameters_name():
    """In any order, or some of them, as TRL's; a function with other names gets them in the documented order."""
    told = []

    def swapped(completions, prompts, **columns):
        told.append((prompts, completions))
        return [1.0]

    def only(completions, **columns):
        told.append(completions)
        return [2.0]

    def others(a, b, c, **columns):
        told.append((a, b, c))
        return [3.0]

    arguments = (["p"], ["c"], [[7]])
    found = [scoring.apply(function, arguments, {"answer": ["x"]}) for function in (swapped, only, others)]
    assert found == [[1.0], [2.0], [3.0]]
    assert told == [(["p"], ["c"]), ["c"], (["p"], ["c"], [[7]])]
