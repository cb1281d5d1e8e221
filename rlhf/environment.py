"""`rlhf env`: what a bug report needs to say of the machine: versions, backends, instruction sets, threads, GPUs."""

import importlib
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .settings import ToolParser

PACKAGES = (
    "rlhf-kernels", "torch", "triton", "numpy", "transformers", "accelerate", "tokenizers", "safetensors", "datasets",
    "peft", "deepspeed", "vllm", "trl", "verl", "openrlhf",
)  # fmt: skip
NOT_SHOWN = ("RLHF_CACHE",)  # paths
PREFIXES = ("RLHF_", "OMP_", "MKL_", "KMP_", "TRITON_", "NCCL_", "TORCH", "PYTORCH_", "ACCELERATE_", "HF_HUB_OFFLINE")
NAMES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "CUDA_VISIBLE_DEVICES", "THP_MEM_ALLOC_ENABLE", "WORLD_SIZE")


def describe() -> dict[str, str]:
    """{what: how it is}, in the order in which it is printed. Nothing of it names a user, a file or a key."""
    found = {"Python": f"{platform.python_version()}, {platform.platform()}", "processor": processor()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            if name in ("rlhf-kernels", "torch", "transformers"):
                found[name] = "not installed"
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        return {**found, "torch": f"cannot be imported ({error})"}
    threads = f"{torch.get_num_threads()} of {len(os.sched_getaffinity(0))} usable cores"
    found["threads"] = f"{threads}; torch's kernels: {torch.backends.cpu.get_cpu_capability()}"
    return {**found, **kernels(), **gpus(torch), **variables()}


def processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.processor() or 'unknown'} ({platform.machine()}), {os.cpu_count()} cores"


def kernels() -> dict[str, str]:
    """The backends of rlhf_kernels, and the instruction sets that its C++ kernels have on this machine."""
    import rlhf_kernels
    from rlhf_kernels import _native

    isas = "none" if _native.missing() else f"{', '.join(_native.isas())}; the last one serves"
    states = {}
    for backends in rlhf_kernels.backends().values():
        for name, state in backends.items():
            states.setdefault(name, state)
    return {"instruction sets": isas, **{f"backend {name}": state for name, state in states.items()}}


def gpus(torch) -> dict[str, str]:
    if not torch.cuda.is_available():
        return {"GPU": f"none (torch's build: {torch.version.cuda or torch.version.hip or 'CPU'})"}
    found = {}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        found[f"GPU {index}"] = f"{device.name}, sm_{device.major}{device.minor}, {memory}, CUDA {torch.version.cuda}"
    return found


def variables() -> dict[str, str]:
    """The settings in the environment that change what is computed, or how."""
    found = {name for name in os.environ if name.startswith(PREFIXES) or name in NAMES}
    return {name: os.environ[name] for name in sorted(found.difference(NOT_SHOWN))}


def main(argv=None) -> int:
    """Print what `describe` finds, one line each."""
    ToolParser(prog="rlhf env", description=__doc__.partition(": ")[2]).parse_args(argv)
    found = describe()
    width = max(map(len, found))
    print("\n".join(f"{name:<{width}}  {text}" for name, text in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
