"""The benchmarks in short: that each one works. What they measured is looked at by no test: the machine may be busy."""

import re
import subprocess

import pytest
from bench import BENCHMARKS
from conftest import ROOT
from processes import Script, wait_until

# A run that takes longer than this hangs.
LIMIT = 170


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
    report = (tmp_path / "docs" / "benchmarks.md").read_text()
    sections = report.split("\n## ")[1:]
    assert [text.splitlines()[0] for text in sections] == [each.__doc__.splitlines()[0] for each in BENCHMARKS.values()]
    for section in sections:
        assert re.search(r"^\|.*\| (\*\*)?\d", section, re.MULTILINE), f"no figures in: {section}"
    assert (tmp_path / "docs" / "scaling.svg").read_text().lstrip().startswith("<?xml")
    far = (tmp_path / "docs" / "how-far.md").read_text()
    assert re.search(r"^\| memory of a `worker.py` +\| \d+ MB", far, re.MULTILINE)
    assert bench.left_behind() == []


def test_a_benchmark_can_be_chosen_and_then_nothing_is_written(bench):
    before = {file: file.stat().st_mtime for file in (ROOT / "docs").iterdir()}
    script = bench.start("--quick", "--only", "by-hand")
    assert script.ends(LIMIT) == 0, str(script)
    assert [line for line in script.output() if line.startswith("## ")] == ["## One task by hand"]
    assert {file: file.stat().st_mtime for file in (ROOT / "docs").iterdir()} == before


def test_ctrl_c_ends_the_benchmarks_and_all_that_they_started(bench):
    script = bench.start("--quick", "--only", "scaling")
    wait_until(lambda: any("beam" in str(left) for left in bench.left_behind()), "RabbitMQ runs")
    script.ctrl_c()
    assert script.ends() == 1
    assert script.output("stderr") == [" [!] Interrupted"]
    assert bench.left_behind() == []
