"""A private RabbitMQ node on this machine, for the demo, the tests and the benchmarks.

It listens on loopback only and keeps everything that it writes in one folder, so that it never meets a RabbitMQ that
somebody else runs here. It needs RabbitMQ's programs and nothing else: no root, no service manager, no Docker.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

# How long a node may take to answer; a busy machine needs 15 s, so this is only reached when something is broken.
START_TIMEOUT = 90

NOT_INSTALLED = (
    "RabbitMQ is not installed, and this can't install it. Install it (Debian, Ubuntu: sudo apt-get install "
    "rabbitmq-server; macOS: brew install rabbitmq), or name the folder of its programs in RABBITMQ_BIN. The demo also "
    "takes the RabbitMQ that AMQP_URL names, and one in Docker, if that runs"
)


class NodeError(Exception):
    """RabbitMQ is not installed, did not start, or did not stop. The message is for the user."""


def find_programs() -> Path:
    """Return the folder of RabbitMQ's programs: RABBITMQ_BIN, if that is set. NodeError where there are none."""
    chosen = os.environ.get("RABBITMQ_BIN")
    # First Debian's own folder: its /usr/sbin/rabbitmq-server switches to another user and drops the environment.
    found = shutil.which("rabbitmq-server", path=chosen or f"/usr/lib/rabbitmq/bin:{os.environ.get('PATH', '')}")
    if not found:
        raise NodeError(f"RABBITMQ_BIN={chosen} has no rabbitmq-server in it" if chosen else NOT_INSTALLED)
    return Path(found).parent.resolve()


def answers_amqp(host: str, port: int, timeout: float = 2) -> bool:
    """Tell whether something on host:port answers AMQP's header, i.e. is ready and not merely listening."""
    try:
        with socket.create_connection((host, port), timeout) as connection:
            connection.sendall(b"AMQP\x00\x00\x09\x01")
            return bool(connection.recv(1))
    except OSError:
        return False


def free_port(usual: int | None = None) -> int:
    """Return a TCP port of loopback on which nobody listens now: the usual one if possible.

    Others lie below the ports of outgoing connections: a node that is down for a moment must find its port free again.
    """
    port = usual or random.randrange(10_000, 32_000)
    with contextlib.suppress(OSError):
        socket.create_connection(("localhost", port), 1).close()
        return free_port()
    return port


class Node:
    """One node with its data, logs and process in `folder`.

    port: where it listens for AMQP on 127.0.0.1; a free one by default.
    config: lines for rabbitmq.conf. advanced: an Erlang term for advanced.config. plugins: names to enable.
    home, epmd_port: nodes that share these two can form a cluster.
    """

    def __init__(
        self, folder, name="rabbit", port=None, config="", advanced="[].", plugins=(), home=None, epmd_port=None
    ):
        self.folder, self.home = Path(folder).resolve(), Path(home or folder).resolve()
        self.name = f"{name}@localhost"
        self.port, self.epmd_port, self.dist_port = port or free_port(), epmd_port or free_port(), free_port()
        self.config, self.advanced, self.plugins = config, advanced, plugins
        self.pid = self._process = None

    @property
    def url(self) -> str:
        """The AMQP URL of this node."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}/%2F"

    @property
    def running(self) -> bool:
        """Whether the node's process exists."""
        if self._process or not self.pid:
            return bool(self._process) and self._process.poll() is None
        # An earlier command started it. By now its number may be another program's: see what that is.
        ps = ["ps", "-ww", "-o", "command=", "-p", str(self.pid)]
        ask = ["cat", f"/proc/{self.pid}/cmdline"] if sys.platform == "linux" else ps  # not every Linux has ps
        command = subprocess.run(ask, capture_output=True, text=True, errors="replace").stdout.replace("\0", " ")
        return f"-home {self.home}" in command or "rabbitmq-server" in command

    def start(self) -> "Node":
        """Start the node and return it when it answers AMQP. Its data from an earlier run are kept."""
        self.launch()
        return self.wait_until_ready()

    def launch(self) -> None:
        """Start the process without waiting for it, e.g. because other nodes of its cluster must start as well."""
        self._write_settings()
        server = find_programs() / "rabbitmq-server"
        with (self.folder / "console.log").open("ab") as log:
            # In a session of its own: it outlives this process, and a Ctrl+C in this terminal is not meant for it.
            self._process = subprocess.Popen(
                [server], env=self._environment(), cwd=self.folder,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.pid = self._process.pid
        saved = ("name", "port", "epmd_port", "dist_port", "config", "advanced", "plugins", "pid")
        (self.folder / "node.json").write_text(json.dumps({key: getattr(self, key) for key in saved}))

    @classmethod
    def load(cls, folder) -> "Node | None":
        """Return the node that an earlier command started in `folder`, or None."""
        node = cls(folder)
        try:
            vars(node).update(json.loads((node.folder / "node.json").read_text()))
        except (OSError, ValueError):
            return None
        return node

    def wait_until_ready(self, timeout: float = START_TIMEOUT) -> "Node":
        """Return the node when it answers AMQP; NodeError with the end of its log when it does not."""
        deadline = time.monotonic() + timeout
        while not answers_amqp("127.0.0.1", self.port):
            if not self.running or time.monotonic() > deadline:
                log = self.folder / "console.log"
                # The first line is for a user, the rest for a developer.
                raise NodeError(f"RabbitMQ did not start, see {log}\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)
        return self

    def stop(self, timeout: float = 60) -> None:
        """Stop the node in good order, as a service manager would. Does nothing when it is not running."""
        self._end(os.kill, signal.SIGTERM, timeout)

    def kill(self) -> None:
        """End the node at once (SIGKILL), as a power cut would."""
        self._end(os.killpg, signal.SIGKILL, 30)  # with Erlang's helpers, which would keep its ports

    def freeze(self) -> None:
        """Stop the node's process where it is (SIGSTOP): its connections stay open, but nobody answers on them."""
        os.killpg(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen node go on, as if nothing had happened."""
        os.killpg(self.pid, signal.SIGCONT)

    def close(self) -> None:
        """End the node for good, together with the port mapper (epmd) that Erlang started for it."""
        self.kill()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.epmd_port), 2) as epmd:
            epmd.sendall(b"\x00\x01k")  # KILL_REQ of the EPMD protocol; refused while nodes are registered
            epmd.recv(2)
        (self.folder / "node.json").unlink(missing_ok=True)

    def ctl(self, *arguments: str, program: str = "rabbitmqctl") -> str:
        """Run rabbitmqctl (or another of RabbitMQ's programs) against the node and return what it prints."""
        command = [find_programs() / program, "-q", "-n", self.name, *arguments]
        done = subprocess.run(
            command, env=self._environment(), cwd=self.folder, capture_output=True, text=True, timeout=120
        )
        if done.returncode:
            raise NodeError(f"{program} {' '.join(arguments)} failed: {(done.stderr or done.stdout).strip()}")
        return done.stdout

    def _end(self, send, signum: int, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        if self.running:
            send(self.pid, signum)
        while self.running:
            if time.monotonic() > deadline:
                raise NodeError(f"RabbitMQ (process {self.pid}) did not stop within {timeout} s")
            time.sleep(0.05)

    def _write_settings(self) -> None:
        for folder in (self.home, self.folder):
            folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "rabbitmq.conf").write_text(f"listeners.tcp.1 = 127.0.0.1:{self.port}\n{self.config}")
        (self.folder / "advanced.config").write_text(f"{self.advanced}\n")
        (self.folder / "enabled_plugins").write_text(f"[{','.join(self.plugins)}].\n")
        cookie = self.home / ".erlang.cookie"
        if not cookie.exists():
            cookie.write_text(os.urandom(16).hex())
            cookie.chmod(0o400)  # Erlang refuses a cookie that others can read

    def _environment(self) -> dict:
        """The node's environment: nothing inherited may point it at another node's files or ports."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RABBITMQ_", "ERL_")) and k != "NOTIFY_SOCKET"}
        return kept | {
            "HOME": str(self.home),
            "RABBITMQ_NODENAME": self.name,
            "RABBITMQ_DIST_PORT": str(self.dist_port),
            "RABBITMQ_MNESIA_BASE": f"{self.folder}/data",
            "RABBITMQ_LOG_BASE": f"{self.folder}/log",
            "RABBITMQ_PID_FILE": f"{self.folder}/pid",
            "RABBITMQ_CONFIG_FILE": f"{self.folder}/rabbitmq.conf",
            "RABBITMQ_ADVANCED_CONFIG_FILE": f"{self.folder}/advanced.config",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{self.folder}/enabled_plugins",
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RUNNING_UNDER_SYSTEMD": "true",  # makes rabbitmq-server become the node instead of a shell around it
            # Erlang's own traffic listens on every interface unless told otherwise.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "ERL_EPMD_PORT": str(self.epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
        }


def cluster_nodes(folder, count: int = 3, config: str = "", **settings) -> list[Node]:
    """Return nodes that are not started yet, the others set to join the first. config, settings: as for a Node."""
    join = (
        "cluster_formation.peer_discovery_backend = classic_config\n"
        "cluster_formation.classic_config.nodes.1 = rabbit1@localhost\n"
    )
    settings |= {"home": folder, "epmd_port": free_port()}
    first, *others = [f"rabbit{number}" for number in range(1, count + 1)]
    nodes = [Node(Path(folder) / first, first, config=config, **settings)]
    return nodes + [Node(Path(folder) / name, name, config=config + join, **settings) for name in others]
