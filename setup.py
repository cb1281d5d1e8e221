"""Builds rlhf_kernels._cpu from csrc/cpu, each op once per instruction set, and _cuda from csrc/cuda if nvcc is there.

Needs a C++17 compiler, pybind11 and ninja, whose file this script writes: ninja knows what a changed header or flag
makes stale. Without a working compiler, or without nvcc, the install still succeeds, and the reason is stored in
rlhf_kernels/_cpu_build_error.txt or _cuda_build_error.txt, which `rlhf_kernels.backends()` shows.
RLHF_KERNELS_WERROR=1 (for CI) turns warnings into errors, and lets a failed build fail the install.
RLHF_KERNELS_SANITIZE=address,undefined (for make sanitize) builds a slow module that stops at the first bad access.
RLHF_KERNELS_CUDA_ARCHS=90a (default: 80 90a 100, as far as nvcc knows them) builds for less, the newest always also as
PTX, which the driver of a later GPU compiles; RLHF_KERNELS_CUDA_ARCHS= builds no _cuda.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

CSRC = Path("csrc")
STRICT = os.environ.get("RLHF_KERNELS_WERROR") == "1"
X86 = platform.machine().lower() in ("x86_64", "amd64")
ISA_FLAGS = {"base": []}
if X86:
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = [
        *ISA_FLAGS["avx2"],
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
    ]
COMMON = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fvisibility=hidden"]
SANITIZERS = os.environ.get("RLHF_KERNELS_SANITIZE")
SANITIZE = []
if SANITIZERS:  # Python's own flags may allow signed overflow; a left shift of a signed number is defined since C++20
    SANITIZE = [f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=undefined", "-fno-sanitize=shift-base"]
    SANITIZE += ["-fno-wrapv", "-O1", "-g"]
STRIP = [] if SANITIZERS else ["-Wl,-s" if sys.platform == "linux" else "-Wl,-x"]  # symbols are most of the module
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", *(["-Werror"] if STRICT else [])]
CUDA_ARCHS = os.environ.get("RLHF_KERNELS_CUDA_ARCHS", "80 90a 100").split()


def sources() -> list[tuple[Path, str]]:
    """Every (source, instruction set) that is compiled, the slowest first."""
    files = sorted((CSRC / "cpu").glob("*.cpp"), key=lambda file: (file.stem != "isa", file))
    return [(file, isa) for file in files for isa in (["base"] if file.stem == "isa" else ISA_FLAGS)]


class Missing(Exception):
    """A module that this machine cannot build, and need not."""


def note_of(module: str) -> str:
    return f"{module}_build_error.txt"


def run(command) -> str:
    """What the command prints; CCompilerError with what it printed if it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise CCompilerError((done.stdout + done.stderr)[-2000:])
    return done.stdout


class NinjaFile:
    """One module's build.ninja: objects, each from a source and with a command of its own, and the link of them all."""

    def __init__(self, folder: Path):
        self.folder, self.objects, self.commands = folder, [], []
        self.lines = [f"builddir = {self._path(folder)}"]
        # A command is one variable: what is quoted for the shell stays as it is.
        self.lines += ["rule compile", "  command = $run", "  depfile = $out.d", "  deps = gcc", "  description = $in"]
        self.lines += ["rule link", "  command = $run", "  description = $out"]

    @staticmethod
    def _path(path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(path))

    def _build(self, rule, target, inputs, command):
        command = shlex.join(str(part) for part in command)
        self.commands.append(command)
        self.lines.append(f"build {self._path(target)}: {rule} {' '.join(map(self._path, inputs))}")
        self.lines.append(f"  run = {command.replace('$', '$$')}")

    def compile(self, source: Path, name: str, command, depends: str):
        """command plus -c source -o object; `depends` makes the compiler list the headers that it read."""
        target = self.folder / name
        command = [*command, depends, "-MF", f"{target}.d", "-c", source, "-o", target]
        self._build("compile", target, [source], command)
        self.objects.append(target)

    def link(self, target: Path, command):
        """command plus the objects and -o target."""
        self._build("link", target, self.objects, [*command, *self.objects, "-o", target])

    def run(self, force: bool):
        """Build what is stale, or all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if force:
            shutil.rmtree(self.folder)
            self.folder.mkdir()
        file = self.folder / "build.ninja"
        file.write_text("\n".join([*self.lines, ""]))
        command = [find_ninja(), "-f", str(file), "-j", str(os.cpu_count() or 1)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in (done.stdout + done.stderr).splitlines() if line not in self.commands]
            said = [line for line in lines if not re.match(r"\[\d+/\d+\]|FAILED: |ninja: ", line)]
            raise CCompilerError("\n".join(said or lines)[:2000])


def find_ninja() -> str:
    """The ninja of the package of that name, or the one on PATH."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        found = shutil.which("ninja")
    else:
        found = shutil.which("ninja", path=BIN_DIR) or shutil.which("ninja")
    if found is None:
        raise CCompilerError("ninja was not found")
    return found


class BuildNative(build_ext):
    """Builds each module by ninja; one that cannot be built leaves a note in its place."""

    def run(self):
        super().run()
        for ext in self.extensions if self.inplace else []:
            name = note_of(ext.name.rpartition(".")[2])
            built, note = Path(self.build_lib) / "rlhf_kernels" / name, Path("rlhf_kernels") / name
            note.unlink(missing_ok=True)
            if built.exists():  # and no module of an earlier build may stand in for the one that is missing
                shutil.copy(built, note)
                Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)

    def build_extension(self, ext):
        module = ext.name.rpartition(".")[2]
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        note = target.parent / note_of(module)
        note.unlink(missing_ok=True)
        try:
            build = self._cuda(target) if module == "_cuda" else self._cpu(target)
            build.run(self.force)
        except Missing as reason:
            target.unlink(missing_ok=True)
            note.write_text(f"{reason}\n")
        except (BaseError, CCompilerError, ImportError, OSError) as error:
            if STRICT:
                raise RuntimeError(f"{ext.name} does not build: {error}") from error
            target.unlink(missing_ok=True)
            language = "CUDA" if module == "_cuda" else "C++"
            reason = f"the {language} build failed when the package was installed: {' '.join(str(error).split())}"
            note.write_text(reason + "\n")
            print(f"warning: {ext.name} is left out; {reason}", file=sys.stderr)

    def _cpu(self, target) -> NinjaFile:
        """One object for each op and instruction set, by Python's own compiler and flags, or CXX and CXXFLAGS."""
        import pybind11

        compiler = [flag for flag in self.compiler.compiler_so_cxx if flag != "-g"]
        if shutil.which(compiler[0]) is None:
            raise CCompilerError(f"the compiler {compiler[0]} was not found")
        openmp = self._openmp()
        headers = (CSRC / "include", pybind11.get_include(), *self.compiler.include_dirs)
        shared = [*compiler, *(f"-I{path}" for path in headers), *COMMON, *WARNINGS, *openmp]
        build = NinjaFile(Path(self.build_temp) / "cpu")
        for source, isa in sources():
            macros = ["-DRK_X86=1"] if X86 else []
            if source.stem != "isa":
                macros += [f"-DRK_ISA={isa}", *(["-DRK_BASELINE=1"] if isa == "base" else [])]
            build.compile(source, f"{source.stem}-{isa}.o", [*shared, *macros, *ISA_FLAGS[isa], *SANITIZE], "-MMD")
        build.link(target, [*self.compiler.linker_so_cxx, *openmp, *SANITIZE, *STRIP])
        return build

    def _cuda(self, target) -> NinjaFile:
        """nvcc compiles and links everything; only the CUDA headers and the static runtime are needed."""
        nvcc = shutil.which("nvcc")
        if nvcc is None or SANITIZERS or not CUDA_ARCHS:
            why = (
                "nvcc was not found" if nvcc is None else "RLHF_KERNELS_CUDA_ARCHS or RLHF_KERNELS_SANITIZE left it out"
            )
            raise Missing(f"{why} when the package was installed")
        import pybind11

        known = run([nvcc, "--list-gpu-arch"]).split()
        archs = [arch for arch in CUDA_ARCHS if f"compute_{arch.rstrip('af')}" in known]
        if not archs:
            raise Missing(f"nvcc knows none of the architectures {' '.join(CUDA_ARCHS)}")
        newest = max((arch.rstrip("af") for arch in archs), key=int)  # PTX of 90a would run on no later GPU
        codes = [(arch, f"sm_{arch}") for arch in archs] + [(newest, f"compute_{newest}")]
        targets = [f"-gencode=arch=compute_{arch},code={code}" for arch, code in codes]
        host = ["-fPIC", "-fvisibility=hidden", *WARNINGS]
        flags = ["-std=c++17", "-O3", f"-Xcompiler={','.join(host)}", *(["-Werror=all-warnings"] if STRICT else [])]
        headers = (CSRC / "include", pybind11.get_include(), sysconfig.get_paths()["include"])
        flags += [*(f"-I{path}" for path in headers), f'-DRK_ARCHITECTURES="{" ".join(archs)}"', f"-DRK_PTX={newest}"]
        build = NinjaFile(Path(self.build_temp) / f"cuda-{'-'.join(archs)}")
        for source in [*sorted((CSRC / "cuda").glob("*.cu")), CSRC / "cuda" / "module.cpp"]:
            device = targets if source.suffix == ".cu" else []
            build.compile(source, f"{source.name}.o", [nvcc, *flags, *device], "-MD")
        build.link(target, [nvcc, "-shared", "-cudart=static", *targets, *(f"-Xlinker={flag[4:]}" for flag in STRIP)])
        return build

    def _openmp(self):
        """["-fopenmp"] if the compiler and linker take it, else [] (the kernels then run on one thread)."""
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder) / "probe.cpp"
            probe.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
            try:
                objects = self.compiler.compile([str(probe)], output_dir=folder, extra_postargs=["-fopenmp"])
                self.compiler.link_executable(objects, str(Path(folder) / "probe"), extra_postargs=["-fopenmp"])
            except CCompilerError:
                return []
        return ["-fopenmp"]


setup(
    ext_modules=[
        Extension(
            "rlhf_kernels._cpu",
            [str(source) for source, isa in sources() if isa == "base"],
            depends=[str(header) for header in sorted(CSRC.rglob("*.h"))],
            optional=True,
        ),
        Extension(
            "rlhf_kernels._cuda",
            [str(source) for source in sorted((CSRC / "cuda").glob("*.c*"))],
            depends=[str(header) for folder in ("include", "cuda") for header in sorted((CSRC / folder).glob("*.h"))],
            optional=True,
        ),
    ],
    cmdclass={"build_ext": BuildNative},
)
