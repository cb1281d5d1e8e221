"""Servers that a run asks over HTTP, for samples or scores: JSON in, JSON out.

A question is asked again, a bounded number of times, where no answer came or the server said that the fault is its own
(5xx, 429); what the server refuses (4xx) is refused at once, in the server's own words. Errors name the setting that
holds the address. Proxies and passwords of the environment (`HTTP_PROXY`, `.netrc`) are not used: a server of a run
stands in the same network. `REQUESTS_CA_BUNDLE` is.
"""

import json
import os
import threading
import time
import urllib.parse

from .errors import RunError

BUSY = {408, 425, 429, 500, 502, 503, 504}
"""Status codes after which the same question may get an answer."""
CONNECT_SECONDS = 10.0
LONGEST_PAUSE = 5.0  # seconds between two attempts; the first pause is a tenth of a second, each further one twice that


class ServerError(RunError):
    """A server gave no answer that can be used. `status`: its status code, None where there was none."""

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class Unreachable(ServerError):
    """No answer, half of one, none in time, or that the server is at fault or busy: so at every attempt."""


class Refused(ServerError):
    """The server answers that it will not do this (4xx, 501), sends elsewhere (3xx), or what it sends is not JSON."""


class JsonClient:
    """One server. Threads may share it; each has its own connections.

    Args:
        setting: the setting that holds the address, for messages.
        url: http(s)://host[:port][/path]; a path stands before those of the questions.
        timeout: seconds that a server may take before it answers, and between two bytes of its answer.
        attempts: how often a question is asked at most.
        token: sent as `Authorization: Bearer`; None = no such header.
    Raises:
        ValueError: no such address; the package requests is not installed.
    Example:
        >>> client = JsonClient("reward_server", "http://localhost:8000", timeout=60, attempts=3)
        >>> client.post("/score", {"texts": ["..."]})  # doctest: +SKIP
        {'scores': [0.5]}
    """

    def __init__(self, setting: str, url: str, *, timeout: float = 600.0, attempts: int = 4, token: str | None = None):
        try:
            import requests
        except ImportError:
            raise ValueError(
                f"{setting}: the package requests is not installed (pip install 'rlhf-kernels[servers]')"
            ) from None
        self.setting, self.url, self.timeout, self.attempts = setting, checked_url(setting, url), timeout, attempts
        self._requests, self._token, self._own = requests, token, threading.local()

    def get(self, path: str, **limits):
        """What the server answers to GET; see `ask`."""
        return self.ask("GET", path, **limits)

    def post(self, path: str, body=None, **limits):
        """What the server answers to a JSON body; see `ask`. It must be one that may come twice."""
        return self.ask("POST", path, body, **limits)

    def ask(self, method: str, path: str, body=None, *, params=None, text=False, timeout=None, attempts=None):
        """The server's answer, decoded from JSON; None where it is empty.

        Args:
            body: sent as JSON; None = nothing is sent.
            params: of the address, behind `?`.
            text: the answer is text, and stays so.
            timeout, attempts: in place of the client's.
        Raises:
            Unreachable: no attempt got an answer.
            Refused: the answer says no, or cannot be read.
        """
        attempts = self.attempts if attempts is None else attempts
        for attempt in range(attempts):
            if attempt:
                time.sleep(min(0.1 * 2 ** (attempt - 1), LONGEST_PAUSE))
            try:
                return self._ask(method, path, body, params, text, self.timeout if timeout is None else timeout)
            except Unreachable as error:
                last = error
        tried = f" ({attempts} attempts)" if attempts > 1 else ""
        raise Unreachable(f"{last}{tried}", last.status) from last.__cause__

    def _ask(self, method, path, body, params, text, timeout):
        place = f"{self.setting}: {method} {self.url}{path}"
        try:
            answer = self._session().request(
                method, self.url + path, json=body, params=params, allow_redirects=False,
                timeout=(min(CONNECT_SECONDS, timeout), timeout),
            )  # fmt: skip
        except self._requests.Timeout as error:
            raise Unreachable(f"{place}: no answer within {timeout:g} s") from error
        except self._requests.RequestException as error:  # refused, reset, broken off in the middle
            raise Unreachable(f"{place}: {_reason(error)}") from error
        if answer.status_code in BUSY:
            raise Unreachable(f"{place}: {answer.status_code}, {_sentence(answer)}", answer.status_code)
        if not 200 <= answer.status_code < 300:
            raise Refused(f"{place}: {answer.status_code}, {_sentence(answer)}", answer.status_code)
        if not answer.content.strip():
            if answer.status_code != 204 and answer.headers.get("Content-Length") != "0":
                raise Unreachable(f"{place}: the answer broke off")
            return None
        if text:
            return answer.text
        try:
            return json.loads(answer.content)
        except ValueError as error:
            raise Refused(f"{place}: want JSON, got {_short(answer.text)!r}", answer.status_code) from error

    def _session(self):
        """This thread's, and after a fork this process's: connections are not shared."""
        if getattr(self._own, "process", None) != os.getpid():
            session = self._requests.Session()
            session.trust_env = False
            session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
            if self._token:
                session.headers["Authorization"] = f"Bearer {self._token}"
            self._own.process, self._own.session = os.getpid(), session
        return self._own.session


def checked_url(setting: str, url: str) -> str:
    """The address without a slash at its end.

    Raises:
        ValueError: it is none of a server, or holds a user's name, a question or a fragment.
    """
    want = f"{setting}: got {url!r}, want http://host:port"
    try:
        parts = urllib.parse.urlsplit(url)
        parts.port  # noqa: B018 - read, so that a wrong one raises
    except (ValueError, AttributeError, TypeError):
        raise ValueError(want) from None
    if parts.username is not None:
        raise ValueError(f"{setting}: want http://host:port without a user's name or password in it")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(want)
    return url.rstrip("/")


def _sentence(answer) -> str:
    """What a server says of an error, where it stands in the answers of FastAPI, OpenAI's API and others."""
    try:
        said = answer.json()
        for name in ("error", "message", "detail"):
            if isinstance(said, dict) and said.get(name):
                said = said[name]
    except ValueError:
        said = answer.text
    return _short(said if isinstance(said, str) else json.dumps(said)) or answer.reason or "no reason given"


def _reason(error) -> str:
    """The innermost cause of an error of requests, whose own text shows objects of libraries."""
    while isinstance(error, BaseException):
        inner = getattr(error, "reason", None) or error.__cause__ or error.__context__
        inner = inner if isinstance(inner, BaseException) else next(
            (x for x in error.args if isinstance(x, BaseException)), None
        )  # fmt: skip
        if inner is None:
            break
        error = inner
    return _short(f"{type(error).__name__}: {error}")


def _short(text: str, length: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 3] + "..."
