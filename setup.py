"""Builds rlhf_kernels._cpu from csrc/cpu, each op once per instruction set, and _cuda from csrc/cuda if nvcc is there.

Needs a C++17 compiler and pybind11. Without a working compiler, or without nvcc, the install still succeeds, and the
reason is stored in rlhf_kernels/_cpu_build_error.txt or _cuda_build_error.txt, which `rlhf_kernels.backends()` shows.
RLHF_KERNELS_WERROR=1 (for CI) turns warnings into errors, and lets a failed build fail the install.
RLHF_KERNELS_SANITIZE=address,undefined (for make sanitize) builds a slow module that stops at the first bad access.
RLHF_KERNELS_CUDA_ARCHS=90a (default: 80 90a 100, as far as nvcc knows them, the last also as PTX) builds for less;
RLHF_KERNELS_CUDA_ARCHS= builds no _cuda.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
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
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
CUDA_ARCHS = os.environ.get("RLHF_KERNELS_CUDA_ARCHS", "80 90a 100").split()


def sources() -> list[tuple[Path, str]]:
    """Every (source, instruction set) that is compiled."""
    files = sorted((CSRC / "cpu").glob("*.cpp"))
    return [(file, isa) for file in files for isa in (["base"] if file.stem == "isa" else ISA_FLAGS)]


class Missing(Exception):
    """A module that this machine cannot build, and need not."""


def note_of(module: str) -> str:
    return f"{module}_build_error.txt"


class BuildNative(build_ext):
    """Compiles in parallel; a module that cannot be built leaves a note in its place."""

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
            self._build_cuda(target) if module == "_cuda" else self._build(target)
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

    def _build_cuda(self, target):
        """nvcc compiles and links everything; only the CUDA headers and the static runtime are needed."""
        nvcc = shutil.which("nvcc")
        if nvcc is None or SANITIZERS or not CUDA_ARCHS:
            why = (
                "nvcc was not found" if nvcc is None else "RLHF_KERNELS_CUDA_ARCHS or RLHF_KERNELS_SANITIZE left it out"
            )
            raise Missing(f"{why} when the package was installed")
        import pybind11

        known = self._run([nvcc, "--list-gpu-arch"]).split()
        archs = [arch for arch in CUDA_ARCHS if f"compute_{arch.rstrip('a')}" in known]
        if not archs:
            raise Missing(f"nvcc knows none of the architectures {' '.join(CUDA_ARCHS)}")
        targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        if not archs[-1].endswith("a"):
            targets.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        host = ["-fPIC", "-fvisibility=hidden", *WARNINGS, *(["-Werror"] if STRICT else [])]
        flags = ["-std=c++17", "-O3", f"-Xcompiler={','.join(host)}", *(["-Werror=all-warnings"] if STRICT else [])]
        includes = [CSRC / "include", pybind11.get_include(), sysconfig.get_paths()["include"]]
        flags += [f"-I{path}" for path in includes] + [f'-DRK_ARCHITECTURES="{" ".join(archs)}"']
        folder = Path(self.build_temp) / f"cuda-{'-'.join(archs)}"
        folder.mkdir(parents=True, exist_ok=True)
        headers = max(
            path.stat().st_mtime for path in [*CSRC.glob("include/*.h"), *CSRC.glob("cuda/*.h"), Path(__file__)]
        )

        def compile_one(source):
            output = folder / f"{source.name}.o"
            if self.force or not output.exists() or output.stat().st_mtime < max(source.stat().st_mtime, headers):
                self._run([nvcc, *flags, *(targets if source.suffix == ".cu" else []), "-c", source, "-o", output])
            return output

        jobs = [*sorted((CSRC / "cuda").glob("*.cu")), CSRC / "cuda" / "module.cpp"]
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            objects = list(pool.map(compile_one, jobs))
        self._run([nvcc, "-shared", "-cudart=static", *targets, *objects, "-o", target])

    @staticmethod
    def _run(command) -> str:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if done.returncode:
            raise CCompilerError((done.stderr or done.stdout)[-2000:])
        return done.stdout

    def _build(self, target):
        import pybind11

        openmp = self._openmp()
        warnings = [*WARNINGS, *(["-Werror"] if STRICT else [])]
        headers_changed = max(path.stat().st_mtime for path in CSRC.rglob("*.h"))

        def compile_one(job):
            source, isa = job
            macros = [("RK_ISA", isa)] if source.stem != "isa" else []
            macros += [("RK_X86", "1")] if X86 else []
            macros += [("RK_BASELINE", "1")] if isa == "base" and source.stem != "isa" else []
            output = Path(self.build_temp) / isa
            done = output / source.with_suffix(".o")
            if not self.force and done.exists():
                newest = max(source.stat().st_mtime, headers_changed, Path(__file__).stat().st_mtime)
                if done.stat().st_mtime > newest:
                    return str(done)
            (written,) = self.compiler.compile(
                [str(source)],
                output_dir=str(output),
                macros=macros,
                include_dirs=[str(CSRC / "include"), pybind11.get_include()],
                extra_postargs=[*COMMON, *warnings, *openmp, *ISA_FLAGS[isa], *SANITIZE],
            )
            return written

        jobs = sorted(sources(), key=lambda job: job[0].stem != "isa")  # the slowest first
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            objects = list(pool.map(compile_one, jobs))
        self.compiler.link_shared_object(objects, str(target), extra_postargs=[*openmp, *SANITIZE], target_lang="c++")

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
