from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from daemon.diagram import (
    WHY,
    Change,
    DiagramRefused,
    Format,
    build,
    parse_old,
    render,
    render_diagram,
)
from daemon.generate_docs import PAGES, main, stale_pages, write_pages
from machine.states import TRANSITIONS, Rule, State, Trigger

SVG = "{http://www.w3.org/2000/svg}"
TEXT_FORMATS = [Format.MERMAID, Format.DOT, Format.SVG, Format.MD]


def table() -> dict[str, Any]:
    made: dict[str, Any] = json.loads(render("json"))
    return made


def other_table() -> dict[str, Any]:
    """An earlier machine: one rule fewer, one more, one that led elsewhere, one more state."""
    old = table()
    old["transitions"] = [
        rule
        for rule in old["transitions"]
        if (rule["source"], rule["trigger"]) != ("ACTIVE", "drain")
    ]
    for rule in old["transitions"]:
        if rule["trigger"] == "step_down":
            rule["dest"] = "BOOTING"
    old["states"].append({"name": "BROKEN", "meaning": 'gone <wrong> & "bad"'})
    old["transitions"].append({"trigger": "break_", "source": "ACTIVE", "dest": "BROKEN"})
    return old


def test_every_trigger_has_its_reason() -> None:
    assert set(WHY) == set(Trigger)


@pytest.mark.parametrize("format", TEXT_FORMATS)
def test_every_rule_of_the_table_is_drawn(format: Format) -> None:
    drawn = render(format).decode()
    for state in State:
        assert state.value in drawn
    for trigger in {rule.trigger for rule in TRANSITIONS}:
        assert drawn.count(trigger.value) >= sum(r.trigger is trigger for r in TRANSITIONS)


def test_a_rule_more_in_the_table_is_an_arrow_more() -> None:
    more = (*TRANSITIONS, Rule(Trigger.BOOTED, State.DRAINING, State.BOOTING))
    few = render_diagram(build(), Format.DOT).decode().count("->")
    assert render_diagram(build(rules=more), Format.DOT).decode().count("->") == few + 1
    # DRAINING is no end any more.
    assert "DRAINING --> [*]" in render(Format.MERMAID).decode()
    assert "DRAINING --> [*]" not in render_diagram(build(rules=more), Format.MERMAID).decode()
    drawn = ET.fromstring(render_diagram(build(rules=more), Format.SVG))
    assert len(drawn.findall(f"{SVG}g[@data-change]")) == len(more)


def test_svg_is_well_formed_and_marks_the_present_state() -> None:
    root = ET.fromstring(render("svg", current=State.ACTIVE))
    present = [g.get("data-state") for g in root.iter(f"{SVG}g") if g.get("data-present")]
    assert present == ["ACTIVE"]
    assert not ET.fromstring(render("svg")).findall(f"{SVG}g[@data-present]")


@pytest.mark.parametrize("format", [Format.MERMAID, Format.DOT, Format.MD, Format.JSON])
def test_text_marks_the_present_state(format: Format) -> None:
    assert render(format, current=State.PASSIVE) != render(format)


def test_boxes_of_the_picture_do_not_overlap() -> None:
    root = ET.fromstring(render("svg", old=other_table()))
    boxes = [
        (float(box.get("x", 0)), float(box.get("y", 0)))
        for group in root.findall(f"{SVG}g[@data-state]")
        for box in group.findall(f"{SVG}rect")
    ]
    assert len(boxes) == len(set(boxes)) == 5
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    assert all(0 < x < width and 0 < y < height for x, y in boxes)


def test_png_is_a_picture_at_twice_the_size() -> None:
    drawn = render("png", current=State.ACTIVE)
    root = ET.fromstring(render("svg", current=State.ACTIVE))
    assert drawn.startswith(b"\x89PNG\r\n")
    assert int.from_bytes(drawn[16:20], "big") == 2 * float(root.get("width", 0))


def test_same_table_has_no_difference() -> None:
    diagram = build(old=table())
    assert {arrow.change for arrow in diagram.arrows} == {Change.KEPT}


def test_difference_finds_added_removed_and_changed() -> None:
    diagram = build(old=other_table())
    found = {
        (arrow.source, arrow.trigger): (arrow.change, arrow.former_dest)
        for arrow in diagram.arrows
        if arrow.change is not Change.KEPT
    }
    assert found == {
        ("ACTIVE", "drain"): (Change.ADDED, None),
        ("ACTIVE", "step_down"): (Change.CHANGED, "BOOTING"),
        ("ACTIVE", "break_"): (Change.REMOVED, None),
    }
    assert diagram.state_changes is not None
    assert diagram.state_changes["BROKEN"] is Change.REMOVED


@pytest.mark.parametrize("format", TEXT_FORMATS)
def test_difference_is_marked_in_words_not_by_colour_alone(format: Format) -> None:
    drawn = render(format, old=other_table()).decode()
    assert "+ drain" in drawn
    assert "- break_" in drawn
    assert "~ step_down" in drawn
    assert "was to BOOTING" in drawn


def test_difference_in_json_can_be_compared_with_again() -> None:
    marked = json.loads(render("json", old=other_table()))
    assert {rule["change"] for rule in marked["transitions"]} == set(Change)
    assert all(arrow.change is Change.KEPT for arrow in build(old=marked).arrows)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"{",
        b'{"states": 1}',
        b'{"states": [], "transitions": [{"trigger": "a", "source": "X", "dest": "Y"}]}',
    ],
)
def test_file_that_is_no_diagram_is_refused(raw: bytes) -> None:
    with pytest.raises(DiagramRefused):
        build(old=parse_old(raw))


def test_unknown_format_is_refused_with_the_known_ones() -> None:
    with pytest.raises(DiagramRefused, match="mermaid, dot, svg, png, md, json"):
        render("gif")


def test_generated_docs_are_current() -> None:
    assert list(stale_pages()) == [], "run `python -m daemon.generate_docs`"
    assert main(["--check"]) == 0


def test_a_stale_page_is_named(tmp_path: Path) -> None:
    write_pages(tmp_path)
    assert list(stale_pages(tmp_path)) == []
    (tmp_path / "settings.md").write_text("old")
    (tmp_path / "events.md").unlink()
    assert set(stale_pages(tmp_path)) == {"settings.md", "events.md"} < set(PAGES)
