"""A TCP proxy that fails on command: connections that are cut, answers that get lost, a server that is gone."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Proxy:
    """Forwards to a server on this machine; set its attributes at any time."""

    def __init__(self, port: int) -> None:
        self._server_port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.dead = False  # every connection is closed at once, also those that are open
        self.cut_after: int | None = None  # bytes of answers, then the connection is cut
        self.cuts = 0  # how many connections may still be cut so
        self.lose: bytes | None = None  # the answer to the next request that contains this is lost
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """No new connections."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            if self.dead:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self._server_port))
            connection = _Connection(self, client, server)
            for pump in (connection.requests, connection.answers):
                threading.Thread(target=pump, daemon=True).start()


class _Connection:
    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self.proxy, self.client, self.server = proxy, client, server
        self.lost = False

    def requests(self) -> None:
        with suppress(OSError), self._closing():
            while content := self.client.recv(1 << 16):
                if self.proxy.lose is not None and self.proxy.lose in content:
                    self.proxy.lose, self.lost = None, True
                if self.proxy.dead:
                    return
                self.server.sendall(content)

    def answers(self) -> None:
        """An answer that gets lost has been given: what was asked for is done."""
        sent = 0
        with suppress(OSError), self._closing():
            while content := self.server.recv(1 << 16):
                if self.lost or self.proxy.dead:
                    return
                most = self.proxy.cut_after
                if most is not None and self.proxy.cuts > 0 and sent + len(content) > most:
                    self.proxy.cuts -= 1
                    self.client.sendall(content[: max(0, most - sent)])
                    return
                self.client.sendall(content)
                sent += len(content)

    @contextmanager
    def _closing(self) -> Iterator[None]:
        try:
            yield
        finally:
            for end in (self.client, self.server):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
