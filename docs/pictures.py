"""Draws the pictures of the concepts, docs/concepts/*.svg: `python docs/pictures.py`. Colours follow the reader's setting."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np

WIDTH = 720
STYLE = """text{font:14px system-ui,sans-serif;fill:#1c2430}.q{fill:#667085}.m{font-family:monospace;font-size:12px}
.line{stroke:#667085;fill:none}.good{stroke:#15803d;fill:#15803d}.bad{stroke:#c0362c;fill:#c0362c}.none{stroke:#98a2b3;fill:#98a2b3}
.bar{stroke-width:5;stroke-linecap:round}.box{stroke:#2f6fde;fill:#2f6fde;fill-opacity:.1}.boxbad{stroke:#c0362c;fill:#c0362c;fill-opacity:.12}
.band{fill:#2f6fde;fill-opacity:.12}.main{stroke:#2f6fde;fill:none;stroke-width:1.8}
.rule{stroke:#b45309;stroke-dasharray:5 4;fill:none;stroke-width:1.8}
text.good,text.bad,text.none{stroke:none}
@media(prefers-color-scheme:dark){text{fill:#e6eaf0}.q{fill:#94a0b3}.line{stroke:#94a0b3}.good{stroke:#4ade80;fill:#4ade80}
.bad{stroke:#f87171;fill:#f87171}.none{stroke:#667085;fill:#667085}.box{stroke:#6ea3ff;fill:#6ea3ff}.boxbad{stroke:#f87171;fill:#f87171}
.band{fill:#6ea3ff}.main{stroke:#6ea3ff}.rule{stroke:#fbbf24}}"""


class Picture:
    """An SVG that is put together from left to right and top to bottom; places are in pixels."""

    def __init__(self, height: int, title: str) -> None:
        self.height, self.title, self.parts = height, title, list[str]()

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> None:
        """A text."""
        self.parts.append(f'<text class="{kind}" x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{escape(words)}</text>')

    def segment(self, kind: str, x: tuple[float, float], y: tuple[float, float]) -> None:
        """A straight line from (x[0], y[0]) to (x[1], y[1])."""
        self.parts.append(f'<line class="{kind}" x1="{x[0]:.0f}" x2="{x[1]:.0f}" y1="{y[0]:.0f}" y2="{y[1]:.0f}"/>')

    def dot(self, kind: str, x: float, y: float, size: float = 6) -> None:
        """A dot."""
        self.parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{size:g}"/>')

    def box(self, kind: str, x: float, y: float, width: float, height: float) -> None:
        """A box."""
        place = f'x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{height:.0f}"'
        self.parts.append(f'<rect class="{kind}" {place} rx="6"/>')

    def path(self, kind: str, x: np.ndarray, y: np.ndarray) -> None:
        """A line through points."""
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        self.parts.append(f'<polyline class="{kind}" points="{points}"/>')

    def time(self, y: float) -> None:
        """The axis of time."""
        self.segment("line", (30, WIDTH - 30), (y, y))
        self.text(WIDTH - 30, y + 20, "time →", "q", "end")

    def moment(self, x: float, words: str, bottom: float) -> None:
        """A decision."""
        self.segment("rule", (x, x), (34, bottom))
        self.text(x, 24, words, "", "middle")

    def svg(self) -> str:
        """The whole file."""
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" role="img">'
        return (
            "\n".join([head, f"<title>{escape(self.title)}</title><style>{STYLE}</style>", *self.parts, "</svg>"])
            + "\n"
        )


def span(picture: Picture, kind: str, x: tuple[float, float], y: float, words: str) -> None:
    """A row: a dot where it happened, and a bar until its value was known."""
    picture.segment(f"{kind} bar", x, (y, y))
    picture.dot(kind, x[0], y)
    picture.text(x[0] - 12, y + 5, words, kind, "end")


def known_at() -> Picture:
    """Values that count for decisions after they were known."""
    picture = Picture(250, "A value counts for decisions after it was known")
    picture.time(205)
    for x, words in ((330, "decision A"), (560, "decision B")):
        picture.moment(x, words, 205)
    span(picture, "good", (180, 270), 75, "amount")
    span(picture, "bad", (180, 470), 125, "settled, fraud")
    span(picture, "none", (180, 180), 175, "country")
    picture.text(195, 180, "prior: known before the row", "q")
    picture.text(345, 80, "A and B may use it", "good")
    picture.text(345, 118, "A: refused", "bad")
    picture.text(575, 130, "B may use it", "good")
    picture.text(180, 235, "● happened, the bar ends when the value was known", "q")
    return picture


def windows() -> Picture:
    """Rows within and outside of a window."""
    picture = Picture(285, "Which past rows are within a trailing window")
    picture.box("band", 250, 34, 330, 200)
    picture.text(262, 52, "the last 30 days", "q")
    picture.time(234)
    picture.moment(580, "decision at T", 234)
    for y, x, kind, words in (
        (80, (150, 220), "none", "happened too early"),
        (120, (290, 370), "good", "counts"),
        (160, (400, 520), "good", "counts"),
        (200, (470, 640), "bad", "not yet known at T"),
    ):
        span(picture, kind, x, y, words if kind != "good" else "")
        if kind == "good":
            picture.text(x[1] + 14, y + 5, words, kind)
    picture.text(30, 270, "● happened, the bar ends when it was known", "q")
    return picture


def digests() -> Picture:
    """Two chains, which differ from one link on."""
    picture = Picture(220, "Two chains of digests, which differ from one link on")
    links = ("inputs", "dataset", "features", "fitted", "order", "loss@10", "weights", "metrics")
    for row, (name, changed) in enumerate((("a run", 8), ("repeated", 4))):
        y = 46 + 86 * row
        picture.text(10, y - 10, name, "q")
        for place, link in enumerate(links):
            x, bad = 10 + 88 * place, place >= changed
            picture.box("boxbad" if bad else "box", x, y, 78, 46)
            picture.text(x + 39, y + 19, link, "", "middle")
            digest = f"{(0x9E3779B1 * (place + 1 + 31 * bad)) & 0xFFFFFF:06x}"
            picture.text(x + 39, y + 37, digest, "m bad" if bad else "m q", "middle")
            if place:
                picture.segment("line", (x - 10, x), (y + 23, y + 23))
    picture.text(10 + 88 * 4, 208, "the first link that differs: exit code 2", "bad")
    return picture


def gates() -> Picture:
    """Intervals of gains against the least gain."""
    picture = Picture(245, "A challenger is promoted when the whole interval of its gain is above the line")
    picture.segment("line", (250, 250), (30, 195))
    picture.text(250, 215, "as good", "q", "middle")
    picture.segment("rule", (330, 330), (30, 195))
    picture.text(330, 235, "retrain.gate.min_gain", "", "middle")
    for y, low, high, kind, words in (
        (55, 120, 300, "bad", "kept: it may be worse"),
        (95, 220, 520, "bad", "kept: too few days to tell"),
        (135, 262, 318, "bad", "kept: better, but by too little"),
        (175, 380, 530, "good", "promoted"),
    ):
        picture.segment(f"{kind} bar", (low, high), (y, y))
        picture.dot(kind, (low + high) / 2, y, 7)
        picture.text(high + 14, y + 5, words, kind)
    picture.text(WIDTH - 10, 215, "gain over the champion →", "q", "end")
    return picture


def alarm_lines() -> Picture:
    """Scores of days, and the line that is their quantile so far, looking forward only."""
    picture = Picture(270, "Scores of days and the line beyond which a day alarms")
    days = np.arange(120)
    scores = 0.3 + 0.45 * np.modf(np.abs(np.sin(days * 12.9898) * 43758.5453))[0] ** 2
    scores[96:] += np.linspace(0.25, 0.55, 24)
    line = np.array([np.quantile(scores[: min(day, 90)], 0.99) * 1.05 if day >= 20 else np.nan for day in days])
    x, top, bottom = 40 + days * 5.5, 40, 220
    at = lambda values: bottom - (values - 0.1) / 1.5 * (bottom - top)  # noqa: E731
    picture.segment("line", (40, WIDTH - 30), (bottom, bottom))
    picture.path("main", x, at(scores))
    picture.path("rule", x[20:], at(line[20:]))
    for day in np.flatnonzero(scores > line):
        picture.dot("bad", x[day], at(scores[day]), 4)
    picture.text(44, 30, "score of the day: its largest distance over all columns", "q")
    picture.text(200, at(line[45]) - 16, "line: 1 % of the days would be above it")
    picture.text(x[96] - 12, 60, "alarms", "bad", "end")
    picture.text(44, 245, "the first days only teach the line", "q")
    picture.text(WIDTH - 30, 245, "days →", "q", "end")
    return picture


PICTURES = (known_at, windows, digests, gates, alarm_lines)


def main() -> None:
    """Write every picture."""
    for draw in PICTURES:
        (Path(__file__).parent / "concepts" / f"{draw.__name__}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
