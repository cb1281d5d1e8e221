"""The compiled modules _cpu and _cuda: finds them, and calls their functions; the only file that takes addresses.

RLHF_KERNELS_CPU_ISA=base|avx2|avx512 forces an instruction set; by default the newest that the CPU has is taken.
RLHF_KERNELS_CPU_POOL_MB (default 512) bounds the memory of freed results that is kept for the next ones; 0 keeps none.
RLHF_KERNELS_CUDA_ON_CPU names a build of csrc/cuda whose blocks run on CPU tensors, for tests (tests/cuda_on_cpu).
"""

import functools
import importlib.machinery
import importlib.util
import math
import os
from pathlib import Path

import torch  # before _cpu: the extension then shares torch's OpenMP threads
from torch import Tensor

from ._planes import places
from ._signatures import CODED, CPU, CUDA, signatures

POOLED_BYTES = 2 << 20
POOL = "RLHF_KERNELS_CPU_POOL_MB"
EMPTY = 64
DTYPES = {dtype: code for code, dtype in enumerate(CODED)}
_HOST = torch.device("cpu")
KL_ESTIMATORS = {"k1": 1, "k2": 2, "k3": 3}  # enum KlEstimator of csrc/include/kl.h


@functools.cache
def _load() -> tuple[object | None, str | None]:
    try:
        from . import _cpu
    except ImportError as error:
        note = Path(__file__).with_name("_cpu_build_error.txt")
        return None, note.read_text().strip() if note.exists() else f"{__package__}._cpu cannot be imported: {error}"
    return _cpu, None


def missing() -> str | None:
    """Why the compiled module is not there, or None if it is."""
    return _load()[1]


CUDA_ON_CPU = "RLHF_KERNELS_CUDA_ON_CPU"


@functools.cache
def _load_cuda() -> tuple[object | None, str | None]:
    if path := os.environ.get(CUDA_ON_CPU):
        loader = importlib.machinery.ExtensionFileLoader("_cuda", path)
        module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_cuda", loader))
        loader.exec_module(module)
        return module, None
    try:
        from . import _cuda
    except ImportError as error:
        note = Path(__file__).with_name("_cuda_build_error.txt")
        return None, note.read_text().strip() if note.exists() else f"{__package__}._cuda cannot be imported: {error}"
    return _cuda, None


@functools.cache
def has_gpu() -> bool:
    """Whether PyTorch finds a CUDA or ROCm device; asked once, because every call on one would ask."""
    return torch.cuda.is_available()


def serves(capability: tuple[int, int], architectures: str, ptx: int) -> bool:
    """Whether code for these architectures ("80 90a 100") and PTX of that one run on a GPU of this compute capability.

    Code runs on its own major version, from its minor version on; that of 90a on 9.0 alone. PTX is compiled by the
    driver for its own architecture and all later ones.
    """
    major, minor = capability
    for arch in architectures.split():
        own, least = divmod(int(arch.rstrip("af")), 10)
        if own == major and (minor == least if arch.endswith("a") else minor >= least):
            return True
    return 0 < ptx <= 10 * major + minor


def unserved(gpus: list[tuple[str, tuple[int, int]]], module, driver: int) -> str | None:
    """Why the module cannot run on one of these GPUs (name, compute capability) with this driver; None if it can."""
    held = ", ".join(f"sm_{arch}" for arch in module.architectures.split()) + f" and PTX of compute_{module.ptx}"
    for index, (name, capability) in enumerate(gpus):
        if not serves(capability, module.architectures, module.ptx):
            found = f"GPU {index}, {name}, has compute capability {capability[0]}.{capability[1]}"
            return f"{found}; _cuda was built for {held}: RLHF_KERNELS_CUDA_ARCHS builds it for others"
    compiles = any(not serves(capability, module.architectures, 0) for _, capability in gpus)
    if driver < module.runtime if compiles else driver // 1000 < module.runtime // 1000:
        wanted = _version(module.runtime) if compiles else f"{module.runtime // 1000}.0"
        return (
            f"the driver serves CUDA up to {_version(driver)}; _cuda was built for {held}, and needs {wanted} or newer"
        )
    return None


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


@functools.cache
def _unserved_here() -> str | None:
    gpus = range(torch.cuda.device_count())
    found = [(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)) for i in gpus]
    module = _load_cuda()[0]
    return unserved(found, module, module.driver())


def missing_cuda() -> str | None:
    """Why the CUDA launchers cannot run here, or None if they can."""
    reason = _load_cuda()[1]
    if reason is not None or os.environ.get(CUDA_ON_CPU):
        return reason
    if not (torch.version.cuda and has_gpu()):
        return "there is no NVIDIA GPU"
    return _unserved_here()


@functools.cache
def _launchers() -> dict:
    module, reason = _load_cuda()
    if reason is not None:
        raise RuntimeError(f"the cuda backend is missing: {reason}")
    return module.functions()


def isas() -> list[str]:
    """Instruction sets that were built and that this CPU has, plainest first."""
    return _load()[0].isas()


@functools.cache
def _functions(isa: str) -> dict:
    module, reason = _load()
    if reason is not None:
        raise RuntimeError(f"the cpu backend is missing: {reason}")
    if not isa:
        isa = module.isas()[-1]
    if isa not in module.isas():
        known = ", ".join(module.isas())
        raise RuntimeError(f"RLHF_KERNELS_CPU_ISA={isa}: this machine runs only {known}")
    return module.functions(isa)


def run(name: str, *args) -> None:
    """Call a native function: a tensor goes as its address, None as 0, a bool as 0 or 1; the thread count is added.

    An empty tensor has no address; it goes as one that nobody reads, because 0 means that an argument is absent.
    RuntimeError if an argument is not what `_signatures.CPU` says that the function takes.
    """
    signatures(CPU)[name].check(args, _HOST)
    _functions(os.environ.get("RLHF_KERNELS_CPU_ISA", ""))[name](*_values(args), torch.get_num_threads())


def launch(name: str, *args) -> None:
    """Call a launcher of _cuda on the device of the first tensor, on its current stream; arguments as for `run`."""
    device = next(x.device for x in args if isinstance(x, Tensor))
    signatures(CUDA)[name].check(args, device)
    function = _launchers()[name]
    if device.type != "cuda":
        function(0, *_values(args), 0)
        return
    stream = torch.cuda.current_stream(device).cuda_stream
    if device.index == torch.cuda.current_device():
        function(device.index, *_values(args), stream)
    else:
        with torch.cuda.device(device):
            function(device.index, *_values(args), stream)


def _values(args) -> list:
    return [x.data_ptr() or EMPTY if isinstance(x, Tensor) else 0 if x is None else x for x in args]


@functools.cache
def _pool():
    """The class of pooled buffers, or None where there is no pool: outside Linux, under sanitizers, if switched off."""
    module, asked = _load()[0], os.environ.get(POOL, "512")
    if not asked.isdecimal():
        raise ValueError(f"{POOL}={asked}: expected a whole number of MiB, 0 for no pool")
    if module is None or int(asked) == 0 or module.sanitized or not hasattr(module, "Buffer"):
        return None
    module.keep(int(asked) << 20)
    return module.Buffer


def empty_pool() -> None:
    """Give the memory of freed results back to the system; what is in use stays."""
    if _pool() is not None:
        keep = _load()[0].keep
        keep(keep(0))


def fresh(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialised result. A large one lies in pooled memory: faulting in fresh pages would cost more than its use.

    The memory returns to the pool when the last tensor that shares it is gone.
    """
    count = math.prod(shape)
    if count * dtype.itemsize < POOLED_BYTES or (buffer := _pool()) is None:
        return torch.empty(*shape or ((),), dtype=dtype, device=_HOST)  # sizes and a device are parsed faster so
    return torch.frombuffer(buffer(count * dtype.itemsize), dtype=dtype).view(shape)


def dense_rows(tensor: Tensor | None) -> Tensor | None:
    """The tensor itself if its last dimension is dense, else a copy; the row stride may be anything."""
    if tensor is None or tensor.shape[-1] <= 1 or tensor.stride(-1) == 1:
        return tensor
    return tensor.contiguous()


def dense_fp32(tensor: Tensor | None) -> Tensor | None:
    """The tensor in fp32 and contiguous."""
    if tensor is None or (tensor.dtype is torch.float32 and tensor.is_contiguous()):
        return tensor
    return tensor.to(torch.float32).contiguous()


def alike_as_rows(*tensors: Tensor) -> list[Tensor]:
    """Tensors of one shape as [rows, columns]: in place if they are matrices, else as one row, copied if need be."""
    if tensors[0].dim() == 2 and not all(x.is_contiguous() for x in tensors):
        return [dense_rows(x) for x in tensors]
    return [x.contiguous().view(1, -1) for x in tensors]


def typed_rows(tensor: Tensor) -> tuple[Tensor, int, int]:
    """The three arguments of a matrix of any dtype: itself, its dtype and its row stride."""
    return tensor, DTYPES[tensor.dtype], tensor.stride(0)


def typed_planes(a: Tensor, b: Tensor) -> tuple:
    """The arguments of two tensors that `planes` returned together: each with its dtype, and where its rows lie."""
    return a, DTYPES[a.dtype], *places(a), b, DTYPES[b.dtype], *places(b)[1:]


def or_infinite(bound: float | None) -> float:
    """A bound as the kernels take it: no bound is an infinite one."""
    return float("inf") if bound is None else bound


def as_rows(tensor: Tensor | None) -> Tensor | None:
    """[B, T] of a tensor [B, T] or [T], with dense rows."""
    return None if tensor is None else dense_rows(tensor if tensor.dim() == 2 else tensor[None])


def rows(tensor: Tensor | None) -> tuple[Tensor | None, int]:
    """The two arguments of a tensor [B, T]: itself and its row stride; packed and absent tensors have stride 0."""
    return tensor, tensor.stride(0) if tensor is not None and tensor.dim() == 2 else 0
