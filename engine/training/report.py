"""Writes `report.html` of a training or evaluation run: headline figures, then learning, quality, data and run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from markupsafe import Markup

from engine.config import plugins
from engine.config.sections.training import BLEND, BOOSTERS
from engine.config.tree import Config
from engine.runtime import records, storage
from engine.runtime.reports import html
from engine.runtime.run import LabelsRecord, Run
from engine.runtime.tracking import read_points
from engine.training.evaluate import Row, SplitDetails, watched_metric
from engine.training.loop import Epoch
from engine.training.loss import Loss
from engine.training.metrics import DECIDED, LIFTED, Metric
from engine.training.precision import HIDDEN
from engine.training.resampling import FEWEST_BLOCKS

EXTRA = {"r2": "R²", "mape": "Mean absolute percentage error"}  # reported where they exist
CURVE_POINTS = 400
IMPORTANCE = "importance.json"  # of boosted trees
MOST_IMPORTANT = 20  # features that are shown
SHOWN = 5  # classes named in a tile
PERIOD_COLUMNS = {
    "period": "Period",
    "used": "Rows from, to",
    "known_by": "Label known by",
    "rows": "Rows used",
    "not_ripe": "Not ripe",
    "unlabelled": "Without a label",
    "target_mean": "Mean of the target (share of positives)",
    "target_mean_with_not_ripe": "The same with rows not ripe",
}


class DataSummary(TypedDict):
    """The data section of the report: rows of each split, and in `features` how many of each kind."""

    dataset: str
    digest: str
    rows: int
    splits: Mapping[str, LabelsRecord]
    features: dict[str, int]


class Measured(NamedTuple):
    """One target: its name (empty for the main one), what `evaluate_scores` returned for `valid` and `test`, and its figures."""

    name: str
    loss: Loss
    details: Mapping[str, SplitDetails]
    figures: Mapping[str, float]


def write_report(
    run: Run,
    *,
    histories: Mapping[str, Sequence[Epoch]],
    measured: Sequence[Measured],
    data_summary: DataSummary,
    quarantine: Mapping[str, int],
    config: Config,
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Write the report into the run's directory and return its path.

    `measured`: each target, the main one first; `metrics` the run's flat figures.
    """
    figures, (_, loss, details_by_split, _) = dict(metrics or {}), measured[0]
    judged = "test" if "test" in details_by_split else next(iter(details_by_split), "")
    body = [html.tiles(_verdict(figures, judged, loss, details_by_split.get(judged, {})))]
    if "" in histories:
        body.append(_learning(run, histories[""], config, loss))
    elif any(histories.values()):
        body.append(_learning_of_members(histories, config, loss))
    cards = [_permuted(details["importance"]) for details in details_by_split.values() if "importance" in details]
    if (run.directory / IMPORTANCE).exists():
        cards.append(_by_gain(records.read(run.directory / IMPORTANCE, dict[str, float])))
    if cards:
        body.append(html.section("Features", html.row(*cards)))
    for name, details in sorted(details_by_split.items(), key=lambda item: item[0] != judged):
        body += _quality(name, details, figures, loss, config)
    for part in measured[1:]:
        body += _other_target(part, config)
    body += [_data(data_summary, quarantine), _facts(run, config, figures)]
    path = run.directory / "report.html"
    subtitle = f"{run.record.get('command', '')} of {config.name}, started {run.record.get('started', '')[:19]} UTC"
    storage.write_text(path, html.page(config.name, subtitle, body, f"Run directory {run.directory}"))
    return path


def _other_target(part: Measured, config: Config) -> list[Markup]:
    """The figures, importance and quality of a target beside the main one."""
    judged = "test" if "test" in part.details else next(iter(part.details), "")
    tiles = html.tiles(_verdict(part.figures, judged, part.loss, part.details.get(judged, {})))
    cards = [_permuted(details["importance"]) for details in part.details.values() if "importance" in details]
    body = [html.section(f"Target {part.name}", tiles), *([html.row(*cards)] if cards else [])]
    for name, details in sorted(part.details.items(), key=lambda item: item[0] != judged):
        body += _quality(name, details, part.figures, part.loss, config, f"{part.name}: ")
    return body


# ------------------------------------------------------------------------------------------------------- verdict


def _verdict(figures: Mapping[str, float], split: str, loss: Loss, details: SplitDetails) -> list[html.Tile]:
    tiles = []
    labels = {name: metric.label for name, metric in loss.metrics.items()}
    labels |= {name: metric.label for name, metric in DECIDED.items() if f"{split}/{name}" in figures}
    labels |= {name: label for name, label in EXTRA.items() if f"{split}/{name}" in figures}
    for name, label in labels.items():
        value = figures.get(f"{split}/{name}")
        why = details.get("not_computable", {}).get(name)
        tiles.append(html.Tile(f"{label}, {split}", html.format_number(value), why or _interval(details, name)))
    if f"{split}/rows" in figures:
        rate = figures.get(f"{split}/positive_rate")
        positive = details.get("score", {}).get("positive")
        note = f"{100 * rate:.1f} % {'positive' if positive is None else repr(positive)}" if rate is not None else ""
        tiles.append(html.Tile(f"Rows, {split}", html.format_number(figures[f"{split}/rows"]), note))
    if "train/rows_per_second" in figures:
        note = f"{html.format_number(figures.get('train/steps_per_second'))} steps/s"
        tiles.append(html.Tile("Training speed", f"{figures['train/rows_per_second'] / 1000:,.0f} k rows/s", note))
    lost = figures.get(f"{split}/rows_of_unknown_target", 0)
    if lost:
        named = ", ".join(
            f"{text}: {rows:,}" for text, rows in list(details.get("unknown_targets", {}).items())[:SHOWN]
        )
        tiles.append(
            html.Tile(f"Rows without a metric, {split}", html.format_number(lost), f"unknown target: {named}", "warn")
        )
    skipped = figures.get("train/steps_skipped", 0)
    if skipped:
        tiles.append(html.Tile("Steps skipped", html.format_number(skipped), "the loss was not finite", "warn"))
    return tiles


def _interval(details: SplitDetails, name: str) -> str:
    pair, blocks = details.get("intervals", {}).get(name), details.get("blocks")
    if not pair:
        if not blocks or not 0 < blocks["number"] < FEWEST_BLOCKS:
            return ""
        return f"no interval: {blocks['number']} blocks of {blocks['of']}, fewer than {FEWEST_BLOCKS}"
    return f"{100 * details['confidence']:.0f} %: {html.format_number(pair[0])} to {html.format_number(pair[1])}"


# ------------------------------------------------------------------------------------------------------ learning


def _learning(run: Run, history: Sequence[Epoch], config: Config, loss: Loss) -> Markup:
    name = watched_metric(loss, config.train.metric)
    label = loss.metrics[name].label
    steps = [float(entry["step"]) for entry in history]
    batch = _batch_losses(run.directory)
    curves = [
        html.Series("batch", [x for x, _ in batch], [y for _, y in batch], colour=5),
        html.Series("train, epoch mean", steps, [entry.get("train_loss") for entry in history], colour=0),
    ]
    if any("valid_log_loss" in entry for entry in history):
        curves.append(html.Series("valid", steps, [entry.get("valid_log_loss") for entry in history], colour=1))
    epochs = [float(entry["epoch"] + 1) for entry in history]
    watched = html.Series(name, epochs, [entry.get(f"valid_{name}") for entry in history])
    cards = [html.card("Loss by step", html.line_chart([c for c in curves if c.x], x_label="step", y_label="loss"))]
    if any(entry.get(f"valid_{name}") is not None for entry in history):
        title = f"{label} of the validation rows by epoch"
        cards.append(html.card(title, html.line_chart([watched], x_label="epoch", y_label=label)))
    return html.section("Learning", html.row(*cards))


def _learning_of_members(histories: Mapping[str, Sequence[Epoch]], config: Config, loss: Loss) -> Markup:
    """The watched metric of each member by epoch, or by round."""
    name = watched_metric(loss, config.train.metric)
    curves = [
        html.Series(
            member,
            [float(entry["epoch"] + 1) for entry in history],
            [entry.get(f"valid_{name}") for entry in history],
            colour=place,
        )
        for place, (member, history) in enumerate(histories.items())
    ]
    chart = html.line_chart(curves, x_label="epoch or round", y_label=loss.metrics[name].label)
    return html.section(
        "Learning", html.row(html.card(f"{loss.metrics[name].label} of the validation rows, by member", chart))
    )


def _of_members(members: Sequence[Row], loss: Loss, figures: Mapping[str, float], split: str) -> Markup:
    """Each member by itself, with its weight, their mean and standard deviation."""
    names = loss.metrics
    rows = [[row["name"], f"{row['share']:.3f}", *(row.get(name) for name in names)] for row in members]
    for what, prefix in (("mean of them", "members_mean"), ("standard deviation", "members_sd")):
        rows.append([what, "", *(figures.get(f"{prefix}/{split}/{name}") for name in names)])
    rows.append(["the model", "", *(figures.get(f"{split}/{name}") for name in names)])
    heads = ["Member", "Weight", *(metric.label for metric in names.values())]
    return html.card(
        "Members", html.table(heads, rows), note="The model's scores are the weighted mean of its members' scores."
    )


def _permuted(found: Mapping[str, Any]) -> Markup:
    groups = found["groups"][:MOST_IMPORTANT]
    chart = html.interval_chart(
        [f"{item['name']} ({item['features']})" if item["features"] > 1 else item["name"] for item in groups],
        [item["loss"] for item in groups],
        [item["low"] for item in groups],
        [item["high"] for item in groups],
        x_label=f"loss of {found['metric']}",
        reference=0.0,
    )
    note = (
        f"What {found['metric']} ({html.format_number(found['base'])}) loses when a column, or all features of a view (their "
        f"number), are shuffled among {found['rows']:,} validation rows; intervals over {found['shuffles']} shuffles."
    )
    return html.card("By permutation", chart, note=note)


def _by_gain(shares: Mapping[str, float]) -> Markup:
    first = list(shares.items())[:MOST_IMPORTANT]
    top = max((share for _, share in first), default=0.0) or 1.0
    rows = [[name, html.bar(share / top, f"{100 * share:.1f} %")] for name, share in first]
    note = f"Share of the gain of all splits, of {len(shares)} features; all are in {IMPORTANCE}."
    return html.card("By gain", html.table(["Feature", "Gain"], rows), note=note)


def _batch_losses(directory: Path) -> list[tuple[float, float]]:
    """(step, loss) of the run's metrics.jsonl, thinned."""
    found = [(float(point.step), point.values.get("train/loss", math.nan)) for point in read_points(directory)]
    points = [(step, loss) for step, loss in found if not math.isnan(loss)]
    return points[:: -(-len(points) // CURVE_POINTS) or 1]


# ------------------------------------------------------------------------------------------------------- quality


def _quality(
    split: str, details: SplitDetails, figures: Mapping[str, float], loss: Loss, config: Config, of: str = ""
) -> list[Markup]:
    cards = []
    if "roc" in details:
        curve = html.Series("model", details["roc"]["x"], details["roc"]["y"])
        chance = html.Series("chance", [0, 1], [0, 1], style="dashed", colour=5)
        chart = html.line_chart([curve, chance], x_label="false positive rate", y_label="true positive rate", **_UNIT)
        cards.append(html.card("ROC", chart))
        curve = html.Series("model", details["pr"]["x"], details["pr"]["y"])
        rate = figures.get(f"{split}/positive_rate", 0.0)
        chance = html.Series("chance", [0, 1], [rate, rate], style="dashed", colour=5)
        chart = html.line_chart([curve, chance], x_label="recall", y_label="precision", **_UNIT)
        cards.append(html.card("Precision and recall", chart))
    if "calibration" in details:
        table = details["calibration"]
        curve = html.Series("model", table["score"], table["positive"])
        ideal = html.Series("ideal", [0, 1], [0, 1], style="dashed", colour=5)
        chart = html.line_chart([curve, ideal], x_label="mean score of a bin", y_label="share of positives", **_UNIT)
        cards.append(html.card("Calibration", chart))
        bins = details["histogram"]
        counts = {"negative": bins["negative"], "positive": bins["positive"]}
        cards.append(html.card("Scores by class", html.histogram(bins["edges"], counts, x_label="score", share=True)))
    cards += _decisions(details, config)
    cards += _compared(split, details, figures, loss)
    parts = [
        html.section(
            f"{of}quality on {split} rows" if of else f"Quality on {split} rows",
            html.row(*cards) if cards else Markup(""),
            note=_meaning(details),
        )
    ]
    return [*parts, _breakdowns(split, details, figures, loss)]


def _decisions(details: SplitDetails, config: Config) -> list[Markup]:
    """What the model decides, what the highest scores find, what errors cost; of a number, how it errs by prediction."""
    cards = []
    if "confusion" in details:
        decision, counts, said = details["decision"], details["confusion"], details["score"]
        rows = [
            [f"is {said['positive']!r}", counts["true_positives"], counts["false_negatives"]],
            [f"is {said['negative']!r}", counts["false_positives"], counts["true_negatives"]],
        ]
        rule = {"f1": "the best F1 of validation rows", "cost": "the least cost on validation rows"}
        note = f"From a score of {decision['threshold']:.4g} up: {rule.get(decision['rule'], 'as chosen')}."
        heads = ["", f"taken as {said['positive']!r}", f"taken as {said['negative']!r}"]
        cards.append(html.card("Decisions", html.table(heads, rows), note=note))
    if "gains" in details:
        curve = html.Series("model", details["gains"]["x"], details["gains"]["y"])
        chance = html.Series("chance", [0, 1], [0, 1], style="dashed", colour=5)
        axes: dict[str, Any] = {"x_label": "share of rows, highest scores first", "y_label": "share of positives found"}
        note = f"The lift is the curve over the diagonal, at {LIFTED:.0%} of the rows."
        cards.append(html.card("Gains", html.line_chart([curve, chance], **axes, **_UNIT), note=note))
        curve = html.Series("cost of a row", details["costs"]["x"], details["costs"]["y"])
        costs = config.evaluate.false_positive, config.evaluate.false_negative
        note = f"A negative row taken as positive costs {costs[0]:g}, a positive row taken as negative {costs[1]:g}."
        chart = html.line_chart([curve], x_label="threshold", y_label="mean cost", x_range=(0.0, 1.0))
        cards.append(html.card("Cost by threshold", chart, note=note))
    if details.get("by_prediction"):
        keys = ("rows", "score", "target", "mean_error", "absolute_error")
        rows = [[k, *(row[key] for key in keys)] for k, row in enumerate(details["by_prediction"], 1)]
        heads = ["Decile", "Rows", "Mean prediction", "Mean target", "Mean error", "Mean absolute error"]
        cards.append(html.card("By prediction", html.table(heads, rows), note="Error: prediction minus target."))
    return cards


def _compared(split: str, details: SplitDetails, figures: Mapping[str, float], loss: Loss) -> list[Markup]:
    """A table of the model and its baselines, and a table of its classes."""
    cards, names = [], loss.metrics
    if details.get("members"):
        cards.append(_of_members(details["members"], loss, figures, split))
    if details.get("baselines"):
        rows = [["model", *(figures.get(f"{split}/{name}") for name in names)]]
        rows += [[kind, *(values.get(name) for name in names)] for kind, values in details["baselines"].items()]
        note = "A linear model of the same encoded rows, and the best constant."
        cards.append(
            html.card(
                "Against baselines", html.table(["", *(metric.label for metric in names.values())], rows), note=note
            )
        )
    if details.get("classes"):
        keys = ("class", "rows", "predicted", "precision", "recall", "f1")
        rows = [[row[key] for key in keys] for row in details["classes"]]
        cards.append(
            html.card("By class", html.table(["Class", "Rows", "Predicted", "Precision", "Recall", "F1"], rows))
        )
    return cards


def _meaning(details: SplitDetails) -> str:
    """The meaning of a score, as a sentence."""
    said = details.get("score", {})
    return f"The score is the probability that {said['target']} is {said['positive']!r}." if "positive" in said else ""


_UNIT: dict[str, Any] = {"x_range": (0.0, 1.0), "y_range": (0.0, 1.0)}


def _breakdowns(split: str, details: SplitDetails, figures: Mapping[str, float], loss: Loss) -> Markup:
    name, names = loss.metric, loss.metrics
    metric = names[name]
    whole = figures.get(f"{split}/{name}")
    cards = []
    months = details.get("by_month", [])
    if len(months) > 1:
        cards.append(html.card(f"{metric.label} by month", _by_month(months, metric)))
    for column, parts in details.get("slices", {}).items():
        better = "higher" if metric.higher_is_better else "lower"
        note = f"The {len(parts)} most frequent values; {better} is better; the dashed line is the value of all rows."
        cards.append(html.card(f"{metric.label} by {column}", _by_value(parts, metric, whole), note=note))
    rows = [[part["value"], part["rows"], *(part.get(key) for key in names)] for part in months]
    columns = ["Month", "Rows", *(item.label for item in names.values())]
    cards.append(html.card("By month, all metrics", html.table(columns, rows)))
    return html.row(*cards)


def _by_month(months: Sequence[Row], metric: Metric) -> Markup:
    pairs = [part["intervals"].get(metric.name, (None, None)) for part in months]
    places = [float(k) for k in range(len(months))]
    series = html.Series(
        metric.name, places, [part.get(metric.name) for part in months], [p[0] for p in pairs], [p[1] for p in pairs]
    )
    named = {float(k): str(part["value"]) for k, part in enumerate(months)}
    return html.line_chart([series], y_label=metric.label, x_ticks=named, x_range=(-0.5, len(months) - 0.5))


def _by_value(parts: Sequence[Row], metric: Metric, whole: float | None) -> Markup:
    labels = [f"{part['value']} ({part['rows']:,})" for part in parts]
    pairs = [part["intervals"].get(metric.name, (None, None)) for part in parts]
    values = [part.get(metric.name) for part in parts]
    return html.interval_chart(
        labels, values, [p[0] for p in pairs], [p[1] for p in pairs], x_label=metric.label, reference=whole
    )


# ---------------------------------------------------------------------------------------------------------- data


def _data(summary: DataSummary, quarantine: Mapping[str, int]) -> Markup:
    plain = {"dataset": summary["dataset"], "digest": summary["digest"], "rows": summary["rows"]}
    cards = [html.card("Data", html.facts(plain))]
    if splits := summary["splits"]:
        rows = [[name, *(_shown(part.get(key)) for key in PERIOD_COLUMNS)] for name, part in splits.items()]
        cards.append(html.card("Periods", html.table(["Split", *PERIOD_COLUMNS.values()], rows), note=_labels(splits)))
    cards.append(html.card("Features", html.facts(summary["features"])))
    table = html.table(["What", "Rows"], list(quarantine.items()), empty="No row was quarantined.")
    cards.append(html.card("Quarantine", table))
    return html.section("Data", html.row(*cards))


def _shown(value: Any) -> Any:
    return " to ".join(value) if isinstance(value, list) else value


def _labels(splits: Mapping[str, LabelsRecord]) -> str:
    """The rule by which a label counts, as sentences."""
    if "train" in splits and splits["train"]["known_by"] is None:
        return "A label counts whenever it became known: labels from the future may be in it."
    return "A row counts where its label was known then; rows that are not ripe have a label that came later, or were too young."


def _model(config: Config) -> str:
    if config.model.kind == BLEND:
        kinds = [f"{name} ({plugins.split(model.kind)[0]})" for name, model in config.model.blended.items()]
        return f"blend of {', '.join(kinds or config.model.blend.bundles)}"
    if config.model.kind in BOOSTERS:
        trees = config.model.trees
        size = ", ".join(
            f"{name} {value}" for name, value in (("leaves", trees.leaves), ("depth", trees.depth)) if value
        )
        return f"{config.model.kind}, learning rate {trees.learning_rate:g}, at most {size}"
    model = config.model
    if model.kind in HIDDEN:
        members = f", {model.members} members" if model.kind == "tabm" else ""
        numbers = "" if model.embeddings == "none" else f", numbers embedded ({model.embeddings})"
        return f"{model.kind}, hidden layers {list(model.hidden)}, dropout {model.dropout}{members}{numbers}"
    return ", ".join([plugins.split(model.kind)[0], *(f"{name} {value}" for name, value in model.settings.items())])


def _facts(run: Run, config: Config, figures: Mapping[str, float]) -> Markup:
    times = [(name, float(value)) for name, value in sorted(figures.items()) if name.endswith("_seconds")]
    total = max((value for _, value in times), default=1.0) or 1.0
    rows = [[name, html.bar(value / total, f"{value:.2f} s")] for name, value in times]
    about = {
        "model": _model(config) + (" (chosen by rule)" if "chosen_model" in run.record else ""),
        **({"trees": figures["train/trees"]} if "train/trees" in figures else {}),
        "parameters": figures.get("train/parameters"),
        "loss": config.train.loss,
        **run.record.get("sizes", {}),
        "precision": run.record.get("precision", "–"),
        **({"seeds": ", ".join(map(str, config.train.every_seed))} if config.several else {"seed": config.train.seed}),
        "best epoch": figures.get("train/best_epoch", -1) + 1 if "train/best_epoch" in figures else None,
        "engine": run.record.get("code", {}).get("engine_version", "–"),
        "plan": run.record.get("plan", "–"),
    }
    where = html.card("Time by part", html.table(["Part", "Seconds"], rows))
    return html.section("Run", html.row(html.card("Model and run", html.facts(about)), where))
