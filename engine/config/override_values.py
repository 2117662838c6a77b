"""Values of overrides by Hydra's grammar, with words kept as written, and those that stand for several: `a,b`, `choice(a,b)`,
`range(1,4)`, `interval(0,1)` and `tag(log, interval(1e-4,1))`.
"""

from __future__ import annotations

import functools
import itertools
import re
import shlex
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import create_functions
from hydra.core.override_parser.overrides_visitor import HydraErrorListener, HydraOverrideVisitor
from hydra.core.override_parser.types import IntervalSweep, Override, OverrideType, Sweep, ValueType
from hydra.errors import HydraException
from hydra.grammar.gen.OverrideLexer import CommonTokenStream, InputStream, OverrideLexer  # type: ignore[attr-defined]
from hydra.grammar.gen.OverrideParser import OverrideParser

from engine.config import literals, schema, secrecy
from engine.config.overrides import Word, read
from engine.config.sections.sweep import KINDS
from engine.config.tree import Config
from engine.errors import UserError


class _Values(HydraOverrideVisitor):  # type: ignore[misc]
    """Values of overrides, with words kept as written; only a function (`int(5)`, `range(1,3)`) gets numbers."""

    _typed = 0

    def _createPrimitive(self, ctx: Any) -> Any:
        value = super()._createPrimitive(ctx)
        word = value is None or isinstance(value, (bool, int, float))
        return literals.marked(ctx.getText().strip()) if word and not self._typed else value

    def visitDictKey(self, ctx: Any) -> Any:
        return str(super().visitDictKey(ctx)).removeprefix(literals.MARK)

    def visitFunction(self, ctx: Any) -> Any:
        typed = ctx.getChild(0).getText() not in ("choice", "shuffle", "str", "tag")
        self._typed += typed
        try:
            return super().visitFunction(ctx)
        finally:
            self._typed -= typed


def parse(text: str) -> tuple[Word, Any]:
    """An override and its value: plain containers, marked words, or a sweep. Raises UserError."""
    if (shown := text.encode("utf-8", "backslashreplace").decode()) != text:
        raise UserError(f"an override must be UTF-8 text, found {secrecy.masked_word(shown)!r}")
    word = read(text)
    if word is None or word.parts[0] == "hydra":
        raise UserError(f"an override must be key=value with a key of this engine, found {secrecy.masked_word(text)!r}")
    if not word.value:
        return word, ""
    listener = HydraErrorListener()
    lexer = OverrideLexer(InputStream(word.value))
    lexer.mode(OverrideLexer.VALUE_MODE)
    parser = OverrideParser(CommonTokenStream(lexer))
    for part in (lexer, parser):
        part.removeErrorListeners()
        part.addErrorListener(listener)
    try:
        parsed = _Values(create_functions()).visit(parser.value())
        if parser.getCurrentToken().type != -1:
            raise HydraException(f"extraneous input {parser.getCurrentToken().text!r}")
    except (HydraException, RecursionError) as error:
        reason = str(error).splitlines()[0]
        name, equals, value = secrecy.masked_word(text).partition("=")
        hint = ""
        if (
            equals
            and value[:1] in ("[", "{")
            and functools.reduce(schema.below, word.parts, Config) not in (str, str | None)
        ):
            hint = " A text in a list or mapping needs quotes of its own where it has signs such as ~ or (, as in '[\"~\", c]'"
        elif equals and re.fullmatch(r"[+~]*[\w.]+", name):
            hint = f" A value with spaces, = or () needs quotes inside the word: {shlex.quote(f'{name}={schema.quoted(value)}')}"
        raise UserError(
            f"an override must be key=value, found {secrecy.masked_word(text)!r} ({reason}).{hint}"
        ) from None
    return word, parsed if isinstance(parsed, Sweep) else Override._convert_value(parsed)


def combinations(overrides: Sequence[str]) -> list[list[str]]:
    """Every combination of overrides with several values (`train.lr=0.1,0.2`), in order. Raises UserError for an interval."""
    choices = []
    for word in overrides:
        key, value = parse(word)
        if isinstance(value, IntervalSweep):
            raise UserError(
                f"{secrecy.masked_word(word)!r} must list its values to be run with each: `engine sweep --multirun` searches "
                "in an interval"
            )
        if isinstance(value, Sweep):
            prefix = word.removesuffix(key.value or "")
            choices.append([prefix + item for item in _listed(value)])
        else:
            choices.append([word])
    return [list(combination) for combination in itertools.product(*choices)]


def searched(overrides: Sequence[str]) -> list[str]:
    """Overrides for a search: a key with several values becomes one of `sweep.space`.

    As in Hydra's sweepers, an interval of whole numbers has whole numbers, and `tag(log, ...)` draws on a logarithmic scale.
    """
    found = []
    for word in overrides:
        key, value = parse(word)
        if not isinstance(value, Sweep):
            found.append(word)
        else:
            found.append(f"++sweep.space[{key.key}]={{{_space(value)}}}")
    return found


def _space(value: Any) -> str:
    """The kinds of an entry of `sweep.space`: all of them, so that those of a file are replaced."""
    kinds = dict.fromkeys(KINDS, "[]")
    if isinstance(value, IntervalSweep):
        whole = all(isinstance(end, int) for end in (value.start, value.end))
        kinds["log" if "log" in value.tags else "int" if whole else "uniform"] = f"[{value.start},{value.end}]"
    else:
        kinds["choice"] = f"[{','.join(_listed(value))}]"
    return ",".join(f"{kind}:{values}" for kind, values in kinds.items())


def _listed(value: Any) -> list[str]:
    """The values as they are written on the command line."""
    override = Override(OverrideType.CHANGE, "", ValueType.CHOICE_SWEEP, value)
    return [item.replace(literals.MARK, "") for item in override.sweep_string_iterator()]
