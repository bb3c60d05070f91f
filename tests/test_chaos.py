"""Chaos in short: every kind of fault in one run, and the proof that a run finds what is lost, or done twice."""

import re
import shutil
import subprocess

import pytest
from conftest import ROOT
from processes import Script

# How long a run may take.
LIMIT = 150

# How to break a copy of the scripts: patterns that occur once in a file of theirs, with what takes their place.
ACK = "channel.basic_ack(method.delivery_tag)"
ACKNOWLEDGES_FIRST = {
    r'(say\(" \[x\] Done"\)\n(?: +#.*\n)?) +' + re.escape(ACK): r"\1",
    r"( +)with .*\n +work\(task\)\n": rf"\1{ACK}\n\g<0>",
}
DOES_TWICE = {r'( +)say\(" \[x\] Done"\)\n': r'\g<0>\1say(f" [x] Received {shown(task)} (redelivered)")\n\g<0>'}
KEEPS = (r"self\._messages\[self\._tag\] = message", r"self\._size \+= message\.size", r"self\._size -= .*\.pop\(.*")
DOES_NOT_WAIT = dict.fromkeys(KEEPS, "pass")

# Scripts that lose tasks, with faults that show it.
LOSING = [
    ("worker.py", ACKNOWLEDGES_FIRST, "--kinds worker-killed --faults 3 --tasks 12 --seed 1 --workers 3"),
    ("task_queue/publisher.py", DOES_NOT_WAIT, "--kinds rabbitmq-killed --faults 1 --tasks 1200 --seed 3"),
]


class Chaos:
    """Runs tools/chaos.py, with its files in a folder of the test."""

    def __init__(self, folder):
        self.files, self.scripts, self.script = folder / "files", folder / "scripts", None
        self.files.mkdir()

    def start(self, arguments: str) -> Script:
        words = ["tools/chaos.py", "--scripts", self.scripts if self.scripts.exists() else ROOT, *arguments.split()]
        settings = {"url": "amqp://not-used.invalid", "environment": [("TMPDIR", str(self.files))]}
        self.script = Script(*map(str, words), **settings)
        return self.script

    def break_scripts(self, name: str, patterns: dict) -> None:
        """Let it run with a copy of the scripts of which one is broken."""
        shutil.copytree(ROOT, self.scripts, ignore=shutil.ignore_patterns(".*", "__pyc*", "docs", "tests", "tools"))
        text = (self.scripts / name).read_text()
        for pattern, replacement in patterns.items():
            text, times = re.subn(pattern, replacement, text)
            assert times == 1, f"{name} has changed: it has {times} times this: {pattern}"
        (self.scripts / name).write_text(text)

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
    script = chaos.start("--seed 138 --tasks 120 --workers 4")
    assert script.ends(LIMIT) == 0, str(script)
    times = [re.match(r"[a-z]+-[a-z]+ +(\d+)   ", line) for line in script.output()]
    assert [row[1] for row in times if row] == ["1"] * 12
    assert script.output()[-1] == " [x] No task was lost (seed 138)"
    assert chaos.processes() == list(chaos.files.iterdir()) == []


@pytest.mark.parametrize(("name", "patterns", "arguments"), LOSING, ids=["ack before work", "no wait for confirms"])
def test_a_script_that_loses_tasks_is_found_out(name, patterns, arguments, chaos):
    chaos.break_scripts(name, patterns)
    script = chaos.start(arguments)
    assert script.ends(LIMIT) == 1
    lost = int(re.search(r"(\d+) lost", str(script))[1])
    complaint = script.output("stderr")[0]
    assert complaint.startswith(f" [!] {lost} tasks were reported sent and never done: "), str(script)
    assert len(re.findall(r"'task \d+[ .]*'", complaint)) == lost > 0


def test_a_worker_that_does_each_task_twice_is_found_out(chaos):
    chaos.break_scripts("worker.py", DOES_TWICE)
    script = chaos.start("--kinds producer-killed --faults 1 --tasks 4 --seed 1 --workers 2")
    assert script.ends(LIMIT) == 1
    assert "'task 1' was done 2 times, and no fault explains that" in str(script)


def test_ctrl_c_ends_chaos_and_all_that_it_started(chaos):
    script = chaos.start("--seed 1")
    script.wait_for("1/60")
    assert any("new_task.py" in process for process in chaos.processes())
    script.ctrl_c()
    assert script.ends() == 1
    assert script.output("stderr") == [" [!] Interrupted"]
    assert chaos.processes() == []
