"""The benchmarks in short: that each one works. What they measured is looked at by no test: the machine may be busy."""

import re
import subprocess

import pytest
from bench import Bench
from conftest import ROOT
from processes import Script, wait_until


@pytest.fixture
def start(tmp_path):
    """Give a function that starts tools/bench.py; after the test, nothing that it started may be there."""
    scripts: list[Script] = []

    def start(*arguments: str) -> Script:
        files = [("TMPDIR", str(tmp_path))]
        scripts.append(Script("tools/bench.py", *arguments, url="amqp://not-used.invalid", environment=files))
        return scripts[-1]

    yield start
    scripts[0].terminate()  # and not kill(): it must end what it started
    scripts[0].ends()
    assert left_behind(tmp_path) == []


def left_behind(folder) -> list[str]:
    """Return the benchmarks' temporary files, and the command lines of what they started, that are still there."""
    running = subprocess.run(["ps", "-ww", "-A", "-o", "command="], capture_output=True, text=True).stdout
    return [line for line in running.splitlines() if str(folder) in line] + list(map(str, folder.glob("bench-*")))


def test_every_benchmark_works_and_the_report_has_a_section_of_each(start, tmp_path):
    script = start("--quick")
    assert (script.ends(within=170), script.output("stderr")) == (0, []), str(script)
    pages = tmp_path / "quick-bench"
    sections = (pages / "benchmarks.md").read_text().split("\n## ")[1:]
    titles = [getattr(Bench, name).__doc__.splitlines()[0] for name in Bench.SECTIONS]
    assert [section.splitlines()[0] for section in sections] == titles
    for section in sections:
        assert re.search(r"^\| .* \| [\d.,]+(: | +\|)", section, re.MULTILINE), f"no figures in: {section}"
    how_far = (pages / "how-far.md").read_text()
    assert re.search(r"^\| memory of a `worker.py`, MB +\| [\d.]+ ", how_far, re.MULTILINE)
    assert (pages / "scaling.svg").read_text().startswith("<?xml")


def test_a_benchmark_can_be_chosen_and_then_nothing_is_written(start):
    before = {file: file.stat().st_mtime for file in (ROOT / "docs").iterdir()}
    script = start("--quick", "--only", "by_hand")
    assert script.ends(within=170) == 0, str(script)
    assert [line for line in script.output() if line.startswith("## ")] == ["## One task by hand"]
    assert {file: file.stat().st_mtime for file in (ROOT / "docs").iterdir()} == before


def test_ctrl_c_ends_the_benchmarks_and_all_that_they_started(start, tmp_path):
    script = start("--quick", "--only", "scaling")
    wait_until(lambda: any("beam" in line for line in left_behind(tmp_path)), "RabbitMQ runs")
    script.ctrl_c()
    assert (script.ends(), script.output("stderr")) == (1, [" [!] Interrupted"])
