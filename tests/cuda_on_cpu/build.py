"""Builds csrc/cuda for the CPU, where its blocks run as fibers (cuda_runtime.h beside this file)."""

import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent
COMPILER = shutil.which("c++") or shutil.which("g++")
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-fsanitize=alignment",
    "-fno-sanitize-recover=alignment",
]
MACROS = ["-DRK_ISA=device", "-DRK_BASELINE=1", '-DRK_ARCHITECTURES="cpu"', "-DRK_PTX=0"]


def build() -> Path | None:
    """The shared object, built if its sources are newer; None without a compiler or pybind11."""
    if COMPILER is None or find_spec("pybind11") is None:
        return None
    import pybind11

    headers = [*(ROOT / "csrc" / "include").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.h"), *HERE.glob("*.h")]
    newest = max(path.stat().st_mtime for path in [*headers, Path(__file__)])
    folder = ROOT / "build" / "cuda_on_cpu"
    folder.mkdir(parents=True, exist_ok=True)
    includes = [HERE, ROOT / "csrc" / "include", pybind11.get_include(), sysconfig.get_paths()["include"]]

    def compile_one(source):
        target = folder / f"{source.name}.o"
        if not target.exists() or target.stat().st_mtime < max(newest, source.stat().st_mtime):
            command = [COMPILER, *FLAGS, *MACROS, *(f"-I{path}" for path in includes), "-x", "c++", "-c", str(source)]
            partial = target.with_suffix(f".{os.getpid()}")
            subprocess.run([*command, "-o", str(partial)], check=True)
            partial.replace(target)
        return target

    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ROOT / "csrc" / "cuda" / "module.cpp"]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    module = folder / "_cuda.so"
    if not module.exists() or module.stat().st_mtime < max(path.stat().st_mtime for path in objects):
        partial = module.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [COMPILER, "-shared", "-fsanitize=alignment", *map(str, objects), "-o", str(partial)], check=True
        )
        partial.replace(module)
    return module
