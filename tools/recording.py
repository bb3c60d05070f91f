"""Records three shells, while a worker is stopped in the middle of a task, as docs/recording.svg: CSS, no script."""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from xml.sax.saxutils import escape

from node import Node, NodeError
from processes import ROOT, Line, Script, Shells, interruptible

# Pauses in seconds. A person needs a moment before the next command, and to see the end before it starts again.
BEFORE_A_COMMAND, MID_TASK, AT_THE_END = 0.5, 2, 5

# Measures of the picture, in its own units: as wide as a page of text, and still readable on a phone.
WIDTH, PADDING, TITLE_HEIGHT, LINE_HEIGHT, GAP = 720, 14, 34, 24, 14


def play(shells: Shells) -> None:
    """Play the scene: a worker is stopped in the middle of a task, and the other one does it."""

    def send(task: str, worker: Script) -> None:
        time.sleep(BEFORE_A_COMMAND)
        shells.run(3, f"new_task.py {task}").ends()
        worker.wait_for(f"Received {task!r}")

    first, second = shells.work(1), shells.work(2)
    send("First message.", first)  # it is busy then, so the second task is for the other one
    send("Second message..", second)
    first.wait_for("Done")
    send("A long one.....", first)
    time.sleep(MID_TASK)
    shells.ctrl_c(1)
    shells.type(1, "$")
    second.wait_for("(redelivered)")
    second.wait_for("Done", times=2)


def draw(shells: dict[int, list[Line]]) -> str:
    """Return the picture: a pane for each shell, and in it the lines that it showed, each coming at its moment."""
    # Both workers wait already when it begins, with the first command in shell 3.
    began = shells[3][0].at
    length = max(lines[-1].at for lines in shells.values()) - began + AT_THE_END
    panes, moments, top = [], [], 0
    for shell, lines in shells.items():
        height = TITLE_HEIGHT + LINE_HEIGHT * len(lines) + PADDING
        panes.append(f'<rect class="pane" x="1" y="{top + 1}" width="{WIDTH - 2}" height="{height - 2}" rx="8"/>')
        panes.append(f'<text class="title" x="{PADDING}" y="{top + 22}">Shell {shell}</text>')
        for number, line in enumerate(lines):
            y = top + TITLE_HEIGHT + LINE_HEIGHT * number + 16
            text = escape(line.text).replace("(redelivered)", '<tspan class="mark">(redelivered)</tspan>')
            name = f"m{len(panes)}"
            panes.append(f'<text class="line {line.stream} {name}" x="{PADDING}" y="{y}">{text}</text>')
            percent = 100 * max(0, line.at - began) / length
            moment = f"@keyframes {name} {{ 0% {{ opacity: 0 }} {percent:.2f}% {{ opacity: 1 }} }}"
            moments.append(f"{moment} .{name} {{ animation-name: {name} }}")
        top += height + GAP
    parts = {"moments": "\n".join(moments), "panes": "\n".join(panes)}
    return PICTURE.format(width=WIDTH, height=top - GAP, length=length, delay=length - AT_THE_END / 2, **parts)


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
.line {{ white-space: pre; animation: {length:.1f}s -{delay:.1f}s step-end infinite }}
.title {{ font: 600 15px system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; fill: #59636e }}
.pane {{ fill: #f6f8fa; stroke: #818b98; stroke-width: 2 }}
.stderr, .mark {{ fill: #bc4c00 }}
.typed, .mark {{ font-weight: 600 }}
{moments}
@media (prefers-color-scheme: dark) {{
text {{ fill: #e6edf3 }}
.title {{ fill: #9aa4af }}
.pane {{ fill: #151b23; stroke: #6e7681 }}
.stderr, .mark {{ fill: #f0883e }}
}}
@media (prefers-reduced-motion: reduce) {{ .line {{ animation: none }} }}
</style>
{panes}
</svg>
"""


def main() -> str | int | None:
    """Make the picture; return the exit status, or what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "recording.svg", help="file to write")
    parser.add_argument("--url", help="a RabbitMQ to play on, with nothing in its task_queue and no other worker")
    chosen = parser.parse_args()
    shown: dict[int, list[Line]] = {1: [], 2: [], 3: []}
    with tempfile.TemporaryDirectory(prefix="recording-", ignore_cleanup_errors=True) as folder:
        node = Node(folder)
        shells = Shells("python", lambda shell, line: shown[shell].append(line), chosen.url or node.url)
        try:
            with interruptible(shells.close, node.close):
                if not chosen.url:
                    node.start()
                play(shells)
        except KeyboardInterrupt:
            return 130
        except (NodeError, AssertionError) as problem:
            return f" [!] {problem}"
    chosen.output.write_text(draw(shown))
    print(f"wrote {chosen.output}")


if __name__ == "__main__":
    sys.exit(main())
