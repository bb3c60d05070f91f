"""Records the tutorial's three shells, while a worker is stopped in the middle of a task, as docs/recording.svg.

    make recording

Plays it with the real new_task.py and worker.py on a RabbitMQ that is started for this, on loopback, and draws what
each shell showed, at the moment when it did. The picture plays by itself, over and over: CSS, no script in it.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from xml.sax.saxutils import escape

from node import Node, NodeError
from processes import ROOT, Line, Script, ignore_signals, raise_on_signals

# Pauses in seconds. A person needs a moment before the next command, and to see the end before it starts again.
BEFORE_A_COMMAND, MID_TASK, AT_THE_END = 0.5, 2, 5

# Measures of the picture, in its own units: as wide as a page of text, and still readable on a phone.
WIDTH, PADDING, TITLE_HEIGHT, LINE_HEIGHT, GAP = 720, 14, 34, 24, 14


class Recorder:
    """Three shells with the scripts that run in them, and what a person typed there."""

    def __init__(self, url: str):
        self.url = url
        self.typed: dict[int, list[Line]] = {1: [], 2: [], 3: []}
        self.scripts: list[tuple[int, Script]] = []

    def type(self, shell: int, text: str) -> None:
        """Note what a person types in a shell."""
        self.typed[shell].append(Line(time.monotonic(), "typed", text))

    def run(self, shell: int, *command: str) -> Script:
        """Start one of the two scripts in a shell, after a moment, and return it running."""
        time.sleep(BEFORE_A_COMMAND)
        self.type(shell, " ".join(["$ python", *command]))
        self.scripts.append((shell, Script(*command, url=self.url)))
        return self.scripts[-1][1]

    def send(self, *words: str) -> None:
        """Send a task from shell 3."""
        sender = self.run(3, "new_task.py", *words)
        sender.wait_for("[x] Sent")
        sender.ends()

    def play(self) -> None:
        """Play the scene: a worker is stopped in the middle of a task, and the other one does it."""
        first, second = self.run(1, "worker.py"), self.run(2, "worker.py")
        for worker in (first, second):
            worker.wait_for("[*] Waiting")
        self.send("First", "message.")
        first.wait_for("Received 'First")  # it is busy, so the second task is for the other one
        self.send("Second", "message..")
        second.wait_for("Received 'Second")
        first.wait_for("Done")
        self.send("A", "long", "one.....")
        first.wait_for("Received 'A long")
        time.sleep(MID_TASK)
        self.type(1, "^C")
        first.ctrl_c()
        first.ends()
        self.type(1, "$")
        second.wait_for("(redelivered)")
        second.wait_for("Done", times=2)

    def shown(self, shell: int) -> list[Line]:
        """Return the lines that a shell has shown, in order."""
        return sorted(self.typed[shell] + [line for at, script in self.scripts if at == shell for line in script.lines])


def draw(shells: dict[int, list[Line]]) -> str:
    """Return the picture: a pane for each shell, and in it the lines that it showed, each coming at its moment."""
    # Both workers wait already when it begins, with the first command in shell 3.
    began = shells[3][0].at
    length = max(lines[-1].at for lines in shells.values()) - began + AT_THE_END
    panes, moments, top = [], [], 0
    for shell, lines in shells.items():
        height = TITLE_HEIGHT + LINE_HEIGHT * len(lines) + PADDING
        panes.append(
            f'<rect class="pane" x="1" y="{top + 1}" width="{WIDTH - 2}" height="{height - 2}" rx="8"/>\n'
            f'<text class="title" x="{PADDING}" y="{top + 22}">Shell {shell}</text>'
        )
        for number, line in enumerate(lines):
            y = top + TITLE_HEIGHT + LINE_HEIGHT * number + 16
            text = escape(line.text).replace("(redelivered)", '<tspan class="mark">(redelivered)</tspan>')
            classes = f"line {line.stream}"
            if line.at > began:
                classes += f" m{len(moments)}"
                moment = f"0% {{ opacity: 0 }} {100 * (line.at - began) / length:.2f}% {{ opacity: 1 }}"
                moments.append(
                    "@keyframes m{0} {{ {1} }} .m{0} {{ animation-name: m{0} }}".format(len(moments), moment)
                )
            panes.append(f'<text class="{classes}" x="{PADDING}" y="{y}">{text}</text>')
        top += height + GAP
    return PICTURE.format(
        width=WIDTH, height=top - 6, bar=top - 10, time=f"{length:.1f}s -{length - AT_THE_END / 2:.1f}s",
        moments="\n".join(moments), panes="\n".join(panes),
    )  # fmt: skip


# Without animation, all lines are there: for a viewer who wants no motion, or a program that knows none. With it, the
# end comes first (by a negative delay): so the first frame, which is all that some show, tells the story.
PICTURE = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img" \
aria-labelledby="title desc">
<!-- Made by `make recording` from a real run; don't edit. -->
<title id="title">Three shells: a worker is stopped in the middle of a task, and another one does it</title>
<desc id="desc">Shells 1 and 2 run a worker each, shell 3 sends three tasks. Ctrl+C stops the worker in shell 1 in the \
middle of the third one, which is redelivered to the worker in shell 2, and done there.</desc>
<style>
text {{ font: 17px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #1f2328 }}
.line {{ white-space: pre; animation: {time} step-end infinite }}
.title {{ font: 600 15px system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; fill: #59636e }}
.pane {{ fill: #f6f8fa; stroke: #818b98; stroke-width: 2 }}
.typed {{ font-weight: 600 }}
.stderr, .mark {{ fill: #bc4c00 }}
.mark {{ font-weight: 600 }}
.bar {{ fill: #818b98; animation: bar {time} linear infinite }}
@keyframes bar {{ 0% {{ transform: scaleX(0) }} }}
{moments}
@media (prefers-color-scheme: dark) {{
text {{ fill: #e6edf3 }}
.title {{ fill: #9aa4af }}
.pane {{ fill: #151b23; stroke: #6e7681 }}
.stderr, .mark {{ fill: #f0883e }}
.bar {{ fill: #6e7681 }}
}}
@media (prefers-reduced-motion: reduce) {{ .line {{ animation: none }} .bar {{ display: none }} }}
</style>
{panes}
<!-- How far it is: in a long task nothing else moves. -->
<rect class="bar" x="0" y="{bar}" width="{width}" height="3"/>
</svg>
"""


def record(url: str, output: Path) -> None:
    """Play the scene on the RabbitMQ at this URL, and write the picture."""
    recorder = Recorder(url)
    try:
        recorder.play()
        output.write_text(draw({shell: recorder.shown(shell) for shell in (1, 2, 3)}))
    finally:
        ignore_signals()
        for _, script in recorder.scripts:
            script.kill()
    print(f"wrote {output}: {output.stat().st_size / 1000:.1f} kB")


def main() -> int:
    """Do what the command line says; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "recording.svg", help="file to write")
    parser.add_argument("--url", help="a RabbitMQ to play on, with nothing in its task_queue and no other worker")
    found = parser.parse_args()
    raise_on_signals()
    try:
        if found.url:
            record(found.url, found.output)
            return 0
        with tempfile.TemporaryDirectory(prefix="recording-", ignore_cleanup_errors=True) as folder:
            node = Node(folder)
            try:
                record(node.start().url, found.output)
            finally:
                node.close()
    except KeyboardInterrupt:
        return 130
    except (NodeError, AssertionError) as problem:
        print(f" [!] {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
