"""Records the tutorial's three shells, while a worker is stopped in the middle of a task, as docs/recording.svg.

    make recording

Plays it with the real new_task.py and worker.py on a RabbitMQ that is started for this, on loopback, and draws what
each shell showed, at the moment when it did. The picture plays by itself, over and over: CSS, no script in it.
"""

import argparse
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

from node import Node, NodeError
from processes import ROOT, Script

LONG_TASK = "A long one....."

# Pauses in seconds. A person needs a moment before the next command, and to see the end before it starts again.
BEFORE_A_COMMAND = 0.5
MID_TASK = 2
AT_THE_END = 5

# Measures of the picture, in its own units: as wide as a page of text, and still readable on a phone.
WIDTH, PADDING, TITLE_HEIGHT, LINE_HEIGHT, GAP = 720, 14, 34, 24, 14


class Shown(NamedTuple):
    """A line that a shell showed: when (seconds since the start), which shell (1 to 3), its kind, and its text.

    kind: "typed" for what a person types, else where it was printed, "stdout" or "stderr".
    """

    at: float
    shell: int
    kind: str
    text: str


class Recorder:
    """Three shells with the scripts that run in them, and what a person typed there."""

    def __init__(self, url: str):
        self.url = url
        self.began = time.monotonic()
        self.typed: list[Shown] = []
        self.scripts: list[tuple[int, Script]] = []

    def type(self, shell: int, text: str) -> None:
        """Note what a person types in a shell."""
        self.typed.append(Shown(time.monotonic() - self.began, shell, "typed", text))

    def run(self, shell: int, *command: str) -> Script:
        """Start one of the two scripts in a shell, after a moment, and return it running."""
        time.sleep(BEFORE_A_COMMAND)
        self.type(shell, " ".join(["$ python", *command]))
        self.scripts.append((shell, Script(*command, url=self.url)))
        return self.scripts[-1][1]

    def send(self, task: str) -> None:
        """Send a task from shell 3."""
        sender = self.run(3, "new_task.py", *task.split())
        sender.wait_for(" [x] Sent")
        sender.ends()

    def shown(self) -> list[Shown]:
        """Return what all shells have shown, in order."""
        printed = [
            Shown(line.at - self.began, shell, line.stream, line.text)
            for shell, script in self.scripts
            for line in script.lines
        ]
        return sorted(self.typed + printed, key=lambda line: line.at)

    def close(self) -> None:
        """End whatever still runs."""
        for _, script in self.scripts:
            script.kill()


def play(shells: Recorder) -> list[Shown]:
    """Play the scene and return what the shells showed: a worker is stopped mid-task, the other does its task."""
    first = shells.run(1, "worker.py")
    first.wait_for("[*] Waiting")
    second = shells.run(2, "worker.py")
    second.wait_for("[*] Waiting")
    shells.send("First message.")
    first.wait_for("Received 'First")  # it is busy, so the second task is for the other one
    shells.send("Second message..")
    second.wait_for("Received 'Second")
    first.wait_for("Done")
    shells.send(LONG_TASK)
    first.wait_for("Received 'A long")
    time.sleep(MID_TASK)
    shells.type(1, "^C")
    first.ctrl_c()
    first.ends()
    shells.type(1, "$")
    second.wait_for("(redelivered)")
    second.wait_for("Done", times=2)
    return shells.shown()


def draw(shown: list[Shown]) -> str:
    """Return the picture: a pane for each shell, and in it the lines that it showed, each coming at its moment."""
    length = shown[-1].at + AT_THE_END
    panes, moments, top = [], [], 0
    for shell in (1, 2, 3):
        lines = [line for line in shown if line.shell == shell]
        height = TITLE_HEIGHT + LINE_HEIGHT * len(lines) + PADDING
        panes.append(
            f'<rect class="pane" x="1" y="{top + 1}" width="{WIDTH - 2}" height="{height - 2}" rx="8"/>\n'
            f'<text class="title" x="{PADDING}" y="{top + 22}">Shell {shell}</text>'
        )
        for number, line in enumerate(lines):
            moment = f"m{len(moments)}"
            moments.append(
                f"@keyframes {moment} {{ 0% {{ opacity: 0 }} {100 * line.at / length:.2f}% {{ opacity: 1 }} }}\n"
                f".{moment} {{ animation-name: {moment} }}"
            )
            y = top + TITLE_HEIGHT + LINE_HEIGHT * number + 16
            panes.append(f'<text class="line {line.kind} {moment}" x="{PADDING}" y="{y}">{marked_up(line)}</text>')
        top += height + GAP
    return PICTURE.format(
        width=WIDTH, height=top - 6, bar=top - 10, length=f"{length:.1f}", moments="\n".join(moments),
        panes="\n".join(panes),
    )  # fmt: skip


def marked_up(line: Shown) -> str:
    """Return the text of a line, with a mark on the word that this picture is about."""
    mark = "(redelivered)"
    return escape(line.text).replace(mark, f'<tspan class="mark">{mark}</tspan>')


# Without animation, all lines are there: that is what a viewer shows who wants no motion, or a program that knows none.
PICTURE = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img" \
aria-labelledby="title desc">
<!-- Made by `make recording` from a real run; don't edit. -->
<title id="title">Three shells: a worker is stopped in the middle of a task, and another one does it</title>
<desc id="desc">Shells 1 and 2 run a worker each, shell 3 sends three tasks. Ctrl+C stops the worker in shell 1 in the \
middle of the third one, which is redelivered to the worker in shell 2, and done there.</desc>
<style>
text {{ font: 17px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #1f2328 }}
.line {{ white-space: pre; animation: {length}s step-end infinite }}
.title {{ font: 600 15px system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; fill: #59636e }}
.pane {{ fill: #f6f8fa; stroke: #818b98; stroke-width: 2 }}
.typed {{ font-weight: 600 }}
.stderr, .mark {{ fill: #bc4c00 }}
.mark {{ font-weight: 600 }}
.bar {{ fill: #818b98; animation: bar {length}s linear infinite }}
@keyframes bar {{ 0% {{ transform: scaleX(0) }} }}
{moments}
@media (prefers-color-scheme: dark) {{
text {{ fill: #e6edf3 }}
.title {{ fill: #9aa4af }}
.pane {{ fill: #151b23; stroke: #6e7681 }}
.stderr, .mark {{ fill: #f0883e }}
.bar {{ fill: #6e7681 }}
}}
@media (prefers-reduced-motion: reduce) {{
.line {{ animation: none }}
.bar {{ display: none }}
}}
</style>
{panes}
<!-- How far it is: in a long task nothing else moves. -->
<rect class="bar" x="0" y="{bar}" width="{width}" height="3"/>
</svg>
"""


def record(url: str, output: Path) -> None:
    """Play the scene on the RabbitMQ at this URL, and write the picture."""
    shells = Recorder(url)
    try:
        output.write_text(draw(play(shells)))
    finally:
        shells.close()
    print(f"wrote {output}: {output.stat().st_size / 1000:.1f} kB")


def record_on_a_node_of_its_own(output: Path) -> None:
    """Do it on a RabbitMQ that is started for it, and gone with its data afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="recording-"))
    node = Node(folder)
    try:
        record(node.start().url, output)
    finally:
        node.close()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Do what the command line says; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "recording.svg", help="file to write")
    parser.add_argument("--url", help="a RabbitMQ to play on, with nothing in its task_queue and no other worker")
    found = parser.parse_args()
    # kill does as Ctrl+C does: what was started is ended, and no picture is written. Both set explicitly, as a shell
    # lets `make recording &` ignore Ctrl+C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if found.url:
            record(found.url, found.output)
        else:
            record_on_a_node_of_its_own(found.output)
    except KeyboardInterrupt:
        return 130
    except (NodeError, AssertionError) as problem:
        print(f" [!] {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
