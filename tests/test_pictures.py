"""The pictures in docs/: fit to be shown on any page, and true to the scripts."""

import re
import xml.etree.ElementTree as ElementTree

import pytest
from conftest import ROOT

import task_queue
from task_queue import dead_letters

DOCS = ROOT / "docs"
# All but the plot of `make bench`.
PICTURES = sorted({path.name for path in DOCS.glob("*.svg")} - {"scaling.svg"})
HAND_MADE = [name for name in PICTURES if name != "recording.svg"]

SVG = "{http://www.w3.org/2000/svg}"


def parsed(path) -> ElementTree.Element:
    """Return an SVG file as a tree; an error if it isn't well-formed XML."""
    return ElementTree.fromstring(path.read_text())  # noqa: S314 (our own files)


def words(path) -> str:
    """Return all text that a picture shows, as one line."""
    return " ".join("".join(text.itertext()) for text in parsed(path).iter(f"{SVG}text"))


def shells_of(path) -> dict[str, list[str]]:
    """Return what each shell shows in a recording: {"Shell 1": [line, ...], ...}."""
    shells = {}
    for text in parsed(path).iter(f"{SVG}text"):
        line = "".join(text.itertext())
        if text.get("class") == "title":
            lines = shells[line] = []
        else:
            lines.append(line)
    return shells


@pytest.mark.parametrize("name", PICTURES)
class TestEachPicture:
    def test_is_described_for_those_who_do_not_see_it(self, name):
        picture = parsed(DOCS / name)
        assert picture.get("role") == "img"
        described = {child.get("id"): child.text for child in picture if child.tag in (f"{SVG}title", f"{SVG}desc")}
        assert list(described) == picture.get("aria-labelledby").split() == ["title", "desc"]
        assert all(described.values())

    def test_needs_nothing_but_itself(self, name):
        """Pages show it as an image: there no script runs, and nothing is loaded."""
        text = (DOCS / name).read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"<script|<foreignObject|<image|<use|href|\bon\w+=|@import|javascript:|//", text)
        assert all(target.startswith("#") for target in re.findall(r"url\((.*?)\)", text))

    def test_has_colours_for_light_and_dark(self, name):
        """A colour that only the light theme knows would be hard to see in the dark."""
        light, dark = parsed(DOCS / name).find(f"{SVG}style").text.split("@media (prefers-color-scheme: dark)")
        rule = re.compile(r"([^{}/]+)\{[^{}]*(?:fill|stroke): #")
        assert {found.strip() for found in rule.findall(re.sub(r"/\*.*?\*/", "", light))} == {
            found.strip() for found in rule.findall(dark)
        }

    def test_is_small_and_comes_from_nowhere(self, name):
        content = (DOCS / name).read_bytes()
        assert len(content) < (8_000 if name in HAND_MADE else 30_000)
        assert b"/home" not in content and str(ROOT).encode() not in content


def test_the_diagrams_have_one_style():
    assert len({parsed(DOCS / name).find(f"{SVG}style").text for name in HAND_MADE}) == 1


def test_the_diagrams_name_what_the_scripts_use():
    assert task_queue.QUEUE in words(DOCS / "queue.svg")
    assert f"after {dead_letters.MAX_DELIVERIES} deliveries" in words(DOCS / "life-of-a-task.svg")


def test_the_recording_shows_what_the_shells_really_show(broker, shells, tmp_path):
    """When a line of the scripts has changed, docs/recording.svg must be made again: make recording."""
    picture = tmp_path / "recording.svg"
    recorder = shells.start("tools/recording.py", "--url", broker.url, "--output", str(picture))
    try:
        assert recorder.ends(within=60) == 0, recorder
    finally:
        recorder.terminate()  # not killed: it must end its workers
        recorder.ends()
    seen = shells_of(picture)
    assert seen["Shell 2"][-2:] == [" [x] Received 'A long one.....' (redelivered)", " [x] Done"]
    assert seen == shells_of(DOCS / "recording.svg")
