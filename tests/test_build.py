"""The layout's rules, the native objects, and an install without a compiler."""

import ast
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

from rlhf_kernels import _native, dispatch

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "rlhf_kernels"
X86 = platform.machine().lower() in ("x86_64", "amd64")
ISA_FLAGS = {"base": []}
if X86:
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = [*ISA_FLAGS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
SUPPORT = {"isa", "math"}  # run-time detection and threads; the vector maths for its test
COMPOSED = {"cross_entropy", "linear"}  # their arithmetic is that of logprobs
WALKED = {"ppo"}  # on a CPU a call of the op policy; its arithmetic stands in a header of its own
BESIDE = {  # public files that are no op's own
    "aggregation",
    "dispatch",
    "group_advantages",
    "hub",
    "importance",
    "model_head",
    "objectives",
    "parity",
    "preferences",
}
# Public functions of the op linear beside it; token_statistics has one of logprobs too.
LINEAR = {"linear_divergences", "linear_policy", "linear_preference", "token_statistics"}
COMPILER = shutil.which("c++") or shutil.which("g++")


def ops_with(backend):
    return {op for op, rows in dispatch.TABLE.items() if backend in [row[0] for row in rows]}


def stems(folder, pattern):
    return {path.stem for path in folder.glob(pattern)}


@pytest.mark.parametrize("op", dispatch.TABLE)
def test_every_op_has_its_room(op):
    files = [PACKAGE / f"{op}.py", PACKAGE / "reference" / f"{op}.py", ROOT / "tests" / "kernels" / f"test_{op}.py"]
    files.append(ROOT / "docs" / "ops" / f"{op}.md")
    if op in ops_with("cpu"):
        files += [ROOT / "csrc" / "cpu" / f"{op}.cpp"] if op not in WALKED else []
        files += [ROOT / "csrc" / "include" / f"{op}.h"] if op not in COMPOSED else []
    if op in ops_with("cuda"):
        files.append(ROOT / "csrc" / "cuda" / f"{op}.cu")
    files += [PACKAGE / name / f"{op}.py" for name in ("cpu", "triton", "cuda") if op in ops_with(name)]
    missing = [str(path.relative_to(ROOT)) for path in files if not path.exists()]
    assert not missing, f"the op {op} lacks {', '.join(missing)}"


def test_no_orphans():
    ops = set(dispatch.TABLE)
    assert stems(ROOT / "csrc" / "cpu", "*.cpp") == ops_with("cpu") - WALKED | SUPPORT
    assert stems(ROOT / "csrc" / "include", "*.h") == ops_with("cpu") - COMPOSED | {"exp", "rk", "module"}
    assert stems(ROOT / "csrc" / "cuda", "*.c*") == ops_with("cuda") | {"module"}
    assert ops_with("reference") == ops
    for name in ("reference", "cpu", "triton", "cuda"):
        modules = {stem for stem in stems(PACKAGE / name, "*.py") if not stem.startswith("_")}
        assert modules == ops_with(name)
    assert stems(ROOT / "docs" / "ops", "*.md") == ops
    public = {name for name in stems(PACKAGE, "*.py") if not name.startswith("_")}
    assert public == ops | LINEAR | BESIDE


def test_dispatch_is_short_and_swallows_nothing():
    text = (PACKAGE / "dispatch.py").read_text()
    assert len(text.splitlines()) <= 150
    assert not [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ExceptHandler)]


def test_files_are_short():
    kernels = [path for pattern in ("cpu/*.cpp", "cuda/*.cu", "*/*.h") for path in (ROOT / "csrc").glob(pattern)]
    long = {path.name: len(path.read_text().splitlines()) for path in kernels}
    assert {name: lines for name, lines in long.items() if lines > 400} == {}
    python = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {name: lines for name, lines in python.items() if lines > 500} == {}


def test_the_build_and_the_native_code_know_no_torch():
    for path in [ROOT / "setup.py", *(ROOT / "csrc").rglob("*.*")]:
        assert not re.search(r"import torch|#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path
    requires = re.search(r"requires = \[(.*)\]", (ROOT / "pyproject.toml").read_text())[1]
    assert "torch" not in requires


@pytest.fixture(scope="module", params=["advantages", pytest.param("all", marks=pytest.mark.slow)])
def symbols(request, tmp_path_factory):
    """{(op, instruction set): [(type, demangled name)]} of freshly compiled objects."""
    if COMPILER is None or shutil.which("nm") is None:
        pytest.skip("needs a C++ compiler and nm")
    folder = tmp_path_factory.mktemp("objects")

    def compile_one(job):
        op, isa = job
        target = folder / f"{op}-{isa}.o"
        baseline = ["-DRK_BASELINE=1"] if isa == "base" else []
        baseline += ["-DRK_X86=1"] if X86 else []
        command = [COMPILER, "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-fno-math-errno", "-fPIC"]
        command += [f"-DRK_ISA={isa}", *baseline, *ISA_FLAGS[isa], f"-I{ROOT / 'csrc' / 'include'}"]
        subprocess.run([*command, "-c", str(ROOT / "csrc" / "cpu" / f"{op}.cpp"), "-o", str(target)], check=True)
        listing = subprocess.run(["nm", "-C", str(target)], check=True, capture_output=True, text=True).stdout
        return job, [re.match(r"\S*\s+(\S)\s+(.*)", line).groups() for line in listing.splitlines()]

    names = sorted(ops_with("cpu") - WALKED | SUPPORT - {"isa"}) if request.param == "all" else [request.param]
    jobs = [(name, isa) for name in names for isa in ISA_FLAGS]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return dict(pool.map(compile_one, jobs))


def test_nothing_is_shared_between_instruction_sets(symbols):
    """A symbol that the linker may merge lies in its own rk::<isa>; one made for a newer CPU never serves an older."""
    for (op, isa), table in symbols.items():
        for kind, name in table:
            shared = kind in "VvWwu" or (kind in "TDBR" and isa != "base")
            assert not shared or re.match(rf"(\S+ (for|of) )?(.* )?rk::{isa}::", name), f"{op} for {isa} shares {name}"


def test_only_the_baseline_registers(symbols):
    """A static constructor compiled for a newer instruction set would run at import on every CPU."""
    for (op, isa), table in symbols.items():
        constructors = [name for _, name in table if "GLOBAL__sub_I" in name or "rk_entry" in name]
        assert bool(constructors) == (isa == "base"), f"{op} for {isa}: {constructors}"


def test_compiler_flags_are_those_of_setup():
    text, fuzzing = (ROOT / "setup.py").read_text(), (ROOT / "Makefile").read_text().split()
    for flag in {flag for flags in ISA_FLAGS.values() for flag in flags}:
        assert f'"{flag}"' in text
        assert flag in fuzzing


def test_package_data_is_declared():
    text = (ROOT / "pyproject.toml").read_text()
    for pattern in ("presets/*.yaml", "demo/*.jsonl", "demo/base/*", "_cpu_build_error.txt", "_cuda_build_error.txt"):
        assert f'"{pattern}"' in text


@pytest.fixture
def checkout(tmp_path):
    """A copy of what setup.py needs, without modules and notes of this checkout."""
    if find_spec("setuptools") is None or find_spec("pybind11") is None:
        pytest.skip("needs setuptools and pybind11 in this environment")
    source = tmp_path / "source"
    shutil.copytree(ROOT / "csrc", source / "csrc")
    shutil.copytree(PACKAGE, source / "rlhf_kernels", ignore=shutil.ignore_patterns("*.so", "*.txt", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    return source


def build(source, out, **environment):
    """setup.py build in that folder; returns what it printed."""
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(out)]
    environment = {**os.environ, "RLHF_KERNELS_WERROR": "0", "RLHF_KERNELS_CUDA_ARCHS": "", **environment}
    environment.pop("RLHF_KERNELS_SANITIZE", None)
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


def program(path, text):
    """A program in Python of this name."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!{sys.executable}\nimport subprocess, sys\narguments = sys.argv[1:]\n{text}")
    path.chmod(0o755)
    return path


NEEDS_NINJA = pytest.mark.skipif(not (find_spec("ninja") or shutil.which("ninja")), reason="needs ninja")
# Only preprocesses, which finds the headers in no time; logs the sources that it is given.
PREPROCESSOR = """
target = arguments[arguments.index("-o") + 1]
if "-MF" in arguments:
    print(arguments[arguments.index("-c") + 1], target, file=open(LOG, "a"))
    arguments[arguments.index("-c")] = "-E"
    sys.exit(subprocess.run([COMPILER, *arguments, "-MT", target]).returncode)
open(target, "w")
"""
NVCC = """
if "--list-gpu-arch" in arguments:
    sys.exit(print(*KNOWN, sep="\\n"))
print(*arguments, file=open(LOG, "a"))
open(arguments[arguments.index("-o") + 1], "w")
"""


@NEEDS_NINJA
@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_a_change_builds_again_what_it_reaches(checkout, tmp_path):
    log = tmp_path / "log"
    compiler = program(tmp_path / "bin" / "c++", f"LOG, COMPILER = {str(log)!r}, {COMPILER!r}\n{PREPROCESSOR}")

    def compiled(**environment):
        log.unlink(missing_ok=True)
        build(checkout, tmp_path / "out", CXX=str(compiler), **environment)
        lines = log.read_text().splitlines() if log.exists() else []
        return {(Path(source).stem, Path(target).stem.rpartition("-")[2]) for source, target in map(str.split, lines)}

    every = {(op, isa) for op in ops_with("cpu") - WALKED | SUPPORT - {"isa"} for isa in ISA_FLAGS} | {("isa", "base")}
    assert compiled() == every
    assert compiled() == set()
    (checkout / "csrc" / "cpu" / "narrow_prompts.h").touch()
    assert compiled() == {("bradley_terry", isa) for isa in ISA_FLAGS}
    (checkout / "csrc" / "cpu" / "kl.cpp").touch()
    assert compiled() == {("kl", isa) for isa in ISA_FLAGS}
    assert compiled(CXXFLAGS="-DOTHER=1") == every


@NEEDS_NINJA
@pytest.mark.parametrize(
    "asked, known, built, ptx",
    [
        ("90a", "80 90 100", "90a", "90"),
        ("80 90a 100", "80 90", "80 90a", "90"),
        ("80 90a 100", "80 90 100 120", "80 90a 100", "100"),
        ("100 80", "80 90 100", "100 80", "100"),
    ],
)
def test_the_newest_architecture_also_goes_as_ptx(checkout, tmp_path, asked, known, built, ptx):
    """PTX of the architecture without its `a`: that of 90a would run on no later GPU."""
    log, known = tmp_path / "log", [f"compute_{arch}" for arch in known.split()]
    nvcc = program(tmp_path / "bin" / "nvcc", f"LOG, KNOWN = {str(log)!r}, {known!r}\n{NVCC}")
    path = f"{nvcc.parent}{os.pathsep}{os.environ['PATH']}"
    build(checkout, tmp_path / "out", CXX="/no/such/c++", PATH=path, RLHF_KERNELS_CUDA_ARCHS=asked)
    expected = {f"arch=compute_{arch},code=sm_{arch}" for arch in built.split()}
    expected.add(f"arch=compute_{ptx},code=compute_{ptx}")
    lines = [line for line in log.read_text().splitlines() if ".cu" in line]
    assert len(lines) == len(ops_with("cuda")) + 1  # and the link
    for line in lines:
        assert set(re.findall(r"-gencode=(\S+)", line)) == expected


def test_the_module_is_stripped():
    """Symbols would be most of the file; what stays is what the loader needs."""
    if _native.missing() or shutil.which("nm") is None:
        pytest.skip(_native.missing() or "needs nm")
    module = _native._load()[0]
    if module.sanitized:
        pytest.skip("a checked build keeps its symbols")
    done = subprocess.run(["nm", module.__file__], capture_output=True, text=True)
    assert "no symbols" in done.stderr and not done.stdout
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", module.__file__], check=True, capture_output=True, text=True
    )
    names = {line.split()[-1]: line.split()[-2] for line in listing.stdout.splitlines()}
    assert names.pop("PyInit__cpu") == "T"
    assert set(names.values()) <= set("VWwuA"), "only what several modules may share is visible"


def test_install_without_a_compiler_succeeds_and_says_why(checkout, tmp_path):
    out = tmp_path / "out"
    build(checkout, out, CC="/no/such/cc", CXX="/no/such/c++")
    note = (out / "rlhf_kernels" / "_cpu_build_error.txt").read_text()
    assert note.startswith("the C++ build failed when the package was installed:")
    assert (out / "rlhf_kernels" / "_cuda_build_error.txt").exists()
    assert "/no/such/c" in note
    assert not list(out.rglob("*.so"))
    # The finder of an editable install of this very package would add its _cpu to the copy.
    script = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in getattr(f, '__name__', '')]; "
        "import rlhf_kernels as r; print(r.__file__); print(r.backends())"
    )
    environment = {**os.environ, "PYTHONPATH": str(out)}
    printed = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    ).stdout
    assert str(out) in printed
    assert "advantages     cpu        missing: the C++ build failed" in printed
    assert "advantages     reference  available" in printed
