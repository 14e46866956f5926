"""`atoll serve`: a federation's page on a port of this machine, made anew while somebody looks at it."""

import sys
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from launch.show.page import Federation
from pretrain.config.errors import ConfigError

LOOPBACK = "127.0.0.1"
REFRESH_SECONDS = 15
IDLE_SECONDS = 10.0  # of a connection on which nothing comes
# No source of anything but what is in the page, no script, in nobody's frame.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class PageServer(ThreadingHTTPServer):
    """Answers GET / to whoever asks under a name that it goes by."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, federation: Federation, port: int, names: Sequence[str] = ()) -> None:
        """On loopback; 0 is any free port. `names` are hosts under which a proxy asks, as host or host:port.

        Raises ConfigError for a port that cannot be had.
        """
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"--port: {port} given; {error}; allowed: a free port, or 0 for any") from None
        own = [f"{host}:{self.server_port}" for host in (LOOPBACK, "localhost")]
        self.names = {name.lower() for name in (*own, *names)}
        self._federation, self._lock = federation, threading.Lock()
        self._page, self._made = b"", 0.0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who goes away before the page is there is no error."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://{LOOPBACK}:{self.server_port}/"

    def page(self) -> bytes:
        """The page, at most `REFRESH_SECONDS` old; while the store cannot be read, what it was, and why."""
        with self._lock:
            if not self._page or time.monotonic() - self._made >= REFRESH_SECONDS:
                trouble = ""
                try:
                    self._federation.look()
                except ConfigError as error:
                    trouble = str(error)
                self._page = self._federation.page(trouble).encode()
                self._made = time.monotonic()
            return self._page


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    timeout = IDLE_SECONDS

    def do_GET(self) -> None:
        """The one page."""
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or hosts[0].lower() not in self.server.names:
            # A name of somebody else's that leads here: a page of theirs would read ours as its own (DNS rebinding).
            self._answer(421, b"this is no name of this server; see atoll serve --name\n")
        elif self.path != "/":
            self._answer(404, b"there is / alone\n")
        else:
            self._answer(200, self.server.page(), "text/html; charset=utf-8", Refresh=str(REFRESH_SECONDS))

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Without what was asked."""
        self._answer(code, b"only GET is answered\n" if code == 501 else b"no request\n")

    def _answer(self, code: int, body: bytes, kind: str = "text/plain; charset=utf-8", **more: str) -> None:
        self.send_response(code)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(body)), **more}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def version_string(self) -> str:
        """Of no library."""
        return "atoll"

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: whoever looks at the page is nobody's affair."""
