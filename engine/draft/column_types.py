"""Types of text columns: a full pass over every file counts, for each type that a column may have, the values that are not of it.

Values are read by the same function as in ingest, so a type is guessed exactly where ingest will read it.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc

from engine.config.sections.data import SourceColumn, SourceConfig
from engine.data.arrow_types import parse_type
from engine.data.parse import FALSE, TRUE, Reading, to_type
from engine.draft.sources import TEXT, Source

EXCEPTIONS = 0.01  # a column is of a type where at most this part of its values is not
EARLY, EARLY_ROWS = 0.2, 1_000  # a type is given up early where more are not
KEPT = 50  # different exceptions kept of a column and type
ZONE = "UTC"
# Texts that mean "no value" in a column of numbers or times.
NULLS = ("NA", "N/A", "n/a", "#N/A", "NULL", "null", "None", "none", "nan", "NaN", "NAN", "-", "--", "?", ".", "nil", "missing",
         "unknown", "Unknown")  # fmt: skip
_DATES = ("%d/%m/%Y", "%m/%d/%Y", "%d.%m.%Y", "%d-%m-%Y", "%m-%d-%Y", "%Y/%m/%d", "%Y.%m.%d", "%d/%m/%y", "%m/%d/%y", "%d.%m.%y",
          "%d %b %Y", "%d-%b-%Y", "%d-%b-%y", "%b %d %Y", "%b %d, %Y", "%d %B %Y", "%B %d, %Y")  # fmt: skip
_TIMES = (" %H:%M", " %H:%M:%S", " %H:%M:%S.%f", " %I:%M %p", " %I:%M:%S %p", "T%H:%M:%S")
_COMPACT = ("%Y%m%d", "%Y%m%d%H%M%S")
_DAY = re.compile(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{2,4}|(\d.*[A-Za-z]{3}|[A-Za-z]{3}.*\d).*\d")
_LEADING_ZERO = r"^0[0-9]+$"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A type that text may have, and how it is read."""

    type: str
    format: str | None = None
    decimal: str = "."
    thousands: str = ""

    @property
    def reading(self) -> Reading:
        """How ingest reads it."""
        return Reading(ZONE, self.format, self.decimal, self.thousands)


@dataclasses.dataclass
class Trial:
    """The values that are not of a candidate: their number, and the texts of some."""

    candidate: Candidate
    bad: int = 0
    texts: Counter[str] = dataclasses.field(default_factory=Counter)

    @property
    def is_null_spelling(self) -> bool:
        """Whether all of them are a few texts that mean that there is no value."""
        return bool(self.texts) and sum(self.texts.values()) == self.bad and set(self.texts) <= {*NULLS}


@dataclasses.dataclass
class TextColumn:
    """What is seen of one column of text over all files."""

    name: str
    typed: bool = False  # whether the file says that it is text, and not a number or a truth value
    rows: int = 0
    nulls: int = 0
    trials: list[Trial] = dataclasses.field(default_factory=list)
    zeros: bool = False  # a number with a zero in front, such as a postal code
    values: Counter[str] = dataclasses.field(default_factory=Counter)  # of the first rows

    @property
    def filled(self) -> int:
        """Rows that are not null."""
        return self.rows - self.nulls


@dataclasses.dataclass(frozen=True)
class Guess:
    """The type of a column, and what a reader should know of it."""

    type: str
    format: str | None = None
    exceptions: int = 0  # values that are not of the type, read as null
    nulls: tuple[str, ...] = ()  # spellings of null that were found
    note: str = ""


def settle_types(
    source: Source, advance: Callable[[int], None] = lambda _: None
) -> tuple[SourceConfig, dict[str, Guess]]:
    """The source's config with the types of its text columns, and the guesses; reads every file once."""
    typed = source.files[0].format == "jsonl"  # its texts are read as texts, or as times
    columns = {name: TextColumn(name, typed) for name, column in source.config.columns.items() if column.type == TEXT}
    for chunk in source.tables(ZONE):
        advance(chunk.num_rows)
        for name, column in columns.items():
            if chunk.schema.field(name).type == pa.string():
                _count(column, chunk[name])
    decimal, thousands = _separators(columns)
    guesses = {name: _guess(column, decimal) for name, column in columns.items()}
    spelled = sorted({text for guess in guesses.values() for text in guess.nulls})
    declared = {
        name: _declared(column, guesses[name]) if name in guesses else column
        for name, column in source.config.columns.items()
    }
    csv = source.config.csv
    nulls = (*csv.nulls, *(text for text in spelled if text not in csv.nulls))
    csv = dataclasses.replace(csv, decimal=decimal, thousands=thousands, nulls=nulls)
    return dataclasses.replace(source.config, columns=declared, csv=csv), guesses


def _declared(column: SourceColumn, guess: Guess) -> SourceColumn:
    policy = "null" if guess.exceptions else column.on_violation
    return dataclasses.replace(column, type=guess.type, format=guess.format, on_violation=policy)


def _count(column: TextColumn, values: pa.ChunkedArray | pa.Array) -> None:
    values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    first = not column.filled
    column.rows += len(values)
    blank = pc.equal(pc.utf8_trim_whitespace(values), "")
    values = values.filter(pc.invert(pc.fill_null(blank, True)))
    column.nulls += len(blank) - len(values)
    if not len(values):
        return
    if first:
        found = _candidates(column.name, values)
        column.trials = [Trial(one) for one in found if not column.typed or one.type in ("date", "timestamp")]
    if column.filled <= 2 * EARLY_ROWS or first:
        column.values.update(values.slice(0, EARLY_ROWS).to_pylist())
    column.zeros |= bool(pc.any(pc.match_substring_regex(values, _LEADING_ZERO)).as_py())
    for trial in column.trials:
        _try(trial, values)
    column.trials = [
        trial
        for trial in column.trials
        if column.filled < EARLY_ROWS or trial.bad <= EARLY * column.filled or trial.is_null_spelling
    ]


def _try(trial: Trial, values: pa.Array) -> None:
    parsed = to_type(values, parse_type(trial.candidate.type), trial.candidate.reading)
    trial.bad += len(parsed.bad)
    if not len(parsed.bad):
        return
    for found in pc.value_counts(pc.utf8_trim_whitespace(values.take(pa.array(parsed.bad)))).to_pylist():
        if found["values"] in trial.texts or len(trial.texts) < KEPT:
            trial.texts[found["values"]] += found["counts"]


def _candidates(name: str, values: pa.Array) -> list[Candidate]:
    """Types that the first values may have, the narrowest first."""
    sample = [text.strip() for text in values.slice(0, EARLY_ROWS).to_pylist()]
    found = []
    words = {text for text in sample if text not in NULLS}
    if words and words <= {*TRUE, *FALSE} and not words <= {"0", "1"}:
        found.append(Candidate("bool"))
    digits = sum(bool(re.fullmatch(r"[-+]?[\d.,'\u00a0 ]*\d[\d.,]*([eE][-+]?\d+)?%?", text)) for text in sample)
    if 2 * digits >= len(sample):
        found += [Candidate("int64"), Candidate("float64")]
        if any("," in text for text in sample):
            found += [Candidate("float64", decimal=","), Candidate("float64", decimal=",", thousands=".")]
            found += [Candidate("float64", thousands=",")]
    if re.search(r"date|time|day|_at$|_on$|^ts$|when", name.lower()):
        found = [*(Candidate("timestamp", form) for form in _COMPACT), *found]
    if 2 * sum(bool(_DAY.search(text)) for text in sample) >= len(sample):
        found += [Candidate("date"), Candidate("timestamp")]
        found += [Candidate("date", form) for form in _DATES]
        found += [Candidate("timestamp", day + time) for day in _DATES for time in _TIMES]
    few = values.slice(0, 100)
    return [one for one in found if 2 * len(to_type(few, parse_type(one.type), one.reading).bad) <= len(few)]


def _separators(columns: dict[str, TextColumn]) -> tuple[str, str]:
    """Decimal and thousands separator of the source: the decimal one of most columns of numbers, and a separator of thousands
    where one of these needs it.
    """
    votes: Counter[tuple[str, str]] = Counter()
    for column in columns.values():
        numbers = [trial for trial in column.trials if trial.candidate.type == "float64"]
        best = min(numbers, key=lambda trial: trial.bad, default=None)
        if best is not None and _fits(best, column):
            votes[best.candidate.decimal, best.candidate.thousands] += 1
    commas = sum(count for (decimal, _), count in votes.items() if decimal == ",")
    decimal = "," if commas else "."  # a whole number is read by either, and counts for the point
    return decimal, max((thousands for mark, thousands in votes if mark == decimal), default="")


def _fits(trial: Trial, column: TextColumn) -> bool:
    return trial.bad <= EXCEPTIONS * column.filled or trial.is_null_spelling


def _guess(column: TextColumn, decimal: str) -> Guess:
    if not column.filled:
        return Guess(TEXT, note="null in every row")
    fitting = [trial for trial in column.trials if _fits(trial, column) and _possible(trial, column, decimal)]
    if not fitting:
        return Guess(TEXT)
    best = min(fitting, key=lambda trial: 0 if trial.is_null_spelling else trial.bad)
    candidate = best.candidate
    nulls = tuple(sorted(text for text in best.texts if text in NULLS))
    exceptions = 0 if best.is_null_spelling else best.bad - sum(best.texts[text] for text in nulls)
    notes = []
    if exceptions:
        shown = ", ".join(repr(text) for text, _ in best.texts.most_common(3) if text not in nulls)
        notes.append(f"{exceptions:,} of {column.filled:,} values are not, such as {shown}: they are read as null")
    if other := _other_order(best, fitting):
        notes.append(f"every value can also be read as {other}: which is right? If that one, change `format`")
    return Guess(candidate.type, candidate.format, exceptions, nulls, "; ".join(notes))


def _possible(trial: Trial, column: TextColumn, decimal: str) -> bool:
    """Whether a candidate may be chosen beside the other columns: one decimal separator, no number that begins with 0."""
    kind = trial.candidate.type
    if kind in ("int64", "float64") and column.zeros:
        return False
    return kind != "float64" or trial.candidate.decimal == decimal


def _other_order(best: Trial, fitting: list[Trial]) -> str:
    """The format with day and month the other way round, where it reads every value too."""
    form = best.candidate.format
    if form is None or "%d" not in form or "%m" not in form:
        return ""
    turned = form.translate(str.maketrans("dm", "md"))
    return next((turned for trial in fitting if trial.candidate.format == turned and trial.bad <= best.bad), "")
