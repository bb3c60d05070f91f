"""Finds or starts the RabbitMQ that the demo plays on, and stops what it started. The Makefile lists what it can do."""

import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial, partialmethod

from node import Node, NodeError, answers_amqp, find_programs
from processes import ROOT

FOLDER = ROOT / ".rabbitmq"  # where the private node keeps everything
# The ports that RabbitMQ has everywhere: for AMQP, and for watching it (management UI, metrics for Prometheus).
PORT = 5672
WATCH_PORTS = {"management": 15672, "prometheus": 15692}
# Prints one line on what is done about RabbitMQ.
say = partial(print, "RabbitMQ:", flush=True)


class Container:
    """RabbitMQ as the service of docker-compose.yml, with what is used of a Node here."""

    def compose(self, *arguments: str) -> str:
        """Run docker compose, which shows what goes wrong, and return what it prints; NodeError where it fails."""
        # In a project of its own: what `docker compose up` starts in this folder is left alone.
        command = ["docker", "compose", "-p", "task-queue-demo", *arguments]
        done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise NodeError(f"this failed: {' '.join(command)}")
        return done.stdout

    @property
    def running(self) -> bool:
        return docker_answers() and bool(self.compose("ps", "-q", "rabbitmq"))

    start = partialmethod(compose, "up", "-d", "--wait", "rabbitmq")
    stop = partialmethod(compose, "down")
    kill = partialmethod(compose, "kill", "rabbitmq")
    ctl = partialmethod(compose, "exec", "-T", "--user", "rabbitmq", "rabbitmq", "rabbitmqctl", "-q")


def docker_answers() -> bool:
    """Tell whether there is an engine behind the docker command, and Compose."""
    command = ["docker", "compose", "ls"]
    return shutil.which("docker") is not None and not subprocess.run(command, capture_output=True).returncode


def find() -> Node | Container | None:
    """Find a RabbitMQ that runs, or start one. Return it if it was started here, now or earlier, else None."""
    if os.environ.get("AMQP_URL"):
        say("using the one that AMQP_URL names")
        return None
    server = started()
    if answers_amqp("localhost", PORT):
        say(f"using the one that answers on localhost:{PORT}")
        return server
    if server:
        return ready(server)
    if docker_answers():
        say("starting it with Docker (docker compose up)")
        with suppress(NodeError):
            return ready(Container())
        say("Docker failed; going on without it")
    see_programs()
    if answers_amqp("localhost", PORT):  # a package that has just been installed may start its service
        return find()
    say(f"starting a private node, with its data in {FOLDER.name}/")
    return ready(private_node())


def ready(server: Node | Container) -> Node | Container:
    """Start it, and return it when it answers."""
    began = time.monotonic()
    server.start()
    after = f"ready on localhost:{PORT} after {time.monotonic() - began:.0f} s"
    say(f"{after}, with its management UI on http://localhost:{WATCH_PORTS['management']}")
    return server


def started(otherwise: str = "") -> Node | Container | None:
    """Return what was started here and still runs. If nothing does, NodeError that names another command, if any."""
    server = next((server for server in (private_node(), Container()) if server.running), None)
    if otherwise and not server:
        raise NodeError(f"make's RabbitMQ doesn't run (make rabbitmq starts it). For your own one: sudo {otherwise}")
    return server


def private_node() -> Node:
    """Return the private node as an earlier command left it, or a new one that is not started yet."""
    config = "".join(f"{what}.tcp.ip = 127.0.0.1\n{what}.tcp.port = {port}\n" for what, port in WATCH_PORTS.items())
    plugins = [f"rabbitmq_{what}" for what in WATCH_PORTS]
    # RabbitMQ tells how many tasks a queue holds as of five seconds ago. Who follows the tutorial wants to see what is.
    fresh_figures = "[{rabbit, [{quorum_tick_interval, 1000}]}]."
    return Node(FOLDER, port=PORT, config=config, advanced=fresh_figures, plugins=plugins)


def see_programs() -> None:
    """See that RabbitMQ's programs are installed, through apt where it may be used; NodeError if they are not."""
    try:
        find_programs()
    except NodeError:
        install = [ROOT / "tools" / "apt.sh", "rabbitmq-server", "procps"]  # procps, for ps
        if os.environ.get("RABBITMQ_BIN") or subprocess.call(install):
            raise


def stop() -> None:
    """Stop what was started here; its data stay."""
    if server := started():
        say(f"stopping the {type(server).__name__.lower()} on localhost:{PORT}")
        server.stop()
    else:
        say("nothing to stop, as none was started here")


def kill() -> None:
    """Kill what was started here; its data stay."""
    server = started("systemctl kill --signal=SIGKILL rabbitmq-server")
    server.kill()
    say(f"killed the {type(server).__name__.lower()} on localhost:{PORT}")


def queues() -> None:
    """Show the queues of what was started here, in columns."""
    command = ["list_queues", "name", "messages_ready", "messages_unacknowledged", "consumers"]
    server = started(f"rabbitmqctl {' '.join(command)}")
    rows = [line.split("\t") for line in server.ctl(*command).splitlines()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())


if __name__ == "__main__":
    try:
        {"start": find, "queues": queues, "kill": kill, "stop": stop, "programs": see_programs}[sys.argv[1]]()
    except (NodeError, AssertionError) as problem:
        sys.exit(f" [!] {str(problem).splitlines()[0]}")
    except KeyboardInterrupt:
        sys.exit(130)
