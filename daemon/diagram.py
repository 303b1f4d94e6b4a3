"""The state diagram, drawn from `machine.states.TRANSITIONS`: a picture cannot say what is not so.

Formats: mermaid, dot, svg, png, md, json. `json` is also what a later `--diff` compares with. The
drawing is our own: four states need no layout engine in a process that keeps a lease (Graphviz in
a wheel is 110 MB of native code), and a table that changes is laid out by the same few rules.

Never lives here: a state or a transition; those are read from the table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from machine.states import INITIAL, MEANINGS, TRANSITIONS, Rule, State, Trigger

STATES_MAX = 50
RULES_MAX = 500

WHY: dict[Trigger, str] = {
    Trigger.BOOTED: "the local state is open and the listeners are bound",
    Trigger.ACTIVATE: "the lease was granted under a new epoch",
    Trigger.STEP_DOWN: "the lease was lost, an operator asked, neither store could be restored "
    "from, or the bridge died beyond repair",
    Trigger.DRAIN: "SIGTERM, SIGINT or an operator's drain",
}
"""What makes each trigger be fired, in one line."""


class Format(StrEnum):
    """What a diagram can be rendered as."""

    MERMAID = "mermaid"
    DOT = "dot"
    SVG = "svg"
    PNG = "png"
    MD = "md"
    JSON = "json"


class DiagramRefused(Exception):
    """The diagram cannot be made; the message says why and what to do."""


class Change(StrEnum):
    """What became of a transition since the table it is compared with."""

    KEPT = "kept"
    ADDED = "added"
    REMOVED = "removed"
    CHANGED = "changed"


MARKS = {Change.KEPT: "", Change.ADDED: "+ ", Change.REMOVED: "- ", Change.CHANGED: "~ "}
"""Written in front of a label, so that a change is not told by colour alone."""

COLOURS = {
    Change.KEPT: "#374151",
    Change.ADDED: "#15803d",
    Change.REMOVED: "#b91c1c",
    Change.CHANGED: "#b45309",
}


@dataclass(frozen=True, slots=True)
class Arrow:
    """One transition to draw. `former_dest` is where a changed one led before."""

    trigger: str
    source: str
    dest: str
    change: Change = Change.KEPT
    former_dest: str | None = None

    @property
    def label(self) -> str:
        """The trigger, with its mark and where it led before."""
        former = f" (was to {self.former_dest})" if self.former_dest else ""
        return f"{MARKS[self.change]}{self.trigger}{former}"


@dataclass(frozen=True, slots=True)
class Diagram:
    """What is drawn: the states in order, the arrows, and where the instance stands now."""

    states: Mapping[str, str]
    """Each state with its meaning."""
    initial: str
    arrows: tuple[Arrow, ...]
    current: str | None = None
    state_changes: Mapping[str, Change] | None = None

    @property
    def compared(self) -> bool:
        """Whether this shows a difference between two tables."""
        return self.state_changes is not None

    @property
    def final(self) -> tuple[str, ...]:
        """The states that nothing leads out of."""
        sources = {arrow.source for arrow in self.arrows if arrow.change is not Change.REMOVED}
        gone = {
            state for state, what in (self.state_changes or {}).items() if what is Change.REMOVED
        }
        return tuple(state for state in self.states if state not in sources | gone)


def build(
    current: State | None = None,
    old: Mapping[str, Any] | None = None,
    rules: Sequence[Rule] = TRANSITIONS,
) -> Diagram:
    """Make a diagram of the table, compared with `old` (an earlier JSON rendering) when given.

    Raises `DiagramRefused` when `old` is no such thing.
    """
    states = {state.value: MEANINGS[state] for state in State}
    new = {(rule.trigger.value, rule.source.value): rule.dest.value for rule in rules}
    here = current.value if current else None
    if old is None:
        arrows = tuple(Arrow(trigger, source, dest) for (trigger, source), dest in new.items())
        return Diagram(states, INITIAL.value, arrows, here)
    old_states, former = _read_old(old)
    arrows = tuple(_compare(former, new))
    changes = {
        state: Change.ADDED if state not in old_states else Change.KEPT for state in states
    } | {state: Change.REMOVED for state in old_states if state not in states}
    return Diagram({**old_states, **states}, INITIAL.value, arrows, here, changes)


def _compare(
    former: Mapping[tuple[str, str], str], new: Mapping[tuple[str, str], str]
) -> Iterator[Arrow]:
    for (trigger, source), dest in new.items():
        was = former.get((trigger, source))
        if was is None:
            yield Arrow(trigger, source, dest, Change.ADDED)
        elif was != dest:
            yield Arrow(trigger, source, dest, Change.CHANGED, was)
        else:
            yield Arrow(trigger, source, dest)
    for (trigger, source), dest in former.items():
        if (trigger, source) not in new:
            yield Arrow(trigger, source, dest, Change.REMOVED)


def _read_old(old: Mapping[str, Any]) -> tuple[dict[str, str], dict[tuple[str, str], str]]:
    try:
        states = {str(item["name"]): str(item["meaning"]) for item in old["states"]}
        rules = {
            (str(item["trigger"]), str(item["source"])): str(item["dest"])
            for item in old["transitions"]
            if item.get("change") != Change.REMOVED
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise DiagramRefused(
            "the file to compare with is no diagram of ours. Make one, at the revision to compare "
            "with, by `watchkeeper diagram --format json`."
        ) from error
    named = {state for key, dest in rules.items() for state in (key[1], dest)}
    if not named <= set(states) or len(states) > STATES_MAX or len(rules) > RULES_MAX:
        raise DiagramRefused("the file to compare with names states that it does not list")
    return states, rules


def parse_old(raw: bytes) -> Mapping[str, Any]:
    """Read the file that a diagram is compared with.

    Raises `DiagramRefused` when it is no JSON object.
    """
    try:
        old = json.loads(raw)
    except ValueError as error:
        raise DiagramRefused(f"the file to compare with is no JSON: {error}") from error
    if not isinstance(old, dict):
        raise DiagramRefused("the file to compare with holds no JSON object")
    return old


def render(
    format: Format | str,
    *,
    current: State | None = None,
    old: Mapping[str, Any] | None = None,
) -> bytes:
    """Draw the table: UTF-8 text, or the bytes of a picture.

    Raises `DiagramRefused`: an unknown format, an unreadable `old`, no font for a PNG.
    """
    return render_diagram(build(current, old), format)


def render_diagram(diagram: Diagram, format: Format | str) -> bytes:
    """Draw a diagram that was built before. Raises `DiagramRefused` as `render` does."""
    try:
        wanted = Format(format)
    except ValueError as error:
        known = ", ".join(Format)
        raise DiagramRefused(f"{str(format)[:30]!r} is no format. Known: {known}.") from error
    if wanted is Format.PNG:
        return _png(diagram)
    texts = {
        Format.MERMAID: _mermaid,
        Format.DOT: _dot,
        Format.SVG: _svg,
        Format.MD: _markdown,
        Format.JSON: _json,
    }
    return texts[wanted](diagram).encode()


# --- text ------------------------------------------------------------------------------------


def _json(diagram: Diagram) -> str:
    changes = diagram.state_changes or {}
    states = [
        {"name": name, "meaning": meaning}
        | ({"change": changes[name].value} if diagram.compared else {})
        for name, meaning in diagram.states.items()
    ]
    transitions = [
        {"trigger": arrow.trigger, "source": arrow.source, "dest": arrow.dest}
        | ({"change": arrow.change.value} if diagram.compared else {})
        | ({"formerDest": arrow.former_dest} if arrow.former_dest else {})
        for arrow in diagram.arrows
    ]
    table: dict[str, object] = {"initial": diagram.initial, "states": states}
    if diagram.current:
        table["current"] = diagram.current
    return json.dumps({**table, "transitions": transitions}, indent=2) + "\n"


def _mermaid(diagram: Diagram) -> str:
    lines = ["stateDiagram-v2", "    direction LR", f"    [*] --> {diagram.initial}"]
    lines += [
        f"    {arrow.source} --> {arrow.dest} : {arrow.label.strip()}" for arrow in diagram.arrows
    ]
    lines += [f"    {state} --> [*]" for state in diagram.final]
    lines += list(_mermaid_classes(diagram))
    return "\n".join(lines) + "\n"


def _mermaid_classes(diagram: Diagram) -> Iterator[str]:
    if diagram.current:
        yield "    classDef present fill:#dcfce7,stroke:#15803d,stroke-width:3px"
        yield f"    class {diagram.current} present"
    for change in (Change.ADDED, Change.REMOVED):
        named = [state for state, what in (diagram.state_changes or {}).items() if what is change]
        if named:
            yield f"    classDef {change} stroke:{COLOURS[change]},stroke-width:2px"
            yield f"    class {','.join(named)} {change}"


def _dot(diagram: Diagram) -> str:
    lines = [
        "digraph watchkeeper {",
        "  rankdir=LR;",
        '  node [shape=box, style="rounded,filled", fillcolor=white, fontname="Helvetica"];',
        '  edge [fontname="Helvetica", fontsize=11];',
        "  start [shape=point, width=0.15];",
        f"  start -> {_quoted(diagram.initial)};",
    ]
    for state in diagram.states:
        change = (diagram.state_changes or {}).get(state, Change.KEPT)
        present = state == diagram.current
        fill = "#dcfce7" if present else "white"
        width = 3 if present else 1
        note = "\\n(present)" if present else ""
        lines.append(
            f"  {_quoted(state)} [label={_quoted(MARKS[change] + state, note)}, "
            f'color="{COLOURS[change]}", fillcolor="{fill}", penwidth={width}];'
        )
    for arrow in diagram.arrows:
        colour = COLOURS[arrow.change]
        style = "dashed" if arrow.change is Change.REMOVED else "solid"
        lines.append(
            f"  {_quoted(arrow.source)} -> {_quoted(arrow.dest)} [label={_quoted(arrow.label)}, "
            f'color="{colour}", fontcolor="{colour}", style={style}];'
        )
    return "\n".join([*lines, "}"]) + "\n"


def _quoted(text: str, raw_suffix: str = "") -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}{raw_suffix}"'


def _markdown(diagram: Diagram) -> str:
    lines = ["```mermaid", _mermaid(diagram).rstrip("\n"), "```", ""]
    lines += _state_table(diagram)
    lines += ["", *_transition_table(diagram)]
    return "\n".join(lines) + "\n"


def _state_table(diagram: Diagram) -> Iterator[str]:
    extra = " | change" if diagram.compared else ""
    yield f"| state | means{extra} |"
    yield "|---|---|" + ("---|" if diagram.compared else "")
    for state, meaning in diagram.states.items():
        name = f"**{state}** (present)" if state == diagram.current else state
        change = f" | {diagram.state_changes[state]}" if diagram.state_changes else ""
        yield f"| {name} | {_cell(meaning)}{change} |"


def _transition_table(diagram: Diagram) -> Iterator[str]:
    extra = " | change" if diagram.compared else ""
    yield f"| from | trigger | to | fired when{extra} |"
    yield "|---|---|---|---|" + ("---|" if diagram.compared else "")
    for arrow in diagram.arrows:
        known = arrow.trigger in set(Trigger)
        why = WHY[Trigger(arrow.trigger)] if known else ""
        former = f", was to {arrow.former_dest}" if arrow.former_dest else ""
        change = f" | {arrow.change}{former}" if diagram.compared else ""
        yield f"| {arrow.source} | `{arrow.trigger}` | {arrow.dest} | {_cell(why)}{change} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# --- pictures --------------------------------------------------------------------------------

BOX_WIDTH, BOX_HEIGHT = 232, 112
GAP_X, GAP_Y = 150, 96
MARGIN = 48
ARC_HEIGHT, LANE = 40, 56
LINE_CHARACTERS = 33
FONT = "Helvetica, Arial, 'DejaVu Sans', sans-serif"

PLACES: dict[str, tuple[int, int]] = {
    State.BOOTING.value: (0, 0),
    State.PASSIVE.value: (1, 0),
    State.ACTIVE.value: (2, 0),
    State.DRAINING.value: (1, 1),
}
"""Column and row of the states we know; others follow in further rows."""

FILLS = {
    State.BOOTING.value: "#f3f4f6",
    State.PASSIVE.value: "#dbeafe",
    State.ACTIVE.value: "#dcfce7",
    State.DRAINING.value: "#fef3c7",
}


@dataclass(frozen=True, slots=True)
class _Box:
    """A state's place, in pixels; `column` and `row` decide how arrows run."""

    column: int
    row: int
    head_room: float

    @property
    def left(self) -> float:
        return MARGIN + 24 + self.column * (BOX_WIDTH + GAP_X)

    @property
    def top(self) -> float:
        return MARGIN + self.head_room + self.row * (BOX_HEIGHT + GAP_Y)

    @property
    def right(self) -> float:
        return self.left + BOX_WIDTH

    @property
    def bottom(self) -> float:
        return self.top + BOX_HEIGHT

    @property
    def middle(self) -> tuple[float, float]:
        return self.left + BOX_WIDTH / 2, self.top + BOX_HEIGHT / 2


def _place(diagram: Diagram) -> dict[str, _Box]:
    """Give known states their places, and others columns of their own to the right."""
    column = max(place[0] for place in PLACES.values()) + 1
    others = [name for name in diagram.states if name not in PLACES]
    places = PLACES | {name: (column + index // 2, index % 2) for index, name in enumerate(others)}
    arcs = sum(
        places[arrow.source][1] == places[arrow.dest][1]
        and abs(places[arrow.source][0] - places[arrow.dest][0]) != 1
        for arrow in diagram.arrows
    )
    head_room = ARC_HEIGHT * arcs + (16 if diagram.current else 0)
    return {name: _Box(*places[name], head_room) for name in diagram.states}


def _svg(diagram: Diagram) -> str:
    boxes = _place(diagram)
    width = max(box.right for box in boxes.values()) + MARGIN
    height = max(box.bottom for box in boxes.values()) + 68 + (44 if diagram.compared else 0)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" font-family="{FONT}" role="img">'
    )
    parts = [
        head,
        "<title>Watchkeeper: states and transitions</title>",
        "<defs>",
        *(_arrow_head(change) for change in Change),
        "</defs>",
        f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>',
        *_start_and_end(diagram, boxes),
        *_svg_arrows(diagram, boxes),
        *(_svg_box(diagram, name, box) for name, box in boxes.items()),
    ]
    if diagram.compared:
        parts += _legend(height)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _arrow_head(change: Change) -> str:
    return (
        f'<marker id="head-{change}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" '
        'markerHeight="8" markerUnits="userSpaceOnUse" orient="auto-start-reverse">'
        f'<path d="M0 0L10 5L0 10z" fill="{COLOURS[change]}"/></marker>'
    )


def _start_and_end(diagram: Diagram, boxes: Mapping[str, _Box]) -> Iterator[str]:
    first = boxes[diagram.initial]
    x, y = first.left - 48, first.middle[1]
    yield f'<circle cx="{x:g}" cy="{y:g}" r="7" fill="#111827"/>'
    yield _path(f"M{x + 7:g} {y:g}H{first.left:g}", Change.KEPT)
    for name in diagram.final:
        x, y = boxes[name].middle[0], boxes[name].bottom + 40
        yield _path(f"M{x:g} {boxes[name].bottom:g}V{y - 9:g}", Change.KEPT)
        yield f'<circle cx="{x:g}" cy="{y:g}" r="8" fill="#fff" stroke="#111827" stroke-width="2"/>'
        yield f'<circle cx="{x:g}" cy="{y:g}" r="4" fill="#111827"/>'


def _svg_box(diagram: Diagram, name: str, box: _Box) -> str:
    change = (diagram.state_changes or {}).get(name, Change.KEPT)
    present = name == diagram.current
    stroke = "#111827" if present else COLOURS[change]
    dash = ' stroke-dasharray="7 5"' if change is Change.REMOVED else ""
    x = box.middle[0]
    frame = (
        f'<rect x="{box.left:g}" y="{box.top:g}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" '
        f'rx="14" fill="{FILLS.get(name, "#f3f4f6")}" stroke="{stroke}" '
        f'stroke-width="{4 if present else 1.5}"{dash}/>'
    )
    lines = [_text(x, box.top + 31, MARKS[change] + name, 18, "#111827")]
    lines += [
        _text(x, box.top + 54 + 16 * number, line, 12, "#374151", weight=400)
        for number, line in enumerate(_wrapped(diagram.states[name]))
    ]
    if present:
        lines.append(
            f'<rect x="{x - 44:g}" y="{box.top - 15:g}" width="88" height="24" rx="12" '
            'fill="#111827"/>'
        )
        lines.append(_text(x, box.top + 2, "present", 12, "#ffffff"))
    mark = ' data-present="true"' if present else ""
    return f"<g data-state={quoteattr(name)}{mark}>{frame}{''.join(lines)}</g>"


def _text(x: float, y: float, text: str, size: int, colour: str, *, weight: int = 700) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="middle" font-size="{size}" '
        f'font-weight="{weight}" fill="{colour}">{escape(text)}</text>'
    )


def _wrapped(text: str) -> list[str]:
    """Break a meaning into at most four lines that fit a box."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > LINE_CHARACTERS:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines if len(lines) <= 4 else [*lines[:3], lines[3] + " …"]


@dataclass(slots=True)
class _Ports:
    """Where on a box's sides arrows begin and end, so that no two share a line."""

    used: dict[tuple[str, str], int]
    arcs: int = 0

    def take(self, state: str, side: str) -> float:
        """Take the next place on a side: the middle, then alternately beside it."""
        count = self.used[state, side] = self.used.get((state, side), -1) + 1
        return LANE * ((count + 1) // 2) * (1 if count % 2 else -1)


def _svg_arrows(diagram: Diagram, boxes: Mapping[str, _Box]) -> Iterator[str]:
    """Draw every arrow: those to a neighbour first, since they run straight through the middle."""
    ports = _Ports({})
    pairs: dict[frozenset[str], list[Arrow]] = {}
    for arrow in diagram.arrows:
        pairs.setdefault(frozenset({arrow.source, arrow.dest}), []).append(arrow)
    others: list[Arrow] = []
    for arrows in pairs.values():
        one, two = boxes[arrows[0].source], boxes[arrows[0].dest]
        if one.row != two.row or abs(one.column - two.column) != 1:
            others += arrows
            continue
        ordered = sorted(arrows, key=lambda arrow: (boxes[arrow.source].column, arrow.trigger))
        for index, arrow in enumerate(ordered):
            lane = (index - (len(ordered) - 1) / 2) * 40
            yield _svg_arrow(arrow, *_straight(boxes[arrow.source], boxes[arrow.dest], lane))
        for arrow in arrows[:1]:
            left, right = sorted((arrow.source, arrow.dest), key=lambda name: boxes[name].column)
            ports.take(left, "right")
            ports.take(right, "left")
    # Loops first: they stay low, and each arc after them runs above the one before.
    for arrow in sorted(others, key=lambda arrow: arrow.source != arrow.dest):
        yield _svg_arrow(arrow, *_bent(arrow, boxes, ports))


def _svg_arrow(arrow: Arrow, path: str, x: float, y: float) -> str:
    title = f"{arrow.source} to {arrow.dest}: {arrow.label}"
    if arrow.trigger in set(Trigger):
        title += f" ({WHY[Trigger(arrow.trigger)]})"
    words = [(MARKS[arrow.change] + arrow.trigger, 14)]
    if arrow.former_dest:
        words.append((f"was to {arrow.former_dest}", 12))
    labels = "".join(
        f'<text x="{x:g}" y="{y + 16 * number:g}" text-anchor="middle" font-size="{size}" '
        f'font-weight="600" fill="{COLOURS[arrow.change]}" stroke="#ffffff" stroke-width="5" '
        f'stroke-linejoin="round" paint-order="stroke">{escape(text)}</text>'
        for number, (text, size) in enumerate(words)
    )
    return (
        f"<g data-change={quoteattr(arrow.change.value)}><title>{escape(title)}</title>"
        f"{_path(path, arrow.change)}{labels}</g>"
    )


def _straight(source: _Box, dest: _Box, lane: float) -> tuple[str, float, float]:
    """Run to a neighbour in the same row; the label is above, or below the lower of two."""
    y = source.middle[1] + lane
    forth = source.column < dest.column
    start, end = (source.right, dest.left) if forth else (source.left, dest.right)
    return f"M{start:g} {y:g}H{end:g}", (start + end) / 2, y + (-9 if lane <= 0 else 19)


def _bent(arrow: Arrow, boxes: Mapping[str, _Box], ports: _Ports) -> tuple[str, float, float]:
    """Run over the heads of a row, straight down or up, or round one corner."""
    source, dest = boxes[arrow.source], boxes[arrow.dest]
    if source == dest:
        x, y = source.right - 56, source.top
        ports.arcs += 1
        return f"M{x:g} {y:g}c-6 -40 44 -40 36 -2", x + 16, y - 36
    if source.row == dest.row:
        x = source.middle[0] + ports.take(arrow.source, "top")
        end = dest.middle[0] + ports.take(arrow.dest, "top")
        ports.arcs += 1
        peak = source.top - ARC_HEIGHT * ports.arcs * 4 / 3
        path = f"M{x:g} {source.top:g}C{x:g} {peak:g} {end:g} {peak:g} {end:g} {dest.top:g}"
        return path, (x + end) / 2, source.top - ARC_HEIGHT * ports.arcs + 5
    down = source.row < dest.row
    start, end = (source.bottom, dest.top) if down else (source.top, dest.bottom)
    x = source.middle[0] + ports.take(arrow.source, "bottom" if down else "top")
    if source.column == dest.column:
        return f"M{x:g} {start:g}V{end:g}", x, (start + end) / 2 + 5
    forth = source.column < dest.column
    y = dest.middle[1] + ports.take(arrow.dest, "left" if forth else "right")
    side = dest.left if forth else dest.right
    bend, turn = (16 if forth else -16), (16 if down else -16)
    corner = f"V{y - turn:g}Q{x:g} {y:g} {x + bend:g} {y:g}"
    # The label sits on the vertical part, beyond what its neighbours' labels cover.
    return f"M{x:g} {start:g}{corner}H{side:g}", x, (start + y) / 2 + 5 + (x - source.middle[0]) / 2


def _path(path: str, change: Change) -> str:
    dash = ' stroke-dasharray="7 5"' if change is Change.REMOVED else ""
    width = 1.8 if change is Change.KEPT else 3
    return (
        f'<path d="{path}" fill="none" stroke="{COLOURS[change]}" stroke-width="{width}"{dash} '
        f'marker-end="url(#head-{change})"/>'
    )


def _legend(height: float) -> Iterator[str]:
    x = MARGIN
    for change in (Change.ADDED, Change.REMOVED, Change.CHANGED):
        y = height - 26
        yield _path(f"M{x:g} {y:g}h44", change)
        yield (
            f'<text x="{x + 54:g}" y="{y + 5:g}" font-size="14" fill="{COLOURS[change]}">'
            f"{escape(MARKS[change])}{change}</text>"
        )
        x += 170


def _png(diagram: Diagram) -> bytes:
    import resvg_py

    if resvg_py.svg_to_bytes(svg_string=_probe("M")) == resvg_py.svg_to_bytes(
        svg_string=_probe("")
    ):
        raise DiagramRefused(
            "this machine has no font, so a PNG would have no words. Install one (Debian: "
            "fonts-dejavu-core), or take --format svg."
        )
    return bytes(resvg_py.svg_to_bytes(svg_string=_svg(diagram), zoom=2))


def _probe(text: str) -> str:
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" width="20" height="20">'
        f'<text x="2" y="16" font-size="16" font-family="{FONT}">{text}</text></svg>'
    )
