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


def parsed(name) -> ElementTree.Element:
    """Return a picture, in docs/ or elsewhere, as a tree; an error if it isn't well-formed XML."""
    return ElementTree.parse(DOCS / name).getroot()  # noqa: S314 (our own files)


def style(name) -> str:
    return parsed(name).find(f"{SVG}style").text


def lines(name) -> list[str]:
    """Return the text that a picture shows, line by line."""
    return ["".join(text.itertext()) for text in parsed(name).iter(f"{SVG}text")]


def coloured(css: str) -> set[str]:
    """Return what has a colour of its own."""
    return {rule.strip() for rule in re.findall(r"([^{}/]+)\{[^{}]*(?:fill|stroke): #", re.sub(r"/\*.*?\*/", "", css))}


@pytest.mark.parametrize("name", PICTURES)
class TestEachPicture:
    def test_is_described_for_those_who_do_not_see_it(self, name):
        picture = parsed(name)
        assert picture.get("role") == "img"
        described = {child.get("id"): child.text for child in picture if child.tag in (f"{SVG}title", f"{SVG}desc")}
        assert list(described) == picture.get("aria-labelledby").split() == ["title", "desc"]
        assert all(described.values())

    def test_is_small_and_needs_nothing_but_itself(self, name):
        """Pages show it as an image: there no script runs, and nothing is loaded."""
        text = (DOCS / name).read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert len(text.encode()) < (8_000 if name in HAND_MADE else 30_000)
        assert not re.search(r"<script|<foreignObject|<image|<use|href|\bon\w+=|@import|javascript:|//", text)
        assert all(target.startswith("#") for target in re.findall(r"url\((.*?)\)", text))
        assert "/home" not in text and str(ROOT) not in text

    def test_has_colours_for_light_and_dark(self, name):
        """A colour that only the light theme knows would be hard to see in the dark."""
        light, dark = style(name).split("@media (prefers-color-scheme: dark)")
        assert coloured(light) == coloured(dark)


def test_the_diagrams_have_one_style_and_name_what_the_scripts_use():
    assert len({style(name) for name in HAND_MADE}) == 1
    assert task_queue.QUEUE in " ".join(lines("queue.svg"))
    assert f"after {dead_letters.MAX_DELIVERIES} deliveries" in " ".join(lines("life-of-a-task.svg"))


def test_the_recording_shows_what_the_shells_really_show(broker, shells, tmp_path):
    """When a line of the scripts has changed, docs/recording.svg must be made again: make recording."""
    picture = tmp_path / "recording.svg"
    recorder = shells.start("tools/recording.py", "--url", broker.url, "--output", str(picture))
    try:
        assert recorder.ends(within=60) == 0, str(recorder)
    finally:
        recorder.terminate()  # not killed: it must end its workers
        recorder.ends()
    seen = lines(picture)
    end = seen.index("Shell 3")
    assert seen[end - 2 : end] == [" [x] Received 'A long one.....' (redelivered)", " [x] Done"]
    assert seen == lines("recording.svg")
