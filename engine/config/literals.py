"""Unquoted words of config files and the command line, kept as text until the type of their key is known.

YAML and Hydra turn unquoted words into numbers, booleans and nulls before the type of their key is known: `0123` becomes
83, `1.10` becomes 1.1, `no` becomes False. Here such a word stays a text with a mark, and `settled` decides by the declared
type: a text key gets the text, any other key the value. Files and the command line read numbers in the same way.
"""

from __future__ import annotations

import json
import math
import re
from decimal import Decimal
from typing import Any, TextIO

import yaml

from engine.config import schema

LARGEST = 1 << 24  # characters of a file with its aliases expanded
MARK = "\ufdd0"  # a Unicode noncharacter, which never occurs in users' text
_NULLS = {"null", "~"}
_WHOLE = re.compile(r"[+-]?(0|[1-9][0-9]*(_[0-9]+)*)")
_NUMBER = re.compile(
    r"[+-]?((0|[1-9][0-9]*(_[0-9]+)*)(\.[0-9_]*)?|\.[0-9][0-9_]*)(e[+-]?[0-9]+)?|[+-]?\.?(inf|nan)", re.IGNORECASE
)
_TAGS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "null", "timestamp"))
_WORD = "!engine/word"
_MERGE, _VALUE = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:value"


def marked(text: str) -> str:
    """An unquoted word that may be a text or another value."""
    return MARK + text


def escaped(text: str) -> str:
    """The text as it is written where `${` would begin a reference: it stays this text."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def load(stream: TextIO) -> Any:
    """The YAML document of a file: names as written, quoted scalars as text, unquoted ones as text or marked.

    Raises yaml.YAMLError.
    """
    try:
        loaded = yaml.load(stream, Loader=_Loader)
        json.dumps(loaded, ensure_ascii=False).encode("utf-8")  # as a run keeps its config
    except RecursionError:
        raise yaml.YAMLError(f"{stream.name} has too many levels of nested lists or mappings") from None
    except UnicodeEncodeError as error:
        half = error.object[error.start].encode("utf-8", "backslashreplace").decode()
        raise yaml.YAMLError(
            f"{stream.name} must be valid Unicode text, found half of a surrogate pair, {half}"
        ) from None
    except ValueError:
        raise yaml.YAMLError(f"{stream.name} has a list or mapping that contains itself, by an alias") from None
    return loaded


class _Loader(yaml.SafeLoader):
    def construct_document(self, node: Any) -> Any:
        if _written_out(node, {}) > LARGEST:
            raise yaml.YAMLError(
                f"{self.name} must not have more than {LARGEST:,} characters after every alias and `<<` is expanded"
            )
        return super().construct_document(node)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for name, _ in node.value:
            if name.tag == _MERGE:
                continue
            wrong = "a name that is not a text" if not isinstance(name, yaml.ScalarNode) or not name.value else ""
            if wrong or name.value in seen:
                problem = f"found {wrong or f'duplicate key {name.value}'}"
                raise yaml.constructor.ConstructorError(
                    "while reading a mapping", node.start_mark, problem, name.start_mark
                )
            seen.add(name.value)
        self.flatten_mapping(node)
        return {name.value: self.construct_object(value, deep=deep) for name, value in node.value}

    def word(self, node: Any) -> str | None:
        text = self.construct_scalar(node)
        return marked(text) if text else None


def _written_out(node: Any, known: dict[int, int]) -> int:
    """Number of characters and values below a node with aliases expanded; `load` rejects a node that contains itself."""
    if isinstance(node, yaml.ScalarNode):
        return 1 + len(node.value)
    if id(node) not in known:
        known[id(node)] = 1
        parts = (part for item in node.value for part in (item if isinstance(item, tuple) else (item,)))
        known[id(node)] = 1 + sum(_written_out(part, known) for part in parts)
    return known[id(node)]


_Loader.yaml_implicit_resolvers = {
    letter: [(_WORD if tag in _TAGS else tag, pattern) for tag, pattern in resolvers if tag != _VALUE]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag in (_WORD, *_TAGS):  # `!!float 1.10` is kept as written too
    _Loader.add_constructor(_tag, _Loader.word)
_Loader.add_constructor(_MERGE, _Loader.construct_scalar)  # `<<` as a value
for _kind in ("binary", "set", "omap", "pairs"):  # no config key has such a value
    del _Loader.yaml_constructors[f"tag:yaml.org,2002:{_kind}"]
# YAML 1.1 requires a dot and a sign: 1e5 is a text there, but a number everywhere else and on the command line.
_Loader.add_implicit_resolver(_WORD, re.compile(f"(?:{_NUMBER.pattern})$", re.IGNORECASE), list("-+.0123456789iInN"))


def settled(values: Any, hint: Any = None) -> Any:
    """Plain values with every marked word converted to its declared type, or by its form if none is declared."""
    if isinstance(values, dict):
        return {name: settled(item, schema.below(hint, name)) for name, item in values.items()}
    if isinstance(values, list):
        return [settled(item, schema.below(hint, index)) for index, item in enumerate(values)]
    return _value(values[1:], schema.leaves(hint)) if isinstance(values, str) and values[:1] == MARK else values


def texts(values: Any) -> Any:
    """Plain values with every marked word as text, null as null."""
    return settled(values, str | None)


def _value(text: str, kinds: set[Any]) -> Any:
    null = text.lower() in _NULLS
    if str in kinds and not kinds & {bool, int, float}:
        return None if null and type(None) in kinds else text
    if null:
        return None
    if text.lower() in ("true", "false") and (bool in kinds or not kinds):
        return text.lower() == "true"
    if _WHOLE.fullmatch(text):
        return int(text)
    if not _NUMBER.fullmatch(text):
        return text
    digits = text.lower().replace(".inf", "inf").replace(".nan", "nan")
    number = float(digits)
    # A bound of a decimal column may have more digits than a float: kept as text if the key allows text.
    return text if str in kinds and math.isfinite(number) and Decimal(repr(number)) != Decimal(digits) else number
