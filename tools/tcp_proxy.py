"""A TCP proxy on loopback that breaks connections in the ways that networks do, for the tests and chaos."""

import contextlib
import socket
import socketserver
import threading


class Link(socketserver.BaseRequestHandler):
    """One connection through the proxy: what comes from each of its two ends goes to the other."""

    def handle(self) -> None:
        # In a thread of its own for each connection; the server closes the near end afterwards.
        near, self.is_cut, self.held = self.request, False, []  # held: what has come and waits here
        self.flowing = threading.Event()  # or else it is stalled
        if not self.server.silent:
            self.flowing.set()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.server.target)) as far:
            self.ends = near, far
            self.server.links.append(self)
            back = threading.Thread(target=self._pass_on, args=(far, near), daemon=True)
            back.start()
            self._pass_on(near, far)
            back.join()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        """Pass on what comes from one end, until one of them is closed; then close both."""
        received = b"."
        while received:
            try:
                received = source.recv(1 << 16)
            except OSError:
                received = b""
            # On a stalled link nothing gets on: no bytes, and no news of an end that is closed.
            self.held.append(received)
            self.flowing.wait()
            self.held.remove(received)
            with contextlib.suppress(OSError):
                target.sendall(received)
        self.cut()

    def cut(self) -> None:
        """Close both ends, for the threads that read from them, too."""
        self.is_cut = True
        for end in self.ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self.flowing.set()


class TcpProxy(socketserver.ThreadingTCPServer):
    """Passes connections on to a port of this machine, until it is told to cut or stall them."""

    daemon_threads = True

    def __init__(self, target: int):
        super().__init__(("127.0.0.1", 0), Link)
        self.target = target
        self.links: list[Link] = []  # all that there ever were
        self.silent = False  # whether nothing gets through on new connections
        self.url = f"amqp://guest:guest@127.0.0.1:{self.server_address[1]}/%2F"  # of RabbitMQ behind it
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def connections(self) -> list[Link]:
        """Those that are open."""
        return [link for link in self.links if not link.is_cut]

    @property
    def held(self) -> int:
        """How many bytes wait at the stalled connections, as far as this side of the network can tell."""
        return sum(len(part) for link in self.connections if not link.flowing.is_set() for part in link.held)

    def cut(self) -> int:
        """Close every connection, as a router that restarts does. Return how many."""
        links = self.connections
        for link in links:
            link.cut()
        return len(links)

    def stall(self) -> int:
        """Let no more bytes through on the connections of now, and close nothing (half-open). Return how many."""
        links = self.connections
        for link in links:
            link.flowing.clear()
        return len(links)

    def close(self) -> None:
        """End the proxy and its connections."""
        self.shutdown()
        self.server_close()
        self.cut()
