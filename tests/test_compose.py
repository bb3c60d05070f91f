"""docker-compose.yml, run for real by a Docker engine with Compose 2.24 or later. The page's blocks run both files."""

import json
import os
import subprocess

import pika
import pytest
from conftest import DONE, ROOT
from processes import wait_until

pytestmark = pytest.mark.docker

PROJECT = f"task-queue-test-{os.getpid()}"
USER, PASSWORD = "tester", "compose-test-password"


def compose(*arguments: str, file: str = "docker-compose.yml") -> str:
    """Run one `docker compose` command and return what it printed on stdout."""
    # What the user has set must not reach the tests: variables are left out, and these win over a file .env.
    settings = {name: value for name, value in os.environ.items() if not name.startswith(("COMPOSE_", "RABBITMQ_"))}
    settings |= {"RABBITMQ_DEFAULT_USER": USER, "RABBITMQ_DEFAULT_PASS": PASSWORD, "RABBITMQ_ERLANG_COOKIE": "testers"}
    settings |= {"AMQP_PORT": "0", "MANAGEMENT_PORT": "0", "PROMETHEUS_PORT": "0"}  # 0: any port that is free
    command = ["docker", "compose", "--project-name", PROJECT, "-f", file, *arguments]
    streams = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    done = subprocess.run(command, cwd=ROOT, env=settings, **streams)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def rabbitmq():
    """RabbitMQ in a container."""
    try:
        compose("--profile", "*", "build", "--quiet")
        compose("up", "-d", "--wait", "rabbitmq")
        yield
    finally:
        compose("--profile", "*", "down", "--volumes", "--rmi", "local", "--timeout", "0")


def wait_for_log(text: str) -> None:
    """Return once `text` is in the worker's lines."""
    wait_until(lambda: text in compose("logs", "--no-color", "worker"), f"the worker prints {text!r}", within=60)


def start_a_worker() -> None:
    """Start a worker afresh (its log too), and wait until it is ready for tasks."""
    compose("--profile", "workers", "up", "-d", "--force-recreate", "--no-deps", "worker")
    wait_for_log("[*] Waiting for messages.")


def send(task: str) -> None:
    assert compose("run", "--rm", "new_task", task).splitlines()[-1] == f" [x] Sent {task!r}"


def connect(login: str) -> pika.BlockingConnection:
    """Connect to the published port, as a script outside of the containers does."""
    port = compose("port", "rabbitmq", "5672").strip().rpartition(":")[2]
    return pika.BlockingConnection(pika.URLParameters(f"amqp://{login}@localhost:{port}/%2F"))


@pytest.mark.parametrize("file", ["docker-compose.yml", "docker-compose.cluster.yml"])
def test_every_port_is_published_on_loopback_only(file):
    services = json.loads(compose("config", "--format", "json", file=file))["services"]
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports
    assert {port.get("host_ip") for port in ports} == {"127.0.0.1"}


def test_user_and_password_come_from_the_environment(rabbitmq):
    connect(f"{USER}:{PASSWORD}").close()
    with pytest.raises(pika.exceptions.ProbableAuthenticationError):
        connect("guest:guest")


def test_what_rabbitmq_tells_of_a_queue_is_a_second_old_at_most(rabbitmq):
    told = "application:get_env(rabbit, quorum_tick_interval)."
    assert compose("exec", "-T", "--user", "rabbitmq", "rabbitmq", "rabbitmqctl", "-q", "eval", told) == "{ok,1000}\n"


def test_a_worker_that_is_stopped_finishes_its_task_first(rabbitmq):
    start_a_worker()
    send("Long.....")
    wait_for_log("[x] Received 'Long.....'")
    assert DONE not in compose("logs", "worker")
    processes = compose("top")
    assert "worker.py" in processes
    assert PASSWORD not in processes
    compose("stop", "worker")
    assert DONE in compose("logs", "worker")
    assert compose("ps", "-a", "--format", "{{.ExitCode}}", "worker").split() == ["0"]
    with connect(f"{USER}:{PASSWORD}") as connection:
        assert connection.channel().queue_declare("task_queue", passive=True).method.message_count == 0


def test_tasks_survive_a_killed_rabbitmq_and_a_new_container(rabbitmq):
    send("Survivor")
    compose("kill", "rabbitmq")
    assert compose("ps", "-a", "--format", "{{.ExitCode}}", "rabbitmq").split() == ["137"]
    compose("rm", "--force", "rabbitmq")
    compose("up", "-d", "--wait", "rabbitmq")
    start_a_worker()
    wait_for_log("[x] Received 'Survivor'")
    wait_for_log(DONE)
