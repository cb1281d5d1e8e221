"""Runs PPO in children of one process that has imported everything, and kills them: python ppo_forks.py PLAN RESULT.

PLAN is a JSON file: a list of runs {"options": settings of PPOConfig, "ranks": processes, "kills": how often all of
them get SIGKILL at a random moment, "seed": of these moments, "environment": variables that are set}; the run before
one with kills is the same without. After each kill the run is started again with `resume_from_checkpoint: true`, in the
end until it is done. In place of kills, "dies": [rank, what, n]: that process alone gets SIGKILL in its n-th "update",
or when it has written its "slices" of a checkpoint for the n-th time, and the others end by themselves. RESULT: for
each run, what it was doing at each kill.
"""

import faulthandler
import itertools
import json
import mmap
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemWriter

from rlhf.ppo import PPOConfig, PPOTrainer
from rlhf.ppo import run as ppo_run

PHASES = ("start", "between", "rollout", "update", "save")
ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT


def watch(shared):
    """Make the trainer note in shared memory what it is doing."""

    def noting(owner, name, phase):
        original = getattr(owner, name)

        def noted(*args, **kwargs):
            shared[0] = PHASES.index(phase)
            try:
                return original(*args, **kwargs)
            finally:
                shared[0] = PHASES.index("between")

        setattr(owner, name, noted)

    noting(PPOTrainer, "sample", "rollout")
    noting(PPOTrainer, "update", "update")
    noting(ppo_run, "save_checkpoint", "save")


def note_rollouts(folder, rank):
    """Make the trainer write what each process samples to `rollouts-RANK.jsonl` beside the run."""
    original = PPOTrainer.sample

    def noted(self, rows):
        rollouts = original(self, rows)
        with open(f"{folder}-rollouts-{rank}.jsonl", "a") as file:
            prompts = [row["row_number"] for row in rows]
            file.write(json.dumps({"prompts": prompts, "responses": rollouts.response_ids}) + "\n")
        return rollouts

    PPOTrainer.sample = noted


def note_weights(trainer, folder, rank):
    """Write how many rows of each weight, and of its optimizer state, the process holds to `weights-RANK.json`."""

    def rows(tensor):
        return len(tensor.to_local() if hasattr(tensor, "to_local") else tensor)

    networks = ("policy", "reference", "value", "reward_model")
    held = {
        f"{network}.{name}": [rows(weight), *map(rows, moments(trainer.optimizer, weight)), len(weight)]
        for network in networks
        for name, weight in getattr(trainer, network).named_parameters()
    }
    Path(f"{folder}-weights-{rank}.json").write_text(json.dumps(held))


def moments(optimizer, weight):
    return [state for name, state in optimizer.state.get(weight, {}).items() if name != "step"]


def die_in(what, count):
    """Make this process kill itself in the `count`-th update, or when its slices of a checkpoint are on the disk."""
    owner, name = (FileSystemWriter, "write_data") if what == "slices" else (PPOTrainer, "update")
    original, calls = getattr(owner, name), itertools.count(1)

    def deadly(*args, **kwargs):
        last = next(calls) == count
        if last and what != "slices":
            os.kill(os.getpid(), signal.SIGKILL)
        done = original(*args, **kwargs)
        if last:
            done.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    setattr(owner, name, deadly)


def child(options, rank, ranks, port, shared, environment, dies=None):
    code = 1
    try:
        os.environ |= environment
        if ranks > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        watch(shared)
        note_rollouts(options["output_dir"], rank)
        if dies and dies[0] == rank:
            die_in(*dies[1:])
        trainer = PPOTrainer(PPOConfig(**options))
        trainer.train()
        note_weights(trainer, options["output_dir"], rank)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        code = 0
    except BaseException as error:
        print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def start(options, ranks, environment, dies=None):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared, children = mmap.mmap(-1, 1), []
    for rank in range(ranks):
        children.append(os.fork())
        if children[-1] == 0:
            child(options, rank, ranks, port, shared if rank == 0 else bytearray(1), environment, dies)
    return children, shared


def run(options, ranks=1, kills=0, seed=0, environment=(), seconds=0.0, dies=None):
    """Run to the end; `seconds` is what it takes unkilled, of which the kills together let about half go by."""
    moments, hits = random.Random(seed), []
    if dies:
        children, shared = start(options, ranks, dict(environment), dies)
        ends = [os.waitpid(pid, 0)[1] for pid in children]
        if not os.WIFSIGNALED(ends[dies[0]]) or not all(ends):
            raise SystemExit(f"a process was to be killed, and the others to fail: {ends}")
        options, hits = {**options, "resume_from_checkpoint": "true"}, [PHASES[shared[0]]]
    for kill in range(kills + 1):
        resume = {"resume_from_checkpoint": "true"} if kill else {}
        children, shared = start({**options, **resume}, ranks, dict(environment))
        if kill < kills:
            early = moments.random() < 0.1  # now and then before it has begun
            while not early and shared[0] == 0 and os.waitid(os.P_PID, children[0], ENDED) is None:
                time.sleep(0.01)
            time.sleep(moments.uniform(0, seconds / kills))
            for pid in children:
                os.kill(pid, signal.SIGKILL)  # a child that has ended stays killable until it is waited for
        ends = [os.waitpid(pid, 0)[1] for pid in children]
        if kill < kills and any(map(os.WIFSIGNALED, ends)):
            hits.append(PHASES[shared[0]])
        elif any(ends):
            raise SystemExit(f"a run failed: {ends}")
        else:
            return hits
    return hits


if __name__ == "__main__":
    faulthandler.enable()  # in the children, too
    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None  # SIGKILL, unlike a power cut, leaves what was written
    results, seconds = [], 0.0
    for each in json.loads(Path(sys.argv[1]).read_text()):
        begin = time.perf_counter()
        results.append(run(**each, seconds=seconds))
        seconds = time.perf_counter() - begin
    Path(sys.argv[2]).write_text(json.dumps(results))
