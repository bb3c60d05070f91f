"""docker-compose.yml and docker-compose.cluster.yml, run for real: needs a Docker engine, and Compose 2.24 or later.

Every run is a Compose project of its own, on free ports, and is taken down with its volumes and images at the end.
"""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pika
import pytest
from conftest import DONE, ROOT
from processes import wait_until

pytestmark = pytest.mark.docker

FILES = ["docker-compose.yml", "docker-compose.cluster.yml"]
USER, PASSWORD = "tester", "compose-test-password"

Compose = Callable[..., str]


def run_compose(project: str, files: list[Path], *arguments: str) -> str:
    """Run one `docker compose` command and return what it printed on stdout."""
    # What the user has set must not reach the tests: variables are left out, and these win over a file .env.
    settings = {name: value for name, value in os.environ.items() if not name.startswith(("COMPOSE_", "RABBITMQ_"))}
    settings |= {"RABBITMQ_DEFAULT_USER": USER, "RABBITMQ_DEFAULT_PASS": PASSWORD, "RABBITMQ_ERLANG_COOKIE": "testers"}
    settings |= {"AMQP_PORT": "0", "MANAGEMENT_PORT": "0", "PROMETHEUS_PORT": "0"}  # 0: any port that is free
    options = [option for file in files for option in ("-f", str(file))]
    command = ["docker", "compose", "--project-name", project, "--project-directory", str(ROOT), *options, *arguments]
    done = subprocess.run(command, env=settings, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def running(project: str, *files: Path) -> Iterator[Compose]:
    """Build the image, hand out a function that runs `docker compose` on these files, and clean up behind it."""
    compose = partial(run_compose, f"task-queue-test-{os.getpid()}-{project}", list(files))
    try:
        compose("--profile", "*", "build", "--quiet")
        yield compose
    finally:
        compose("--profile", "*", "down", "--volumes", "--rmi", "local", "--timeout", "0")


@pytest.fixture(scope="module")
def compose() -> Iterator[Compose]:
    for command in running("single", ROOT / "docker-compose.yml"):
        command("up", "-d", "--wait", "rabbitmq")
        yield command


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Compose]:
    # Everything talks inside of the containers here, so the ports that the file publishes needn't be free.
    without_ports = tmp_path / "without-ports.yml"
    without_ports.write_text("services:\n" + "".join(f"  rabbit{n}: {{ports: !reset []}}\n" for n in (1, 2, 3)))
    yield from running("cluster", ROOT / "docker-compose.cluster.yml", without_ports)


def wait_for_logs(compose: Compose, text: str, count: int = 1) -> None:
    """Return once `text` is in the workers' lines `count` times."""
    wait_until(lambda: compose("logs", "--no-color", "worker").count(text) >= count, f"{count} times {text!r}", 60)


def start_workers(compose: Compose, count: int) -> None:
    """Start so many workers afresh (their logs too), and wait until all of them are ready for tasks."""
    compose("--profile", "workers", "up", "-d", "--force-recreate", "--no-deps", "--scale", f"worker={count}", "worker")
    wait_for_logs(compose, "[*] Waiting for messages.", count)


def send(compose: Compose, task: str) -> None:
    assert compose("run", "--rm", "new_task", *task.split()).splitlines()[-1] == f" [x] Sent {task!r}"


def connect(compose: Compose, user: str, password: str) -> pika.BlockingConnection:
    """Connect to the published port, as a script outside of the containers does."""
    port = compose("port", "rabbitmq", "5672").strip().rpartition(":")[2]
    return pika.BlockingConnection(pika.URLParameters(f"amqp://{user}:{password}@localhost:{port}/%2F"))


@pytest.mark.parametrize("file", FILES)
def test_every_port_is_published_on_loopback_only(file: str) -> None:
    services = json.loads(run_compose("task-queue-test", [ROOT / file], "config", "--format", "json"))["services"]
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports
    assert {port.get("host_ip") for port in ports} == {"127.0.0.1"}


def test_user_and_password_come_from_the_environment(compose: Compose) -> None:
    connect(compose, USER, PASSWORD).close()
    with pytest.raises(pika.exceptions.ProbableAuthenticationError):
        connect(compose, "guest", "guest")


def test_a_worker_that_is_stopped_finishes_its_task_first(compose: Compose) -> None:
    start_workers(compose, 1)
    send(compose, "Long.....")
    wait_for_logs(compose, "[x] Received 'Long.....'")
    assert DONE not in compose("logs", "worker")
    processes = compose("top")
    assert "worker.py" in processes
    assert PASSWORD not in processes
    compose("stop", "worker")
    assert DONE in compose("logs", "worker")
    assert compose("ps", "-a", "--format", "{{.ExitCode}}", "worker").split() == ["0"]
    connection = connect(compose, USER, PASSWORD)
    assert connection.channel().queue_declare("task_queue", passive=True).method.message_count == 0
    connection.close()


def test_tasks_survive_a_killed_rabbitmq_and_a_new_container(compose: Compose) -> None:
    compose("stop", "worker")
    send(compose, "Survivor")
    compose("kill", "rabbitmq")
    assert compose("ps", "-a", "--format", "{{.ExitCode}}", "rabbitmq").split() == ["137"]
    compose("rm", "--force", "rabbitmq")
    compose("up", "-d", "--wait", "rabbitmq")
    start_workers(compose, 1)
    wait_for_logs(compose, "[x] Received 'Survivor'")
    wait_for_logs(compose, DONE)


def test_a_cluster_forms_by_itself_and_survives_the_loss_of_the_leader(cluster: Compose) -> None:
    cluster("up", "-d", "--wait")
    send(cluster, "First")
    wait_for_logs(cluster, DONE)
    list_queues = "gosu rabbitmq rabbitmqctl -q --formatter json list_queues name members leader"
    queues = json.loads(cluster("exec", "-T", "rabbit1", *list_queues.split()))
    (queue,) = [queue for queue in queues if queue["name"] == "task_queue"]
    assert sorted(queue["members"]) == ["rabbit@rabbit1", "rabbit@rabbit2", "rabbit@rabbit3"]

    leader = queue["leader"].removeprefix("rabbit@")
    cluster("kill", leader)
    assert cluster("ps", "-a", "--status", "exited", "--services").split() == [leader]
    send(cluster, "Second")
    wait_for_logs(cluster, "[x] Received 'Second'")
    wait_for_logs(cluster, DONE, 2)
