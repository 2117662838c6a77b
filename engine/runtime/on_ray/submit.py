"""`engine submit COMMAND ...`: run a command as a job on a running cluster, after checks of versions, size and secrets.

Files of the working folder that git tracks or would track are uploaded, without outputs; paths become absolute, because a
job runs in a node-local copy; commit and patch are files beside the runs, because `.git` is not uploaded. Secrets stay
references to environment variables of the cluster.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import platform
import re
import secrets as random_names
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

import engine
from engine.config import secrecy
from engine.config.tree import Config
from engine.errors import UserError
from engine.runtime import environment, git, records, storage, terminal
from engine.runtime.on_ray import cluster, ray_private, versions
from engine.runtime.run import Run, SourceRecord

EXCLUDED = (".git", ".venv", "venv", "store", "runs", "__pycache__", "node_modules", "build", "dist", ".hydra", "wandb")
LARGEST = 5
POLL_SECONDS = 0.5
PATIENCE_SECONDS = 90.0
SOURCE_VARIABLE = "ENGINE_SOURCE"
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
EXIT_CODES = {"done": 0, "alarm": 2, "interrupted": 130}
ANSWER = "engine-versions "
PROBE = f"""
import json, ray
ray.init(address="auto", log_to_driver=False)
print("{ANSWER}" + json.dumps(of_nodes(ray, {PATIENCE_SECONDS / 2})))
"""


def submit(config: Config, words: Sequence[str]) -> int:
    """Run `words` (`train +experiment=flights ...`) as a Ray job, follow its log, and return the run's own exit code.

    The address is `cluster.address` if it begins with http, else RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265.
    Raises UserError if a check fails.
    """
    if not words or "=" in words[0]:
        raise UserError("submit must be followed by a command, as in `engine submit train +experiment=flights`")
    check_secrets(words)
    files = upload_files(Path.cwd())
    _report_secrets(secret_files(Path.cwd()))
    _report(files, config)
    client, address = _connect(config)
    words = with_config(words, Path.cwd(), address)
    _check_versions(client, address)
    nodes = check_nodes(client, address, uploaded="engine/__init__.py" in files)
    runs = Path(config.paths.runs).resolve()
    source = record_source(runs, nodes)
    with _staged(Path.cwd(), files) as folder:
        job = _send(
            client,
            entrypoint=entrypoint(config, words, interpreter(address)),
            runtime_env={"working_dir": str(folder), "env_vars": {SOURCE_VARIABLE: str(source)}},
            metadata={"engine": engine.__version__, "command": words[0]},
        )
    _say(f"submitted {job} to {address}; stop it with: ray job stop {job} --address {address}")
    text = _follow(client, job)
    return exit_code(text, str(client.get_job_status(job).value))


# ---------------------------------------------------------------------------------------------------- pre-flight


def check_secrets(words: Sequence[str]) -> None:
    """Raise UserError for a literal secret: the command line of a job is shown in the dashboard and kept in logs.

    Secrets: values of keys named like one, the address of an alert, a password or signature in a URL, the value of an
    environment variable named like a secret.
    """
    for word in words:
        if secrecy.is_secret_word(word):
            name = word.partition("=")[0]
            raise UserError(
                f"{name} looks like a secret, and a job's command line is visible to everybody on the cluster. Write "
                f"'{name}=${{oc.env:NAME}}' and set NAME in the environment of the cluster"
            )


def upload_files(folder: Path) -> dict[str, int]:
    """Relative path -> bytes of the files to upload: those that git tracks or would track, without outputs and secrets."""
    return {name: (folder / name).stat().st_size for name in _files(folder) if not is_secret(folder, name)}


def secret_files(folder: Path) -> list[str]:
    """Relative paths of files that are not uploaded because files with such names usually contain secrets."""
    return [name for name in _files(folder) if is_secret(folder, name)]


def is_secret(folder: Path, name: str) -> bool:
    """Whether a file or its link target usually contains secrets, by its name or that of a folder above it."""
    target, root = (folder / name).resolve(), folder.resolve()
    linked = target.relative_to(root) if target.is_relative_to(root) else target
    return any(secrecy.holds_file(path) for path in (Path(name), linked))


def _files(folder: Path) -> list[str]:
    listed = subprocess.run(
        ["git", "-C", str(folder), "ls-files", "-co", "--exclude-standard", "-z"], capture_output=True, check=False
    )
    if listed.returncode == 0:
        names = [name for name in listed.stdout.decode("utf-8", "surrogateescape").split("\0") if name]
    else:
        names = list(_walk(folder))
    kept = [name for name in names if not any(part in EXCLUDED for part in Path(name).parts)]
    return [name for name in sorted(set(kept)) if (folder / name).is_file()]


def _walk(folder: Path) -> Iterator[str]:
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in EXCLUDED]
        for name in files:
            yield str((Path(root) / name).relative_to(folder))


def largest_entries(files: dict[str, int]) -> list[tuple[str, int]]:
    """The five largest entries of the working folder, folders with their content."""
    sizes: dict[str, int] = {}
    for name, size in files.items():
        top = Path(name).parts[0]
        sizes[top] = sizes.get(top, 0) + size
    return sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:LARGEST]


def _report_secrets(names: list[str]) -> None:
    """Warn of files that are not uploaded because of their names."""
    if names:
        _warn(
            f"not uploaded, because files with such names usually contain secrets: {', '.join(names)}. A job takes secrets "
            "from the environment of the cluster (${oc.env:NAME}). Rename a file that contains none and that the job needs"
        )


def _report(files: dict[str, int], config: Config) -> None:
    total, limit = sum(files.values()), config.cluster.upload_limit.bytes
    entries = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in largest_entries(files))
    text = f"{len(files)} files, {total / 1e6:.1f} MB; largest: {entries or 'none'}"
    if total > limit:
        raise UserError(
            f"the working folder to upload must be at most cluster.upload_limit={config.cluster.upload_limit}, found {text}. "
            "Move data out of it, add it to .gitignore, or raise the limit"
        )
    _say(f"to upload: {text}")


def _connect(config: Config) -> tuple[Any, str]:
    address = config.cluster.address or ""
    if not address.startswith("http"):
        address = os.environ.get("RAY_API_SERVER_ADDRESS", DEFAULT_ADDRESS)
    try:
        from ray.job_submission import JobSubmissionClient

        _use_token()
        return JobSubmissionClient(address), address
    except ImportError:
        raise UserError("submit needs Ray: pip install 'ray[default]'") from None
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"there must be a Ray cluster with a job server at {address}, but none was found ({_first_line(error)}). "
            "Start one with `ray start --head`, or set cluster.address=http://HOST:8265"
        ) from None


def _use_token() -> None:
    """Send this user's stored Ray token to the cluster, if there is one; RAY_AUTH_MODE decides if it is set.

    A cluster started where a token exists requires it, but Ray's client does not send it by default.
    """
    with contextlib.suppress(ImportError, AttributeError):
        ray_private.send_kept_token()
    kept = Path.home() / ".ray" / "auth_token"  # Ray writes it with the mode that new files have
    if kept.is_file() and kept.stat().st_mode & 0o077:
        _warn(f"other users of this machine can read the token of your Ray clusters, {kept}: chmod 600 {kept}")


def _check_versions(client: Any, address: str) -> None:
    """Raise UserError unless Python (minor version) and Ray (patch version) are the same: other jobs fail obscurely."""
    found = cluster_versions(client)
    ours = {"python": platform.python_version(), "ray": str(environment.packages().get("ray", ""))}
    for name, digits in (("python", 2), ("ray", 3)):
        theirs = found.get(name)
        if theirs and theirs.split(".")[:digits] != ours[name].split(".")[:digits]:
            raise UserError(
                f"{name} must be the same here and on the cluster at {address}, found {ours[name]} and {theirs}"
            )
    _say(f"versions: engine {engine.__version__}, " + ", ".join(f"{name} {value}" for name, value in found.items()))


def cluster_versions(client: Any) -> dict[str, str]:
    """Versions of Python and Ray that the cluster reports; an unknown one is left out."""
    found: dict[str, str | None] = {}
    with contextlib.suppress(Exception):  # `client.get_version()` is the version of the protocol
        found["ray"] = ray_private.api(client, "/api/version").get("ray_version")
    with contextlib.suppress(Exception):
        answer = ray_private.api(client, "/api/v0/cluster_metadata")["data"]
        found |= {"python": answer.get("pythonVersion"), "ray": answer.get("rayVersion") or found.get("ray")}
    return {name: str(value) for name, value in found.items() if value}


def check_nodes(client: Any, address: str, uploaded: bool) -> versions.Comparison:
    """Versions here and on the nodes, reported by a small job without an upload.

    `uploaded`: the engine is uploaded with the job, so that the nodes' engine does not matter. Raises UserError if nodes have
    another engine or Python; if the nodes do not answer there is a warning.
    """
    text = _run_probe(client, interpreter(address))
    line = next((line for line in text.splitlines() if line.startswith(ANSWER)), None)
    if line is None:
        last = (text.strip().splitlines() or ["nothing"])[-1]
        _say(f"warning: the nodes were asked for their versions and did not answer; the last line was: {last}")
        return {}
    found = versions.record(versions.here(), json.loads(line.removeprefix(ANSWER)))
    found["engine_uploaded"] = uploaded
    cluster.check_versions(
        [one for one in found["differences"] if not (uploaded and one["package"] == "engine")],
        _warn,
    )
    return found


def _warn(text: str) -> None:
    for line in f"warning: {text}".splitlines():
        _say(line)


def _run_probe(client: Any, python: str) -> str:
    """The output of the job that reports versions; it needs Ray, but not the engine."""
    program = Path(versions.__file__).read_text(encoding="utf-8") + PROBE
    coded = base64.b64encode(zlib.compress(program.encode(), 9)).decode()
    words = [python, "-c", f"import base64,zlib;exec(zlib.decompress(base64.b64decode('{coded}')))"]
    job = _send(client, entrypoint=shlex.join(words), metadata={"engine": engine.__version__, "command": "versions"})
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        with contextlib.suppress(OSError, RuntimeError):
            if client.get_job_status(job).is_terminal():
                return str(client.get_job_logs(job))
        time.sleep(POLL_SECONDS)
    return ""


# -------------------------------------------------------------------------------------------------- the job itself


def is_here(address: str) -> bool:
    """Whether the cluster is this machine."""
    return bool(re.match(r"https?://(127\.|localhost)", address))


def interpreter(address: str) -> str:
    """The running Python if the cluster is this machine, else the first one on the cluster's PATH."""
    return sys.executable if is_here(address) else "python"


def with_config(words: Sequence[str], folder: Path, address: str) -> list[str]:
    """The words with the path of --config-dir as the job finds it: among the uploaded files, or on this machine.

    Raises UserError if it is in neither.
    """
    found = list(words)
    if "--config-dir" in found:
        place = found.index("--config-dir") + 1
        config_dir = Path(found[place]).expanduser().resolve()
        if config_dir.is_relative_to(folder.resolve()):
            found[place] = str(config_dir.relative_to(folder.resolve()))
        elif is_here(address):
            found[place] = str(config_dir)
        else:
            raise UserError(
                f"--config-dir must be in the working folder {folder}, which is uploaded for a job on another machine, "
                f"found {config_dir}: start the command in the folder that contains it"
            )
    return found


def entrypoint(config: Config, words: Sequence[str], python: str = "python") -> str:
    """The job's command line: the same words, with absolute paths and the job's own cluster."""
    absolute = {
        "paths.runs": str(Path(config.paths.runs).resolve()),
        "paths.store": str(Path(config.paths.store).resolve()),
    }
    if config.data.path and Path(config.data.path).exists():
        absolute["data.path"] = str(Path(config.data.path).resolve())
    dropped = (*absolute, "cluster.address")
    kept = [word for word in words if word.partition("=")[0].lstrip("+") not in dropped]
    extra = [f"{name}={_quoted(value)}" for name, value in absolute.items() if "://" not in value]
    return shlex.join([python, "-m", "engine", *kept, *extra])


def _quoted(value: str) -> str:
    """A value, quoted if Hydra would not read it as one string."""
    return value if re.fullmatch(r"[\w./\-:]+", value) else "'" + value.replace("'", "\\'") + "'"


def record_source(runs: Path, nodes: versions.Comparison | None = None) -> Path:
    """Write commit and patch of the working folder and the versions of the nodes where the job can read them.

    Returns the path of source.json.
    """
    folder = runs / ".submitted" / f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{random_names.token_hex(3)}"
    state = environment.git_state(Path.cwd())
    patch, omitted = secrecy.masked_patch(git.patch(Path(state["root"])) if state and state["dirty"] else "")
    if patch:
        storage.write_text(folder / "source.patch", patch)
    facts: SourceRecord = {
        "git": state,
        "folder": str(Path.cwd()),
        "engine": engine.__version__,
        "patch": bool(patch),
        "not_in_patch": omitted,
        "versions": nodes,
    }
    storage.write_json(folder / "source.json", facts)
    return folder / "source.json"


def adopt_source(run: Run) -> None:
    """Inside a submitted job: add the commit and patch of the submitting folder to the run's record."""
    path = os.environ.get(SOURCE_VARIABLE)
    if not path or not Path(path).exists():
        return
    source = records.read(Path(path), SourceRecord)
    run.note(submitted=source)
    patch = Path(path).with_name("source.patch")
    if source.get("patch") and patch.exists():
        run.write_patch("source", patch.read_text(encoding="utf-8"))


@contextlib.contextmanager
def _staged(folder: Path, files: dict[str, int]) -> Iterator[Path]:
    """A copy of exactly the listed files, so that what is uploaded is what was reported."""
    with tempfile.TemporaryDirectory(prefix="engine-submit-") as name:
        root = Path(name) / "work"
        for relative in files:
            target = root / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / relative, target)
        root.mkdir(exist_ok=True)
        yield root


def _send(client: Any, **job: Any) -> str:
    """Submit a job, with retries, since a cluster that has just started rejects jobs for some seconds."""
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return str(client.submit_job(**job))
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > end:
                raise UserError(f"the cluster must accept the job, but it replied: {_first_line(error)}") from error
            time.sleep(2 * POLL_SECONDS)


def _follow(client: Any, job: str) -> str:
    """Print the job's log as it grows; returns the whole text when the job has ended.

    Waits for a job server that is unreachable for a while, since the job does not need it; then raises UserError.
    """
    shown, answered = 0, time.monotonic()
    while True:
        try:
            ended = client.get_job_status(job).is_terminal()
            text = str(client.get_job_logs(job))
        except (OSError, RuntimeError) as error:
            if time.monotonic() - answered > PATIENCE_SECONDS:
                raise UserError(
                    f"the job server must answer, but was silent for {PATIENCE_SECONDS:g} s ({_first_line(error)}). "
                    f"The job may still be running: check with `ray job status {job}`"
                ) from error
            time.sleep(POLL_SECONDS)
            continue
        answered = time.monotonic()
        sys.stdout.write(text[shown:])
        sys.stdout.flush()
        shown = len(text)
        if ended:
            return text
        time.sleep(POLL_SECONDS)


class Ended(TypedDict, total=False):
    """The keys of a job's run.json that are read here."""

    status: str
    alarms: list[str]


def exit_code(log: str, job_status: str) -> int:
    """The exit code from the run's record, found by the directory in the log's last lines; else 0 or 1 by the job's status."""
    for line in reversed(log.splitlines()):
        record = Path(line.strip()) / "run.json"
        if line.strip().startswith("/") and record.exists():
            facts = records.read(record, Ended)
            finished = (record.parent / "DONE").exists()
            if facts.get("alarms") and finished:
                return EXIT_CODES["alarm"]
            return EXIT_CODES.get(str(facts.get("status")), 1) if finished or facts.get("status") != "done" else 1
    return 0 if job_status == "SUCCEEDED" else 1


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _say(text: str) -> None:
    terminal.err(f"{terminal.one_line(text)}\n")
