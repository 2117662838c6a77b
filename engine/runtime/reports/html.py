"""Building blocks of self-contained HTML reports: tiles, tables, and charts as inline SVG.

A report is one file without external scripts, fonts or images, so it opens offline and prints. Colours follow
the reader's light or dark setting. Every text is escaped here; callers pass plain strings.

    page("Title", "subtitle", [section("Quality", tiles([...]), row(card("ROC", line_chart([...])), ...))])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup, escape

from engine.runtime.reports.style import STYLE

Number = float | int | None
Formatter = Callable[[float], str]
WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 14, 40
PALETTE = 6
NAME, SENTENCE = 24, 60  # letters of a cell: up to NAME it is not broken, from SENTENCE on it has a width of its own
ONE_BAND = 0.02  # half the width of a band of one point, of the axis


# ------------------------------------------------------------------------------------------------------- numbers


def format_number(value: Any, digits: int = 4) -> str:
    """Short text of a number: 0.7482, 28,243, 1.2e-07; a dash for a missing value."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, (bool, str)):
        return str(value)
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}" if abs(value) < 1e15 else f"{value:.{digits}g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if abs(value) >= 1e-3 else f"{value:.2g}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers within [low, high]."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low]
    raw = (high - low) / max(count, 1)
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [0.0 if k == 0 else k * step for k in range(first, last + 1)]


def _tick_text(value: float) -> str:
    if value != 0 and (abs(value) >= 1e5 or abs(value) < 1e-4):
        return f"{value:.3g}"
    return f"{value:,.4f}".rstrip("0").rstrip(".") if abs(value) < 1000 else f"{value:,.0f}"


# --------------------------------------------------------------------------------------------------------- text


@dataclass(frozen=True)
class Tile:
    """One figure in a row of tiles; `tone` is good, bad, warn or plain."""

    label: str
    value: str
    note: str = ""
    tone: str = "plain"


def tiles(items: Iterable[Tile]) -> Markup:
    """A row of figures."""
    parts = [
        Markup(
            '<div class="tile {}"><div class="label">{}</div><div class="value">{}</div>'
            '<div class="note">{}</div></div>'
        ).format(item.tone, item.label, item.value, item.note)
        for item in items
    ]
    return Markup('<div class="tiles">{}</div>').format(Markup("").join(parts))


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, empty: str = "nothing to show") -> Markup:
    """A table; numbers are shortened and right-aligned, as are their titles. A cell may be Markup, such as `bar`."""
    body = []
    titled = [""] * len(columns)
    for cells in rows:
        parts = []
        for place, cell in enumerate(cells):
            number = isinstance(cell, (int, float)) and not isinstance(cell, bool)
            titled[place] = "num" if number else titled[place]
            text = cell if isinstance(cell, Markup) else escape(format_number(cell) if number or cell is None else cell)
            kind = "num" if number or cell is None else _width(text)
            parts.append(Markup('<td class="{}">{}</td>').format(kind, text))
        body.append(Markup("<tr>{}</tr>").format(Markup("").join(parts)))
    if not body:
        return paragraph(empty, quiet=True)
    head = Markup("").join(
        Markup('<th class="{}">{}</th>').format(kind, name) for kind, name in zip(titled, columns, strict=True)
    )
    return Markup('<div class="scroll"><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>').format(
        head, Markup("").join(body)
    )


def _width(cell: Markup) -> str:
    """The class of a cell by the letters that a reader sees."""
    letters = len(cell.striptags())
    return "short" if letters <= NAME else "long" if letters >= SENTENCE and "<" not in cell else ""


def bar(share: float, text: str = "") -> Markup:
    """A table cell with a bar of `share` (0 to 1) of its width behind a text."""
    width = 100 * min(max(share, 0.0), 1.0)
    return Markup('<div class="bar"><i style="width:{}%"></i><span>{}</span></div>').format(f"{width:.1f}", text)


def badge(text: str, tone: str = "plain") -> Markup:
    """A table cell with a state in its colour; `tone` as of a tile."""
    return Markup('<span class="badge {}">{}</span>').format(tone, text)


def link(text: str, path: str) -> Markup:
    """A link to a file, by its path relative to the page; no text in it can become the scheme of an address."""
    return Markup('<a href="{}">{}</a>').format(quote(path), text)


def folded(title: str, *body: Markup, opened: bool = False) -> Markup:
    """A part of which only the title is seen until the reader opens it."""
    state = Markup(" open") if opened else Markup("")
    return Markup("<details{}><summary>{}</summary>{}</details>").format(state, title, Markup("").join(body))


def paragraph(text: str, *, quiet: bool = False) -> Markup:
    """A paragraph."""
    return Markup('<p class="{}">{}</p>').format("quiet" if quiet else "", text)


def preformatted(text: str) -> Markup:
    """Preformatted text."""
    return Markup('<pre class="scroll">{}</pre>').format(text)


def facts(pairs: Mapping[str, object]) -> Markup:
    """Names and values, one per line."""
    lines = [
        Markup("<dt>{}</dt><dd>{}</dd>").format(
            name, value if isinstance(value, (str, Markup)) else format_number(value)
        )
        for name, value in pairs.items()
    ]
    return Markup("<dl>{}</dl>").format(Markup("").join(lines))


def card(title: str, *body: Markup, note: str = "") -> Markup:
    """A titled box."""
    foot = Markup('<p class="quiet">{}</p>').format(note) if note else Markup("")
    return Markup('<div class="card"><h3>{}</h3>{}{}</div>').format(title, Markup("").join(body), foot)


def row(*cards: Markup) -> Markup:
    """Cards side by side where the window is wide enough."""
    return Markup('<div class="row">{}</div>').format(Markup("").join(cards))


def section(title: str, *body: Markup, note: str = "") -> Markup:
    """A titled part of the page."""
    head = Markup('<p class="quiet">{}</p>').format(note) if note else Markup("")
    return Markup("<section><h2>{}</h2>{}{}</section>").format(title, head, Markup("").join(body))


# -------------------------------------------------------------------------------------------------------- charts


@dataclass(frozen=True)
class Series:
    """One line: points (None or NaN leaves a gap), an optional band, `style` solid, dashed or dots."""

    name: str
    x: Sequence[float]
    y: Sequence[Number]
    low: Sequence[Number] | None = None
    high: Sequence[Number] | None = None
    style: str = "solid"
    colour: int | None = None


@dataclass(frozen=True)
class _Frame:
    """Data coordinates to pixels."""

    x: tuple[float, float]
    y: tuple[float, float]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT

    def at_x(self, value: float) -> float:
        share = (value - self.x[0]) / ((self.x[1] - self.x[0]) or 1.0)
        return self.left + share * (self.width - self.left - RIGHT)

    def at_y(self, value: float) -> float:
        share = (value - self.y[0]) / ((self.y[1] - self.y[0]) or 1.0)
        return self.height - BOTTOM - share * (self.height - TOP - BOTTOM)


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str = "",
    y_label: str = "",
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    x_ticks: Mapping[float, str] | None = None,
    lines: Mapping[str, float] | None = None,
) -> Markup:
    """Lines with bands. `x_ticks` names positions on the x axis; `lines` are named horizontal rules (a threshold)."""
    xs = [x for item in series for x in item.x]
    ys = [y for item in series for values in (item.y, item.low or (), item.high or ()) for y in values if _known(y)]
    ys += list((lines or {}).values())
    if not xs or not ys:
        return paragraph("no points to draw", quiet=True)
    frame = _Frame(x_range or _span(xs, 0.0), y_range or _span(ys, 0.06))
    parts = [_axes(frame, x_label, y_label, x_ticks)]
    for name, value in (lines or {}).items():
        parts.append(_rule(frame, name, value))
    for place, item in enumerate(series):
        parts.append(_line(frame, item, _colour(item, place)))
    return _svg(frame, parts, _legend([(item.name, _colour(item, k), item.style) for k, item in enumerate(series)]))


def histogram(
    edges: Sequence[float],
    counts: Mapping[str, Sequence[float]],
    *,
    x_label: str = "",
    y_label: str = "rows",
    share: bool = False,
) -> Markup:
    """Overlaid histograms on shared edges; `share` divides each by its own total."""
    scaled = {name: _shares(values) if share else list(values) for name, values in counts.items()}
    top = max((value for values in scaled.values() for value in values), default=0.0)
    if top <= 0:
        return paragraph("no rows to draw", quiet=True)
    frame = _Frame((edges[0], edges[-1]), (0.0, top * 1.05))
    parts = [_axes(frame, x_label, "share" if share else y_label, None)]
    for place, (name, values) in enumerate(scaled.items()):
        for low, high, value in zip(edges[:-1], edges[1:], values, strict=True):
            x, y = frame.at_x(low), frame.at_y(value)
            parts.append(
                Markup(
                    '<rect class="f{}" x="{}" y="{}" width="{}" height="{}"><title>{}: {} to {}: {}</title></rect>'
                ).format(
                    place % PALETTE,
                    f"{x:.1f}",
                    f"{y:.1f}",
                    f"{max(frame.at_x(high) - x - 0.5, 0.5):.1f}",
                    f"{frame.at_y(0) - y:.1f}",
                    name,
                    format_number(low),
                    format_number(high),
                    format_number(value),
                )
            )
    return _svg(frame, parts, _legend([(name, k % PALETTE, "fill") for k, name in enumerate(scaled)]))


def interval_chart(
    labels: Sequence[str],
    values: Sequence[Number],
    low: Sequence[Number] | None = None,
    high: Sequence[Number] | None = None,
    *,
    x_label: str = "",
    reference: float | None = None,
) -> Markup:
    """One dot per label with its interval, from top to bottom; `reference` is a vertical rule (the value of all rows)."""
    known = [value for group in (values, low or (), high or ()) for value in group if _known(value)]
    if not known:
        return paragraph("nothing that can be computed", quiet=True)
    known += [reference] if reference is not None else []
    left = min(16 + 7 * max(len(label) for label in labels), 220)
    frame = _Frame(_span(known, 0.05), (0.0, float(len(labels))), WIDTH, TOP + BOTTOM + 20 * len(labels), left)
    parts = [_x_axis(frame, x_label, None)]
    if reference is not None:
        x = f"{frame.at_x(reference):.1f}"
        parts.append(_segment("rule", (x, x), (TOP, frame.height - BOTTOM)))
    for place, (label, value) in enumerate(zip(labels, values, strict=True)):
        y = TOP + 20 * place + 10
        parts.append(_tick(left - 8, y + 4, label))
        parts.append(_dot(frame, y, label, value, low[place] if low else None, high[place] if high else None))
    return _svg(frame, parts, Markup(""))


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[Number]],
    *,
    limits: tuple[float, float] | None = None,
    text: Formatter | None = None,
) -> Markup:
    """Cells shaded from `limits[0]` (clear) to `limits[1]` (full); a missing value is hatched."""
    known = [float(value) for line in values for value in line if value is not None and math.isfinite(value)]
    low, high = limits or ((min(known), max(known)) if known else (0.0, 1.0))
    write = text or format_number
    head = Markup("<th></th>") + Markup("").join(Markup("<th>{}</th>").format(name) for name in columns)
    body = []
    for name, line in zip(rows, values, strict=True):
        cells = []
        for column, value in zip(columns, line, strict=True):
            if not _known(value):
                cells.append(Markup('<td class="gap" title="{}, {}: not computable"></td>').format(name, column))
                continue
            share = min(max((float(value or 0.0) - low) / ((high - low) or 1.0), 0.0), 1.0)
            cells.append(
                Markup('<td style="--share:{}%" title="{}, {}: {}">{}</td>').format(
                    f"{100 * share:.0f}", name, column, format_number(value), write(float(value or 0.0))
                )
            )
        body.append(Markup("<tr><th>{}</th>{}</tr>").format(name, Markup("").join(cells)))
    return Markup(
        '<div class="scroll"><table class="heat"><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>'
    ).format(head, Markup("").join(body))


def _known(value: Number) -> bool:
    return value is not None and math.isfinite(value)


def _span(values: Sequence[Number], margin: float) -> tuple[float, float]:
    known = [float(value) for value in values if value is not None and math.isfinite(value)]
    low, high = min(known), max(known)
    if low == high:
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    return low - margin * (high - low), high + margin * (high - low)


def _shares(values: Sequence[float]) -> list[float]:
    total = sum(values)
    return [value / total if total else 0.0 for value in values]


def _axes(frame: _Frame, x_label: str, y_label: str, x_ticks: Mapping[float, str] | None) -> Markup:
    parts = []
    for value in ticks(*frame.y):
        y = frame.at_y(value)
        parts.append(_segment("grid", (frame.left, frame.width - RIGHT), (f"{y:.1f}", f"{y:.1f}")))
        parts.append(_tick(frame.left - 8, f"{y + 4:.1f}", _tick_text(value)))
    middle = (TOP + frame.height - BOTTOM) / 2
    parts.append(
        Markup('<text class="axis" transform="translate(13 {}) rotate(-90)" text-anchor="middle">{}</text>').format(
            middle, y_label
        )
    )
    return Markup("").join(parts) + _x_axis(frame, x_label, x_ticks)


def _x_axis(frame: _Frame, label: str, named: Mapping[float, str] | None) -> Markup:
    base = frame.height - BOTTOM
    parts = [_segment("base", (frame.left, frame.width - RIGHT), (base, base))]
    places = named or {value: _tick_text(value) for value in ticks(*frame.x, 6)}
    step = -(-len(places) // 12)
    for value, text in list(places.items())[::step]:
        parts.append(_tick(f"{frame.at_x(value):.1f}", base + 17, text, "middle"))
    middle = (frame.left + frame.width - RIGHT) / 2
    parts.append(
        Markup('<text class="axis" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            middle, frame.height - 6, label
        )
    )
    return Markup("").join(parts)


def _segment(kind: str, x: tuple[Any, Any], y: tuple[Any, Any]) -> Markup:
    """A straight line from (x[0], y[0]) to (x[1], y[1]), in pixels."""
    return Markup('<line class="{}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(kind, *x, *y)


def _tick(x: Any, y: Any, text: str, anchor: str = "end") -> Markup:
    """A small text at (x, y), in pixels."""
    return Markup('<text class="tick" x="{}" y="{}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


def _mark(kind: str, x: float, y: float, size: float, title: str) -> Markup:
    """A dot with a title."""
    return Markup('<circle class="{}" cx="{}" cy="{}" r="{}"><title>{}</title></circle>').format(
        kind, f"{x:.1f}", f"{y:.1f}", size, title
    )


def _colour(item: Series, place: int) -> int:
    return item.colour if item.colour is not None else place % PALETTE


def _line(frame: _Frame, item: Series, colour: int) -> Markup:
    parts = []
    if item.low is not None and item.high is not None:
        band = [
            place for place in zip(item.x, item.low, item.high, strict=True) if _known(place[1]) and _known(place[2])
        ]
        if len({x for x, _, _ in band}) == 1:  # a band of one point has no width
            aside = ONE_BAND * (frame.x[1] - frame.x[0])
            band = [(x + side, low, high) for x, low, high in band for side in (-aside, aside)]
        edge = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in reversed(band)]
        points = " ".join(f"{frame.at_x(x):.1f},{frame.at_y(float(y or 0.0)):.1f}" for x, y in edge)
        parts.append(Markup('<polygon class="b{}" points="{}"/>').format(colour, points))
    if item.style != "dots":
        dash = Markup(' stroke-dasharray="5 4"') if item.style == "dashed" else Markup("")
        for run in _runs(item):
            points = " ".join(f"{frame.at_x(x):.1f},{frame.at_y(y):.1f}" for x, y in run)
            parts.append(Markup('<polyline class="s{}"{} points="{}"/>').format(colour, dash, points))
    if item.style == "dots" or len(item.x) <= 40:
        for x, y in ((x, float(y or 0.0)) for x, y in zip(item.x, item.y, strict=True) if _known(y)):
            title = f"{item.name}: {format_number(y)} at {format_number(x)}"
            parts.append(_mark(f"d{colour}", frame.at_x(x), frame.at_y(y), 2.6, title))
    return Markup("").join(parts)


def _runs(item: Series) -> list[list[tuple[float, float]]]:
    """Pieces of a line between its gaps."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(item.x, item.y, strict=True):
        if _known(y):
            pieces[-1].append((x, float(y or 0.0)))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _dot(frame: _Frame, y: float, label: str, value: Number, low: Number, high: Number) -> Markup:
    if value is None or not math.isfinite(value):
        return Markup('<text class="tick" x="{}" y="{}">not computable</text>').format(frame.left + 4, y + 4)
    parts = []
    if low is not None and high is not None and math.isfinite(low) and math.isfinite(high):
        parts.append(_segment("s0", (f"{frame.at_x(low):.1f}", f"{frame.at_x(high):.1f}"), (y, y)))
    bounds = f" ({format_number(low)} to {format_number(high)})" if low is not None else ""
    parts.append(_mark("d0", frame.at_x(value), y, 4, f"{label}: {format_number(value)}{bounds}"))
    return Markup("").join(parts)


def _rule(frame: _Frame, name: str, value: float) -> Markup:
    y, right = frame.at_y(value), frame.width - RIGHT
    return _segment("rule", (frame.left, right), (f"{y:.1f}", f"{y:.1f}")) + _tick(right, f"{y - 5:.1f}", name)


def _legend(items: Sequence[tuple[str, int, str]]) -> Markup:
    if len(items) < 2:
        return Markup("")
    parts = [
        Markup('<span><i class="k{} {}"></i>{}</span>').format(colour, style, name) for name, colour, style in items
    ]
    return Markup('<div class="legend">{}</div>').format(Markup("").join(parts))


def _svg(frame: _Frame, parts: Sequence[Markup], legend: Markup) -> Markup:
    return legend + Markup('<svg viewBox="0 0 {} {}" role="img">{}</svg>').format(
        frame.width, frame.height, Markup("").join(parts)
    )


# ---------------------------------------------------------------------------------------------------------- page

_STYLE = STYLE + "".join(
    f".s{k}{{stroke:var(--c{k});fill:none;stroke-width:1.8}}.d{k}{{fill:var(--c{k})}}.f{k}{{fill:var(--c{k});fill-opacity:.45}}"
    f".b{k}{{fill:var(--c{k});fill-opacity:.16}}.k{k}{{background:var(--c{k})}}"
    for k in range(PALETTE)
)

_PAGE = jinja2.Environment(autoescape=True).from_string(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{{ title }}</title><style>{{ style }}</style></head>
<body><main><header><h1>{{ title }}</h1><p class="quiet">{{ subtitle }}</p></header>
{% for part in body %}{{ part }}
{% endfor %}<footer>{{ footer }}</footer></main></body></html>
"""
)


def page(title: str, subtitle: str, body: Iterable[Markup], footer: str = "") -> str:
    """The whole file. Parts that are not Markup are escaped."""
    return _PAGE.render(title=title, subtitle=subtitle, style=Markup(_STYLE), body=list(body), footer=footer)
