"""The rooms of rlhf/: imports run one way, files are short, and what moved is found in its old place."""

import ast
import importlib
import importlib.metadata
import subprocess
import sys
import warnings
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import rlhf
from rlhf import _moved

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ROOT / "rlhf"
FLOORS = (  # a room or file imports from its own room and from floors before its own
    {"disk", "errors", "interrupt", "locks"},
    {"checkpoint", "extras", "metrics", "own_code", "processes", "ranges", "same_run", "servers", "settings"},
    {"data", "environment", "stages"},
    {"models"},
    {"rollouts"},
    {"rewards", "reports"},
    {"training"},
    {"sft", "reward", "preference", "ppo", "evaluate"},
    {"pipeline"},
    {"cli", "demo"},
    {"__main__"},
)
FRONT = {"__init__", "_moved"}


def imported(path):
    """Dotted names below rlhf (room, room.file) that a file imports, at its top or inside a function."""
    package = ["rlhf", *path.relative_to(ROOMS).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            found = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in found:
            parts = name.split(".")
            if parts[0] == "rlhf" and len(parts) > 1:
                yield parts[1:]


def room_of(path):
    return path.relative_to(ROOMS).parts[0].removesuffix(".py")


FILES = [path for path in sorted(ROOMS.rglob("*.py")) if room_of(path) not in FRONT]
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}


def test_every_room_has_its_floor():
    assert {room_of(path) for path in FILES} == set(FLOOR)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOMS)))
def test_imports_run_one_way(path):
    own = room_of(path)
    upward = [".".join(name) for name in imported(path) if name[0] != own and FLOOR.get(name[0], -1) >= FLOOR[own]]
    assert not upward, f"{path.relative_to(ROOT)} imports from its own floor or above: {upward}"


def test_no_files_import_each_other():
    graph = {}
    for path in FILES:
        name = path.relative_to(ROOMS).with_suffix("").parts
        for parts in imported(path):
            place = ROOMS.joinpath(*parts[:2])
            file = parts[:2] if place.with_suffix(".py").is_file() else parts[:1]
            if file != list(name):
                graph.setdefault(".".join(name), set()).add(".".join(file))
    TopologicalSorter(graph).prepare()


def test_files_are_short():
    lines = {str(path.relative_to(ROOMS)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: count for name, count in lines.items() if count > 400} == {}


def test_public_names_are_found():
    assert {name: getattr(rlhf, name).__name__ for name in rlhf.__all__} == {name: name for name in rlhf.__all__}
    assert rlhf.__version__ == importlib.metadata.version("rlhf-kernels")
    with pytest.raises(AttributeError, match="no attribute 'SFTTrainerr'"):
        rlhf.SFTTrainerr  # noqa: B018


def test_importing_rlhf_is_light():
    script = "import sys, rlhf; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_command_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "rlhf", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("rlhf COMMAND [flags]")


OLD_PLACES = {
    "rlhf.data": "load_rows split_rows encode_prompt encode_completion end_of_turn_id pad_batch DataError",
    "rlhf.models": "load_policy load_reward_model load_tokenizer save_model token_scores stop_token_ids",
    "rlhf.training": "StageConfig StageTrainer encode_rows make_batch",
    "rlhf.ppo": "PPOTrainer PPOConfig train_ppo",
    "rlhf.rewards": "math_answer regex json_schema unit_test BUILT_IN",
    "rlhf.evaluate": "evaluate_policies best_of_n wilson_interval win_rate",
    "rlhf.pipeline": "run_pipeline PipelineConfig Stages",
    "rlhf.rankings": "ranks_of decided_pairs",
    "rlhf.adapters": "add_adapters merged",
    "rlhf.sequences": "join response_log_probs response_scores",
    "rlhf.rollout": "Completion RolloutEngine RolloutError Rollouts collect sample",
    "rlhf.rollout_engines": "load_engine log_prob_gap",
    "rlhf.scoring": "Scorer reward_functions",
    "rlhf.sandbox": "run_python SandboxError",
    "rlhf.guards": "HealthGuards",
    "rlhf.kl_controller": "KLController",
    "rlhf.ppo_checkpoint": "save_checkpoint load_checkpoint",
    "rlhf.ppo_config": "PPOConfig",
    "rlhf.ppo_iteration": "Experience Iteration",
    "rlhf.ppo_run": "PPORun ActorCritic",
    "rlhf.ppo_state": "Cursor WeightAverage",
    "rlhf.sharding": "trained_weights whole_tensor",
    "rlhf.startup_check": "check_contract ContractError",
    "rlhf.health": "health",
    "rlhf.page": "render",
    "rlhf.plots": "Series",
    "rlhf.report": "write_report text_table",
    "rlhf.reward_report": "ranking_report report_table",
    "rlhf.runs": "read_report",
}


@pytest.mark.parametrize("module", OLD_PLACES)
def test_what_moved_is_found_in_its_old_place(module):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        sys.modules.pop(module, None) if module in _moved.MOVED else None
        old = importlib.import_module(module)
    for name in OLD_PLACES[module].split():
        assert getattr(old, name) is getattr(importlib.import_module(_moved.MOVED.get(module, module)), name)
    if module in _moved.MOVED:
        text = f"{module} moved to {_moved.MOVED[module]}"
        assert text in [str(warning.message) for warning in told if warning.category is DeprecationWarning]


def test_the_table_of_old_places_is_whole():
    assert set(_moved.MOVED) <= set(OLD_PLACES)
    assert not [module for module in _moved.MOVED if (ROOT / f"{module.replace('.', '/')}.py").exists()]
