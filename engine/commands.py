"""The commands of the command line and of `engine.run`, as data: a new command is one line. Imports no other package."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine.errors import UserError, nearest

EVERY = ("cluster", "tracking", "paths", "resources")
DATA = ("data", "split", "features")
OPTION = re.compile(r"\[(--[\w-]+)( [^\s\]]+)?( \.\.\.)?\]")  # in a usage: [--json], [--from LINK], [--entity A=B ...]


@dataclass(frozen=True)
class Command:
    """The function of a command, and the parts of the config that it reads.

    A step is `function(config, run) -> {metric: value}` and gets a run directory; a plain command (`plain=True`) is
    `function(config, words) -> exit code` and gets none. `resume` names the section with its `resume` key.
    A plain command whose `usage` has options in brackets is `function(config, words, options)`.
    """

    target: str
    help: str
    sections: tuple[str, ...] = ()
    resume: str | None = None
    plain: bool = False
    usage: str = "[key=value ...]"
    check: str = ""  # `function(config)` of a step that checks the config before a run directory is made
    raw: bool = False  # a plain command that is handed all of its words, overrides too
    keys: tuple[tuple[str, str], ...] = ()  # options of a step that set a config key

    @property
    def options(self) -> dict[str, tuple[bool, bool]]:
        """Options of a plain command by name: (whether a value follows, whether it may be given several times)."""
        found = OPTION.findall(self.usage) if self.plain else ()
        return {name: (bool(value), bool(several)) for name, value, several in found}


plain = functools.partial(Command, plain=True)

# A name of two words (`features list`) takes precedence over its first word.
COMMANDS: dict[str, Command] = {
    "init": plain(
        "engine.draft.command:init",
        "write data, features and experiment for files that nobody has described yet, ready to review and to train",
        usage="PATH ... [--target COLUMN] [--time COLUMN] [--id COLUMN ...] [--zone ZONE] [--known SPAN] [--name NAME] "
        "[--out FOLDER]",
    ),
    "ingest": Command("engine.data.ingest:ingest", "read the sources, check them, store the dataset", DATA),
    "validate": Command("engine.data.validate:validate", "read and check the sources, store nothing", DATA),
    "data show": plain(
        "engine.data.show:show",
        "a dataset in figures: rows, columns, nulls, histograms, digests, quarantine",
        usage="NAME [--json]",
    ),
    "data gc": plain(
        "engine.data.dataset_gc:gc",
        "datasets that no run names, and the reasons that keep the others; --delete removes them",
        usage="[--delete] [--json]",
    ),
    "features": Command("engine.features.build:features", "compute the feature views of a dataset", DATA),
    "features list": plain(
        "engine.features.catalog:list_views",
        "the catalog: views, owners, sizes, and how many models use them",
        DATA,
        usage="[+experiment=NAME] [--json]",
    ),
    "features show": plain(
        "engine.features.catalog:show",
        "one view: specification, versions, statistics, models",
        DATA,
        usage="VIEW [+experiment=NAME] [--json]",
    ),
    "features diff": plain(
        "engine.features.catalog:diff",
        "which months and features of two versions of a view differ",
        usage="VIEW VERSION VERSION [--json]",
    ),
    "features gc": plain(
        "engine.features.catalog:gc",
        "versions that no run names; --delete removes them",
        usage="[--delete] [--json]",
    ),
    "features latest": plain(
        "engine.features.catalog:latest",
        "values of a view for every entity, or one, as of now or an instant; --out exports Parquet or SQLite",
        DATA,
        usage="VIEW +experiment=NAME [--entity COLUMN=VALUE ...] [--at INSTANT] [--out FILE] [--json]",
    ),
    "features audit": plain(
        "engine.features.catalog:audit",
        "leak audit: change values that rows must not use and compare the features; exit code 2 with leaks",
        DATA,
        usage="+experiment=NAME [--rows N] [--seed N] [--json]",
    ),
    "train": Command(
        "engine.training.train:train",
        "fit a model and measure it",
        ("train", "model", "evaluate", *DATA),
        "train",
        check="engine.training.train:check_trainable",
    ),
    "evaluate": Command(
        "engine.lifecycle.evaluate:evaluate",
        "measure a model on rows with labels; or, by a protocol, what training comes to over periods, folds and seeds",
        ("evaluate", "protocol", "train", "model", *DATA),
        check="engine.lifecycle.evaluate:check",
        usage="[--protocol forward|grouped|random] [key=value ...]",
        keys=(("--protocol", "protocol.kind"),),
    ),
    "score": Command(
        "engine.scoring.score:score",
        "write predictions for a period",
        ("score", *DATA),
        "score",
        check="engine.scoring.score:check_scorable",
    ),
    "serve": Command(
        "engine.serving.serve:serve",
        "a model behind an HTTP endpoint, with the features and the bits of batch scoring, until it is interrupted",
        ("serve", "score", "data", "features"),
        check="engine.serving.serve:check_servable",
    ),
    "skew": plain(
        "engine.serving.skew:skew",
        "compute the rows of a serving run again as batch scoring does: which features differ, and why; exit code 2 with any",
        ("trust",),
        usage="RUN [--json]",
    ),
    "monitor": Command(
        "engine.monitoring.monitor:monitor",
        "compare a window or a scoring run with the model's reference; exit code 2 is an alarm",
        ("monitor", "evaluate", *DATA),
    ),
    "monitor --incidents": plain(
        "engine.monitoring.incidents:incidents",
        "the incidents of a name, as of its newest monitoring run that looked for sudden changes",
        ("monitor", *DATA),
        usage="+experiment=NAME [--json]",
    ),
    "submit": plain(
        "engine.runtime.on_ray.submit:submit",
        "run a command as a job of a Ray cluster: check the upload, start the job, follow it",
        ("train", "score", *DATA),
        raw=True,
        usage="COMMAND [key=value ...] [cluster.address=http://host:8265]",
    ),
    "warmup": plain(
        "engine.runtime.warmup:warmup", "compile every kernel, so that the next command starts quickly", usage=""
    ),
    "reproduce": plain(
        "engine.lifecycle.reproduce:reproduce",
        "repeat a run in a temporary folder and compare link by link; exit code 2 names the first difference",
        ("trust",),
        usage="RUN [trust=DIGEST] [--code recorded|current] [--from LINK] [--inputs DIR] [--build-env] [--keep DIR] [--json]",
    ),
    "verify": plain(
        "engine.lifecycle.verify:verify",
        "check every file of the store and of the runs against its digest; exit code 2 names damaged files",
        usage="[FOLDER ...] [--json]",
    ),
    "compare": plain(
        "engine.lifecycle.compare:compare",
        "differences between runs: code, config, data, environment, metrics, cost; a sweep means its best configs",
        usage="RUN|SWEEP ... [--html FILE] [--json]",
    ),
    "runs": plain(
        "engine.lifecycle.runs:runs",
        "list runs, filtered and sorted: --where 'test/roc_auc > 0.74' --sort test/roc_auc",
        usage="[--where CONDITION] [--sort KEY] [--columns KEYS] [--limit N] [--json]",
    ),
    "ui": plain(
        "engine.lifecycle.ui:ui",
        "write one page over models, alarms, backtests, sweeps, views and runs, for a browser; no server",
        usage="[--out FILE]",
    ),
    "runs gc": plain(
        "engine.lifecycle.retention:gc",
        "runs that are no longer needed, and the reasons that keep the others; --delete removes them",
        usage="[--older SPAN] [--delete] [--json]",
    ),
    "runs rm": plain(
        "engine.lifecycle.retention:rm",
        "remove runs by name; shows whether something needs them, --delete removes them",
        usage="RUN ... [--delete] [--json]",
    ),
    "lineage": plain(
        "engine.lifecycle.lineage:lineage",
        "the runs that led to a file, a model or an alarm, and the runs that used it",
        usage="PATH|DIGEST [--json]",
    ),
    "registry list": plain(
        "engine.lifecycle.registry:list_models",
        "models, their champions and challengers",
        usage="[NAME] [--json]",
    ),
    "registry show": plain(
        "engine.lifecycle.registry:show",
        "a model's versions and every change with its author, reason and decision; or one version",
        usage="NAME | NAME@ALIAS | NAME@DIGEST [--json]",
    ),
    "registry promote": plain(
        "engine.lifecycle.registry:promote",
        "make a training run, the best of a sweep or a version the champion, by hand",
        ("registry", "trust"),
        usage="NAME RUN|SWEEP|challenger|DIGEST [registry.why=TEXT] [trust=DIGEST]",
    ),
    "registry challenge": plain(
        "engine.lifecycle.registry:challenge",
        "make a training run, the best of a sweep or a version the challenger, which may be scored in the champion's shadow",
        ("registry", "trust"),
        usage="NAME RUN|SWEEP|DIGEST [registry.why=TEXT] [trust=DIGEST]",
    ),
    "registry rollback": plain(
        "engine.lifecycle.registry:rollback",
        "make the previous champion the champion again",
        ("registry",),
        usage="NAME [registry.why=TEXT]",
    ),
    "registry diff": plain(
        "engine.lifecycle.registry:diff",
        "differences between two versions: specification, training, metrics",
        usage="NAME VERSION VERSION [--json]",
    ),
    "retrain": Command(
        "engine.lifecycle.retrain:retrain",
        "decide on the newest monitoring record; train a challenger, judge it, promote it or keep the champion",
        ("retrain", "train", "model", *DATA),
        "retrain",
        usage="[--replay decision.json] [key=value ...]",
        keys=(("--replay", "retrain.replay"),),
    ),
    "backtest": Command(
        "engine.lifecycle.backtest:backtest",
        "replay the past period by period under several policies of retraining: quality against cost",
        ("backtest", "retrain", "train", "model", *DATA),
        "backtest",
    ),
    "sweep": Command(
        "engine.lifecycle.sweep:sweep",
        "search for hyper-parameters: trials in rounds, on Ray or one after the other, with the same result each time",
        ("sweep", "train", "model", "evaluate", *DATA),
        "sweep",
        check="engine.lifecycle.sweep:check_sweepable",
    ),
    "track sync": plain(
        "engine.runtime.tracking:track_sync",
        "send the mirror of runs again from their directories",
        ("tracking",),
        usage="RUN ... [key=value ...]",
    ),
}


def find(words: list[str]) -> tuple[str, list[str]]:
    """(command name, the words after it); raises UserError when there is no such command."""
    name, first = " ".join(words[:2]), words[0]
    if name in COMMANDS and len(words) > 1:
        return name, words[2:]
    for place, word in enumerate(words[1:], 1):  # an option that is a command of its own may come later
        if word.startswith("--") and f"{first} {word}" in COMMANDS:
            return f"{first} {word}", words[1:place] + words[place + 1 :]
    if first in COMMANDS:
        longer = [other for other in COMMANDS if other.startswith(f"{first} ") and "--" not in other]
        if longer and words[1:] and "=" not in words[1] and words[1][:1] not in "-+~":
            raise UserError(f"unknown command {name!r}.{nearest(name, longer)}")
        return first, words[1:]
    if "=" in first:
        raise UserError(f"a command must come first, as in `python -m engine train {first}`.{nearest('', COMMANDS)}")
    raise UserError(f"unknown command {first!r}.{nearest(first, COMMANDS)}")


def keyed(command: Command, rest: list[str]) -> list[str]:
    """The words of a step, with options converted to config keys: `--replay FILE` is `retrain.replay=FILE`."""
    keys, found, remaining = dict(command.keys), [], iter(rest)
    for word in remaining:
        name, equals, value = word.partition("=")
        found.append(f"{keys[name]}={value if equals else next(remaining, '')}" if name in keys else word)
    return found


def split(command: Command, rest: list[str]) -> tuple[list[str], list[str], dict[str, Any]]:
    """(overrides, words, options) of what follows a plain command. An option's value is "" for a flag, and a list where it
    may be given several times; what was not given is absent.

    Raises UserError for an option that the command does not have, and for one without its value.
    """
    overrides, words, remaining = [], [], iter(rest)
    options: dict[str, Any] = {}
    for word in remaining:
        name, equals, value = word.partition("=")
        if name in command.options:
            valued, several = command.options[name]
            value = (value if equals else next(remaining, "")) if valued else ""
            if valued and not value:
                raise UserError(f"{name} must be followed by a value, found nothing")
            options[name] = [*options.get(name, ()), value] if several else value
        elif word.startswith("-"):
            raise UserError(f"unknown option {word!r}.{nearest(name, command.options)}")
        elif "=" in word or word[:1] in "+~":
            overrides.append(word)
        else:
            words.append(word)
    return overrides, words, options


def function(name: str) -> Callable[..., Any]:
    """The function of a command; its module is imported now."""
    return _imported(COMMANDS[name].target)


def check(name: str, config: Any) -> None:
    """Raise UserError where a step would refuse the config anyway: before it has a run directory."""
    if COMMANDS[name].check:
        _imported(COMMANDS[name].check)(config)


def _imported(target: str) -> Callable[..., Any]:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]
