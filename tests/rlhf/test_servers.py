"""The client of servers: what is asked again, what is not, and what errors say."""

import builtins
import threading

import pytest

from rlhf import servers
from rlhf.servers import JsonClient, Refused, ServerError, Unreachable
from tests.fake_server import Died, Fake

pytest.importorskip("requests", reason="needs the package requests")


@pytest.fixture
def pauses(monkeypatch):
    slept = []
    monkeypatch.setattr(servers.time, "sleep", slept.append)
    return slept


def in_turns(*answers):
    """An answer for each question, the last one for all others."""
    left = list(answers)

    def answer(method, path, body):
        now = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(now, Exception):
            raise now
        return now

    return answer


def client(server, **options):
    return JsonClient("reward_server", server.url, **{"timeout": 5.0, **options})


def test_what_is_sent_and_what_comes_back():
    with Fake(lambda method, path, body: (200, {"method": method, "path": path, "body": body})) as server:
        ask = client(server)
        assert ask.post("/score", {"a": [1, 2.5, "é"]}) == {
            "method": "POST", "path": "/score", "body": {"a": [1, 2.5, "é"]},
        }  # fmt: skip
        assert ask.get("/models") == {"method": "GET", "path": "/models", "body": None}
        assert ask.ask("GET", "/models", params={"deep": "yes"})["path"] == "/models?deep=yes"


def test_an_empty_answer_is_none():
    with Fake(in_turns((200, None))) as server:
        assert client(server).get("/health") is None


def test_an_answer_may_be_text():
    with Fake(in_turns((200, "Erfolg für a".encode()))) as server:
        assert client(server).post("/load", {"x": 1}, text=True) == "Erfolg für a"


@pytest.mark.parametrize("fault", [
    (500, {"error": "out of memory"}), (503, b"busy"), (429, {"detail": "slowly"}), Died(),
    Died(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{\"half\""), Died(b"HTTP/1.1 200"),
])  # fmt: skip
def test_a_fault_of_the_server_is_asked_again(fault, pauses):
    with Fake(in_turns(fault, fault, (200, [1]))) as server:
        assert client(server, attempts=3).post("/score", {"x": 1}) == [1]
        assert server.asked == [("POST", "/score", {"x": 1})] * 3
    assert pauses == [0.1, 0.2]


@pytest.mark.parametrize(("fault", "text"), [
    ((500, {"error": {"message": "out of memory", "code": 500}}), "500, out of memory"),
    ((503, b""), "503, Service Unavailable"), (Died(), "RemoteDisconnected"),
    (Died(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{\"half\""), "IncompleteRead"),
])  # fmt: skip
def test_attempts_are_bounded(fault, text, pauses):
    with Fake(in_turns(fault)) as server:
        with pytest.raises(Unreachable, match=r"reward_server: POST http://127\.0\.0\.1") as raised:
            client(server, attempts=4).post("/score")
        assert len(server.asked) == 4
    assert text in str(raised.value) and "4 attempts" in str(raised.value)


@pytest.mark.parametrize(("said", "text"), [
    ({"error": {"message": "max_tokens is too large", "type": "BadRequest"}}, "400, max_tokens is too large"),
    ({"detail": [{"loc": ["body", "x"], "msg": "missing"}]}, '"msg": "missing"'), (b"no\nsuch  thing", "no such thing"),
])  # fmt: skip
def test_a_refusal_is_told_at_once_in_the_servers_words(said, text):
    with Fake(in_turns((400, said))) as server:
        with pytest.raises(Refused) as raised:
            client(server).post("/score")
        assert len(server.asked) == 1
    assert text in str(raised.value) and raised.value.status == 400 and isinstance(raised.value, ServerError)


@pytest.mark.parametrize(("reply", "text"), [
    ((200, b"<html>hello</html>"), "want JSON, got '<html>hello"), ((302, b""), "302"), ((404, b""), "404, Not Found"),
    ((501, b""), "501"),
])  # fmt: skip
def test_what_is_no_answer_is_refused(reply, text):
    with Fake(in_turns(reply)) as server:
        with pytest.raises(Refused, match=text):
            client(server).get("/score")
        assert len(server.asked) == 1


def test_a_server_that_is_slow():
    stop = threading.Event()

    def answer(method, path, body):
        stop.wait(5)
        return 200, {}

    with Fake(answer) as server:
        with pytest.raises(Unreachable, match=r"no answer within 0.2 s \(2 attempts\)"):
            client(server, timeout=0.2, attempts=2).get("/score")
        stop.set()
        assert len(server.asked) == 2


def test_a_server_that_is_not_there(pauses):
    with Fake(in_turns((200, {}))) as server:
        pass
    with pytest.raises(Unreachable, match=r"reward_server: GET http://127.0.0.1:\d+/x: ConnectionRefusedError"):
        client(server).get("/x")
    assert pauses == [0.1, 0.2, 0.4]


def test_a_server_that_comes_back(monkeypatch):
    with Fake(in_turns((200, {"n": 1}))) as server:
        ask = client(server)
        assert ask.get("/x") == {"n": 1}  # the connection is kept
        server.stop()
        monkeypatch.setattr(servers.time, "sleep", lambda seconds: server.start())
        assert ask.get("/x") == {"n": 1}


def test_threads_share_a_client():
    with Fake(lambda method, path, body: (200, body)) as server:
        ask, found = client(server), {}
        threads = [
            threading.Thread(target=lambda n=n: found.update({n: ask.post("/echo", {"n": n})})) for n in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {n: {"n": n} for n in range(16)}


def test_proxies_of_the_environment_are_not_used(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with Fake(in_turns((200, {}))) as server:
        assert client(server).get("/x") == {}


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://host:port", "", "http://h?x=1", 8])
def test_an_address_that_is_none(url):
    with pytest.raises(ValueError, match=r"reward_server: got .*, want http://host:port"):
        JsonClient("reward_server", url)


def test_an_address_with_a_password_is_not_repeated():
    with pytest.raises(ValueError, match="without a user's name") as raised:
        JsonClient("reward_server", "http://me:secret@host:1")
    assert "secret" not in str(raised.value)


def test_an_address_may_have_a_path():
    with Fake(lambda method, path, body: (200, path)) as server:
        assert JsonClient("reward_server", f"{server.url}/models/a/").get("/x") == "/models/a/x"


def test_without_requests(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "requests":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"reward_server: .*pip install 'rlhf-kernels\[servers\]'"):
        JsonClient("reward_server", "http://host:1")
