"""A line to an S3 server on which answers to some requests come byte by byte."""

import re
import socket
import socketserver
import threading
from contextlib import suppress

REQUEST = re.compile(rb"(GET|HEAD|PUT|POST|DELETE) (\S+) HTTP/1\.1\r\n")
PAUSE_SECONDS = 0.05  # between two bytes


class Connection(socketserver.BaseRequestHandler):
    """One connection to the server, for one request after another."""

    def handle(self) -> None:
        assert isinstance(self.server, DrippingLine)
        self.asked = ""
        with suppress(OSError), socket.create_connection(self.server.far_end) as far:
            threading.Thread(target=self._forward, args=(far,), daemon=True).start()
            while answer := far.recv(65536):
                if self.server.drips.search(self.asked):
                    self._drip(answer)
                else:
                    self.request.sendall(answer)

    def _forward(self, far: socket.socket) -> None:
        assert isinstance(self.server, DrippingLine)
        with suppress(OSError):
            while request := self.request.recv(65536):
                if found := REQUEST.match(request):
                    self.asked = b" ".join(found.groups()).decode()
                    self.server.asked.append(self.asked)
                far.sendall(request)
            far.shutdown(socket.SHUT_RDWR)

    def _drip(self, answer: bytes) -> None:
        assert isinstance(self.server, DrippingLine)
        num_bytes = self.server.num_bytes
        for start in range(0, len(answer), num_bytes):
            if self.server.drips.search(self.asked):
                self.server.over.wait(PAUSE_SECONDS)
            self.request.sendall(answer[start : start + num_bytes])


class DrippingLine(socketserver.ThreadingTCPServer):
    """The line; `drips` says of which requests (`GET /atoll/...`) the answers do."""

    daemon_threads = True

    def __init__(self, far_end: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), Connection)
        self.far_end, self.asked, self.over = far_end, list[str](), threading.Event()
        self.heal()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def drip(self, what: str, num_bytes: int = 1) -> None:
        """From now on, the answers to requests that a pattern is found in, so many bytes at a time."""
        self.drips, self.num_bytes = re.compile(what), num_bytes

    def heal(self) -> None:
        """From now on, none."""
        self.drip(r"(?!)")

    def shutdown(self) -> None:
        """Whatever drips does so no longer."""
        self.over.set()
        super().shutdown()
