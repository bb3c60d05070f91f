"""A private RabbitMQ node on this machine: it listens on loopback only, and writes to one folder only."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import ClassVar

from processes import wait_until

# How long a node may take to start or to stop. A busy machine needs 15 s, so this is only reached when one is broken.
TIMEOUT = 90

NOT_INSTALLED = """RabbitMQ is not installed, or not in the folder that RABBITMQ_BIN names. Install it (sudo apt-get \
install rabbitmq-server; brew install rabbitmq), start Docker, or name a RabbitMQ that runs in AMQP_URL"""


class NodeError(Exception):
    """RabbitMQ is not installed, did not start, or did not stop. The first line of the message is for the user."""


def find_programs() -> Path:
    """Return the folder of RabbitMQ's programs. NodeError where there are none."""
    # First Debian's own folder: its /usr/sbin/rabbitmq-server switches to another user and drops the environment.
    folders = os.environ.get("RABBITMQ_BIN") or f"/usr/lib/rabbitmq/bin:{os.environ['PATH']}"
    if found := shutil.which("rabbitmq-server", path=folders):
        return Path(found).parent.resolve()
    raise NodeError(NOT_INSTALLED)


def answers_amqp(host: str, port: int) -> bool:
    """Tell whether something on host:port answers AMQP's header, i.e. is ready and not merely listening."""
    try:
        with socket.create_connection((host, port), timeout=2) as connection:
            connection.sendall(b"AMQP\x00\x00\x09\x01")
            return bool(connection.recv(1))
    except OSError:
        return False


def free_port() -> int:
    """Return a TCP port of loopback on which nobody listens now."""
    # Below those of outgoing connections: a node that is down for a moment must find its port free again.
    port = random.randrange(10_000, 32_000)
    with socket.socket() as probe:
        return free_port() if probe.connect_ex(("127.0.0.1", port)) == 0 else port


class Node:
    """One node with its data, logs and process in `folder`, where an earlier command may have started it.

    port: where it listens for AMQP on 127.0.0.1; a free one by default.
    config: lines for rabbitmq.conf. advanced: an Erlang term for advanced.config. plugins: names to enable.
    home, epmd_port: nodes that share these two can form a cluster.
    """

    launched: ClassVar[list["Node"]] = []  # by this program

    def __init__(self, folder, name="rabbit", port=0, config="", advanced="[].", plugins=(), home=None, epmd_port=0):
        self.folder, self.home = Path(folder).resolve(), Path(home or folder).resolve()
        self.name = f"{name}@localhost"
        self.port, self.epmd_port, self.dist_port = port or free_port(), epmd_port or free_port(), free_port()
        self.config, self.advanced, self.plugins = config, advanced, plugins
        self.pid = self._process = None
        with contextlib.suppress(FileNotFoundError):
            vars(self).update(json.loads((self.folder / "node.json").read_text()))
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}/%2F"

    @property
    def running(self) -> bool:
        """Whether the node's process exists."""
        if self._process:
            return self._process.poll() is None
        # An earlier command started it. By now its number may be another program's: see what that is.
        ps = subprocess.run(["ps", "-ww", "-o", "command=", "-p", str(self.pid)], capture_output=True, text=True)
        return f"-home {self.home}" in ps.stdout or "rabbitmq-server" in ps.stdout

    def start(self) -> "Node":
        """Start the node, unless it runs, and return it when it answers AMQP. Its data from an earlier run are kept."""
        self.launch()
        return self.wait_until_ready()

    def launch(self) -> None:
        """Start it without waiting for it, e.g. because other nodes of its cluster must start as well."""
        if self.running:
            return
        Node.launched.append(self)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "rabbitmq.conf").write_text(f"listeners.tcp.1 = 127.0.0.1:{self.port}\n{self.config}")
        (self.folder / "advanced.config").write_text(f"{self.advanced}\n")
        (self.folder / "enabled_plugins").write_text(f"[{','.join(self.plugins)}].\n")
        cookie = self.home / ".erlang.cookie"
        if not cookie.exists():
            cookie.write_text(os.urandom(16).hex())
            cookie.chmod(0o400)  # Erlang refuses a cookie that others can read
        with (self.folder / "console.log").open("ab") as log:
            # In a session of its own: it outlives this process, and a Ctrl+C in this terminal is not meant for it.
            settings = {"cwd": self.folder, "env": self._environment(), "start_new_session": True}
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            self._process = subprocess.Popen(find_programs() / "rabbitmq-server", **settings, **streams)
        self.pid = self._process.pid
        saved = {"pid": self.pid, "port": self.port, "epmd_port": self.epmd_port, "dist_port": self.dist_port}
        (self.folder / "node.json").write_text(json.dumps(saved))

    def wait_until_ready(self) -> "Node":
        """Return the node when it answers AMQP; NodeError with the end of its log when it does not."""
        wait_until(lambda: answers_amqp("127.0.0.1", self.port) or not self.running, "RabbitMQ starts", TIMEOUT)
        if not self.running:
            log = self.folder / "console.log"
            raise NodeError(f"RabbitMQ did not start, see {log}\n{log.read_text(errors='replace')[-2000:]}")
        return self

    def stop(self) -> None:
        """Stop the node in good order, as a service manager would. Does nothing when it is not running."""
        self._end(os.kill, signal.SIGTERM)

    def kill(self) -> None:
        """End the node at once (SIGKILL), as a power cut would."""
        self._end(os.killpg, signal.SIGKILL)  # with Erlang's helpers, which would keep its ports

    close = kill  # for good: nothing of it is left running

    def ctl(self, *arguments: str) -> str:
        """Run rabbitmqctl against the node and return what it prints."""
        command = [find_programs() / "rabbitmqctl", "-q", "-n", self.name, *arguments]
        done = subprocess.run(command, env=self._environment(), capture_output=True, text=True)
        if done.returncode:
            raise NodeError(f"rabbitmqctl {' '.join(arguments)} failed: {(done.stderr or done.stdout).strip()}")
        return done.stdout

    def _end(self, send, signum: int) -> None:
        if self.running:
            send(self.pid, signum)
        wait_until(lambda: not self.running, f"RabbitMQ (process {self.pid}) ends", TIMEOUT)
        # And the port mapper that Erlang started for it: a KILL_REQ, which is refused while other nodes need it.
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.epmd_port), 2) as epmd:
            epmd.sendall(b"\x00\x01k")
            epmd.recv(2)

    def _environment(self) -> dict:
        """The node's environment: nothing inherited may point it at another node's files or ports."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RABBITMQ_", "ERL_")) and k != "NOTIFY_SOCKET"}
        return kept | {
            "HOME": str(self.home),
            "RABBITMQ_NODENAME": self.name,
            "RABBITMQ_DIST_PORT": str(self.dist_port),
            "RABBITMQ_MNESIA_BASE": f"{self.folder}/data",
            "RABBITMQ_LOG_BASE": f"{self.folder}/log",
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
    """Return nodes that are not started yet, and will join the first. config, settings: as for a Node."""
    join = "cluster_formation.peer_discovery_backend = classic_config\n"
    join += "cluster_formation.classic_config.nodes.1 = rabbit1@localhost\n"
    settings |= {"config": config + join, "home": folder, "epmd_port": free_port()}
    return [Node(Path(folder) / f"rabbit{n}", f"rabbit{n}", **settings) for n in range(1, count + 1)]


def close_all() -> None:
    """End all that this program has started. The system knows what that is, even if a signal hit it at its start."""
    import psutil  # here, as the demo goes without it

    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    for node in Node.launched:
        node.close()  # which ends Erlang's port mapper
