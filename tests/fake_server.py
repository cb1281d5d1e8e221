"""HTTP servers on this machine for the tests, that answer, or fail to, as a test says."""

import contextlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Died(Exception):
    """Raised by an answer: the connection breaks off. `half`: bytes of an answer that were sent before."""

    def __init__(self, half: bytes = b""):
        self.half = half


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        self.server.asked.append((self.command, self.path, body))
        try:
            status, reply = self.server.answer(self.command, self.path, body)
        except Died as death:
            self.wfile.write(death.half)
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        content = reply if isinstance(reply, bytes) else b"" if reply is None else json.dumps(reply).encode()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # who asked waits no longer
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            if status in (301, 302, 307):
                self.send_header("Location", "/elsewhere")
            self.end_headers()
            self.wfile.write(content)

    do_GET = do_POST = _answer

    def log_message(self, *args):
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads, allow_reuse_address = True, True

    def handle_error(self, request, client_address):
        pass


class Fake:
    """A server. `answer(method, path, body)` gives (status, JSON or bytes), or raises `Died`; `asked` is what came."""

    def __init__(self, answer, port: int = 0):
        self.answer, self.asked, self.port, self.http = answer, [], port, None
        self.start()

    def start(self):
        """Listen, at the same port as before."""
        deadline = time.monotonic() + 10
        while self.http is None:
            try:
                self.http = _Server(("127.0.0.1", self.port), _Handler)
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        self.http.asked, self.http.answer = self.asked, self.answer
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self):
        """Listen no longer; what comes is refused."""
        if self.http is not None:
            self.http.shutdown()
            self.http.server_close()
            self.http = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.stop()
