"""Imports run one way, each framework has one door, and no room takes a name that means something else."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
# A module may import from its own room and from those before it.
ORDER = (
    "engine.errors", "kernels", "engine.config", "engine.runtime", "engine.data", "engine.features", "engine.training",
    "engine.scoring", "engine.serving", "engine.monitoring", "engine.lifecycle", "engine.commands", "engine.api", "engine.draft",
    "engine.__main__",
)  # fmt: skip
DOORS = {
    "hydra": {"engine/config/compose.py", "engine/config/override_values.py"},
    "omegaconf": {"engine/config/compose.py"},
    "ray": {
        "engine/runtime/on_ray/cluster.py",
        "engine/runtime/on_ray/pool.py",
        "engine/runtime/on_ray/ray_private.py",
        "engine/lifecycle/submit.py",
        "engine/runtime/on_ray/submit.py",
    },
    "wandb": {"engine/runtime/tracking.py", "engine/runtime/tracking_wandb.py"},
    "numba": {"kernels/"},
    "llvmlite": {"kernels/"},
    "duckdb": {"engine/data/"},
    "lightgbm": {"engine/training/boosting/on_lightgbm.py"},
    "xgboost": {"engine/training/boosting/on_xgboost.py"},
}
STEPS = {command.target.partition(":")[0] for command in COMMANDS.values() if not command.plain}
SOURCES = sorted((*ROOT.glob("engine/**/*.py"), *ROOT.glob("kernels/**/*.py")))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    return relative(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """(statement, absolute module or member) of every import below a node."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import at line {node.lineno}: write it in full"
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


def rank(name: str) -> int:
    """Place of a dotted name in ORDER; -1 for the bare package `engine` (version and names only)."""
    for index, room in enumerate(ORDER):
        if name == room or name.startswith(f"{room}."):
            return index
    return -1


def for_types_only(tree: ast.Module) -> set[ast.AST]:
    """Statements under `if TYPE_CHECKING:`."""
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    return {inner for block in blocks for inner in ast.walk(block)}


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_a_module_imports_only_its_own_room_and_those_before_it(path: Path) -> None:
    tree = ast.parse(path.read_text())
    own, skipped = rank(module_name(path)), for_types_only(tree)
    for statement, name in imports(tree):
        if name.split(".")[0] in ("engine", "kernels") and statement not in skipped:
            assert rank(name) <= own, f"{relative(path)}:{statement.lineno} imports {name}, which comes later"
            if own == rank("kernels"):
                assert name.startswith("kernels"), (
                    f"{relative(path)}:{statement.lineno}: kernels stand alone, found {name}"
                )


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_only_lifecycle_imports_the_module_of_a_step(path: Path) -> None:
    if not relative(path).startswith("engine/lifecycle/"):  # `commands` imports by the text of a target
        for statement, name in imports(ast.parse(path.read_text())):
            assert not any(f"{name}.".startswith(f"{step}.") for step in STEPS), (
                f"{relative(path)}:{statement.lineno} imports {name}: move what it needs out of the module of a step"
            )


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_function_imports_first_party_modules(path: Path) -> None:
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for statement, name in imports(function):
                assert name.split(".")[0] not in ("engine", "kernels"), f"{relative(path)}:{statement.lineno}: {name}"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_a_framework_is_imported_at_its_door_only(path: Path) -> None:
    tree = ast.parse(path.read_text())
    skipped = for_types_only(tree)
    for statement, name in imports(tree):
        doors = DOORS.get(name.split(".")[0])
        if doors and statement not in skipped:
            assert any(relative(path).startswith(door) for door in doors), (
                f"{relative(path)}:{statement.lineno}: {name}"
            )


def test_no_pickle_anywhere() -> None:
    for path in SOURCES:
        for statement, name in imports(ast.parse(path.read_text())):
            refused = ("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")
            assert name.split(".")[0] not in refused, f"{relative(path)}:{statement.lineno}: {name}"


def test_what_is_installed_is_imported_and_what_is_imported_is_installed() -> None:
    brought = {"omegaconf", "yaml", "llvmlite", "markupsafe"}  # by hydra-core, numba and jinja2
    brought |= {
        "starlette",
        "prometheus_client",
    }  # by the extra `serve`: engine/serving/server.py is imported by `serve` alone
    text = re.search(r"install_requires=(\[.*?\n    \])", (ROOT / "setup.py").read_text(), re.DOTALL)
    assert text is not None
    needed = {re.split(r"[\[<>=]", item)[0].removesuffix("-core") for item in ast.literal_eval(text[1])}
    used = {name.split(".")[0] for path in SOURCES for _, name in imports(ast.parse(path.read_text()))}
    assert needed == used - sys.stdlib_module_names - {"engine", "kernels"} - brought


def test_every_module_is_ranked_and_importing_them_in_order_finds_no_cycle() -> None:
    for path in SOURCES:
        name = module_name(path)
        assert name == "engine" or rank(name) >= 0, f"{name} is in no room of ORDER"


def test_no_module_shadows_the_standard_library() -> None:
    # A room's `profile.py` is only ever `kernels.profile`. What would mislead: a top-level name, or a file beside others
    # that import the module of the same name from the standard library.
    assert not {"engine", "kernels", "conf", "benchmarks", "tests"} & sys.stdlib_module_names
    used = {name.split(".")[0] for path in SOURCES for _, name in imports(ast.parse(path.read_text()))}
    own = {path.stem: relative(path) for path in SOURCES if not path.stem.startswith("__")}
    assert not {file for stem, file in own.items() if stem in sys.stdlib_module_names & used}


def test_the_kernels_package_is_ours_and_not_the_one_on_pypi() -> None:
    assert Path(str(importlib.import_module("kernels").__file__)) == ROOT / "kernels" / "__init__.py"


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sorted(name.split('.')[0] for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_importing_engine_loads_nothing_heavy() -> None:
    heavy = {"torch", "numpy", "pyarrow", "ray", "wandb", "numba", "duckdb", "hydra", "omegaconf", "rich"}
    assert not heavy & loaded_after("import engine; engine.__version__")


def test_help_loads_nothing_heavy() -> None:
    code = "from engine.__main__ import main\nmain(['--help'])"
    assert not {"torch", "numpy", "pyarrow", "ray", "wandb", "hydra"} & loaded_after(code)


def test_a_local_run_without_tracking_and_sql_imports_neither_ray_nor_wandb_nor_duckdb() -> None:
    steps = "from engine import commands, api\nfor name in commands.COMMANDS: commands.function(name)"
    model = """
from engine.config.sections.training import ModelConfig
from engine.training import model
for kind, how in (("mlp", "none"), ("linear", "none"), ("tabm", "ple"), ("wide_and_deep", "periodic")):
    config = ModelConfig(kind=kind, embeddings=how)
    made = model.from_architecture(model.architecture(model.build_model(config, 2, [3], 1, 0)))
    assert made.state_dict()
assert made.work and made.arithmetic("bf16").low
"""
    found = loaded_after(f"{steps}\n{model}")
    assert not {"ray", "wandb", "duckdb"} & found
    assert "torch" in found and "sympy" not in found  # with sympy comes the compiler of torch, a second of every start
    assert "hydra" in found  # the list is read from a process that did load things
