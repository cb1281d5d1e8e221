"""What `make wheel` asks of a wheel, in an environment that holds torch and nothing else: `wheel_smoke.py WHEEL`.

Its name promises manylinux_2_34 or an older one. It is installed, imported, and asked for a loss; it brings no other
package; `rlhf`, whose packages are missing, says in one line which extra they are.
"""

import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
LOSS = """
import torch, rlhf_kernels as rk
table = rk.backends()
print(table)
assert rk.__file__.startswith(FOLDER), rk.__file__
assert table["ppo"]["cpu"] == table["ppo"]["reference"] == "available"
log_probs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
arguments = log_probs, torch.tensor([[-1.0, -2.0]]), torch.tensor([[1.0, 3.0]]), torch.ones(1, 2, dtype=torch.bool)
with rk.backend("cpu"):
    loss = rk.ppo_loss(*arguments).loss
    loss.backward()
assert loss.item() == -2.0 and log_probs.grad.tolist() == [[-0.5, -1.5]], (loss, log_probs.grad)
"""


def run(*command, folder, status=0):
    """(stdout, stderr) of a command in that folder, which must end with that status."""
    done = subprocess.run([str(part) for part in command], cwd=folder, capture_output=True, text=True)
    if done.returncode != status:
        sys.exit(f"{command} ended with {done.returncode}, not {status}\n{done.stdout}{done.stderr}")
    return done.stdout, done.stderr


def main(wheel):
    """Try the wheel; exits with a message at the first thing that is not as it should be."""
    wheel = Path(wheel).resolve(strict=True)
    if not any(int(minor) <= 34 for minor in re.findall(r"manylinux_2_(\d+)_", wheel.name)):
        sys.exit(f"{wheel.name} promises neither manylinux_2_34 nor an older one")
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        programs = Path(folder).resolve() / "bin"
        python = programs / "python"

        def pip(*arguments):
            return run(python, "-m", "pip", "--disable-pip-version-check", *arguments, folder=folder)[0]

        pip("install", "--quiet", "--constraint", CONSTRAINTS, "torch")
        before = set(pip("list", "--format=freeze").split())
        pip("install", "--quiet", wheel)
        added = set(pip("list", "--format=freeze").split()) - before
        print("packages beside torch's:", *sorted(added))
        if [name.partition("==")[0] for name in added] != ["rlhf-kernels"]:
            sys.exit("the wheel brings more than itself")

        print(run(python, "-c", LOSS.replace("FOLDER", repr(str(programs.parent))), folder=folder)[0], end="")
        if "stages:" not in run(programs / "rlhf", "--help", folder=folder)[0]:
            sys.exit("rlhf --help does not list the stages")
        output, error = run(programs / "rlhf", "sft", folder=folder, status=2)
        print(error, end="")
        if output or len(error.splitlines()) != 1 or "pip install 'rlhf-kernels[train]'" not in error:
            sys.exit("rlhf sft does not say in one line what to install")
    print(f"{wheel.name} is fine")


if __name__ == "__main__":
    main(*sys.argv[1:])
