"""Finds or starts the RabbitMQ that the demo plays on, and stops what it started.

    .venv/bin/python tools/rabbitmq.py start       find a RabbitMQ that runs, or start one
    .venv/bin/python tools/rabbitmq.py stop        stop what was started here, and nothing else
    .venv/bin/python tools/rabbitmq.py kill        end it at once, as a power cut would
    .venv/bin/python tools/rabbitmq.py queues      show its queues
    .venv/bin/python tools/rabbitmq.py programs    see that RabbitMQ's programs are installed, for the tests

What was started is written down in .rabbitmq/, and its data are kept there, or in the container's volume.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import apt
from rabbitmq_node import Node, NodeError, answers_amqp, find_programs, free_port

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for task_queue.py

# The private node with its data, and the record of a container: whatever the demo starts is written down in here.
FOLDER = ROOT / ".rabbitmq"

# The port that RabbitMQ has everywhere; what listens on it needs no AMQP_URL.
PORT = 5672

# How long Docker may take for a command (stopping a container takes it 10 s when RabbitMQ hangs), and how long a
# killed container may take to answer again.
DOCKER_TIMEOUT, RESTART_TIMEOUT = 40, 60

# For watching it: the management UI, and the metrics for Prometheus, on the ports that they have everywhere.
WATCH_PORTS = {"management": 15672, "prometheus": 15692}

# RabbitMQ tells how many tasks a queue holds as of five seconds ago. Who follows the tutorial wants to see what is.
FRESH_FIGURES = "[{rabbit, [{quorum_tick_interval, 1000}]}]."

OPTIONS = (
    "No RabbitMQ, and no way to start one here. Do one of these and try again: set AMQP_URL to a RabbitMQ that runs; "
    "start Docker; install RabbitMQ (Debian, Ubuntu: sudo apt-get install rabbitmq-server; macOS: brew install "
    "rabbitmq), or name the folder of its programs in RABBITMQ_BIN"
)


class Container:
    """RabbitMQ as the service `rabbitmq` of docker-compose.yml, started by us. It has what the demo uses of a Node."""

    record = FOLDER / "container.json"

    def __init__(self, identity: str, port: int):
        self.identity, self.port = identity, port

    @property
    def running(self) -> bool:
        """Whether the container runs."""
        return bool(_docker("ps", "-q", "--no-trunc", "--filter", f"id={self.identity}").stdout.strip())

    def kill(self) -> None:
        """End RabbitMQ at once (SIGKILL), as a power cut would."""
        _docker("kill", self.identity)

    def start(self) -> "Container":
        """Start the container again, with its data, and return it when it answers AMQP."""
        _docker("start", self.identity)
        return self.wait_until_ready()

    def wait_until_ready(self) -> "Container":
        """Return the container when it answers AMQP."""
        deadline = time.monotonic() + RESTART_TIMEOUT
        while not answers_amqp("127.0.0.1", self.port):
            if time.monotonic() > deadline:
                raise NodeError(f"RabbitMQ did not come back in its container, see: docker logs {self.identity[:12]}")
            time.sleep(0.1)
        return self

    def ctl(self, *arguments: str) -> str:
        """Run rabbitmqctl in the container and return what it prints."""
        done = _docker("exec", "--user", "rabbitmq", self.identity, "rabbitmqctl", "-q", *arguments)
        if done.returncode:
            raise NodeError(f"rabbitmqctl {arguments[0]} failed: {(done.stderr or done.stdout).strip()}")
        return done.stdout

    def stop(self) -> None:
        """Stop the container in good order; it keeps its data."""
        _docker("stop", self.identity)

    def save(self) -> "Container":
        """Write down that this container is ours."""
        FOLDER.mkdir(exist_ok=True)
        self.record.write_text(json.dumps({"identity": self.identity, "port": self.port}))
        return self

    @classmethod
    def load(cls) -> "Container | None":
        """Return the container that an earlier command started, or None."""
        try:
            return cls(**json.loads(cls.record.read_text()))
        except (OSError, ValueError, TypeError):
            return None


def find() -> Node | Container | None:
    """Find a RabbitMQ that runs, or start one. Return it if it was started here, now or earlier, else None.

    Sets AMQP_URL where the two scripts need it. NodeError if there is none, or if AMQP_URL's one doesn't let us in.
    """
    if os.environ.get("AMQP_URL"):
        connect("demo").close()
        say("using the one that AMQP_URL names")
        return None
    port = answering() or resumed() or start_container() or start_node() or start_installed()
    if port is None:
        raise NodeError(OPTIONS)
    server = next((server for server in started() if server.port == port), None)
    if port != PORT:
        os.environ["AMQP_URL"] = f"amqp://guest:guest@127.0.0.1:{port}/%2F"
        say(f"not on its usual port, so in every shell: export AMQP_URL={os.environ['AMQP_URL']}")
    return server


def connect(name: str):
    """Return a pika connection to the RabbitMQ that the two scripts would use; NodeError if it doesn't let us in."""
    from task_queue import address  # here, because `stop` must work without a .venv

    try:
        return address.connect(name)
    except (address.Unreachable, address.Refused) as problem:
        raise NodeError(str(problem)) from None


# The ways to a RabbitMQ, in the order in which they are tried. Each returns the port, or None if it leads nowhere.


def answering() -> int | None:
    """Use what runs on RabbitMQ's usual port, whoever started it."""
    if not answers_amqp("localhost", PORT):
        return None
    say(f"using the one that answers on localhost:{PORT}")
    return PORT


def resumed() -> int | None:
    """Use what was started here earlier, if it is on another port, or not ready yet."""
    for server in started():
        server.wait_until_ready()
        say(f"using the one started earlier on localhost:{server.port}")
        return server.port
    return None


def start_container() -> int | None:
    """Start the service of docker-compose.yml, given a Docker engine."""
    if not _docker("version", "--format", "{{.Server.Version}}").stdout.strip():
        return None  # no docker at all, or a client without an engine
    say("starting it with Docker (docker compose up -d --wait rabbitmq)")
    theirs = _compose("ps", "-q", "rabbitmq").stdout.strip()  # it runs already: somebody has just started it
    try:
        up = _compose("up", "-d", "--wait", "--quiet-pull", "rabbitmq", timeout=None)
    finally:
        container = _composed()
        if container and not theirs:
            container.save()
    if up.returncode == 0 and container:
        say(f"ready on localhost:{container.port}")
        return container.port
    say(f"Docker can't: {(up.stderr.strip().splitlines() or ['no reason given'])[-1].strip()}")
    if container and not theirs:
        _forget(container)
    return None


def _composed() -> Container | None:
    identity = _compose("ps", "-a", "-q", "rabbitmq").stdout.strip()
    address = _compose("port", "rabbitmq", str(PORT)).stdout.strip()
    return Container(identity, int(address.rpartition(":")[2] or PORT)) if identity else None


def start_node() -> int | None:
    """Start a private node with its data in .rabbitmq/, where RabbitMQ is installed."""
    if find_programs() is None:
        return None
    node = Node.load(FOLDER) or Node(FOLDER)
    node.port = _usual_or_free(PORT)
    ports = {what: _usual_or_free(usual) for what, usual in WATCH_PORTS.items()}
    node.config = "".join(f"{what}.tcp.ip = 127.0.0.1\n{what}.tcp.port = {port}\n" for what, port in ports.items())
    node.plugins, node.advanced = [f"rabbitmq_{what}" for what in ports], FRESH_FIGURES
    say(f"starting a private node, with its data in {FOLDER.name}/")
    began = time.monotonic()
    try:
        node.start()
    except NodeError as error:
        why = str(error).splitlines()[0]
        raise NodeError(f"{why}; if it can't read the data of another version, make clean deletes them") from None
    ready = f"ready on localhost:{node.port} after {time.monotonic() - began:.0f} s"
    say(f"{ready}, with its management UI on http://localhost:{ports['management']}")
    return node.port


def start_installed() -> int | None:
    """Install RabbitMQ where apt may be used. Its service runs then, or does not, as for instance in a container."""
    return (answering() or start_node()) if apt.install("rabbitmq-server") else None


def _usual_or_free(port: int) -> int:
    return port if _is_free(port) else free_port()


def _is_free(port: int) -> bool:
    # Two questions, as macOS lets a second program bind 127.0.0.1 where another listens on all addresses.
    try:
        with socket.create_connection(("localhost", port), 1):
            return False
    except OSError:
        pass
    try:
        with socket.create_server(("127.0.0.1", port)):
            return True
    except OSError:
        return False


def started() -> list[Node | Container]:
    """Return what was started here and still runs."""
    return [server for server in _recorded() if server.running]


def stop() -> None:
    """Stop the node or the container that was started here; both keep their data."""
    if not started():
        say("nothing to stop, as none was started here")
    for server in started():
        say(f"stopping the {type(server).__name__.lower()} on localhost:{server.port}")
    for server in _recorded():
        _forget(server)


def kill() -> None:
    """Kill the node or the container that was started here; both keep their data."""
    for server in _ours():
        server.kill()
        say(f"killed the {type(server).__name__.lower()} on localhost:{server.port}")


def queues() -> None:
    """Show the queues of the RabbitMQ that was started here."""
    for server in _ours():
        listed = server.ctl("list_queues", "name", "messages_ready", "messages_unacknowledged", "consumers")
        rows = [line.split("\t") for line in listed.splitlines()]
        # Under their headings: rabbitmqctl puts a tab between them, and leaves it at that.
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(map(str.ljust, row, widths)).rstrip())


def _ours() -> list[Node | Container]:
    if not started():
        raise NodeError("no RabbitMQ that was started here is running: use your own one's commands, or make rabbitmq")
    return started()


def _recorded() -> list[Node | Container]:
    return [server for server in (Node.load(FOLDER), Container.load()) if server]


def _forget(server: Node | Container) -> None:
    """Stop it and delete the record that it is ours, so that the next one gets fresh ports."""
    try:
        server.stop()
    finally:
        if isinstance(server, Node):
            server.close()
            (FOLDER / "node.json").unlink()
        else:
            server.record.unlink()


def see_programs() -> None:
    """See that RabbitMQ's programs are installed, through apt where it may be used; NodeError if they are not."""
    if find_programs() is None and not (apt.install("rabbitmq-server") and find_programs()):
        raise NodeError(
            "RabbitMQ is not installed, and this can't install it. Install it (Debian, Ubuntu: sudo apt-get install "
            "rabbitmq-server; macOS: brew install rabbitmq) or name the folder of its programs in RABBITMQ_BIN"
        )


def say(what: str) -> None:
    """Print one line on what is done about RabbitMQ."""
    print(f"RabbitMQ: {what}", flush=True)


def _compose(*arguments: str, timeout: float | None = DOCKER_TIMEOUT) -> subprocess.CompletedProcess:
    return _docker("compose", *arguments, timeout=timeout)


def _docker(*arguments: str, timeout: float | None = DOCKER_TIMEOUT) -> subprocess.CompletedProcess:
    """Run docker in the project's folder; a failure, also a missing docker, shows in returncode and stderr."""
    command = ["docker", *arguments]
    try:
        return subprocess.run(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def main() -> int:
    """Do what the command line says."""
    commands = {"start": find, "stop": stop, "kill": kill, "queues": queues, "programs": see_programs}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        commands[sys.argv[1]]()
    except NodeError as error:
        print(f" [!] {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
