"""The benchmarks in short: that each one works. What they measured is looked at by no test: the machine may be busy."""

import re
import subprocess
import sys

import pytest
from bench import BENCHMARKS, title
from conftest import ROOT
from processes import Script

# A run that takes longer than this hangs.
LIMIT = 120


class Bench:
    """Runs tools/bench.py, with its files in a folder of the test."""

    def __init__(self, folder):
        self.folder = folder
        self.script = None

    def start(self, *arguments: str) -> Script:
        files = [("TMPDIR", str(self.folder))]
        self.script = Script("tools/bench.py", *arguments, url="amqp://not-used.invalid", environment=files)
        return self.script

    def left_behind(self) -> list[str]:
        """Return its files, and the command lines of what it started, that are still there."""
        running = subprocess.run(["ps", "-ww", "-A", "-o", "command="], capture_output=True, text=True).stdout
        return [line for line in running.splitlines() if str(self.folder) in line] + list(self.folder.iterdir())


@pytest.fixture
def bench(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    bench = Bench(folder)
    yield bench
    if bench.script and bench.script.running:
        bench.script.terminate()  # and not kill(): it must end what it started
        bench.script.ends()


def test_every_benchmark_works_and_the_report_has_a_section_of_each(bench, tmp_path):
    script = bench.start("--quick", "--write", str(tmp_path / "docs"))
    assert script.ends(LIMIT) == 0, str(script)
    assert script.output("stderr") == []
    report = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert re.findall(r"^## (.*)", report, re.MULTILINE) == [title(each) for each in BENCHMARKS.values()]
    for section in report.split("\n## ")[1:]:
        assert re.search(r"^\|.*\| (\*\*)?\d", section, re.MULTILINE), f"no figures in: {section}"
    for sender in ("`new_task.py -`", "the tutorial's loop", "each one confirmed", "`new_task.py WORD`"):
        assert sender in report
    assert f"| {sys.version.split()[0]}, " in report
    picture = (tmp_path / "docs" / "scaling.svg").read_text()
    assert picture.lstrip().startswith("<?xml")
    assert "workers" in picture
    assert bench.left_behind() == []


def test_a_benchmark_can_be_chosen_and_then_nothing_is_written(bench):
    before = reports()
    script = bench.start("--quick", "--only", "by-hand")
    assert script.ends(LIMIT) == 0, str(script)
    assert [line for line in script.output() if line.startswith("## ")] == ["## One task by hand"]
    assert reports() == before
    assert bench.left_behind() == []


def reports() -> dict:
    """Return when what `make bench` writes was written."""
    return {
        file: file.stat().st_mtime for name in ("benchmarks.md", "scaling.svg") for file in (ROOT / "docs").glob(name)
    }


def test_ctrl_c_ends_the_benchmarks_and_all_that_they_started(bench):
    script = bench.start("--quick", "--only", "scaling")
    script.wait_for("| RabbitMQ ", within=LIMIT)
    assert bench.left_behind() != []
    script.ctrl_c()
    assert script.ends() == 1
    assert script.output("stderr") == [" [!] Interrupted"]
    assert bench.left_behind() == []
