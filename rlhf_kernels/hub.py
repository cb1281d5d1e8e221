"""`python -m rlhf_kernels.hub DIR`: the kernels as a repository that Hugging Face's `kernels` loads.

DIR/build has two copies of this package, without what is for trainers: torch-cpu with the native CPU module of the
Python that wrote it, torch-cuda with the Triton kernels and nothing compiled. `kernels` imports a copy under the id in
its metadata.json, which is also the namespace of its operators, so that copies and the package live in one process.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import sys
import tempfile
from importlib.metadata import files
from pathlib import Path

from . import __version__, _native

PACKAGE = Path(__file__).resolve().parent
NAME = "rlhf-kernels"
MINVER = "0.17.2"  # of `kernels`; no older one was tried
OUTSIDE = {"integrations", "parity.py", "hub.py"}  # for trainers, and what is run from a shell
VARIANTS = {"torch-cpu": "cpu", "torch-cuda": "cuda"}
WRITTEN = {"build", "README.md", "LICENSE"}
CPU_NOTE, CUDA_NOTE = "_cpu_build_error.txt", "_cuda_build_error.txt"  # what `backends()` says of a missing module

README = """\
---
license: apache-2.0
library_name: kernels
tags: [kernels, rlhf]
---

# rlhf-kernels

Fused losses for reinforcement learning from human feedback, version {version} of the package rlhf-kernels: log-probs
and entropy from logits and from hidden states, KL, GAE and KL-shaped advantages, policy, PPO, Bradley-Terry,
Plackett-Luce and preference losses. They are operators of PyTorch: torch.compile takes each into its graph.

```python
from pathlib import Path

import torch
from kernels import get_local_kernel

rk = get_local_kernel(Path("DIR"))  # this folder
logits, labels = torch.randn(2, 5, 100, requires_grad=True), torch.randint(100, (2, 5))
rk.logprobs_from_logits(logits, labels).sum().backward()
print(rk.backends())  # what serves each op here, and why not what does not
```

With `LOCAL_KERNELS="org/rlhf-kernels=DIR"` set, `get_kernel("org/rlhf-kernels", version={major})` is the same.

| build | serves | with |
|---|---|---|
| `torch-cpu` | CPU tensors | C++ for {abi}, the instruction set chosen at run time; else plain PyTorch |
| `torch-cuda` | CUDA tensors | Triton; CPU tensors in plain PyTorch |

The functions are those of `__all__`, with docstrings. Python 3.11 or newer, torch 2.8 or newer. Operators are
`torch.ops.<id>`, with the id in metadata.json, so that the package from pip may be imported in the same process.
Licence: Apache-2.0.
"""


def sources() -> dict[str, bytes]:
    """{path: content} of what both builds hold."""
    paths = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")}
    return {path.as_posix(): (PACKAGE / path).read_bytes() for path in paths if path.parts[0] not in OUTSIDE}


def builds(module: Path) -> dict[str, dict[str, bytes]]:
    """{variant: {path: content}}; module: the native CPU module."""
    no_cuda = "builds for the hub have no CUDA C++; the package rlhf-kernels has it"
    no_cpu = "the build torch-cuda has no native CPU module; torch-cpu and the package rlhf-kernels have one"
    common = {**sources(), CUDA_NOTE: no_cuda.encode()}
    return {
        "torch-cpu": {**common, module.name: module.read_bytes()},
        "torch-cuda": {**common, CPU_NOTE: no_cpu.encode()},
    }


def metadata(variant: str, content: dict[str, bytes]) -> dict:
    """What metadata.json says of a build; its id changes with its content."""
    digest = {path: base64.b64encode(hashlib.sha256(content[path]).digest()).decode() for path in sorted(content)}
    unique = hashlib.sha256(json.dumps(digest).encode()).hexdigest()[:8]
    return {
        "name": NAME,
        "id": f"_{NAME.replace('-', '_')}_{VARIANTS[variant]}_{unique}",
        "version": int(__version__.partition(".")[0]),
        "kernels-minver": MINVER,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": VARIANTS[variant]},
        "digest": {"algorithm": "sha256", "files": digest},
    }


def licence() -> bytes:
    """The licence's text: beside the package in a checkout, else where pip put it."""
    if (PACKAGE.parent / "pyproject.toml").exists():
        return (PACKAGE.parent / "LICENSE").read_bytes()
    return next(Path(str(file.locate())) for file in files(NAME) or [] if file.name == "LICENSE").read_bytes()


def check_replaceable(folder: Path) -> None:
    """FileExistsError unless the folder is absent, empty, or holds what `write` wrote and nothing else."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, expected a folder")
    found = {path.name for path in folder.iterdir()}
    if (folder / "build").is_dir():
        found |= {f"build/{path.name}" for path in (folder / "build").iterdir()}
    strange = sorted(found - WRITTEN - {f"build/{variant}" for variant in VARIANTS})
    if strange:
        raise FileExistsError(f"{folder} holds {', '.join(strange)}, expected a new folder or one written before")


def write(folder: Path | str) -> dict[str, str]:
    """Write the repository to a folder, in the place of an older one; returns {variant: id}.

    It is written beside and renamed, so that a folder of this name is whole.

    Raises:
        RuntimeError: there is no native CPU module.
        FileExistsError: the folder holds something else.
    """
    folder = Path(folder).resolve()
    if reason := _native.missing():
        raise RuntimeError(f"torch-cpu needs the native CPU module: {reason}")
    check_replaceable(folder)
    module, ids = Path(_native._load()[0].__file__), {}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as beside:
        new = Path(beside) / "new"
        for variant, content in builds(module).items():
            described = metadata(variant, content)
            ids[variant] = described["id"]
            content["metadata.json"] = (json.dumps(described, indent=2) + "\n").encode()
            for path, text in content.items():
                target = new / "build" / variant / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(text)
        major, abi = __version__.partition(".")[0], module.name.split(".")[1]
        (new / "README.md").write_text(README.format(version=__version__, major=major, abi=abi))
        (new / "LICENSE").write_bytes(licence())
        if folder.exists():
            folder.rename(Path(beside) / "old")
        new.rename(folder)
    return ids


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rlhf_kernels.hub", description=__doc__.split("\n\n")[1])
    parser.add_argument("folder", help="where the repository is written; an older one there is replaced")
    options = parser.parse_args(arguments)
    try:
        ids = write(options.folder)
    except (OSError, RuntimeError) as reason:
        parser.error(str(reason))
    for variant, name in ids.items():
        print(f"{Path(options.folder) / 'build' / variant}: torch.ops.{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
