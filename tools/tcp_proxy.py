"""A TCP proxy on loopback that breaks connections in the ways that networks do, for the tests and chaos."""

import fcntl
import selectors
import socket
import sys
import termios
import threading


class TcpProxy:
    """Passes connections on to a port of this machine, until it is told to cut, stall or refuse them."""

    def __init__(self, target: int):
        self._target = target
        self._pairs = {}  # socket -> the socket that its bytes go to
        self._stalled = set()
        self._refusing = False
        self.accepted = 0  # how many connections it has passed on, ever
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._wake, self._woken = socket.socketpair()
        self._ended = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """The AMQP URL of RabbitMQ behind this proxy."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}/%2F"

    @property
    def connections(self) -> int:
        """How many connections are open through it."""
        return len(self._pairs) // 2

    def cut(self) -> int:
        """Close every connection, as a router that restarts does. Return how many."""
        with self._lock:
            cut = self.connections
            for end in list(self._pairs):
                self._drop(end)
            return cut

    def stall(self) -> int:
        """Let no more bytes through on the connections of now, and close nothing: a half-open connection.

        Return how many. New connections work.
        """
        with self._lock:
            self._stalled |= set(self._pairs)
            return self.connections

    @property
    def held(self) -> int:
        """How many bytes wait at the stalled connections, as far as this side of the network can tell."""
        with self._lock:
            return sum(
                int.from_bytes(fcntl.ioctl(end, termios.FIONREAD, b"\0" * 4), sys.byteorder) for end in self._stalled
            )

    def resume(self) -> None:
        """Let the bytes through again."""
        with self._lock:
            self._stalled.clear()
        self._wake.send(b"x")

    def refuse(self, refusing: bool = True) -> None:
        """Close new connections at once, or stop doing so."""
        self._refusing = refusing

    def close(self) -> None:
        """End the proxy and its connections."""
        self._ended = True
        self._wake.send(b"x")
        self._thread.join(5)
        self.cut()
        self._listener.close()

    def _run(self) -> None:
        while not self._ended:
            # Made anew each time: there are few connections, and the stalled ones must not be listened to.
            with selectors.DefaultSelector() as selector:
                with self._lock:
                    for end in {self._listener, self._woken, *self._pairs} - self._stalled:
                        selector.register(end, selectors.EVENT_READ)
                ready = [key.fileobj for key, _ in selector.select(0.5)]
            for end in ready:
                with self._lock:
                    self._serve(end)

    def _serve(self, end: socket.socket) -> None:
        if end is self._woken:
            end.recv(100)
        elif end is self._listener:
            self._accept()
        elif end in self._pairs and end not in self._stalled:
            try:
                received = end.recv(1 << 16)
                self._pairs[end].sendall(received)
            except OSError:
                received = b""
            if not received:
                self._drop(end)

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        try:
            if self._refusing:
                raise ConnectionRefusedError
            far = socket.create_connection(("127.0.0.1", self._target), 5)
        except OSError:
            near.close()
            return
        self._pairs |= {near: far, far: near}
        self.accepted += 1

    def _drop(self, end: socket.socket) -> None:
        other = self._pairs.pop(end, None)
        if other:
            self._pairs.pop(other, None)
        for one in (end, other):
            if one:
                self._stalled.discard(one)
                one.close()
