"""The command line: `python -m engine COMMAND [overrides]`. Parses the command, composes the config, runs the step and
reports the outcome.

Exit codes: 0 done, 1 error, 2 alarm, difference, damage or leak, 3 cannot be judged, 130 interrupted, 141 the reader of its
output left (`| head`). The last line of a step on stdout is its run directory.
Packages are imported on dispatch, so that `--help` is quick and a command loads only what it uses.
"""

from __future__ import annotations

import importlib
import os
import select
import shutil
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import engine
from engine import commands
from engine.errors import UserError, nearest
from engine.runtime import terminal

DONE, ERROR, ALARM, UNJUDGED, INTERRUPTED, UNREAD = 0, 1, 2, 3, 130, 141
OPTIONS = {
    "--help": "this help; after a command: its config groups and keys",
    "--version": "version of the engine",
    "--cfg job": "print the resolved config and stop",
    "--config-dir DIR": "a folder with more config (experiment/, data/, features/, ...); store/ and runs/ are beside it, "
    "or in it where it is the working directory, unless paths.store and paths.runs say otherwise",
    "--multirun": "key=a,b runs once with each value, one after the other; `sweep --multirun` searches among them, and in "
    "'key=interval(0,1)' and 'key=tag(log,interval(1e-4,1))'",
}
# Syntax of overrides; the tests run the first example.
WORDS = (
    "A name with a dot or a bracket is written in brackets: 'data.columns[sepal.length].min=0', in an experiment's file "
    "`sepal.length: {min: 0}`. Where a key takes text, the value is the text as written, in files and here: "
    "values=[0123,1.10,no]; null in quotes is text too."
)


@dataclass
class Request:
    """The parsed command line."""

    words: list[str] = field(default_factory=list)
    help: bool = False
    version: bool = False
    cfg: str | None = None
    config_dir: str | None = None
    multirun: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    code = _told(words)
    stall = sys.modules.get("engine.runtime.stall")
    if argv is None and stall is not None and stall.is_left():
        sys.stderr.flush()
        os._exit(code)  # threads are stuck: exit without waiting for them
    return code


def _told(words: list[str]) -> int:
    try:
        code = _main(words)
        sys.stdout.flush()
        return code
    except UserError as error:
        _say(f"error: {error}")
        return ERROR
    except KeyboardInterrupt as error:
        _say("interrupted; the same command continues a run that can be resumed", *_notes(error))
        return INTERRUPTED
    except Exception as error:
        return UNREAD if isinstance(error, BrokenPipeError) and _reader_left() else _unexpected(error)


def _main(words: list[str]) -> int:
    importlib.import_module("engine.runtime.environment").check_names()
    request = _parse(words)
    if request.version:
        print(f"engine {engine.__version__}")
        return DONE
    if not request.words:
        print(_overview(), file=sys.stdout if request.help else sys.stderr)
        return DONE if request.help else ERROR
    name, rest = commands.find(request.words)
    command = commands.COMMANDS[name]
    if request.help:
        print(_command_help(name, command, request.config_dir))
        return DONE
    overrides, plain, options = (
        commands.split(command, rest) if command.plain else (commands.keyed(command, rest), [], {})
    )
    _refuse_options([word for word in overrides if word.startswith("-")])
    if request.multirun and command.plain:
        raise UserError(f"--multirun runs a step once with each value; {name!r} is not a step: leave it out")
    compose = importlib.import_module("engine.config.compose")
    plans = _plans(name, overrides) if request.multirun else [overrides]
    # Every combination is composed before the first one runs, so that a bad value stops the sweep before it starts.
    composed = [compose.compose(plan, request.config_dir) for plan in plans]
    if request.cfg:
        print("---\n".join(compose.to_yaml(one.saved) for one in composed), end="")
        return DONE
    if command.raw:
        plain = [*rest, *(["--config-dir", request.config_dir] if request.config_dir else [])]
    if command.plain:
        secrecy, storage = (importlib.import_module(f"engine.{part}") for part in ("config.secrecy", "runtime.storage"))
        config = composed[0].config
        with (
            secrecy.masked_errors(composed[0].secrets),
            storage.kept_from_others(config.paths.mode, config.data.sensitive),
        ):
            return int(commands.function(name)(config, plain, *([options] if command.options else [])) or DONE)
    codes = {_step(name, one) for one in composed}
    return next(code for code in (ALARM, UNJUDGED, DONE) if code in codes)


def _plans(name: str, overrides: list[str]) -> list[list[str]]:
    """The overrides of each run of --multirun. A search runs once: what has several values is its space."""
    values = importlib.import_module("engine.config.override_values")
    return [values.searched(overrides)] if name == "sweep" else values.combinations(overrides)


def _parse(words: list[str]) -> Request:
    request, remaining = Request(), iter(words)
    simple = {"--help": "help", "-h": "help", "--version": "version", "--multirun": "multirun", "-m": "multirun"}
    valued = {"--cfg": "cfg", "--config-dir": "config_dir"}
    for word in remaining:
        option, equals, value = word.partition("=")
        if word in simple:
            setattr(request, simple[word], True)
        elif option in valued:
            value = value if equals else next(remaining, "")
            if not value or (option == "--cfg" and value != "job"):
                wanted = "job" if option == "--cfg" else "a folder"
                raise UserError(f"{option} must be followed by {wanted}, found {value!r}")
            setattr(request, valued[option], value)
        else:
            request.words.append(word)
    if request.words and request.words[0].startswith("-"):
        _refuse_options(request.words[:1])
    return request


def _refuse_options(words: list[str]) -> None:
    for word in words:
        raise UserError(f"unknown option {word!r}.{nearest(word, [option.split()[0] for option in OPTIONS])}")


def _step(name: str, composed: Any) -> int:
    # Libraries read these on import, so they are set before the engine's packages are imported.
    importlib.import_module("engine.runtime.environment").set_threads(composed.config.resources.threads)
    api = importlib.import_module("engine.api")
    with _termination():
        run = api.execute(name, composed, ["engine", name])
    _show(run.metrics)
    print(run.directory, flush=True)
    return ALARM if run.alarms else UNJUDGED if run.unjudged else DONE


class _termination:
    """SIGTERM ends a step like Ctrl-C: it is recorded as interrupted and can be resumed."""

    def __enter__(self) -> None:
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._previous = signal.signal(signal.SIGTERM, self._interrupt)

    def __exit__(self, *_: object) -> None:
        if self._main:
            signal.signal(signal.SIGTERM, self._previous)

    @staticmethod
    def _interrupt(*_: object) -> None:
        raise KeyboardInterrupt


# ----------------------------------------------------------------------------------------------------------- output


def _say(*lines: str) -> None:
    terminal.err("".join(f"{line}\n" for line in lines))


def _reader_left() -> bool:
    """Whether the reader of stdout has left. Then nothing more is written there, not even at Python's exit."""
    watch = select.poll()
    watch.register(sys.stdout.fileno(), 0)
    left = bool(watch.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return left


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", ()))


def _unexpected(error: Exception) -> int:
    if _notes(error):  # a run has kept the traceback in its log
        _say(f"error: {type(error).__name__}: {error}", *_notes(error), "the traceback is in run.log there")
    else:
        _say("".join(traceback.format_exception(error)).rstrip())
    return ERROR


def headline(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """The test metrics without their slices, or every metric where there are none."""
    test = {name: value for name, value in metrics.items() if name.startswith("test/") and name.count("/") == 1}
    return test or dict(metrics)


def _show(metrics: Mapping[str, float | None]) -> None:
    rows = list(_rows(headline(metrics)))
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        table = Table("metric", box=None, pad_edge=False)
        table.add_column("value", justify="right")
        for row in rows:
            table.add_row(*map(escape, map(terminal.one_line, row)))
        Console().print(table)
        return
    width = max((len(name) for name, _ in rows), default=0)
    for name, text in rows:
        terminal.out(f"{terminal.one_line(name):<{width}}  {text}\n")


def _rows(metrics: Mapping[str, float | None]) -> Iterator[tuple[str, str]]:
    """(name, text) of each metric; `<name>_low` and `<name>_high` become its interval."""
    for name, value in metrics.items():
        base = name.removesuffix("_low").removesuffix("_high")
        if base != name and base in metrics:
            continue
        low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
        interval = "" if low is None or high is None else f"  [{low:.5g}, {high:.5g}]"
        yield name, ("not computable" if value is None else f"{value:,.6g}") + interval


def _overview() -> str:
    lines = [
        "usage: python -m engine COMMAND [key=value ...] [options]",
        "",
        (engine.__doc__ or "").split(". ")[0] + ".",
        "",
        "commands:",
    ]
    lines += _columns([(name, command.help) for name, command in commands.COMMANDS.items()])
    lines += ["", "options:", *_columns(list(OPTIONS.items()))]
    lines += ["", *textwrap.wrap(WORDS, _room())]
    lines += ["", "`python -m engine COMMAND --help` shows the config groups and keys of a command."]
    lines += [
        "Exit codes: 0 done, 1 error, 2 alarm, difference, damage or leak, 3 cannot be judged, 130 interrupted, 141 reader left."
    ]
    return "\n".join(lines)


def _columns(rows: list[tuple[str, str]]) -> Iterator[str]:
    width = max((len(name) for name, _ in rows), default=0) + 2
    room = max(_room() - width - 2, 40)
    for name, text in rows:
        first, *more = textwrap.wrap(text, room) or [""]
        yield f"  {name:<{width}}{first}".rstrip()
        yield from (f"  {'':<{width}}{line}" for line in more)


def _room() -> int:
    return shutil.get_terminal_size((120, 24)).columns


def _command_help(name: str, command: commands.Command, config_dir: str | None) -> str:
    compose, schema, tree = (importlib.import_module(f"engine.config.{part}") for part in ("compose", "schema", "tree"))
    sections = ("name", *command.sections, *commands.EVERY)
    lines = [f"usage: python -m engine {name} {command.usage} [options]", "", f"{name}: {command.help}"]
    lines += ["", "config groups:"]
    for group, choices in compose.groups(config_dir).items():
        if group in sections or group == "experiment":
            named = f"{group}=NAME" if group in compose.chosen() else f"+{group}=NAME"
            lines += _columns([(named, " | ".join(choices))])
    for section in sections:
        lines += ["", f"{section}:", *_columns(_keys(schema.documented, tree.Config, section))]
    lines += ["", *textwrap.wrap(WORDS, _room())]
    return "\n".join(lines)


def _keys(documented: Callable[..., Any], config: type, section: str) -> list[tuple[str, str]]:
    found = []
    for path, kind, default, meaning in documented(config):
        if path.split(".")[0] == section:
            shown = f"{kind}, required" if default == "(required)" else f"{kind}, default {_plain(default)}"
            found.append((path, f"{meaning} [{shown}]"))
    return found


def _plain(value: Any) -> str:
    words = {None: "null", True: "true", False: "false", "": "''"}
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_plain, value))}]"
    return words.get(value, str(value)) if value is None or isinstance(value, (bool, str)) else str(value)


if __name__ == "__main__":
    sys.exit(main())
