"""Compose the frozen Config from command-line overrides and config files: Hydra composes, `schema.build` checks.

With `override_values` the only module that imports Hydra; the only one that imports OmegaConf. Interpolations are
resolved once, here.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Sweep
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from engine.config import code_names, feature_names, literals, nested, plugins, schema, secrecy
from engine.config import overrides as words_
from engine.config.code_names import CodeName
from engine.config.override_values import parse
from engine.config.overrides import merged
from engine.config.plugins import Plugin
from engine.config.sections.runtime import PathsConfig
from engine.config.tree import Config
from engine.errors import UserError, did_you_mean, nearest

_REFERENCE = re.compile(r"\$\{(\.*)([^:{}$]+)\}")
_HYDRA = threading.Lock()  # Hydra keeps its state in the process: one composition at a time
_ROOT = "engine_root"


@dataclasses.dataclass(frozen=True)
class Composed:
    """A checked config, its plain form with secrets masked, and the secret values that must not be written."""

    config: Config
    saved: nested.Tree
    secrets: tuple[str, ...]
    overrides: tuple[str, ...]


def conf_directory() -> Path:
    """The engine's own config files: in `conf/` of the repository, or inside the installed package."""
    inside = Path(__file__).resolve().parents[1] / "conf"
    return inside if inside.is_dir() else inside.parents[1] / "conf"


def compose(overrides: Sequence[str] = (), config_dir: str | None = None) -> Composed:
    """Compose, resolve once, check and freeze.

    Raises UserError naming the key or value that is wrong and the nearest known one.
    """
    folders = [conf_directory()]
    start: nested.Tree = schema.plain(Config(), whole=True)
    if config_dir is not None:
        folders.append(Path(config_dir).expanduser().resolve())
        if not folders[-1].is_dir():
            raise UserError(f"--config-dir must be a folder, found {config_dir!r}")
        start["paths"] |= default_paths(folders[-1])
    parsed = [parse(word) for word in overrides]
    for word, (_, value) in zip(overrides, parsed, strict=True):
        if isinstance(value, Sweep):
            raise UserError(
                f"{secrecy.masked_word(word)!r} names several values: add --multirun, or write a list as key=[a,b]"
            )
    choices = [_names_group(word, folders) for word in overrides]
    files = [_as_name(word, *parsed[place]) for place, word in enumerate(overrides) if choices[place]]
    try:
        plain = _filled(start, _compose_with_hydra(files, folders))
    except _NoChoiceError as error:
        if hint := _other_folder(folders[1] if config_dir is not None else None, error.group, error.choice):
            raise UserError(f"{error.fact}{hint}") from None
        raise
    for (key, value), choice in zip(parsed, choices, strict=True):
        if not choice:
            _change(plain, key, value)
    raw = OmegaConf.create(literals.settled(plain, Config))
    places = {".".join(map(str, place)): (place, value) for place, value in _leaves(raw)}
    leaves = {path: value for path, (_, value) in places.items()}
    with secrecy.masked_errors(secrecy.of_texts(leaves.values())):
        try:
            _resolve_once(raw, places)
            values: Any = OmegaConf.to_container(raw, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            raise UserError(f"config key {error.full_key or '?'}: {str(error).splitlines()[0]}") from None
    keys = {key.rsplit(".", 1)[-1] for key, *_ in schema.documented(Config)}
    hidden, references = secrecy.of_config(leaves, dict(nested.leaves(values, lists=True)), keys)
    with secrecy.masked_errors(hidden):
        _refuse_targets(values)
        _check_top_level(values)
        config = schema.build(Config, values)
        if _pin(values, config, folders[-1] if config_dir is not None else Path.cwd()):
            config = schema.build(Config, values)
        feature_names.check(config)
    _drop_later(values, schema.plain(config))
    saved = nested.mapped(values, lambda path, value: references.get(path, value))
    return Composed(config, saved, hidden, tuple(secrecy.masked_word(word) for word in overrides))


def _pin(values: dict[str, Any], config: Config, folder: Path) -> bool:
    """Read the plug-ins of a config, hold their code, and give the values that name it their digests; whether there are any."""
    found = [plugins.read(folder, reference) for reference in config.plugins]
    values["plugins"] = [plugin.reference for plugin in found]
    for item in code_names.of_config(config):
        if (named := _named(item, found)) != item.name:
            *above, last = item.path
            place: Any = values
            for part in above:
                place = place[part]
            place[last] = named
    plugins.add(found)
    return bool(found)


def _named(item: CodeName, found: Sequence[Plugin]) -> str:
    """The name of what is built in or installed; with its digest where a plug-in defines it. Raises UserError for another."""
    same = [plugin.file for plugin in found if item.name in plugin.defined]
    if item.built_in and same:
        raise UserError(
            f"{item.where}: {item.name!r} is one of the engine, and {same[0]} defines it too: rename that one"
        )
    if item.built_in:
        return item.name
    offered = plugins.installed(item.group)
    others = (*offered, *(name for plugin in found for name in plugin.defined))
    named = plugins.pinned(item.name, found)
    if item.checked and plugins.split(named)[1] is None and item.name not in offered:
        raise UserError(
            f"{item.where} must be one of {', '.join(item.known)}, a name that a file of `plugins` defines, or one of an "
            f"installed package (entry point group {item.group}), found {item.name!r}."
            f"{nearest(item.name, [*item.known, *others], listed=False)}"
        )
    return named


def _drop_later(values: dict[str, Any], saved: nested.Tree) -> None:
    """Drop keys that are not `saved`: those that earlier versions lacked, where they are the default."""
    for name, keys in schema.plain(Config(), whole=True).items():
        if name not in saved:
            values.pop(name, None)
        elif isinstance(keys, dict) and values.get(name):
            for key in keys.keys() - saved[name].keys():
                values[name].pop(key, None)


def default_paths(folder: Path) -> dict[str, str]:
    """Defaults of `paths` for a config folder (absolute): beside it, so that a config finds its runs from any directory.

    Inside the folder if it is the working directory or has one of them already. Relative if below the working directory.
    """
    here = Path.cwd().resolve()
    defaults = {name: getattr(PathsConfig(), name) for name in ("store", "runs")}
    within = folder == here or any((folder / name).is_dir() for name in defaults.values())
    home = folder if within else folder.parent
    home = home.relative_to(here) if home.is_relative_to(here) else home
    return {key: str(home / name) for key, name in defaults.items()}


def groups(config_dir: str | None = None) -> dict[str, list[str]]:
    """Config groups and their choices, read from `conf/` and from the user's own folder."""
    found: dict[str, set[str]] = {}
    for root in (conf_directory(), *([Path(config_dir).expanduser()] if config_dir else [])):
        for file in root.glob("*/*.yaml"):
            found.setdefault(file.parent.name, set()).add(file.stem)
    return {name: sorted(choices) for name, choices in sorted(found.items())}


def chosen() -> set[str]:
    """Groups with a default choice (`cluster=ray` replaces it); a choice of another group is added with `+`."""
    root: Any = OmegaConf.to_container(OmegaConf.load(conf_directory() / "config.yaml"))
    return {str(name) for entry in root["defaults"] if isinstance(entry, dict) for name in entry}


def to_yaml(values: nested.Tree) -> str:
    """YAML text of a plain config."""
    return OmegaConf.to_yaml(OmegaConf.create(values))


class _File(FileConfigSource):
    """Hydra's source of YAML files, with words kept as written; it has its own scheme, which only this module uses."""

    @staticmethod
    def scheme() -> str:
        return "engine"

    def load_config(self, config_path: str) -> ConfigResult:
        path = Path(self.path) / self._normalize_file_name(config_path)
        header = self._get_header_dict(path.read_text(encoding="utf-8"))
        place = f"{self.scheme()}://{self.path}"
        return ConfigResult(
            provider=self.provider, path=place, config=OmegaConf.create(_read_yaml(path)), header=header
        )


def _read_yaml(path: Path) -> Any:
    with open(path, encoding="utf-8") as file:
        values = literals.load(file)
    if isinstance(values, dict) and "defaults" in values:  # Hydra reads these: names of choices
        values["defaults"] = literals.texts(values["defaults"])
    return {} if values is None else values


def _names_group(text: str, folders: list[Path]) -> bool:
    """Whether the override chooses a config file of a group (`cluster=ray`, `+experiment=flights`), which Hydra handles."""
    name = re.split("[=@]", text.lstrip("+~"), maxsplit=1)[0]
    return not re.search(r"[.\[\]\"']", name) and any((folder / name).is_dir() for folder in folders)


def _as_name(text: str, word: words_.Word, value: Any) -> str:
    """The override with a choice like `2024` quoted, because it is a file name and not a number."""
    is_word = isinstance(value, str) and value.startswith(literals.MARK)
    return f"{text.removesuffix(word.value or '')}'{value[1:]}'" if is_word else text


def _filled(start: nested.Tree, files: nested.Tree) -> nested.Tree:
    """The defaults updated from the files; a map given as a whole replaces its default."""
    plain = merged(start, files)
    for path, default in schema.wholes(Config):
        *above, last = path.split(".")
        given: Any = files
        node: Any = plain
        for name in above:
            given, node = (given or {}).get(name), node[name] or {}
        if given and given.get(last):
            node[last] = words_.whole(default, given[last])
    return plain  # type: ignore[no-any-return]


def _change(plain: nested.Tree, word: words_.Word, value: Any) -> None:
    try:
        words_.apply(plain, word, value, Config)
    except words_.Unknown:
        raise UserError(_unknown_key(word.key)) from None


def _compose_with_hydra(words: list[str], folders: list[Path]) -> nested.Tree:
    """The merged values of the chosen files; words as written, interpolations unresolved."""
    try:
        with _HYDRA:
            Plugins.instance().register(_File)
            search = {"searchpath": [f"engine://{folder}" for folder in folders]}
            root = {**_read_yaml(conf_directory() / "config.yaml"), "hydra": search}
            ConfigStore.instance().store(name=_ROOT, node=root)
            with initialize(version_base="1.3", config_path=None, job_name="engine"):
                composed = hydra_compose(_ROOT, overrides=words)
        plain: Any = OmegaConf.to_container(composed, resolve=False)
        return plain  # type: ignore[no-any-return]
    except MissingConfigException as error:
        raise _missing_choice(error) from None
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(_refused(error)) from None
    except yaml.YAMLError as error:
        raise UserError(f"a config file must be YAML: {' '.join(str(error).split())}") from None


class _NoChoiceError(UserError):
    """A choice that its config group does not have."""

    def __init__(self, group: str, choice: str, options: list[str]) -> None:
        self.group, self.choice = group, choice
        self.fact = f"config group {group!r} has no choice {choice!r}."
        super().__init__(f"{self.fact}{nearest(choice, options)}")


def _missing_choice(error: MissingConfigException) -> UserError:
    missing = str(error.missing_cfg_file)
    match = re.search(r"Could not find '([^']+)'", str(error))
    group, _, choice = (match.group(1) if match else missing).rpartition("/")
    options = list(error.options or re.findall(r"^\t(\S+)$", str(error).split("Config search path")[0], re.MULTILINE))
    if group:
        return _NoChoiceError(group, choice, options)
    return UserError(f"no config {missing!r}.{nearest(missing, options)}")


def _other_folder(folder: Path | None, group: str, choice: str) -> str:
    """A hint if the choice exists above or below --config-dir, or near the working directory."""
    here = folder or Path.cwd().resolve()
    levels = [*here.parents[:2], *([] if folder is None else [here]), *sorted(_below(here))]
    found = next((level for level in levels if (level / group / f"{choice}.yaml").is_file()), None)
    if found is None or found == folder:
        return ""
    shown = found.relative_to(Path.cwd()) if found.is_relative_to(Path.cwd()) else found
    said = "" if folder is None else f", not {folder}"
    return f" --config-dir must be the folder that holds {group}/{choice}.yaml: --config-dir {shown}{said}"


def _below(folder: Path) -> Iterator[Path]:
    """Folders one and two levels below."""
    for pattern in ("*/", "*/*/"):
        yield from (path for path in folder.glob(pattern) if not path.name.startswith("."))


def _refused(error: Exception) -> str:
    """The engine's message for an error of Hydra about an override or a config file."""
    text = str(error) or str(error.__cause__ or type(error).__name__)  # Hydra raises some of them without a message
    for pattern, meaning in _REFUSALS.items():
        if match := re.search(pattern, text):
            return meaning(match.group(1))
    first, *more = text.splitlines()
    return f"{first} {more[0]}" if first.endswith(":") and more else first


def _unknown_key(name: str) -> str:
    if name in groups():
        return f"config group {name!r} has no default here: write +{name}=CHOICE, one of {', '.join(groups()[name])}"
    parent, _, last = name.rpartition(".")
    if parent in schema.maps(Config):
        return f"unknown config key {name!r}: {parent} has no entry {last!r}; --cfg job shows those that it has"
    if is_known(name):
        return (
            f"config key {name!r} has no value to change or remove: it is not set, or a config file leaves it or a "
            f"section above it empty (`{name.split('.')[0]}:` with nothing below). Write keys below that line, or remove it"
        )
    return f"unknown config key {name!r}.{nearest_key(name)}"


_CHOSEN = "config group {0!r} has a choice already: write {0}=CHOICE, without the +".format
_REFUSALS: dict[str, Callable[[str], str]] = {
    r"Could not (?:override|delete\.) '([^']+)'": _unknown_key,
    r"Multiple values for (\w+)": _CHOSEN,
    r"(\w+) appears more than once in the final defaults": _CHOSEN,
}


def is_known(name: str) -> bool:
    """Whether a dotted name is a key or a section; below a map any name is."""
    keys = known_keys()
    values = [path for path in schema.maps(Config) if f"{path}.<name>" not in keys]  # maps whose entries are values
    patterns = [re.escape(key).replace("<name>", r"[^.]+") for key in keys] + [
        re.escape(path) + r"\..+" for path in values
    ]
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def nearest_key(name: str) -> str:
    """The nearest key of the same section if that section exists, else of all keys, by the whole name or its last part."""
    section, _, last = name.rpartition(".")
    keys = known_keys()
    inside = {key.removeprefix(f"{section}.").split(".")[0] for key in keys if key.startswith(f"{section}.")}
    inside.discard("<name>")
    if section and inside:
        hint = nearest(last, inside)
        return hint.replace("'", f"'{section}.", 1) if "Did you mean" in hint else hint
    by_last: dict[str, list[str]] = {}
    for key in keys:
        if "<" not in key:
            by_last.setdefault(key.rpartition(".")[2], []).append(key)
    if last in by_last:
        return did_you_mean(by_last[last])
    for word in (name, last):
        similar = difflib.get_close_matches(word, [*keys, *by_last], n=1)
        if similar:
            return did_you_mean(by_last.get(similar[0], similar))
    return nearest(name, {key.partition(".")[0] for key in keys})


def known_keys() -> list[str]:
    """Every dotted key and every section and group name."""
    keys = {path for path, *_ in schema.documented(Config)} | set(groups())
    return sorted(
        keys | {".".join(path.split(".")[:depth]) for path in keys for depth in range(1, path.count(".") + 1)}
    )


def _check_top_level(values: nested.Tree) -> None:
    sections = {field.name for field in dataclasses.fields(Config)}
    for name in values:
        if name in groups() and name not in sections:
            raise UserError(f"a file of config group {name!r} must begin with the line `# @package _global_`")
        if name not in sections:
            hint = schema.dotted(name) or nearest(str(name), sections | set(groups()))
            raise UserError(f"unknown config key {name!r}.{hint}")


def _refuse_targets(values: Any, path: str = "") -> None:
    """Raise UserError for `_target_` and the like anywhere in a config: a config never names code to call."""
    if isinstance(values, dict):
        for name, item in values.items():
            where = f"{path}.{name}" if path else str(name)
            if name in ("_target_", "_partial_", "_recursive_", "_convert_"):
                raise UserError(f"config key {where!r} is not allowed: a config never names code to run. Remove it")
            _refuse_targets(item, where)
    elif isinstance(values, list):
        for index, item in enumerate(values):
            _refuse_targets(item, f"{path}[{index}]")


def _leaves(node: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(path of names and indices, value as written) of every scalar; an interpolation stays text."""
    if node._is_none() or node._is_missing() or node._is_interpolation():
        yield place, node._value()
        return
    for name in node.keys() if isinstance(node, DictConfig) else range(len(node)):
        item = node._get_node(name)
        if isinstance(item, (DictConfig, ListConfig)):
            yield from _leaves(item, (*place, name))
        else:
            yield (*place, name), item._value()


def _resolve_once(root: DictConfig, places: dict[str, tuple[tuple[Any, ...], Any]]) -> None:
    """Replace every interpolation by its value, evaluated exactly once, in order of dependency.

    OmegaConf evaluates at every read: with `a: ${random:}` and `b: ${a}` the two would differ.
    """
    waiting = {path: text for path, (_, text) in places.items() if isinstance(text, str) and "${" in text}
    while waiting:
        ready = [path for path, text in waiting.items() if not _refers_to(path, text, waiting)]
        for path in ready:
            *above, last = places[path][0]
            parent: Any = root
            for part in above:
                parent = parent._get_node(part)
            value = parent[last]
            parent[last] = literals.escaped(value) if isinstance(value, str) else value
            del waiting[path]
        if not ready:
            raise UserError(f"config keys must not refer to each other in a cycle, found {', '.join(waiting)}")


def _refers_to(path: str, text: str, waiting: Iterable[str]) -> bool:
    """Whether the text refers to an unresolved key, or to a section with one."""
    parents = path.split(".")[:-1]
    for dots, name in _REFERENCE.findall(text):
        base = parents[: len(parents) - (len(dots) - 1)] if dots else []
        target = ".".join([*base, name.replace("[", ".").replace("]", "")])
        if any(other == target or f"{other}.".startswith(f"{target}.") for other in waiting if other != path):
            return True
    return False
