"""The folder that `python -m rlhf_kernels.hub` writes: its form, and its builds beside the package in one process.

RLHF_KERNELS_HUB=DIR tests that folder, as `make hub` does; else one is written for the tests.
"""

import ast
import base64
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch._library.custom_ops import OPDEFS

import rlhf_kernels
from rlhf_kernels import _native, hub

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VARIANTS = ("torch-cpu", "torch-cuda")
NEEDS_KERNELS = pytest.mark.skipif(find_spec("kernels") is None, reason="needs the package kernels: make hub")
NEEDS_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")


@pytest.fixture(scope="module", autouse=True)
def module():
    if reason := _native.missing():
        pytest.skip(reason)
    return Path(_native._load()[0].__file__)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if asked := os.environ.get("RLHF_KERNELS_HUB"):
        return Path(asked)
    made = tmp_path_factory.mktemp("hub") / "repository"
    hub.write(made)
    return made


def described(folder, variant):
    return json.loads((folder / "build" / variant / "metadata.json").read_text())


def load(path):
    """A build, imported as `kernels` imports it: under its id, from anywhere."""
    name = json.loads((path / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, path / "__init__.py")
    sys.modules[name] = loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def on_cpu(folder):
    """The build for CPUs, by `kernels` where it is installed."""
    if find_spec("kernels") is None:
        return load(folder / "build" / "torch-cpu")
    from kernels import get_local_kernel

    return get_local_kernel(folder, backend="cpu")


@pytest.fixture(scope="module")
def on_gpu(folder):
    """The build for GPUs; without one Triton's kernels run in its interpreter, as tests/conftest.py says."""
    if DEVICE == "cuda" and find_spec("kernels") is not None:
        from kernels import get_local_kernel

        return get_local_kernel(folder)
    return load(folder / "build" / "torch-cuda")


# Its form


@pytest.mark.parametrize("variant", VARIANTS)
def test_metadata(folder, variant):
    """What kernels 0.17 asks for, and the digest of the files that are there."""
    path, found = folder / "build" / variant, described(folder, variant)
    backend = variant.removeprefix("torch-")
    assert found["name"] == "rlhf-kernels" and found["license"] == "Apache-2.0" and found["python-depends"] == []
    assert found["version"] == 0 and found["backend"] == {"type": backend}
    assert found["id"].isidentifier() and found["id"].startswith(f"_rlhf_kernels_{backend}_")
    files = [file for file in path.rglob("*") if file.is_file() and file != path / "metadata.json"]
    digest = {
        file.relative_to(path).as_posix(): base64.b64encode(hashlib.sha256(file.read_bytes()).digest()).decode()
        for file in files
        if "__pycache__" not in file.parts
    }
    assert found["digest"] == {"algorithm": "sha256", "files": digest}


@pytest.mark.parametrize("variant", VARIANTS)
def test_imports_are_its_own_or_torch(folder, variant):
    """Relative imports that lead to a file of the build; else Python's and torch, and triton in its own room."""
    path = folder / "build" / variant
    for file in path.rglob("*.py"):
        allowed = sys.stdlib_module_names | {"torch"} | ({"triton"} if file.parent.name == "triton" else set())
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                leads = [base] if node.module else [base / alias.name for alias in node.names]
                if node.module is None and file.name == "_native.py":
                    leads = [x for x in leads if x.name not in ("_cpu", "_cuda")]  # looked for, and may be missing
                for lead in leads:
                    assert lead.with_suffix(".py").is_file() or (lead / "__init__.py").is_file(), f"{file}: {lead}"
                continue
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {name.partition(".")[0] for name in names} <= allowed, f"{file.relative_to(path)} imports {names}"


def test_holds_kernels_and_nothing_of_trainers(folder, module):
    assert sorted(path.name for path in folder.iterdir()) == ["LICENSE", "README.md", "build"]
    assert (folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert sorted(path.name for path in (folder / "build").iterdir()) == sorted(VARIANTS)
    for variant in VARIANTS:
        path = folder / "build" / variant
        assert not [x for x in ("integrations", "parity.py", "hub.py") if (path / x).exists()]
        compiled = [file.name for file in path.rglob("*.so")]
        assert compiled == ([module.name] if variant == "torch-cpu" else [])


def test_writing_again_replaces_and_gives_the_same_ids(tmp_path):
    first = hub.write(tmp_path / "made")
    (tmp_path / "made" / "README.md").write_text("old")
    assert hub.write(tmp_path / "made") == first
    assert "get_local_kernel" in (tmp_path / "made" / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("strange", [".git/config", "build/torch-metal/x.py", "notes.txt"])
def test_replaces_nothing_of_others(tmp_path, strange):
    file = tmp_path / "theirs" / strange
    file.parent.mkdir(parents=True)
    file.write_text("theirs")
    with pytest.raises(FileExistsError, match=f"holds {strange.rpartition('/')[0] or strange}, expected a new folder"):
        hub.write(tmp_path / "theirs")
    assert file.read_text() == "theirs"


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    """The last file to be written cannot be: the older folder is whole, and nothing lies beside it."""
    ids = hub.write(tmp_path / "made")
    monkeypatch.setattr(hub, "sources", lambda: {"__init__.py": b"new"})

    def fails():
        raise OSError("no licence")

    monkeypatch.setattr(hub, "licence", fails)
    with pytest.raises(OSError, match="no licence"):
        hub.write(tmp_path / "made")
    assert {variant: described(tmp_path / "made", variant)["id"] for variant in VARIANTS} == ids
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_needs_the_native_module(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_native, "missing", lambda: "no compiler")
    with pytest.raises(SystemExit, match="2"):
        hub.main([str(tmp_path / "made")])
    assert "torch-cpu needs the native CPU module: no compiler" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# Its functions


def logprobs_inputs():
    return (randn(3, 5, 41),), {"labels": torch.arange(15).view(3, 5)}


def linear_inputs():
    return (randn(7, 16), randn(41, 16, seed=1)), {"labels": torch.arange(7) * 5}


def ppo_inputs():
    new, advantages = randn(4, 6), randn(4, 6, seed=1)
    mask = torch.arange(6)[None] < torch.tensor([6, 1, 4, 3])[:, None]
    return (new,), {"old": new - 0.3 * randn(4, 6, seed=2), "advantages": advantages, "mask": mask}


def gae_inputs():
    return (randn(3, 6), randn(3, 6, seed=1)), {}


def ranking_inputs():
    return (randn(4, 3),), {"ranks": torch.tensor([[0, 1, 2], [2, 0, 1], [0, 0, 1], [1, 2, 0]])}


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact_logprobs(logits, *, labels):
    return logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)


def exact_linear(hidden, weight, *, labels):
    return exact_logprobs(hidden @ weight.T, labels=labels)


def exact_ppo(new, *, old, advantages, mask):
    ratio = (new - old).exp()
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    return losses[mask].mean()


def exact_gae(rewards, values):
    """delta_t = r_t + V_{t+1} - V_t at gamma 1; A_t = delta_t + 0.95 A_{t+1}."""
    advantages, ahead, next_value = [], 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        ahead = rewards[:, t] + next_value - values[:, t] + 0.95 * ahead
        next_value = values[:, t]
        advantages.insert(0, ahead)
    return torch.stack(advantages, dim=1)


def exact_ranking(scores, *, ranks):
    """The mean over prompts of the mean over pairs of -log sigmoid(better - worse)."""
    losses = []
    for row, order in zip(scores, ranks.tolist()):
        pairs = [(i, j) for i in range(3) for j in range(3) if order[i] < order[j]]
        losses.append(torch.stack([-torch.nn.functional.logsigmoid(row[i] - row[j]) for i, j in pairs]).mean())
    return torch.stack(losses).mean()


CASES = {
    "logprobs": (logprobs_inputs, exact_logprobs, lambda rk, x, labels: rk.logprobs_from_logits(x, labels)),
    "linear": (linear_inputs, exact_linear, lambda rk, h, w, labels: rk.linear_logprobs(h, w, labels)),
    "ppo": (
        ppo_inputs,
        exact_ppo,
        lambda rk, new, old, advantages, mask: rk.ppo_loss(new, old, advantages, mask).loss,
    ),
    "advantages": (gae_inputs, exact_gae, lambda rk, rewards, values: rk.gae(rewards, values)[0]),
    "bradley_terry": (ranking_inputs, exact_ranking, lambda rk, x, ranks: rk.bradley_terry_loss(x, ranks).loss),
}
DIFFERENTIABLE = set(CASES) - {"advantages"}


def check(kernels, op, device, assert_close):
    """Value, and gradients where the function has them, against float64 autograd of the equation."""
    inputs, exact, function = CASES[op]
    leaves, others = inputs()
    leaves64 = [x.float().double().requires_grad_() for x in leaves]
    others64 = {name: x.float().double() if x.is_floating_point() else x for name, x in others.items()}
    wanted = exact(*leaves64, **others64)
    found = [x.float().to(device).requires_grad_(op in DIFFERENTIABLE) for x in leaves]
    given = {name: x.to(device, torch.float32 if x.is_floating_point() else x.dtype) for name, x in others.items()}
    got = function(kernels, *found, **given)
    assert_close(got.detach().cpu(), wanted.detach(), torch.float32)
    if op in DIFFERENTIABLE:
        upstream = randn(*wanted.shape, seed=9).float()
        gradients = torch.autograd.grad(got, found, upstream.to(device))
        for x, y in zip(gradients, torch.autograd.grad(wanted, leaves64, upstream.double()), strict=True):
            assert_close(x.cpu(), y, torch.float32)


@pytest.mark.parametrize("op", CASES)
def test_the_cpu_build_and_the_package_in_one_process(on_cpu, folder, op, assert_close_to_fp64):
    for kernels in (on_cpu, rlhf_kernels, on_cpu):
        with kernels.backend("cpu"):
            check(kernels, op, "cpu", assert_close_to_fp64)
    served = sys.modules[f"{on_cpu.__name__}.dispatch"].pick(op, torch.zeros(1))
    assert served.__name__ == f"{on_cpu.__name__}.cpu.{op}"
    native = sys.modules[f"{on_cpu.__name__}._cpu"]
    assert Path(native.__file__).parent == folder / "build" / "torch-cpu"
    assert native is not _native._load()[0]


def test_large_results_lie_in_a_pool_of_its_own(on_cpu):
    """Results of 2 MiB and more are buffers of the native module, whose class several modules may have."""
    theirs = sys.modules[f"{on_cpu.__name__}._native"]
    if theirs._pool() is None:
        pytest.skip("no pool on this machine")
    assert theirs._pool() is not _native._pool()
    logits, labels = randn(600, 1000), torch.arange(600)
    wanted = torch.nn.functional.one_hot(labels, 1000) - logits.float().double().softmax(-1)
    for kernels in (on_cpu, rlhf_kernels, on_cpu):
        leaf = logits.float().requires_grad_()
        kernels.logprobs_from_logits(leaf, labels).sum().backward()
        torch.testing.assert_close(leaf.grad.double(), wanted, atol=1e-6, rtol=1e-6)
        del leaf
    assert theirs._load()[0].kept() >= 600 * 1000 * 4


@NEEDS_TRITON
@pytest.mark.parametrize("op", CASES)
def test_the_cuda_build_runs_triton(on_gpu, op, assert_close_to_fp64):
    with on_gpu.backend("triton"):
        check(on_gpu, op, DEVICE, assert_close_to_fp64)
        served = sys.modules[f"{on_gpu.__name__}.dispatch"].pick(op, torch.zeros(1, device=DEVICE))
    assert served.__name__ == f"{on_gpu.__name__}.triton.{op}"


def test_the_cuda_build_says_that_it_has_nothing_compiled(on_gpu):
    assert "torch-cuda has no native CPU module" in on_gpu.backends()["logprobs"]["cpu"]


def test_operators_have_namespaces_of_their_own(on_cpu, on_gpu, folder):
    ids = [described(folder, variant)["id"] for variant in VARIANTS]
    assert [on_cpu.__name__, on_gpu.__name__] == ids
    found = [qualname.split("::") for qualname in OPDEFS]
    names = [{op for space, op in found if space == name} for name in ("rlhf_kernels", *ids)]
    assert "logprobs_fwd" in names[0] and names[0] == names[1] == names[2]
    assert on_cpu.__all__ == rlhf_kernels.__all__ == on_gpu.__all__


def test_a_choice_of_backend_is_one_copy_s_own(on_cpu):
    tensor = torch.zeros(1)
    theirs = sys.modules[f"{on_cpu.__name__}.dispatch"]
    with rlhf_kernels.backend("reference"):
        assert theirs.pick("logprobs", tensor).__name__.endswith(".cpu.logprobs")
    with on_cpu.backend("reference"):
        assert theirs.pick("logprobs", tensor).__name__ == f"{on_cpu.__name__}.reference.logprobs"
        assert rlhf_kernels.dispatch.pick("logprobs", tensor).__name__ == "rlhf_kernels.cpu.logprobs"


def test_both_compile_as_one_graph(on_cpu):
    """A graph holds the operator of the copy that was called."""
    labels = torch.arange(15).view(3, 5)
    for kernels in (on_cpu, rlhf_kernels):
        graphs = []

        def keep(graph, inputs, graphs=graphs):
            graphs.append(graph)
            return graph.forward

        def function(x, kernels=kernels):
            return kernels.logprobs_from_logits(x, labels)

        logits = randn(3, 5, 41).float()
        found = torch.compile(function, backend=keep, fullgraph=True)(logits)
        assert torch.equal(found, function(logits))
        (graph,) = graphs
        assert [n for n in graph.graph.nodes if str(n.target) == f"{kernels.__name__}.logprobs_fwd.default"]


# The package kernels


@NEEDS_KERNELS
@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_reads_its_metadata_and_finds_the_digest(folder, variant):
    from kernels._rust import Digest, Metadata

    path = folder / "build" / variant
    found = Metadata.read_from_file(path / "metadata.json")
    found.digest.validate(Digest.hash_variant(found.digest.algorithm, path))
    assert found.name.python_name == "rlhf_kernels" and str(found.kernels_minver) == "0.17.2"


@NEEDS_KERNELS
def test_kernels_resolves_the_build_of_the_machine(folder):
    from kernels.variants import get_variants_local, resolve_variant

    found = get_variants_local(folder / "build")
    assert {x.variant_str for x in found} == set(VARIANTS)
    assert resolve_variant(found, "cpu")[0].variant_str == "torch-cpu"
    machine = "torch-cuda" if torch.version.cuda else "torch-cpu"
    if not torch.version.hip:
        assert resolve_variant(found)[0].variant_str == machine


@NEEDS_KERNELS
@pytest.mark.parametrize("page", ["docs/integrations/hub.md", "README.md"])
def test_snippets_run(folder, page, capsys):
    """Those of the page and of the repository's card, with this folder in the place of theirs."""
    text = (folder / page if page == "README.md" else ROOT / page).read_text()
    (snippet,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    snippet = re.sub(r'Path\(".*?"\)', f"Path({str(folder)!r})", snippet)
    exec(compile(snippet, page, "exec"), {"__name__": "snippet"})
    assert "logprobs       reference  available" in capsys.readouterr().out


OFFLINE = """
import socket, sys
from pathlib import Path

def refuse(*arguments):
    raise AssertionError(f"connects to {arguments[1:]}")

socket.socket.connect = refuse
socket.getaddrinfo = refuse
import torch
from kernels import get_kernel, get_local_kernel

kernels = get_kernel("someone/rlhf-kernels", version=0, backend="cpu")
assert get_local_kernel(Path(sys.argv[1]), backend="cpu") is kernels
assert not {"rlhf_kernels", "triton"} & set(sys.modules)
with kernels.backend("cpu"):
    logits = torch.zeros(2, 4, requires_grad=True)
    found = kernels.logprobs_from_logits(logits, torch.tensor([0, 3]))
    found.sum().backward()
print(kernels.__file__, found.tolist(), logits.grad.tolist())
"""


@NEEDS_KERNELS
def test_local_kernels_offline_without_the_package(folder, tmp_path):
    """Uniform logits over 4 tokens: log-prob -log 4, gradient 1 - 1/4 at the label and -1/4 elsewhere."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"LOCAL_KERNELS": f"someone/rlhf-kernels={folder}", "RLHF_KERNELS_CUDA_ON_CPU": ""}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(folder)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    row = [-0.25, -0.25, -0.25]
    wanted = [[-1.3862943649291992] * 2, [[0.75, *row], [*row, 0.75]]]
    assert done.stdout.split(maxsplit=1)[0] == str(folder / "build" / "torch-cpu" / "__init__.py")
    assert done.stdout.split(maxsplit=1)[1].strip() == f"{wanted[0]} {wanted[1]}"
