"""The rollout engine of vLLM servers: prompts go to them as they are free, and come back when one dies.

A server that dies is waited for while others go on; what it was sampling is sampled anew, by whoever is free. When it
is back, it gets the weights of this rollout before it samples.
"""

import collections
import logging
import threading
import time

from accelerate import PartialState

from ..models.adapters import trained_names
from ..servers import Unreachable
from .sampling import Completion, RolloutError
from .vllm_answers import parameters, seed_of
from .vllm_server import Stale, VllmServer
from .vllm_weights import Version, WeightFolders, is_tied, on_first, vocabulary

ATTEMPTS = 4  # of one prompt, after which its failures are no accident
MOST_CONNECTIONS = 256  # with a server

logger = logging.getLogger("rlhf")


class VllmServers:
    """The rollout engine of several servers, to which prompts go as they are free.

    `update_weights` is called by all processes together, and the first one does the work; sampling talks to no other
    process, and may run in a thread.
    """

    concurrent = reads_slices = True

    def __init__(self, urls, *, timeout: float, weights: WeightFolders):
        if len({url.rstrip("/") for url in urls}) < len(urls):
            raise ValueError(f"vllm_server: got {', '.join(urls)}, want each server once")
        self.servers, self.timeout, self.weights = [VllmServer(url, timeout) for url in urls], timeout, weights
        self.version = self.vocabulary = self.adapters = None
        self.alone = PartialState().num_processes == 1
        for error in filter(None, self._each(VllmServer.look)):
            raise error

    def _each(self, work) -> list:
        """Do `work(server)` for all servers at once; the error of each, or None."""
        found = [None] * len(self.servers)

        def run(number):
            try:
                work(self.servers[number])
            except Exception as error:
                found[number] = error

        threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(len(self.servers))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    def check(self, policy, tokens: int) -> None:
        """Raise ValueError where a server cannot serve the policy, with texts of up to `tokens` tokens."""
        self.vocabulary = vocabulary(policy)
        lora = hasattr(policy, "peft_config") and bool(trained_names(policy))
        self.adapters = lora and all(server.max_lora_rank for server in self.servers)
        lora = policy.active_peft_config if self.adapters else None
        rank = max(lora.r, *lora.rank_pattern.values()) if lora and lora.rank_pattern else lora and lora.r
        tied = not self.adapters and is_tied(policy)
        for error in filter(None, self._each(lambda server: server.check(self.vocabulary, tokens, rank, tied=tied))):
            raise error

    def update_weights(self, policy) -> None:
        """Give all servers that answer the policy's weights; called by all processes.

        Raises:
            RolloutError: no server answers within `timeout`, or one cannot load the weights.
        """
        if self.adapters is None:
            self.check(policy, 1)
        untied = any(server.untied for server in self.servers)
        version = self.weights.write(policy, adapters=self.adapters, untied=untied)
        self.version = on_first(lambda: self._bring(version))
        for server in self.servers:
            server.lost = None

    def _bring(self, version: Version) -> Version:
        deadline = time.monotonic() + self.timeout
        up = threading.Event()

        def bring(server):
            server.up, server.lost = False, None
            server.bring(version, deadline, wanted=lambda: not up.is_set())
            up.set()

        errors = self._each(bring)
        for error in errors:
            if error is not None and not (isinstance(error, Unreachable) and up.is_set()):
                raise RolloutError(str(error)) from error
            if error is not None:
                logger.warning("%s; the others go on", error)
        self.weights.keep_only(version)
        return version

    def __call__(
        self, model, tokenizer, prompt_ids, *, response_length, temperature, stop_token_ids, samples_per_prompt, seed
    ):
        """See `RolloutEngine`; of sample k of prompt p the seed is `seed_of(seed, p) + k`."""
        rollout = _Rollout(self, [list(ids) for ids in prompt_ids])
        rollout.params = [
            parameters(
                samples=samples_per_prompt, response_length=response_length, temperature=temperature,
                stop_token_ids=stop_token_ids, seed=seed_of(seed, prompt),
            ) for prompt in range(len(prompt_ids))
        ]  # fmt: skip
        return rollout.run(max(1, min(MOST_CONNECTIONS, *(s.max_num_seqs // samples_per_prompt for s in self.servers))))


class _Rollout:
    """The prompts of one call; threads of each server take the next one when they are free."""

    def __init__(self, engine: VllmServers, prompts: list[list[int]]):
        self.engine, self.version, self.prompts = engine, engine.version, prompts
        self.waiting, self.tries = collections.deque(range(len(prompts))), [0] * len(prompts)
        self.found, self.done, self.error, self.told = [], 0, None, set()  # told: the servers said to be away
        self.changed = threading.Condition()

    def run(self, slots: int) -> list[Completion]:
        """All completions; `slots` prompts at a time on a server."""
        threads = [
            threading.Thread(target=self._work, args=(server,), daemon=True, name=f"vllm {server.url}")
            for server in self.engine.servers * min(slots, len(self.prompts))
        ]
        for thread in threads:
            thread.start()
        with self.changed:
            try:
                self.changed.wait_for(self._over)
            finally:
                self.error = self.error or (None if self._over() else RolloutError("the rollout was broken off"))
                self.changed.notify_all()
        if self.error is not None:
            raise self.error
        for thread in threads:  # none may give a server these weights when the next ones are there
            thread.join()
        return self.found

    def _over(self) -> bool:
        return self.error is not None or self.done == len(self.prompts)

    def _work(self, server: VllmServer) -> None:
        try:
            if not server.up:
                self._bring(server)
            while (prompt := self._take(server)) is not None:
                try:
                    found = server.sample(
                        prompt, self.prompts[prompt], self.params[prompt], self.version, self.engine.vocabulary
                    )
                except (Unreachable, Stale) as error:
                    self._put_back(prompt, error, server)
                    self._bring(server)
                else:
                    with self.changed:
                        self.found += found
                        self.done += 1
                        self.changed.notify_all()
        except Unreachable as error:
            if all(other.lost is not None for other in self.engine.servers):
                self._fail(error)
        except Exception as error:
            self._fail(error)

    def _take(self, server: VllmServer) -> int | None:
        """The next prompt, when the server is up; waits while others are under way: they may come back. None: over."""
        with self.changed:
            self.changed.wait_for(lambda: (self.waiting and server.up) or server.lost or self._over())
            return None if self._over() or server.lost else self.waiting.popleft()

    def _put_back(self, prompt: int, error: Exception, server: VllmServer) -> None:
        with self.changed:
            if server.up:
                self.told.add(server)
                patience = f"it is waited for up to {self.engine.timeout:g} s (vllm_timeout)"
                logger.warning("%s; what it was sampling is sampled again, %s", error, patience)
            server.up = False
            self.tries[prompt] += 1
            if self.tries[prompt] == ATTEMPTS:
                raise RolloutError(f"prompt {prompt} was sampled {ATTEMPTS} times without success: {error}")
            self.waiting.appendleft(prompt)
            self.changed.notify_all()

    def _bring(self, server: VllmServer) -> None:
        """Wait until the server is up and has the weights of this rollout."""
        deadline = time.monotonic() + self.engine.timeout
        try:
            server.bring(self.version, deadline, wanted=lambda: not self._over(), alone=self.engine.alone)
            with self.changed:
                if server in self.told:
                    self.told.remove(server)
                    logger.warning("vllm_server: %s is back, with weights %s", server.url, self.version.name)
        finally:
            with self.changed:
                self.changed.notify_all()

    def _fail(self, error: Exception) -> None:
        with self.changed:
            self.error = self.error or (error if isinstance(error, RolloutError) else RolloutError(str(error)))
            self.changed.notify_all()
