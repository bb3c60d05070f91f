"""A TCP proxy on loopback that breaks connections in the ways that networks do, for the tests and chaos."""

import contextlib
import socket
import socketserver
import threading


class Link:
    """One connection through the proxy: what comes from each of its two ends goes to the other."""

    def __init__(self, near: socket.socket, far: socket.socket):
        self.held = {near: 0, far: 0}  # how many bytes have come from this end, and wait here
        self.flowing = threading.Event()  # or else it is stalled
        self.flowing.set()
        self.is_cut = False

    def pass_on(self, source: socket.socket, target: socket.socket) -> None:
        """Pass on what comes from one end, until it is closed; then close both."""
        with contextlib.suppress(OSError):
            while received := self._receive(source):
                target.sendall(received)
        self.cut()

    def _receive(self, source: socket.socket) -> bytes:
        try:
            received = source.recv(1 << 16)
        except OSError:
            received = b""
        # On a stalled link nothing gets on: no bytes, and no news of an end that is closed.
        self.held[source] = len(received)
        self.flowing.wait()
        self.held[source] = 0
        return received

    def cut(self) -> None:
        """Close both ends, for the threads that read from them, too."""
        self.is_cut = True
        for end in self.held:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self.flowing.set()


class TcpProxy:
    """Passes connections on to a port of this machine, until it is told to cut or stall them."""

    def __init__(self, target: int):
        self._target = target
        self._links: list[Link] = []  # all that there ever were
        self.silent = False  # whether nothing gets through on new connections
        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), self._serve)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        """The AMQP URL of RabbitMQ behind this proxy."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}/%2F"

    @property
    def accepted(self) -> int:
        """How many connections it has passed on, ever."""
        return len(self._links)

    @property
    def connections(self) -> int:
        """How many connections are open through it."""
        return len(self._open())

    @property
    def held(self) -> int:
        """How many bytes wait at the stalled connections, as far as this side of the network can tell."""
        return sum(sum(link.held.values()) for link in self._open() if not link.flowing.is_set())

    def cut(self) -> int:
        """Close every connection, as a router that restarts does. Return how many."""
        links = self._open()
        for link in links:
            link.cut()
        return len(links)

    def stall(self) -> int:
        """Let no more bytes through on the connections of now, and close nothing (half-open). Return how many."""
        links = self._open()
        for link in links:
            link.flowing.clear()
        return len(links)

    def close(self) -> None:
        """End the proxy and its connections."""
        self._server.shutdown()
        self._server.server_close()
        self.cut()

    def _open(self) -> list[Link]:
        return [link for link in self._links if not link.is_cut]

    def _serve(self, near: socket.socket, *_) -> None:
        # In a thread of its own for each connection; the server closes `near` afterwards.
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._target)) as far:
            link = Link(near, far)
            if self.silent:
                link.flowing.clear()
            self._links.append(link)
            back = threading.Thread(target=link.pass_on, args=(far, near), daemon=True)
            back.start()
            link.pass_on(near, far)
            back.join()
