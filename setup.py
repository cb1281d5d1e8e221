"""Builds rlhf_kernels._cpu from csrc/cpu, each op once per instruction set. Needs a C++17 compiler and pybind11.

Without a working compiler the install still succeeds, as pure Python, and the reason is stored in
rlhf_kernels/_cpu_build_error.txt, which `rlhf_kernels.backends()` shows.
RLHF_KERNELS_WERROR=1 (for CI) turns warnings into errors, and lets a failed build fail the install.
RLHF_KERNELS_SANITIZE=address,undefined (for make sanitize) builds a slow module that stops at the first bad access.
"""

import os
import platform
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

CSRC = Path("csrc")
ERROR_FILE = "_cpu_build_error.txt"
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


def sources() -> list[tuple[Path, str]]:
    """Every (source, instruction set) that is compiled."""
    files = sorted((CSRC / "cpu").glob("*.cpp"))
    return [(file, isa) for file in files for isa in (["base"] if file.stem == "isa" else ISA_FLAGS)]


class BuildNative(build_ext):
    """Compiles in parallel; a failure leaves a note instead of an extension."""

    def run(self):
        super().run()
        if self.inplace and self.extensions:
            built = Path(self.build_lib) / "rlhf_kernels" / ERROR_FILE
            note = Path("rlhf_kernels") / ERROR_FILE
            note.unlink(missing_ok=True)
            if built.exists():
                shutil.copy(built, note)

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        note = target.parent / ERROR_FILE
        note.unlink(missing_ok=True)
        try:
            self._build(target)
        except (BaseError, CCompilerError, ImportError, OSError) as error:
            if STRICT:
                raise RuntimeError(f"rlhf_kernels._cpu does not build: {error}") from error
            target.unlink(missing_ok=True)
            reason = f"the C++ build failed when the package was installed: {' '.join(str(error).split())}"
            note.write_text(reason + "\n")
            print(f"warning: rlhf_kernels._cpu is left out; {reason}", file=sys.stderr)

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
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
