"""One step of OpenRLHF's own trainers, on a tiny model and one CPU, with its functions and with ours.

What its trainers ask of deepspeed, `Strategy` does with torch. Loss, every metric and, as they are before the
optimizer's step, the gradients of every weight are compared in fp32.
"""

import copy
import importlib
import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from torch.utils.data import DataLoader

from rlhf_kernels.integrations import openrlhf

pytest.importorskip("openrlhf", reason="OpenRLHF is not installed: make test-integrations-openrlhf")
from tests.integrations.peer_tests import counted
from tests.tiny import model_folder, word_tokenizer

STUBS = str(Path(__file__).parent / "stubs")
# What the trainers' modules import and a step does not call.
MOCKED = (
    "vllm",
    "vllm.inputs",
    "vllm.utils",
    "deepspeed.runtime.zero.partition_parameters",
    "openrlhf.utils.vlm_utils",
)
B, T = 4, 14
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    """One rank over gloo, no GPU, and nothing compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(STUBS)
        for name in MOCKED:
            patch.setitem(sys.modules, name, MagicMock())
        importlib.import_module("openrlhf.trainer.ray.ppo_actor")
        importlib.import_module("openrlhf.trainer.ray.ppo_critic")
        importlib.import_module("openrlhf.trainer.ppo_utils.experience_maker")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.cuda, "synchronize", lambda: None)
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        with torch.compiler.set_stance("force_eager"):
            yield
        torch.distributed.destroy_process_group()


@pytest.fixture
def called(monkeypatch):
    """How often each of our functions has been called."""
    calls = Counter()
    for attributes in openrlhf.REPLACED.values():
        for name, function in attributes.items():
            monkeypatch.setitem(attributes, name, counted(calls, name, function))
    return calls


class Strategy:
    """DeepspeedStrategy on one rank without deepspeed; keeps what is logged and the gradients of each step."""

    ring_attn_group = None

    def __init__(self, args, accumulated_gradient=1):
        self.args, self.accumulated_gradient = args, accumulated_gradient
        self.ds_device_mesh = torch.distributed.init_device_mesh("cpu", (1,), mesh_dim_names=("dp",))
        self.logs, self.gradients, self._backwards = [], [], 0

    def backward(self, loss, model, optimizer):
        (loss / self.accumulated_gradient).backward()
        self._backwards += 1

    def optimizer_step(self, optimizer, model, scheduler, name="model"):
        if not self.args.train.dynamic_batch_enable and self._backwards % self.accumulated_gradient:
            return
        self.gradients.append({key: weight.grad.clone() for key, weight in model.named_parameters()})
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

    def get_grad_norm(self, model):
        return sum(x.square().sum() for x in self.gradients[-1].values()).sqrt().item() if self.gradients else 0.0

    def all_reduce(self, data, op="mean"):
        if isinstance(data, dict):
            self.logs.append(dict(data))
        return data

    def is_rank_0(self):
        return True

    def print(self, *words):
        pass


def arguments(**changes):
    """OpenRLHF's nested settings with the changes, as {"actor.dual_clip": 2.0}."""
    groups = {
        "actor": {
            "eps_clip_low_high": (0.2, 0.25), "dual_clip": None, "loss_agg_mode": "token-mean",
            "policy_loss_type": "ppo", "aux_loss_coef": 0.0, "entropy_coef": 0.01,
        },
        "algo": {
            "kl": {"use_loss": True, "init_coef": 0.1, "estimator": "k3", "unbiased_gradient": False},
            "advantage": {
                "estimator": "gae", "gamma": 0.98, "lambd": 0.9, "no_std_norm": False, "is_correction_level": "off",
                "is_correction_mode": "mask", "is_correction_gating": "ratio", "is_correction_threshold": [0.5, 5.0],
            },
        },
        "train": {"max_epochs": 1, "dynamic_batch_enable": False, "colocate_all": False, "async_enable": False,
                  "batch_size": B, "max_tokens_per_gpu": 2 * T},
        "ds": {"packing_samples": False, "tensor_parallel_size": 1, "ring_attn_size": 1},
        "rollout": {"n_samples_per_prompt": 1, "batch_size": B},
        "reward": {"clip_range": (-3.0, 3.0)},
        "model": {"aux_loss_coef": 0.0, "nll_loss_coef": 0.0, "label_smoothing": 0.0, "ipo_enable": False,
                  "margin_loss_enable": False, "compute_fp32_loss_enable": True},
        "logger": {"wandb": {"key": None}, "tensorboard_dir": None, "logging_steps": 1},
        "eval": {"steps": -1}, "ckpt": {"save_steps": -1}, "vllm": {},
    }  # fmt: skip
    for path, value in changes.items():
        *owners, name = path.split(".")
        group = groups
        for owner in owners:
            group = group[owner]
        assert name in group
        group[name] = value
    return json.loads(json.dumps(groups), object_hook=lambda pairs: SimpleNamespace(**pairs))


def actor_of(folder, **options):
    """OpenRLHF's Actor in fp32, which it does not offer."""
    from openrlhf.models import Actor

    return Actor(folder, attn_implementation="eager", **options).float()


def scorer_of(folder, kind):
    """OpenRLHF's critic or reward model in fp32."""
    from openrlhf.models import get_llm_for_sequence_regression

    torch.manual_seed(5)
    return get_llm_for_sequence_regression(folder, kind, attn_implementation="eager", init_value_head=True).float()


def trained(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two saved tiny models: one to train, one to refer to."""
    folder = tmp_path_factory.mktemp("models")
    return model_folder(folder / "policy", seed=0), model_folder(folder / "reference", seed=1)


def compare(step, called, wanted_calls):
    """The step's strategies with OpenRLHF's functions and with ours: what they logged, and every gradient.

    A gradient of a weight is a sum over tokens of both signs, so that its fp32 rounding goes with the weight's largest.
    """
    theirs = step()
    assert not called, "our functions were called where OpenRLHF's are asked for"
    with openrlhf.patched():
        ours = step()
    assert {name for name, count in called.items() if count} == wanted_calls
    assert len(theirs) == len(ours) > 0
    for mine, wanted in zip(ours, theirs, strict=True):
        assert len(mine.logs) == len(wanted.logs) > 0
        for log, wanted_log in zip(mine.logs, wanted.logs, strict=True):
            assert log.keys() == wanted_log.keys()
            for key, value in wanted_log.items():
                assert log[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
        assert len(mine.gradients) == len(wanted.gradients) > 0
        for found, wanted_found in zip(mine.gradients, wanted.gradients, strict=True):
            assert found.keys() == wanted_found.keys()
            for key, gradient in wanted_found.items():
                largest = gradient.abs().max().item()
                assert largest > 0, f"{key} has no gradient to compare"
                torch.testing.assert_close(
                    found[key], gradient, rtol=1e-5, atol=32 * EPS * largest, msg=lambda text, k=key: f"{k}: {text}"
                )
    return ours


# PPO


def experience(folders, args, temperature):
    """A batch of experience, right-padded, one answer with tokens that the policy did not write."""
    from openrlhf.trainer.ppo_utils import Experience

    generator = torch.Generator().manual_seed(4)
    sequences = torch.randint(3, len(word_tokenizer()), (B, T), generator=generator)
    ends = torch.tensor([T, 9, 12, 7])
    attention = (torch.arange(T) < ends[:, None]).long()
    actions = (torch.arange(1, T) >= torch.tensor([3, 4, 2, 5])[:, None]) & attention[:, 1:].bool()
    actions[0, 6:8] = False

    def noise(scale):
        return scale * torch.randn(B, T - 1, generator=generator) * actions

    with torch.no_grad():
        now, reference = (
            actor_of(path, temperature=temperature)(sequences, actions, attention_mask=attention) for path in folders
        )
    return Experience(
        index=list(range(B)),
        sequences=sequences,
        attention_mask=attention,
        action_mask=actions,
        action_log_probs=now + noise(0.3),
        base_action_log_probs=reference,
        rollout_log_probs=now + noise(0.8),
        values=noise(0.5),
        kl=noise(0.0 if args.algo.kl.use_loss else 0.2),
        rewards=torch.tensor([1.0, -0.5, 2.0, 0.3]),
        response_length=actions.sum(-1).float(),
        total_length=ends.float(),
        info={"score": torch.arange(B) / 2.0},
    )


PPO = {
    "token-mean": {},
    "seq-mean-dual-clip": {"actor.loss_agg_mode": "seq-mean", "actor.dual_clip": 1.5, "algo.kl.estimator": "k2"},
    "gspo": {  # with one advantage a sequence, without which the two differ on purpose
        "actor.policy_loss_type": "gspo",
        "actor.eps_clip_low_high": (0.01, 0.02),
        "actor.entropy_coef": None,
        "algo.advantage.estimator": "group_norm",
        "rollout.n_samples_per_prompt": 2,
    },
    "unbiased-kl": {"algo.kl.estimator": "k1", "algo.kl.unbiased_gradient": True},
    "token-clip": {
        "algo.advantage.is_correction_level": "token",
        "algo.advantage.is_correction_mode": "clip",
        "algo.advantage.no_std_norm": True,
    },
    "seq-mask": {"algo.advantage.is_correction_level": "seq", "algo.advantage.is_correction_threshold": [0.9, 1.3]},
    "token-tv": {
        "algo.advantage.is_correction_level": "token",
        "algo.advantage.is_correction_gating": "tv",
        "algo.advantage.is_correction_threshold": [0.0, 0.02],
    },
    "dynamic": {"train.dynamic_batch_enable": True},
    "reward-kl": {"algo.kl.use_loss": False, "actor.entropy_coef": 0.0},
}


@pytest.mark.parametrize("name", PPO)
def test_ppo(name, folders, called, monkeypatch):
    """Advantages from rewards, then the updates of actor and critic: two micro-batches, one step."""
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
    from openrlhf.trainer.ray.ppo_actor import ActorPPOTrainer
    from openrlhf.trainer.ray.ppo_critic import CriticPPOTrainer

    args = arguments(**PPO[name])
    made = experience(folders, args, 0.7)

    def step():
        strategies = [Strategy(args, accumulated_gradient=2) for _ in range(2)]
        maker = RemoteExperienceMaker(*[None] * 4, SimpleNamespace(value=0.1), strategies[0], None)
        (batch,) = maker.compute_advantages_and_returns([copy.deepcopy(made)])
        models = actor_of(folders[0], temperature=0.7), scorer_of(folders[0], "critic")
        options = {"micro_train_batch_size": 2, "dataloader_pin_memory": False}
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        actor = ActorPPOTrainer(strategies[0], models[0], None, *trained(models[0]), **options)
        critic = CriticPPOTrainer(strategies[1], models[1], *trained(models[1]), **options)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
        for trainer, more in ((actor, (0.1,)), (critic, ())):
            trainer.replay_buffer.append(copy.deepcopy(batch))
            torch.manual_seed(3)
            trainer.strategy.logs.append(trainer.ppo_train(*more))
        return strategies

    wanted = {"log_probs_from_logits", "PolicyLoss.forward", "ValueLoss.forward"}
    wanted.add(f"RemoteExperienceMaker.get_{'cumulative_returns' if name == 'gspo' else 'advantages_and_returns'}")
    if args.actor.entropy_coef is not None:
        wanted |= {"compute_entropy", "aggregate_loss"}
    if args.algo.kl.use_loss:
        wanted |= {"compute_approx_kl", "aggregate_loss"}
    actor, critic = compare(step, called, wanted)
    assert 0 < actor.logs[-1]["ppo_clip_ratio"] < 1
    assert critic.logs[-1]["critic_loss"] > 0
    if args.algo.advantage.is_correction_level != "off":
        assert 0 < actor.logs[-1]["is_filter_ratio"] < 1


# SFT, DPO, reward model


def texts(seed, width=T):
    """(ids, mask), each [B, 1, width], as OpenRLHF's data sets collate them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, len(word_tokenizer()), (B, 1, width), generator=generator)
    return ids, (torch.arange(width) < torch.tensor([width, 8, 11, 6])[:, None, None]).long()


def test_sft(folders, called):
    from openrlhf.trainer.sft_trainer import SFTTrainer

    args = arguments()
    rows = []
    for seed in (0, 1):
        ids, mask = texts(seed)
        rows.append((ids, mask, mask.float() * (torch.arange(T) >= 2 + seed)))

    def step():
        strategy, model = Strategy(args, accumulated_gradient=2), actor_of(folders[0])
        model.model.global_steps = 1
        optimizer, scheduler = trained(model)
        loader = DataLoader(rows, batch_size=None)
        trainer = SFTTrainer(model, strategy, optimizer, loader, None, scheduler, max_epochs=1)
        trainer.fit(copy.deepcopy(args))
        return [strategy]

    (strategy,) = compare(step, called, {"log_probs_from_logits", "aggregate_loss"})
    assert len(strategy.gradients) == 1


DPO = {
    "sigmoid": {},
    "smoothed": {"model.label_smoothing": 0.1, "model.nll_loss_coef": 0.2},
    "ipo": {"model.ipo_enable": True},
}


@pytest.mark.parametrize("name", DPO)
def test_dpo(name, folders, called):
    from openrlhf.trainer.dpo_trainer import DPOTrainer

    args = arguments(**DPO[name])
    rows = [(*texts(0), *texts(1, T - 2), [2, 3, 4, 2])]

    def step():
        strategy, model = Strategy(args), actor_of(folders[0])
        optimizer, scheduler = trained(model)
        loader = DataLoader(rows, batch_size=None)
        trainer = DPOTrainer(
            model, actor_of(folders[1]), strategy, word_tokenizer(), optimizer, loader, None, scheduler, beta=0.3,
            max_epochs=1,
        )  # fmt: skip
        trainer.fit(copy.deepcopy(args))
        return [strategy]

    compare(step, called, {"log_probs_from_logits", "DPOLoss.forward"})


@pytest.mark.parametrize("loss, margin", [("sigmoid", False), ("sigmoid", True), ("logexp", False)])
def test_reward_model(loss, margin, folders, called):
    from openrlhf.trainer.rm_trainer import RewardModelTrainer

    args = arguments(**{"model.margin_loss_enable": margin})
    rows = [(*texts(0), *texts(1, T - 2), [0.5, 0.0, 1.0, 2.0])]

    def step():
        strategy, model = Strategy(args), scorer_of(folders[0], "reward")
        optimizer, scheduler = trained(model)
        loader = DataLoader(rows, batch_size=None)
        trainer = RewardModelTrainer(
            model, strategy, optimizer, loader, None, scheduler, word_tokenizer(), max_epochs=1, loss=loss
        )
        trainer.fit(copy.deepcopy(args))
        return [strategy]

    compare(step, called, {"PairWiseLoss.forward" if loss == "sigmoid" else "LogExpLoss.forward"})
