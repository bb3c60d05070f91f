"""Chaos in short: every kind of fault in one run, and the proof that a run finds what is lost, or done twice."""

import re
import shutil
import subprocess

import pytest
from conftest import ROOT
from processes import Script

# A run that takes longer than this ends by itself, as a failure.
LIMIT = 120

# How to break a copy of the scripts: a file of theirs, and patterns in it that occur once, with what takes their place.
ACK = "channel.basic_ack(method.delivery_tag)"
ACKNOWLEDGES_FIRST = {
    r'(print\(" \[x\] Done"\)\n(?: +#.*\n)?) +' + re.escape(ACK): r"\1",
    r"( +)with .*\n +work\(task\)\n": rf"\1{ACK}\n\g<0>",
}
DOES_TWICE = {r'( +)print\(" \[x\] Done"\)\n': r'\g<0>\1print(f" [x] Received {shown(task)} (redelivered)")\n\g<0>'}
FORGETS = r"\g<0>\1self._size -= self._messages.pop(self._tag).size\n"
DOES_NOT_WAIT = {r"( +)self\._channel\._impl\.basic_publish\(.*\n": FORGETS}


class Chaos:
    """Runs tools/chaos.py, with its files in a folder of the test."""

    def __init__(self, folder):
        self.files, self.scripts, self.script = folder / "files", folder / "scripts", None
        self.files.mkdir()

    def start(self, *arguments) -> Script:
        words = map(str, ("tools/chaos.py", "--limit", LIMIT, *arguments))
        self.script = Script(*words, url="amqp://not-used.invalid", environment=[("TMPDIR", str(self.files))])
        return self.script

    def run(self, *arguments) -> int:
        return self.start(*arguments).ends(LIMIT + 30)

    def run_broken(self, name: str, patterns: dict, *arguments) -> int:
        """Run with a copy of the scripts of which one is broken."""
        shutil.copytree(ROOT, self.scripts, ignore=shutil.ignore_patterns(".*", "__pyc*", "docs", "tests", "tools"))
        text = (self.scripts / name).read_text()
        for pattern, replacement in patterns.items():
            text, times = re.subn(pattern, replacement, text)
            assert times == 1, f"{name} has changed: it has {times} times this: {pattern}"
        (self.scripts / name).write_text(text)
        return self.run("--scripts", self.scripts, *arguments)

    def faults(self) -> dict:
        """Return the table that it printed: kind of fault -> how many took place."""
        rows = [re.match(r"([a-z]+-[a-z]+) +(\d+)   ", line) for line in self.script.output()]
        return {row[1]: int(row[2]) for row in rows if row}

    def lost(self) -> int:
        """Return how many tasks it found lost. It must name each one, and complain of that first."""
        lost = int(re.search(r"(\d+) lost", str(self.script))[1])
        complaint = self.script.output("stderr")[0]
        assert complaint.startswith(f" [!] {lost} tasks were reported sent and never done: "), str(self.script)
        assert len(re.findall(r"'task \d+[ .]*'", complaint)) == lost
        return lost

    def processes(self) -> list[str]:
        """Return itself and what it started, if it runs. The environment, which ps shows, names the folder."""
        running = subprocess.run(["ps", "axeww", "-o", "command="], capture_output=True, text=True, errors="replace")
        return [line for line in running.stdout.splitlines() if str(self.files) in line]


@pytest.fixture
def chaos(tmp_path):
    chaos = Chaos(tmp_path)
    yield chaos
    if chaos.script and chaos.script.running:
        chaos.script.terminate()  # and not kill(): it must end what it started
        chaos.script.ends()


def test_no_task_is_lost_while_everything_breaks(chaos):
    assert chaos.run("--seed", 138, "--tasks", 120, "--workers", 4) == 0, str(chaos.script)
    assert list(chaos.faults().values()) == [1] * 12
    assert chaos.script.output()[-1] == " [x] No task was lost (seed 138)"
    assert chaos.processes() == list(chaos.files.iterdir()) == []


def test_a_worker_that_acknowledges_before_the_work_is_found_to_lose_tasks(chaos):
    kills = ("--kinds", "worker-killed", "--faults", 3, "--tasks", 12, "--seed", 1, "--workers", 3)
    assert chaos.run_broken("worker.py", ACKNOWLEDGES_FIRST, *kills) == 1
    assert chaos.lost() > 0


def test_a_worker_that_does_each_task_twice_is_found_out(chaos):
    kills = ("--kinds", "producer-killed", "--faults", 1, "--tasks", 4, "--seed", 1, "--workers", 2)
    assert chaos.run_broken("worker.py", DOES_TWICE, *kills) == 1
    assert "'task 1' was done 2 times, and no fault explains that" in str(chaos.script)


def test_a_producer_that_does_not_wait_for_confirms_is_found_to_lose_tasks(chaos):
    kills = ("--kinds", "rabbitmq-killed", "--faults", 1, "--tasks", 1200, "--seed", 3, "--workers", 5)
    assert chaos.run_broken("task_queue/publisher.py", DOES_NOT_WAIT, *kills) == 1
    assert chaos.lost() > 0


def test_ctrl_c_ends_chaos_and_all_that_it_started(chaos):
    script = chaos.start("--seed", 1)
    script.wait_for("1/60")
    assert any("new_task.py" in process for process in chaos.processes())
    script.ctrl_c()
    assert script.ends() == 1
    assert script.output("stderr") == [" [!] Interrupted"]
    assert chaos.processes() == []
