"""Chaos in short: every kind of fault in one run, and the proof that a run finds what is lost."""

import re
import shutil
import subprocess

import pytest
from conftest import ROOT
from processes import Script

# A run that takes longer than this ends by itself, as a failure.
LIMIT = 120


class Chaos:
    """Runs tools/chaos.py, with its files in a folder of the test."""

    def __init__(self, folder):
        self.folder = folder
        self.script = None

    def start(self, *arguments) -> Script:
        words = [str(word) for word in ("tools/chaos.py", "--limit", LIMIT, *arguments)]
        files = [("TMPDIR", str(self.folder))]
        self.script = Script(*words, url="amqp://not-used.invalid", environment=files)
        return self.script

    def run(self, *arguments) -> int:
        return self.start(*arguments).ends(LIMIT + 30)

    def faults(self) -> dict:
        """Return the table that it printed: kind of fault -> how many took place."""
        rows = [re.match(r"([a-z]+-[a-z]+) +(\d+)   ", line) for line in self.script.output()]
        return {row[1]: int(row[2]) for row in rows if row}

    def processes(self) -> list[str]:
        """Return the command lines of what it started and did not end."""
        running = subprocess.run(["ps", "-ww", "-A", "-o", "command="], capture_output=True, text=True).stdout
        return [line for line in running.splitlines() if str(self.folder) in line]


@pytest.fixture
def chaos(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    chaos = Chaos(folder)
    yield chaos
    if chaos.script and chaos.script.running:
        chaos.script.terminate()  # and not kill(): it must end what it started
        chaos.script.ends()


@pytest.fixture
def patched(tmp_path):
    """Make a copy of the scripts with some text replaced, and return its folder."""

    def patch(name: str, replacements: dict):
        scripts = tmp_path / "scripts"
        scripts.mkdir()
        shutil.copytree(ROOT / "task_queue", scripts / "task_queue")
        for script in ROOT.glob("*.py"):
            shutil.copy(script, scripts)
        text = (scripts / name).read_text()
        for old, new in replacements.items():
            assert text.count(old) == 1, f"{name} has changed: it has {text.count(old)} times this: {old}"
            text = text.replace(old, new)
        (scripts / name).write_text(text)
        return scripts

    return patch


def test_no_task_is_lost_while_everything_breaks(chaos):
    assert chaos.run("--seed", 138, "--tasks", 300, "--workers", 4) == 0, str(chaos.script)
    faults = chaos.faults()
    assert len(faults) == 12
    assert all(faults.values()), faults
    assert chaos.script.output()[-1] == " [x] No task was lost (seed 138)"
    assert chaos.processes() == []
    assert list(chaos.folder.iterdir()) == []


def test_a_worker_that_acknowledges_before_the_work_is_found_to_lose_tasks(chaos, patched):
    ack = "            channel.basic_ack(method.delivery_tag)\n"
    work = "                work(task)\n"
    scripts = patched("worker.py", {ack: "", work: f"    {ack}{work}"})
    kills = ("--kinds", "worker-killed", "--faults", 5, "--tasks", 100, "--seed", 1, "--workers", 3)
    assert chaos.run(*kills, "--scripts", scripts) == 1
    assert chaos.faults()["worker-killed"] == 5
    assert_names_lost_tasks(chaos.script)


def test_a_producer_that_does_not_wait_for_confirms_is_found_to_lose_tasks(chaos, patched):
    publish = "            self._channel._impl.basic_publish(*message.arguments)\n"
    forget = "            self._size -= self._messages.pop(self._tag).size\n"
    scripts = patched("task_queue/publisher.py", {publish: publish + forget})
    kills = ("--kinds", "rabbitmq-killed", "--faults", 1, "--tasks", 800, "--seed", 1, "--workers", 3)
    assert chaos.run(*kills, "--scripts", scripts) == 1
    assert chaos.faults()["rabbitmq-killed"] == 1
    assert_names_lost_tasks(chaos.script)


def assert_names_lost_tasks(script) -> None:
    lost = int(re.search(r"(\d+) lost", str(script))[1])
    assert lost > 0
    names = re.search(rf"\[!\] {lost} tasks were reported sent and never done: (.*)", str(script))[1]
    assert len(re.findall(r"'task \d+[ .]*'", names)) == lost


def test_ctrl_c_ends_chaos_and_all_that_it_started(chaos):
    script = chaos.start("--seed", 1)
    script.wait_for("1/60")
    assert chaos.processes() != []
    script.ctrl_c()
    assert script.ends() == 1
    assert script.output("stderr") == [" [!] Interrupted"]
    assert chaos.processes() == []
