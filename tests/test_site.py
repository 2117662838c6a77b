"""The site of documents: its reference names every command and key, every page is in the navigation, no warning, no fetch."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from engine import __main__ as shell
from engine import commands

ROOT = Path(__file__).resolve().parents[1]


def module(name: str) -> ModuleType:
    """A file of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


pages = module("pages")
MADE = dict(pages.generated())


def plain(text: str) -> str:
    """A cell of a table as a reader sees it, without marks and spaces."""
    text = text.replace("&lt;", "<").replace("&gt;", ">")
    return re.sub(r"[\s\\`]", "", text)


def test_every_key_in_the_help_of_a_command_is_in_the_reference_with_its_meaning() -> None:
    reference = {
        line.split("`")[1]: plain(line)
        for text in MADE.values()
        for line in text.splitlines()
        if line.startswith("| `")
    }
    covered: set[str] = set()
    for name, command in commands.COMMANDS.items():
        if covered and covered.issuperset(command.sections):
            continue  # the help of another command has shown these keys
        covered |= {*command.sections}
        shown = shell._command_help(name, command, None)
        keys = re.findall(r"^  ([a-z_]+(?:\.[\w<>]+)*)  +(\S.*)$", shown[shown.index("\nname:") :], re.MULTILINE)
        assert len(keys) >= 20, name
        for key, meaning in keys:
            assert key in reference, f"{name}: {key}"
            assert plain(meaning.partition("[")[0])[:30] in reference[key], f"{name}: {key}"


def test_every_command_is_in_the_reference_with_its_usage_and_its_keys() -> None:
    text = MADE["reference/commands.md"]
    for name, command in commands.COMMANDS.items():
        part = text[text.index(f"## engine {name}\n") :].partition("\n## ")[0]
        assert f"engine {name} {command.usage}".rstrip() in part
        assert plain(command.help)[1:] in plain(part)
        assert all(f"(keys/{section}.md)" in part for section in command.sections if section != "trust")


def test_every_page_is_in_the_navigation_once() -> None:
    def listed(part: object) -> list[str]:
        inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        return [part] if isinstance(part, str) else [page for item in inner for page in listed(item)]

    found = listed(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    written = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    made = {place for place in MADE if not place.startswith("reference/")}  # which on_config adds
    assert sorted(found) == sorted(written | made)


def test_a_link_is_right_wherever_its_text_goes_and_one_without_a_page_keeps_its_words() -> None:
    text = "[a](docs/labels.md#x) [b](tests/test_site.py) ![c](benchmarks/results/report.png) [d](https://x.y)\n```\n[e](docs/x.md)\n```\n"
    assert pages.relinked(text, "README.md", "deep/index.md") == (
        "[a](../labels.md#x) b ![c](../pictures/report.png) [d](https://x.y)\n```\n[e](docs/x.md)\n```\n"
    )


def test_no_name_of_a_key_or_text_of_its_meaning_becomes_markup() -> None:
    assert pages._cell("a|b *c* <d> [e] _f_") == r"a\|b \*c\* &lt;d&gt; \[e\] \_f\_"


def test_the_pictures_are_those_that_are_drawn_and_each_concept_has_one() -> None:
    drawn = {draw.__name__: draw().svg() for draw in module("pictures").PICTURES}
    for path in (ROOT / "docs" / "concepts").glob("*.md"):
        assert re.findall(r"!\[.+\]\((\w+)\.svg\)", path.read_text()) == [path.stem]
        assert path.with_suffix(".svg").read_text() == drawn.pop(path.stem), "run: python docs/pictures.py"
    assert not drawn


def test_the_notebook_holds_no_output_and_its_page_all_of_its_code() -> None:
    cells = json.loads((ROOT / "docs" / pages.NOTEBOOK).read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5 and all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    assert all("".join(cell["source"]) in MADE["notebooks/first_hour.md"] for cell in code)


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    build = pytest.importorskip("mkdocs.commands.build", reason="needs mkdocs: pip install '.[docs]'")
    from mkdocs.config import load_config

    build.build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    for page in tmp_path.rglob("*.html"):
        fetched = re.findall(r"<(?:script|img|link|iframe)\b[^>]*?(?:src|href)=\"?(https?:[^\" >]*)", page.read_text())
        assert not fetched, f"{page.name} loads {fetched}"
    assert "train.epochs" in (tmp_path / "search" / "search_index.json").read_text()


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = pytest.importorskip("nbclient", reason="needs nbclient: pip install '.[docs]'")
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install '.[docs]'")
    import nbformat
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    class Here(AsyncKernelManager):
        """A kernel of this interpreter, whatever kernels are installed."""

        @property
        def kernel_spec(self) -> KernelSpec:
            words = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
            return KernelSpec(argv=words, display_name="here", language="python")

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(ROOT / "docs" / pages.NOTEBOOK, as_version=4)
    client.NotebookClient(notebook, timeout=300, kernel_manager_class=Here).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in shown), "the plots"
    assert "sudden change" in shown[-1]["data"]["text/plain"], "what changed in the last week"
