"""tools/: the demo plays the tutorial, chaos finds what is lost, the benchmarks work, and nothing stays behind."""

import re
import shutil
import subprocess

import pytest
from bench import Bench
from conftest import ROOT
from processes import wait_until

# How long a run may take.
LIMIT = 170

# How to break a copy of the scripts: patterns that occur once in a file of theirs, with what takes their place.
ACK = "channel.basic_ack(method.delivery_tag)"
ACKNOWLEDGES_FIRST = {
    r'(say\(" \[x\] Done"\)\n(?: +#.*\n)?) +' + re.escape(ACK): r"\1",
    r"( +)with .*\n +work\(task\)\n": rf"\1{ACK}\n\g<0>",
}
KEEPS = (r"self\._messages\[self\._tag\] = number.*", r"self\._size \+= size", r"self\._size -= .*\.pop\(.*")
DOES_NOT_WAIT = dict.fromkeys(KEEPS, "pass")
DOES_TWICE = {r'( +)say\(" \[x\] Done"\)\n': r'\g<0>\1say(f" [x] Received {shown(task)} (redelivered)")\n\g<0>'}

# What chaos must say then.
LOST = " [!] {lost} tasks were reported sent and never done: 'task "
TWICE = "was done 2 times, and no fault explains that"


@pytest.fixture
def start(offline, tmp_path):
    """A function that starts a tool, by its command. When the tool has ended, nothing of it may be left."""
    started = []

    def start(command: str, **settings):
        script = offline.start(*command.split(), environment={"TMPDIR": str(tmp_path), "NO_COLOR": "1"}, **settings)
        started.append(script)
        return script

    yield start
    for script in started:
        script.terminate()  # and not kill(): it must end what it started
        script.ends()
    reports = {tmp_path / "quick-bench", *(log.parent for log in tmp_path.glob("chaos-*/scripts.log"))}
    assert (processes(tmp_path), set(tmp_path.iterdir()) - reports) == ([], set())


def processes(folder) -> list[str]:
    """Return the command lines of what a tool has started, with their environment, which names the folder."""
    running = subprocess.run(["ps", "axeww", "-o", "command="], capture_output=True, text=True, errors="replace")
    return [line for line in running.stdout.splitlines() if str(folder) in line]


def test_the_demo_plays_the_tutorial_and_loses_nothing(start, broker):
    demo = start("tools/demo.py", url=broker.url)
    assert demo.ends(LIMIT) == 0, str(demo)
    assert "Left out: the demo did not start this RabbitMQ" in str(demo)
    assert "Tally: sent 11, done 11, redelivered 2, lost 0" in str(demo)
    assert demo.output("stderr") == []
    assert broker.ready() == 0


def test_no_task_is_lost_while_everything_breaks(start):
    script = start("tools/chaos.py --seed 138 --tasks 120 --workers 4")
    assert script.ends(LIMIT) == 0, str(script)
    times = [re.match(r"[a-z]+-[a-z]+ +(\d+)   ", line) for line in script.output()]
    assert [row[1] for row in times if row] == ["1"] * 12
    assert script.output()[-1] == " [x] No task was lost (seed 138)"


@pytest.mark.parametrize(
    ("name", "patterns", "arguments", "complaint"),
    [
        ("worker.py", ACKNOWLEDGES_FIRST, "worker-killed --faults 3 --tasks 12 --seed 1 --workers 3", LOST),
        ("task_queue/publisher.py", DOES_NOT_WAIT, "rabbitmq-killed --faults 1 --tasks 1200 --seed 3", LOST),
        ("worker.py", DOES_TWICE, "producer-killed --faults 1 --tasks 4 --seed 1 --workers 2", TWICE),
    ],
    ids=["ack before work", "no wait for confirms", "done twice"],
)
def test_chaos_finds_out_scripts_that_are_broken(start, tmp_path_factory, name, patterns, arguments, complaint):
    scripts = tmp_path_factory.mktemp("scripts")
    left_out = shutil.ignore_patterns(".*", "__pyc*", "docs", "tests", "tools")
    shutil.copytree(ROOT, scripts, ignore=left_out, dirs_exist_ok=True)
    text = (scripts / name).read_text()
    for pattern, replacement in patterns.items():
        text, times = re.subn(pattern, replacement, text)
        assert times == 1, f"{name} has changed: it has {times} times this: {pattern}"
    (scripts / name).write_text(text)

    script = start(f"tools/chaos.py --scripts {scripts} --kinds {arguments}")
    assert script.ends(LIMIT) == 1
    tally = re.search(r"(\d+) lost", str(script))
    assert complaint.format(lost=tally[1]) in script.output("stderr")[0]


def test_every_benchmark_works_and_the_report_has_a_section_of_each(start, tmp_path):
    published = {file: file.stat().st_mtime for file in (ROOT / "docs").iterdir()}
    script = start("tools/bench.py --quick")
    assert (script.ends(LIMIT), script.output("stderr")) == (0, []), str(script)
    pages = tmp_path / "quick-bench"
    sections = (pages / "benchmarks.md").read_text().split("\n## ")[1:]
    titles = [getattr(Bench, name).__doc__.splitlines()[0] for name in Bench.SECTIONS]
    assert [section.splitlines()[0] for section in sections] == titles
    for section in sections:
        assert re.search(r"^\| .* \| [\d.,]+(: | +\|)", section, re.MULTILINE), f"no figures in: {section}"
    how_far = (pages / "how-far.md").read_text()
    assert re.search(r"^\| memory of a `worker.py`, MB +\| [\d.]+ ", how_far, re.MULTILINE)
    assert (pages / "scaling.svg").read_text().startswith("<?xml")
    assert published == {file: file.stat().st_mtime for file in (ROOT / "docs").iterdir()}  # is not published


@pytest.mark.parametrize(
    ("command", "started"),
    [("tools/chaos.py --seed 1", "new_task.py"), ("tools/bench.py --quick --only scaling", "worker.py")],
    ids=["chaos", "benchmarks"],
)
def test_ctrl_c_ends_a_tool_and_all_that_it_started(start, tmp_path, command, started):
    script = start(command)
    wait_until(lambda: any(started in line for line in processes(tmp_path)), f"{started} runs")
    script.ctrl_c()
    assert (script.ends(), script.output("stderr")) == (1, [" [!] Interrupted"])
