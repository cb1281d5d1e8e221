"""What an install brings and an import loads: torch for the kernels, an extra for each further use."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PINS = dict(
    line.lower().split("==")
    for line in (re.sub(r"\s*#.*", "", line) for line in (ROOT / "constraints.txt").read_text().splitlines())
    if line
)
# Imported by what is used only where they are, or brought by transformers itself.
OPTIONAL = {"triton", "datasets", "pyarrow", "peft", "jsonschema", "referencing", "vllm", "deepspeed", "gguf"}
OPTIONAL |= {"tokenizers", "huggingface_hub", "jsonschema-specifications", "math-verify", "sympy", "requests"}


def required(*extras):
    """The requirements of the package with these extras, other extras that they name included."""
    found = {}
    for text in [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]:
        name, others = re.match(r"([\w-]+)(?:\[([\w,-]+)\])?", text).groups()
        if name == PROJECT["name"]:
            found |= required(*others.split(","))
        else:
            found[name.lower()] = text
    return found


def imported(folder):
    """{package of PyPI: files of the folder that import it}, of what is neither Python's nor ours."""
    distributions, found = packages_distributions(), {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in {name.partition(".")[0] for name in names} - {"rlhf", "rlhf_kernels"}:
                if name not in sys.stdlib_module_names:
                    package = distributions.get(name, [name])[0].lower()
                    found.setdefault(package, set()).add(str(path.relative_to(ROOT)))
    return found


def test_import_loads_nothing_beside_torch():
    """Not the compiler, not triton: each takes longer to import than the package may."""
    script = (
        "import sys, torch; before = set(sys.modules); import rlhf_kernels; print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert "rlhf_kernels.packing" in loaded
    foreign = {name for name in loaded if name.partition(".")[0] not in {"rlhf_kernels", *sys.stdlib_module_names}}
    assert {name.partition(".")[0] for name in foreign} <= {"torch"}, foreign
    heavy = ("torch._dynamo", "torch._inductor", "torch.fx.experimental", "torch.nn.attention.flex_attention")
    assert not [name for name in foreign if name.startswith(heavy)]
    assert len(foreign) <= 5, foreign


def test_an_install_of_the_kernels_brings_torch_alone():
    assert list(required()) == ["torch"]
    files = imported("rlhf_kernels")
    others = {"transformers", "accelerate", "datasets", "trl", "openrlhf", "verl"}  # which integrations alone import
    assert files.keys() <= {"torch", "triton", "setuptools", *others}, files
    assert all(file.startswith("rlhf_kernels/triton/") for file in files["triton"])
    for name in others:
        assert all(file.startswith("rlhf_kernels/integrations/") for file in files.get(name, ()))


def test_the_extra_of_the_trainers_has_what_they_import():
    pytest.importorskip("transformers", reason="needs the trainers' packages, for the names of what they import")
    packages, files = required("train"), imported("rlhf")
    assert packages.keys() >= {"torch", "transformers", "accelerate", "matplotlib", "vadersentiment"}
    lacking = {name: where for name, where in files.items() if name not in packages and name not in OPTIONAL}
    assert not lacking


def test_the_extra_of_the_tests_runs_tests_and_benchmarks():
    packages = required("test")
    assert packages.keys() >= {"pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "ninja", *required("train")}
    assert packages.keys() >= required("test-kernels").keys()


@pytest.mark.parametrize("extra", ["train", "test"])
def test_versions_that_work_together_satisfy_the_ranges(extra):
    for name, text in required(extra).items():
        requirement = Requirement(text)
        assert name in PINS or extra == "test", f"constraints.txt does not pin {name}"
        assert name not in PINS or requirement.specifier.contains(PINS[name]), text
