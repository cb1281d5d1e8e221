"""A server of vLLM on this machine for the tests: the demo's model in float32, started as docs/rollouts.md says."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "rlhf" / "demo" / "base"
START_SECONDS = 600  # on a machine that is busy with much else
ON_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
UNTIED = ("--hf-overrides", '{"tie_word_embeddings": false}')
LORA = ("--enable-lora", "--max-lora-rank", "16")


class Server:
    """`python -m vllm.entrypoints.openai.api_server` at a port of its own; `log` is what it writes."""

    def __init__(self, folder: Path, *arguments: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.arguments, self.starts, self.process = folder, arguments, 0, None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.starts += 1
        self.log = self.folder / f"server-{self.port}-{self.starts}.log"
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(BASE), "--dtype", "float32",
            "--host", "127.0.0.1", "--port", str(self.port), "--enable-scale-out", "--generation-config", "vllm",
            "--logprobs-mode", "processed_logprobs", "--enforce-eager", "--max-num-seqs", "64", *self.arguments,
        ]  # fmt: skip
        environment = os.environ | ON_CPU | {
            "VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }  # fmt: skip
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def wait(self) -> "Server":
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return self
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"vLLM did not start:\n{self.log.read_text()[-4000:]}")
            time.sleep(1)

    def asked(self, path: str) -> int:
        """How often `path` was answered since the last start."""
        return self.log.read_text(errors="replace").count(f"POST {path} ")

    def kill(self) -> None:
        """SIGKILL to the server and the processes that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
