"""Finds or starts the RabbitMQ that the demo plays on, and stops what it started.

.venv/bin/python tools/rabbitmq.py start       find a RabbitMQ that runs, or start one
.venv/bin/python tools/rabbitmq.py queues      show its queues
.venv/bin/python tools/rabbitmq.py kill        end it at once, as a power cut would
.venv/bin/python tools/rabbitmq.py stop        stop what was started here, and nothing else
.venv/bin/python tools/rabbitmq.py clean       stop it, and delete what Docker keeps of it
.venv/bin/python tools/rabbitmq.py programs    see that RabbitMQ's programs are installed, for the tests
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

from node import Node, NodeError, answers_amqp, find_programs, free_port

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for task_queue

# The private node keeps everything here.
FOLDER = ROOT / ".rabbitmq"

# The ports that RabbitMQ has everywhere: for AMQP, and for watching it (management UI, metrics for Prometheus).
PORT = 5672
WATCH_PORTS = {"management": 15672, "prometheus": 15692}

# RabbitMQ tells how many tasks a queue holds as of five seconds ago. Who follows the tutorial wants to see what is.
FRESH_FIGURES = "[{rabbit, [{quorum_tick_interval, 1000}]}]."

COLUMNS = ("name", "messages_ready", "messages_unacknowledged", "consumers")


class Container:
    """RabbitMQ as the service of docker-compose.yml, with what is used of a Node here.

    It has a Compose project of its own: what `docker compose up` starts in this folder is left alone.
    """

    port = PORT
    project = re.sub("[^a-z0-9]+", "-", f"demo{ROOT}".lower())

    @property
    def running(self) -> bool:
        """Whether the container runs."""
        with suppress(NodeError):  # no Docker
            return bool(self.compose("ps", "-q", "rabbitmq"))
        return False

    def start(self) -> "Container":
        """Start the container and return it when it is ready. Its data from an earlier run are kept."""
        self.compose("up", "-d", "--wait", "--quiet-pull", "rabbitmq", timeout=None)
        return self

    wait_until_ready = start  # one that runs already is not started again

    def stop(self) -> None:
        """Stop the container in good order; its data stay in a volume."""
        self.compose("down")

    def kill(self) -> None:
        """End RabbitMQ at once (SIGKILL), as a power cut would."""
        self.compose("kill", "rabbitmq")

    def ctl(self, *arguments: str) -> str:
        """Run rabbitmqctl in the container and return what it prints."""
        return self.compose("exec", "-T", "--user", "rabbitmq", "rabbitmq", "rabbitmqctl", "-q", *arguments)

    def compose(self, *arguments: str, timeout: float | None = 40) -> str:
        """Run docker compose and return what it prints; NodeError where it fails, or is missing."""
        command = ["docker", "compose", "-p", self.project, *arguments]
        settings = {**os.environ, "AMQP_PORT": str(self.port)}
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=settings,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NodeError(f"Docker can't: {error}") from None
        if done.returncode:
            raise NodeError(f"Docker can't: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}")
        return done.stdout


def find() -> Node | Container | None:
    """Find a RabbitMQ that runs, or start one. Return it if it was started here, now or earlier, else None.

    Sets AMQP_URL where the two scripts need it. NodeError if there is none, or if AMQP_URL's one doesn't let us in.
    """
    if os.environ.get("AMQP_URL"):
        connect("demo").close()
        say("using the one that AMQP_URL names")
        return None
    server = started()
    if answers_amqp("localhost", PORT):
        say(f"using the one that answers on localhost:{PORT}")
        return server if server and server.port == PORT else None
    if server:
        server.wait_until_ready()
        say(f"using the one started earlier on localhost:{server.port}")
    elif not (server := start_container()):
        see_programs()
        if answers_amqp("localhost", PORT):  # a package that has just been installed may start its service
            return find()
        server = start_node()
    if server.port != PORT:
        os.environ["AMQP_URL"] = server.url
        say(f"not on its usual port, so in every shell: export AMQP_URL={server.url}")
    return server


def connect(name: str):
    """Return a pika connection to the RabbitMQ that the two scripts would use; NodeError if it doesn't let us in."""
    from task_queue import address  # here, because `stop` must work without a .venv

    try:
        return address.connect(name)
    except (address.Unreachable, address.Refused) as problem:
        raise NodeError(str(problem)) from None


def started() -> Node | Container | None:
    """Return what was started here and still runs."""
    return next((server for server in (Node.load(FOLDER), Container()) if server and server.running), None)


def start_container() -> Container | None:
    """Start the container, where a Docker engine runs and can do it."""
    if not shutil.which("docker") or subprocess.run(["docker", "version"], capture_output=True).returncode:
        return None
    say("starting it with Docker (docker compose up)")
    container = Container()
    try:
        container.start()
        say(f"ready on localhost:{container.port}")
        return container
    except NodeError as problem:
        say(str(problem))
    with suppress(NodeError):  # what there is of it
        container.stop()
    return None


def start_node() -> Node:
    """Start a private node."""
    node = Node.load(FOLDER) or Node(FOLDER)
    node.port = free_port(PORT)
    ports = {what: free_port(usual) for what, usual in WATCH_PORTS.items()}
    node.config = "".join(f"{what}.tcp.ip = 127.0.0.1\n{what}.tcp.port = {port}\n" for what, port in ports.items())
    node.plugins, node.advanced = [f"rabbitmq_{what}" for what in ports], FRESH_FIGURES
    say(f"starting a private node, with its data in {FOLDER.name}/")
    began = time.monotonic()
    try:
        node.start()
    except NodeError as problem:
        why = str(problem).splitlines()[0]
        raise NodeError(f"{why}; if it can't read the data of another version, make clean deletes them") from None
    ready = f"ready on localhost:{node.port} after {time.monotonic() - began:.0f} s"
    say(f"{ready}, with its management UI on http://localhost:{ports['management']}")
    return node


def stop() -> None:
    """Stop the node or the container that was started here; both keep their data."""
    if server := started():
        say(f"stopping the {type(server).__name__.lower()} on localhost:{server.port}")
        server.stop()
    else:
        say("nothing to stop, as none was started here")
    if node := Node.load(FOLDER):
        node.close()  # with the port mapper of one that was killed


def clean() -> None:
    """Stop it, and delete what Docker keeps of it: container, network, and the volume with the data."""
    stop()
    with suppress(NodeError):  # no Docker
        Container().compose("down", "--volumes")


def kill() -> None:
    """Kill the node or the container that was started here; both keep their data."""
    server = started()
    if not server:
        raise NodeError(
            "this kills only a RabbitMQ that make started, and none of these runs. Your own one: sudo systemctl kill "
            "--signal=SIGKILL rabbitmq-server, or docker kill. To get one of make: stop yours, then make rabbitmq"
        )
    server.kill()
    say(f"killed the {type(server).__name__.lower()} on localhost:{server.port}")


def queues() -> None:
    """Show the queues of the RabbitMQ that was started here, or else of another one on this machine."""
    server = started()
    rows = as_rows(server.ctl("list_queues", *COLUMNS)) if server else of_another()
    # Under their headings: rabbitmqctl puts a tab between them, and leaves it at that.
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())


def as_rows(listed: str) -> list[list[str]]:
    """Return what `rabbitmqctl list_queues` prints as rows of cells."""
    return [line.split("\t") for line in listed.splitlines()]


def of_another() -> list[list[str]]:
    """Return the same from the installed rabbitmqctl, as this user or root, or else from the management plugin."""
    command = ["rabbitmqctl", "-q", "list_queues", *COLUMNS]
    if not os.environ.get("AMQP_URL"):  # which may name another machine's
        for sudo in ([], ["sudo", "-n"]):
            with suppress(OSError, subprocess.CalledProcessError):
                return as_rows(subprocess.run([*sudo, *command], capture_output=True, text=True, check=True).stdout)
        guest = {"Authorization": "Basic Z3Vlc3Q6Z3Vlc3Q="}  # guest:guest, the only user that a new RabbitMQ has
        request = urllib.request.Request("http://localhost:15672/api/queues", headers=guest)
        with suppress(OSError, ValueError), urllib.request.urlopen(request, timeout=5) as answer:
            return [COLUMNS, *([str(queue.get(column, 0)) for column in COLUMNS] for queue in json.load(answer))]
    raise NodeError(f"no RabbitMQ that make started runs. Where your own one does, type: sudo {' '.join(command)}")


def see_programs() -> None:
    """See that RabbitMQ's programs are installed, through apt where it may be used; NodeError if they are not."""
    try:
        find_programs()
    except NodeError:
        if os.environ.get("RABBITMQ_BIN") or not install("rabbitmq-server"):
            raise


def install(package: str) -> bool:
    """Install a package on Debian and Ubuntu. False where that can't be done, or fails."""
    return subprocess.call([ROOT / "tools" / "apt.sh", package]) == 0


def say(what: str) -> None:
    """Print one line on what is done about RabbitMQ."""
    print(f"RabbitMQ: {what}", flush=True)


def main() -> int:
    """Do what the command line says."""
    commands = {"start": find, "queues": queues, "kill": kill, "stop": stop, "clean": clean, "programs": see_programs}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        commands[sys.argv[1]]()
    except NodeError as problem:
        print(f" [!] {str(problem).splitlines()[0]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
