"""Reports are whole files that reach for nothing outside, and no text in them can become markup."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from markupsafe import Markup

from engine.runtime.reports import html

HOSTILE = '<script>alert("x")</script>&'


def everything() -> str:
    """A page with every block, each fed a hostile text."""
    line = html.Series(
        HOSTILE, [0, 1, 2, 3], [0.1, None, float("nan"), 0.4], [0, None, None, 0.3], [0.2, None, None, 1]
    )
    blocks = [
        html.tiles([html.Tile(HOSTILE, HOSTILE, HOSTILE, "bad")]),
        html.table([HOSTILE], [[HOSTILE], [1.5], [None], [html.bar(2.0, HOSTILE)]]),
        html.facts({HOSTILE: HOSTILE, "n": 12345.678}),
        html.line_chart([line, line], x_label=HOSTILE, y_label=HOSTILE, lines={HOSTILE: 0.3}),
        html.histogram([0, 1, 2], {HOSTILE: [1, 2], "b": [0, 3]}, x_label=HOSTILE, share=True),
        html.interval_chart([HOSTILE, "b"], [0.5, None], [0.4, None], [0.6, None], reference=0.45),
        html.heat_map([HOSTILE], ["a", HOSTILE], [[0.2, None]]),
        html.paragraph(HOSTILE),
    ]
    body = html.section(HOSTILE, html.row(*(html.card(HOSTILE, block, note=HOSTILE) for block in blocks)), note=HOSTILE)
    return html.page(HOSTILE, HOSTILE, [body], HOSTILE)


def test_no_text_becomes_markup():
    text = everything()
    assert "<script" not in text and "alert(&#34;x&#34;)" in text


def test_a_page_reaches_for_nothing_outside():
    text = everything()
    assert not re.search(r"(src|href)\s*=|@import|url\(|https?://", text)


def test_a_page_is_well_formed():
    text = everything().replace("<!doctype html>", "")
    for tag in ("meta", "br"):
        text = re.sub(rf"<{tag}([^>]*)>", rf"<{tag}\1/>", text)
    ElementTree.fromstring(text)


def test_nothing_to_draw_says_so():
    assert "no points" in html.line_chart([html.Series("a", [], [])])
    assert "no points" in html.line_chart([html.Series("a", [1.0], [float("nan")])])
    assert "no rows" in html.histogram([0, 1], {"a": [0]})
    assert "nothing that can be computed" in html.interval_chart(["a"], [None])
    assert "nothing to show" in html.table(["a"], [])


def test_a_gap_splits_a_line():
    chart = html.line_chart([html.Series("a", [0, 1, 2, 3, 4], [1, 2, None, 3, 4])])
    assert chart.count("<polyline") == 2


def test_the_band_of_a_single_point_can_be_seen():
    chart = str(html.line_chart([html.Series("a", [0.0], [0.5], low=[0.2], high=[0.8])]))
    corners = [tuple(map(float, corner.split(","))) for corner in re.findall(r'points="([^"]*)"', chart)[0].split()]
    assert len({x for x, _ in corners}) == len({y for _, y in corners}) == 2


def test_a_title_is_set_as_the_numbers_below_it():
    table = str(html.table(["name", "value"], [["a", None], ["b", 1.5]]))
    assert '<th class="">name</th><th class="num">value</th>' in table


@pytest.mark.parametrize(
    ("cell", "kind"),
    [
        ("2026-01-01 10:00", "short"),
        (html.link("2026-01-01 10:00", "a" * 80), "short"),
        ("word " * 20, "long"),
        ("word " * 8, ""),
    ],
)
def test_a_short_cell_is_not_broken_and_a_long_one_has_a_width(cell, kind):
    assert f'<td class="{kind}">' in html.table(["a"], [[cell]])


def test_equal_values_still_have_an_axis():
    chart = html.line_chart([html.Series("a", [0, 1], [5.0, 5.0])])
    assert "nan" not in chart.lower() and "inf" not in chart.lower()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.74816, "0.7482"),
        (28243, "28,243"),
        (2.0, "2"),
        (1.23e-7, "1.2e-07"),
        (None, "–"),
        (float("nan"), "–"),
        (12345.6, "12,346"),
    ],
)
def test_numbers_are_short(value, text):
    assert html.format_number(value) == text


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 7.9), (1e-6, 2e-6), (0, 1e9), (0.74, 0.76)])
def test_ticks_are_round_and_within_the_range(low, high):
    found = html.ticks(low, high)
    assert 3 <= len(found) <= 8
    assert low - 1e-9 * abs(low) <= found[0] and found[-1] <= high + 1e-9 * abs(high)


def test_markup_in_a_cell_is_kept():
    assert "<b>x</b>" in html.table(["a"], [[Markup("<b>x</b>")]])


def test_the_legend_has_the_colours_of_the_lines():
    series = [html.Series(str(colour), [0, 1], [0, 1], colour=colour) for colour in (5, 0, 1)]
    chart = str(html.line_chart([*series, html.Series("plain", [0, 1], [0, 1])], x_label="x", y_label="y"))
    lines = re.findall(r'polyline class="s(\d)"', chart)
    assert lines == ["5", "0", "1", "3"]
    assert re.findall(r'<i class="k(\d)', chart) == lines
