"""A private RabbitMQ node on this machine, for the demo, the tests and the benchmarks.

It listens on loopback only and keeps everything it writes in one folder, so that it never meets a RabbitMQ that
somebody else runs here. It needs RabbitMQ's programs and nothing else: no root, no service manager, no Docker.

RABBITMQ_BIN names the folder of the programs (rabbitmq-server, rabbitmqctl), for trying another version.
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

# Every AMQP 0-9-1 client opens with these 8 bytes (specification, 4.2.2 Protocol Header).
AMQP_HEADER = b"AMQP\x00\x00\x09\x01"


class NodeError(Exception):
    """RabbitMQ is not installed, did not start, or did not stop. The message is for the user."""


def find_programs() -> Path | None:
    """Return the folder of RabbitMQ's programs, or None where RabbitMQ is not installed.

    RABBITMQ_BIN decides when it is set; a folder without rabbitmq-server in it raises NodeError.
    """
    chosen = os.environ.get("RABBITMQ_BIN")
    if chosen:
        if not (Path(chosen) / "rabbitmq-server").exists():
            raise NodeError(f"RABBITMQ_BIN={chosen} has no rabbitmq-server in it")
        return Path(chosen).resolve()
    # Debian's /usr/sbin/rabbitmq-server switches to another user and drops the environment: not fit for a private node.
    debian = Path("/usr/lib/rabbitmq/bin")
    if (debian / "rabbitmq-server").exists():
        return debian
    found = shutil.which("rabbitmq-server")
    return Path(found).resolve().parent if found else None


def answers_amqp(host: str, port: int, timeout: float = 2) -> bool:
    """Tell whether something on host:port answers the AMQP header, i.e. is ready and not merely listening."""
    try:
        with socket.create_connection((host, port), timeout) as connection:
            connection.settimeout(timeout)
            connection.sendall(AMQP_HEADER)
            return bool(connection.recv(1))
    except OSError:
        return False


def free_port() -> int:
    """Return a TCP port that is free on loopback now.

    It lies below the ports that the system gives to outgoing connections: a node that is down for a moment must find
    its port free again.
    """
    while True:
        port = random.randrange(10_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def _command_line(pid: int) -> str:
    """Return the command line of a process, or nothing if it doesn't exist or is a zombie."""
    if sys.platform == "linux":
        try:
            return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
        except OSError:
            return ""
    ps = ["ps", "-ww", "-o", "command=", "-p", str(pid)]
    return subprocess.run(ps, capture_output=True, text=True, errors="replace").stdout


class Node:
    """One node with its data, logs and process in `folder`.

    port: where it listens for AMQP on 127.0.0.1; a free one by default.
    config: lines for rabbitmq.conf. advanced: an Erlang term for advanced.config. plugins: names to enable.
    home, epmd_port: nodes that share these two can form a cluster.
    """

    def __init__(
        self, folder, name="rabbit", port=None, config="", advanced="[].", plugins=(), home=None, epmd_port=None
    ):
        self.folder = Path(folder).resolve()
        self.home = Path(home).resolve() if home else self.folder
        self.name = f"{name}@localhost"
        self.port = port or free_port()
        self.dist_port = free_port()
        self.epmd_port = epmd_port or free_port()
        self.config, self.advanced, self.plugins = config, advanced, tuple(plugins)
        self.pid = None

    @property
    def url(self) -> str:
        """The AMQP URL of this node."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}/%2F"

    @property
    def running(self) -> bool:
        """Whether the node's process exists."""
        if self.pid is None:
            return False
        try:
            return os.waitpid(self.pid, os.WNOHANG) == (0, 0)
        except ChildProcessError:  # started by an earlier command: by now its number may be another program's
            command = _command_line(self.pid)
            return f"-home {self.home}" in command or "rabbitmq-server" in command

    def start(self) -> "Node":
        """Start the node and return it when it answers AMQP. Its data from an earlier run are kept."""
        self.launch()
        return self.wait_until_ready()

    def launch(self) -> None:
        """Start the process without waiting for it, e.g. because other nodes of its cluster must start as well."""
        self._write_settings()
        # The node must outlive this process, and a Ctrl+C in this terminal is not meant for it.
        with (self.folder / "console.log").open("ab") as log:
            process = subprocess.Popen(
                [self._program("rabbitmq-server")], env=self._environment(), cwd=self.folder,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.pid = process.pid
        process.returncode = 0  # `running` reaps it: without this, Popen would warn that it was left behind
        self._save()

    def wait_until_ready(self, timeout: float = START_TIMEOUT) -> "Node":
        """Return the node when it answers AMQP; NodeError with the end of its log when it does not."""
        deadline = time.monotonic() + timeout
        while not answers_amqp("127.0.0.1", self.port):
            if not self.running or time.monotonic() > deadline:
                log = self.folder / "console.log"
                # The first line says it all for a user; the rest is for a developer who sees the whole exception.
                raise NodeError(f"RabbitMQ did not start, see {log}\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)
        return self

    def stop(self, timeout: float = 60) -> None:
        """Stop the node in good order, as a service manager would. Does nothing when it is not running."""
        self._end(signal.SIGTERM, timeout)

    def kill(self) -> None:
        """End the node at once (SIGKILL), as a power cut would."""
        self._end(signal.SIGKILL, 30)

    def freeze(self) -> None:
        """Stop the node's process where it is (SIGSTOP): its connections stay open, but nobody answers on them."""
        os.killpg(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen node go on, as if nothing had happened."""
        os.killpg(self.pid, signal.SIGCONT)

    def close(self) -> None:
        """End the node for good, together with the port mapper (epmd) that Erlang started for it."""
        self.kill()
        try:
            with socket.create_connection(("127.0.0.1", self.epmd_port), 2) as epmd:
                epmd.sendall(b"\x00\x01k")  # KILL_REQ of the EPMD protocol; refused while nodes are registered
                epmd.recv(2)
        except OSError:
            pass  # gone already

    def ctl(self, *arguments: str, program: str = "rabbitmqctl") -> str:
        """Run rabbitmqctl (or another of RabbitMQ's programs) against the node and return what it prints."""
        command = [self._program(program), "-q", "-n", self.name, *arguments]
        done = subprocess.run(
            command, env=self._environment(), cwd=self.folder, capture_output=True, text=True, timeout=120
        )
        if done.returncode:
            raise NodeError(f"{program} {' '.join(arguments)} failed: {(done.stderr or done.stdout).strip()}")
        return done.stdout

    @classmethod
    def load(cls, folder) -> "Node | None":
        """Return the node that an earlier command started in `folder`, or None."""
        try:
            saved = json.loads((Path(folder) / "node.json").read_text())
        except (OSError, ValueError):
            return None
        node = cls(folder)
        for key, value in saved.items():
            setattr(node, key, value)
        node.home = Path(node.home)
        return node

    def _save(self) -> None:
        keys = ("name", "port", "dist_port", "epmd_port", "config", "advanced", "plugins", "pid")
        saved = {key: getattr(self, key) for key in keys} | {"home": str(self.home)}
        (self.folder / "node.json").write_text(json.dumps(saved))

    def _end(self, signum: int, timeout: float) -> None:
        if not self.running:
            return
        deadline = time.monotonic() + timeout
        # The process leads a group of its own: SIGKILL must reach Erlang's helpers too, or they keep the ports.
        (os.killpg if signum == signal.SIGKILL else os.kill)(self.pid, signum)
        while self.running:
            if time.monotonic() > deadline:
                raise NodeError(f"RabbitMQ (process {self.pid}) did not stop within {timeout} s")
            time.sleep(0.05)

    def _program(self, name: str) -> str:
        programs = find_programs()
        if programs is None:
            raise NodeError("RabbitMQ is not installed")
        return str(programs / name)

    def _write_settings(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        listener = f"listeners.tcp.1 = 127.0.0.1:{self.port}\n"
        (self.folder / "rabbitmq.conf").write_text(listener + self.config)
        (self.folder / "advanced.config").write_text(self.advanced + "\n")
        (self.folder / "enabled_plugins").write_text(f"[{','.join(self.plugins)}].\n")
        cookie = self.home / ".erlang.cookie"
        if not cookie.exists():
            cookie.write_text(os.urandom(16).hex())
            cookie.chmod(0o400)  # Erlang refuses a cookie that others can read

    def _environment(self) -> dict:
        """The node's environment: nothing inherited may point it at another node's files or ports."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RABBITMQ_", "ERL_")) and k != "NOTIFY_SOCKET"}
        folder = str(self.folder)
        return kept | {
            "HOME": str(self.home),
            "RABBITMQ_NODENAME": self.name,
            "RABBITMQ_DIST_PORT": str(self.dist_port),
            "RABBITMQ_BASE": folder,
            "RABBITMQ_MNESIA_BASE": f"{folder}/data",
            "RABBITMQ_LOG_BASE": f"{folder}/log",
            "RABBITMQ_PID_FILE": f"{folder}/pid",
            "RABBITMQ_CONFIG_FILE": f"{folder}/rabbitmq.conf",
            "RABBITMQ_ADVANCED_CONFIG_FILE": f"{folder}/advanced.config",
            "RABBITMQ_GENERATED_CONFIG_DIR": f"{folder}/generated",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}/enabled_plugins",
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            # Erlang's own traffic listens on every interface unless told otherwise.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RUNNING_UNDER_SYSTEMD": "true",  # makes rabbitmq-server become the node instead of a shell around it
            "ERL_EPMD_PORT": str(self.epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
        }  # fmt: skip


def cluster_nodes(folder, count: int = 3, config: str = "", **settings) -> list[Node]:
    """Return nodes that are not started yet. config, settings: as for a Node.

    The first is a RabbitMQ as any other; when it runs, the others join it as they start: then all are a cluster.
    """
    join = (
        "cluster_formation.peer_discovery_backend = classic_config\n"
        "cluster_formation.classic_config.nodes.1 = rabbit1@localhost\n"
    )
    settings |= {"home": folder, "epmd_port": free_port()}
    first, *others = [f"rabbit{number}" for number in range(1, count + 1)]
    return [
        Node(Path(folder) / first, first, config=config, **settings),
        *(Node(Path(folder) / name, name, config=config + join, **settings) for name in others),
    ]


def main() -> int:
    """`rabbitmq_node.py start|stop FOLDER`, for trying a node by hand."""
    if len(sys.argv) != 3 or sys.argv[1] not in ("start", "stop"):
        print(f"usage: {Path(sys.argv[0]).name} start|stop FOLDER", file=sys.stderr)
        return 2
    command, folder = sys.argv[1:]
    try:
        node = Node.load(folder)
        if command == "start":
            node = node or Node(folder)
            print((node if node.running else node.start()).url)
        elif node:
            node.stop()
            node.close()
    except NodeError as error:
        print(f" [!] {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
