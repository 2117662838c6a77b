"""`engine reproduce RUN`: repeats a run in a temporary folder and compares its digest chain link by link.

It restores the code, finds the inputs by digest, runs the recorded config with an empty store (a warm one would
hide a changed ingest or kernel) and compares the chain: inputs, dataset, features, fitted state, row order, losses, weights,
metrics, scores. Bits must be equal on the same kind of hardware and libraries; elsewhere the tolerance of
`chain.TOLERANCE` applies. The report states which of the two was used.

`--from LINK` takes earlier links from the recorded run: dataset and features from its store, the model for
`metrics`. Fitted state, order, losses and weights belong to one training, which is repeated as a whole.
The rerun uses no tracker and sends no alert; it writes only to the temporary folder.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from engine.config import literals, nested, plugins
from engine.config.nested import Tree
from engine.config.plugins import Plugin
from engine.config.secrecy import MASK
from engine.config.tree import Config
from engine.errors import UserError
from engine.lifecycle import chain, restore
from engine.lifecycle.restore import Code
from engine.lifecycle.runs import directories, find_run
from engine.runtime import digest, recorded_paths, registry, remote, storage, terminal, trust
from engine.runtime.run import RunRecord, link_order, load_record, records_below
from engine.runtime.terminal import table
from engine.training.bundle import find_model, read_bundle
from engine.training.device import has_gpu

EXPERIMENT = "recorded"
REPRODUCED, DIFFERENT = 0, 2
# What engines did before a key of `split` existed, where its default is something else.
OLDER_SPLIT: Tree = {"known_by": None, "ripening": "none"}
# Keys that name a model.
MODELS = (("score", "model"), ("evaluate", "model"), ("monitor", "model"), ("train", "start_from"))
MEMBERS = "model.blend.bundles"  # key of a list of models, and of their digests in `used`
STORED_AT = {
    "dataset": (),
    "features": ("datasets",),
}  # folders of the store that may be reused, by the link to start at


@dataclass(frozen=True)
class Options:
    """The options of a reproduction."""

    code: str = "recorded"
    start: str = "inputs"
    inputs: Path | None = None
    build_env: bool = False
    keep: Path | None = None
    store: Path = Path("store")  # whose recorded code may run
    trust: str | None = None

    def __post_init__(self) -> None:
        if self.code not in ("recorded", "current"):
            raise UserError(f"--code must be recorded or current, found {self.code!r}")
        chain.check_link(self.start)
        if self.inputs is not None and not self.inputs.is_dir():
            raise UserError(f"--inputs must be a folder, found {str(self.inputs)!r}")


def reproduce(config: Config, words: list[str], given: Mapping[str, str]) -> int:
    """The command: exit code 0 when every link holds, 2 when one differs."""
    if len(words) != 1:
        raise UserError(f"reproduce takes one run, found {' '.join(words) or 'nothing'}")
    options = Options(
        code=given.get("--code", "recorded"),
        start=given.get("--from", "inputs"),
        inputs=Path(given["--inputs"]) if "--inputs" in given else None,
        build_env="--build-env" in given,
        keep=Path(given["--keep"]) if "--keep" in given else None,
        store=Path(config.paths.store),
        trust=config.trust,
    )
    found = reproduce_run(find_run(words[0], Path(config.paths.runs)), options)
    terminal.out(json.dumps(found, indent=1) + "\n" if "--json" in given else as_text(found))
    return REPRODUCED if found["first_difference"] is None else DIFFERENT


def reproduce_run(directory: Path, options: Options) -> dict[str, Any]:
    """Run `directory` again and compare; the report is JSON. Raises UserError when it cannot be run."""
    record = load_record(directory)
    _check_finished(directory, record)
    with tempfile.TemporaryDirectory(prefix="engine-reproduce-") as temporary:
        scratch = Path(temporary).resolve()
        current = options.code == "current"
        code = restore.current_code() if current else restore.recorded_code(record, directory, scratch)
        carried = _carried(record, directory)
        _check_trusted(code, record, directory, options, carried)
        python = restore.build_environment(record, scratch) if options.build_env else Path(sys.executable)
        inputs = find_inputs(record, options.inputs)
        _fill_store(record, scratch / "store", options.start)
        _take_history(record, scratch / "store")
        for path, plugin in carried.items():
            trust.record_plugin(scratch / "store", plugin)
            if path.is_relative_to(directory / plugins.FOLDER):
                storage.write_bytes(scratch / "conf" / plugin.file, plugin.code)
        command = "evaluate" if options.start == "metrics" and record["command"] == "train" else record["command"]
        again = record if code.digest else _with_older_rules(record)  # restored code has its own
        _write_experiment(again, scratch, inputs, directory if command != record["command"] else None)
        terminal.err(f"running {command} again; the recorded run took {record.get('seconds', 0):.0f} s\n")
        failure = _run(command, code, python, scratch)
        rerun = next(iter(directories(scratch / "runs")), None)
        found = _report(directory, rerun, record, options, code, inputs, failure)
        if options.keep is not None:
            shutil.copytree(scratch, options.keep, dirs_exist_ok=True)
        return found


def _carried(record: RunRecord, directory: Path) -> dict[Path, Plugin]:
    """The plug-ins of the run and of the models that it used, by path. Raises UserError for one that is not the recorded one."""
    found = {}
    for reference in record["config"].get("plugins", ()):
        plugin = plugins.read(directory / plugins.FOLDER, reference)
        found[directory / plugins.FOLDER / plugin.file] = plugin
    for used in [*(used for _, _, used in _models(record)), *_members(record)]:
        model = find_model(str(used), Path())
        found |= {model / plugins.FOLDER / plugin.file: plugin for plugin in read_bundle(model).code}
    return found


def _check_trusted(
    code: Code, record: RunRecord, directory: Path, options: Options, carried: dict[Path, Plugin]
) -> None:
    """Refuse code and remote addresses of the run that this machine's store does not know, and list them."""
    reached = _places(record)
    parts = [
        f"  {path}, digest {plugin.digest}"
        for path, plugin in carried.items()
        if not trust.is_recorded(options.store, plugin.digest)
    ]
    digests = list(dict.fromkeys(plugin.digest for plugin in carried.values()))
    if code.digest is None:
        trust.check(options.store, digests, reached, options.trust, "\n".join(parts))
        return
    patch = directory / "engine.patch"
    parts.append(f"  {code.how}, digest {code.digest}, on behalf of {directory}")
    if (record["code"]["engine_git"] or {}).get("dirty") and patch.is_file():
        changed = [line[6:] for line in patch.read_text("utf-8", "replace").splitlines() if line.startswith("+++ b/")]
        parts.append(f"  {patch}: changes {', '.join(changed[:10])}{' ...' if len(changed) > 10 else ''}")
    if options.build_env:
        parts.append("  with packages from the index: " + " ".join(restore.pins(record["environment"]["packages"])))
    trust.check(options.store, [code.digest, *digests], reached, options.trust, "\n".join(parts))


def _places(record: RunRecord) -> dict[str, list[str | None]]:
    """Remote addresses that the rerun would read, by key; paths whose value a reference may change into one count too."""
    data, score = record["config"].get("data") or {}, record["config"].get("score") or {}
    paths = {
        "data.path": data.get("path"),
        "score.input": score.get("input"),
        **{f"data.sources.{name}": source["path"] for name, source in (data.get("sources") or {}).items()},
    }
    found: dict[str, list[str | None]] = {
        name: [path, None, None] for name, path in paths.items() if _has_reference(path)
    }
    there = score.get("input") or ""
    if "://" in there and (item := remote.place(there, score.get("endpoint"), score.get("region"))):
        found["score.input"] = item
    return {**found, **remote.of_data(data)}


def _has_reference(path: str | None) -> bool:
    return "${" in (path or "")


def _check_finished(directory: Path, record: RunRecord) -> None:
    if not (directory / "DONE").exists():
        raise UserError(
            f"{directory} must be a finished run, found status {record.get('status')!r}: other runs cannot be reproduced"
        )
    if not record.get("chain"):
        raise UserError(
            f"{directory} has no chain of digests (command {record['command']!r}): there is nothing to compare"
        )
    if record["command"] == "retrain":
        challenger = (
            record.get("challenger_run") or ""
        ) and f", and its challenger by reproduce {record['challenger_run']}"
        raise UserError(
            f"{directory} changed a registry, which a rerun must not do. Check the decision with "
            f"`retrain retrain.replay={directory / 'decision.json'}`{challenger}"
        )
    hidden = [name for name, value in nested.leaves(record["config"]) if MASK in str(value)]
    if hidden:
        raise UserError(
            f"{directory} cannot be run again: {', '.join(hidden)} was given as a plain secret and is not stored. "
            "Give secrets by reference (${oc.env:NAME})"
        )


# ----------------------------------------------------------------------------------------------------------- inputs


@dataclass(frozen=True)
class Inputs:
    """The present location of the inputs: the data's root (None: as recorded), and the inputs that were not found."""

    root: Path | None
    changed: tuple[str, ...]


def find_inputs(record: RunRecord, folder: Path | None) -> Inputs:
    """Find every recorded input by its digest: at its old path, below `folder`, or below the working directory."""
    recorded_root = recorded_paths.recorded_path(record, str(record["config"].get("data", {}).get("path", "")))
    wanted = {
        recorded_paths.recorded_path(record, name): value
        for name, value in record["inputs"].items()
        if "://" not in name
    }
    roots = [recorded_root, *([folder.resolve()] if folder else []), Path.cwd() / recorded_root.name, Path.cwd()]
    lacking = {
        root: [path for path, value in wanted.items() if not _is_there(path, value, recorded_root, root)]
        for root in roots
    }
    best = min(roots, key=lambda root: len(lacking[root]))  # the first of equal ones
    return Inputs(best, tuple(str(path) for path in lacking[best]))


def _is_there(path: Path, value: str, recorded_root: Path, root: Path) -> bool:
    """Whether the input has its digest, at its old path or below the new root of the data."""
    moved = root / path.relative_to(recorded_root) if path.is_relative_to(recorded_root) else path
    if not moved.is_file() and not path.is_relative_to(recorded_root):
        return _is_in_a_package(path, value)
    return moved.is_file() and digest.of_file(moved) == value


def _is_in_a_package(path: Path, value: str) -> bool:
    """The present path of a file of an installed package (`pkg://`)."""
    for place in range(1, len(path.parts)):
        for root in sys.path:
            here = Path(root or ".").joinpath(*path.parts[-place:])
            if place > 1 and here.is_file() and digest.of_file(here) == value:
                return True
    return False


# ------------------------------------------------------------------------------------------------------------ rerun


def _fill_store(record: RunRecord, store: Path, start: str) -> None:
    """An empty store; with a later start, earlier links are copied from the recorded store."""
    store.mkdir()
    parts = STORED_AT.get(start, ("datasets", "features")) if start != "inputs" else ()
    for part in parts:
        source = recorded_paths.store_of(record) / part
        if not source.is_dir():
            raise UserError(f"--from {start} takes earlier links from the recorded store, but {source} does not exist")
        hidden = shutil.ignore_patterns(".*")
        shutil.copytree(source, store / part, ignore=hidden, copy_function=storage.link)


def _take_history(record: RunRecord, store: Path) -> None:
    """The dataset that was the history of `score.input`; it is copied whichever link the rerun starts at."""
    if not record.get("history"):
        return
    source = Path(record["history"])
    if not (source / "manifest.json").is_file():
        raise UserError(
            f"the run's windows looked back on dataset {source}, which does not exist: restore the store that held it"
        )
    target = store / "datasets" / source.parent.name / source.name
    shutil.copytree(source, target, copy_function=storage.link, dirs_exist_ok=True)


def _write_experiment(record: RunRecord, scratch: Path, inputs: Inputs, judged: Path | None = None) -> None:
    """The recorded config as an experiment that sets every key, so that present defaults do not apply.

    `judged` is the training run whose model is evaluated again, where the rerun starts at its metrics.
    """
    config = cast(Tree, copy.deepcopy(record["config"]))
    config["paths"] = {"store": str(scratch / "store"), "runs": str(scratch / "runs")}
    _reach_nobody(config)
    _read_its_input(config, record)
    if config.get("train", {}).get("reduction") != "ddp":  # results do not depend on the workers
        config["cluster"] = {"kind": "local"}
    elif config.get("cluster"):
        config["cluster"]["address"] = None
    root = config.get("data", {}).get("path") or ""
    if record["config"].get("data", {}).get("sources") and not _has_reference(root) and "://" not in root:
        config["data"]["path"] = literals.escaped(str(inputs.root))
    for section in ("train", "score"):
        if "resume" in config.get(section, {}):
            config[section]["resume"] = "never"
    # The resolved value of `auto` is used. Without a GPU here the rerun uses the CPU, and the tolerance applies.
    device = "cpu" if record.get("device") == "cuda" and not has_gpu() else record.get("device")
    for name, value in (("precision", record.get("precision")), ("device", device)):
        if value:
            config["train"][name] = value
    config.get("train", {}).update(record.get("sizes", {}))
    if "chosen_model" in record:
        config["model"].update(record["chosen_model"])
    _read_its_models(config, record)
    if judged is not None:
        config["evaluate"]["model"] = literals.escaped(str(judged))
    if config.get("monitor", {}).get("run"):
        scored = recorded_paths.recorded_path(record, config["monitor"]["run"])
        config["monitor"]["run"] = literals.escaped(str(scored))
    # JSON is YAML in which no text can be read as a number or a boolean.
    text = f"# @package _global_\n{json.dumps(config, indent=1)}\n"
    storage.write_text(scratch / "conf" / "experiment" / f"{EXPERIMENT}.yaml", text)


def _with_older_rules(record: RunRecord) -> RunRecord:
    """The record with keys that it is older than, by which the present engine does what its engine did."""
    config = record["config"].copy()
    config["split"] = {**OLDER_SPLIT, **config.get("split", {})}
    again = record.copy()
    again["config"] = config
    return again


def _reach_nobody(config: Tree) -> None:
    """Keys that keep the rerun private: no tracker, no alerts, no output of predictions elsewhere."""
    config["tracking"] = {**config.get("tracking", {}), "kind": "off"}
    if config.get("monitor"):
        config["monitor"]["alerts"] = {}
    # The output of scores, and the scores of a second model, are not compared.
    for name in {"output", "endpoint", "region", "shadow"} & config.get("score", {}).keys():
        config["score"][name] = None


def _read_its_models(config: Tree, record: RunRecord) -> None:
    """Keys for the models that the run used, from their present places."""
    for section, name, used in _models(record):
        config[section][name] = literals.escaped(str(used))
    if members := _members(record):
        config["model"]["blend"]["bundles"] = [literals.escaped(str(used)) for used in members]


def _read_its_input(config: Tree, record: RunRecord) -> None:
    """Keys for the rows of `score.input` from their present path, with their recorded history."""
    score, then = config.get("score", {}), record["config"].get("score", {})
    if then.get("input"):
        if "score.input" in _places(record):
            score |= {"endpoint": then["endpoint"], "region": then["region"]}
        else:
            score["input"] = literals.escaped(str(recorded_paths.recorded_path(record, then["input"])))
        score["history"] = record.get("used", {}).get("history", then["history"])


def _models(record: RunRecord) -> Iterator[tuple[str, str, Path]]:
    """(section, key, place) of every model that the run used."""
    for section, name in MODELS:
        if reference := cast(Tree, record["config"]).get(section, {}).get(name):
            used = record.get("started_from") if section == "train" else record.get("model")
            yield section, name, _model_of(record, reference, used)


def _members(record: RunRecord) -> list[Path]:
    """The place of every finished model that the run blended."""
    references = cast(Tree, record["config"]).get("model", {}).get("blend", {}).get("bundles", [])
    used = record.get("used", {})
    return [_model_of(record, reference, used.get(f"{MEMBERS}[{place}]")) for place, reference in enumerate(references)]


def _model_of(record: RunRecord, reference: str, wanted: str | None) -> Path:
    """The model that the run used, by the recorded digest, because an alias may have moved since."""
    runs = recorded_paths.recorded_path(record, record["config"]["paths"]["runs"])
    for folder, other in records_below(directories(runs)) if wanted else ():
        if other["outputs"].get("model") == wanted:
            return folder
    path = recorded_paths.recorded_path(record, reference)
    if path.exists():
        return path
    kept = registry.resolve(f"{reference.partition('@')[0]}@{wanted}", runs) if wanted and "@" in reference else None
    return kept or find_run(reference, runs)


def _run(command: str, code: Code, python: Path, scratch: Path) -> str | None:
    """Run the command in a new process; returns the reason of a failure, or None."""
    path = os.pathsep.join([str(code.root), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = [*command.split(), f"+experiment={EXPERIMENT}", "--config-dir", str(scratch / "conf")]
    log = scratch / "rerun.log"
    with open(log, "w", encoding="utf-8") as file:
        done = subprocess.run(
            [str(python), "-P", "-m", "engine", *words],
            cwd=scratch,
            env={**os.environ, "PYTHONPATH": path},
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode in (0, 2):  # 2: an alarm is a result
        return None
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "no output")


# ----------------------------------------------------------------------------------------------------------- report


def _report(
    directory: Path,
    rerun: Path | None,
    record: RunRecord,
    options: Options,
    code: Code,
    inputs: Inputs,
    failure: str | None,
) -> dict[str, Any]:
    if rerun is None:
        raise UserError(f"the run could not be started again: {failure or 'it left no run directory'}")
    now = load_record(rerun)
    differences = restore.run_differences(record, now)
    exact = all(item["weight"] < restore.DECIDES for item in differences)
    links = chain.compare_chains(directory, rerun, options.start, exact)
    first = chain.first_difference(links)
    if failure is not None and inputs.changed and link_order(options.start) <= link_order("inputs"):
        first = "inputs"  # they are the reason for the stop
    if failure is not None and first is None:
        raise UserError(f"the rerun stopped before the end, though all links before are equal: {failure}")
    return {
        "run": str(directory),
        "command": record["command"],
        "code": {
            "asked": options.code,
            "how": code.how,
            "recorded_digest": record["code"]["engine_digest"],
            "digest": now["code"].get("engine_digest"),
            "doubts": list(code.doubts) if options.code == "recorded" else [],
        },
        "environment": differences,
        "promise": "equal bits" if exact else f"tolerance: {chain.TOLERANCE}",
        "inputs_changed": list(inputs.changed),
        "from": options.start,
        "links": links,
        "failure": failure,
        "first_difference": first,
        "seconds": {"recorded": record.get("seconds"), "now": now.get("seconds")},
    }


def as_text(found: Mapping[str, Any]) -> str:
    """The report as text: environment, table of links, verdict."""
    lines = [f"run          {found['run']}", f"code         {found['code']['asked']}: {found['code']['how']}"]
    lines += [f"doubt        {doubt}" for doubt in found["code"]["doubts"]]
    for item in found["environment"]:
        pair = f"{_short(item['recorded'])} recorded, {_short(item['now'])} now"
        lines.append(f"environment  {item['name']}: {pair} ({restore.WORDS[item['weight']]})")
    lines += [f"input        {name}: no file with the recorded digest" for name in found["inputs_changed"]]
    lines += [f"promise      {found['promise']}", ""]
    rows = [
        [entry["link"], _digest(entry["recorded"]), _digest(entry["now"]), entry["verdict"], entry["detail"]]
        for entry in found["links"]
    ]
    lines.append(table(["link", "recorded", "now", "verdict", "detail"], rows))
    if found["failure"]:
        lines.append(f"the rerun stopped: {found['failure']}")
    first = found["first_difference"]
    moved = f" Environment differences moved {'a link' if first else 'no link'}." if found["environment"] else ""
    lines.append((f"first difference: {first}." if first else "reproduced: every link holds.") + moved)
    return "\n".join(lines) + "\n"


def _digest(value: str | None) -> str:
    return value[:12] if value else "-"


def _short(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, (list, dict)) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
