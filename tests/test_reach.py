"""Every function and class of the packages is reached from the shell, the Python interface or a command."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENTRIES = ("engine", "engine.__main__", "engine.api", "engine.features")
DOCUMENTED = (("engine.scoring.predictor", "Predictor.predict"), ("kernels", "OWNER"))  # for users; read as text
# Calls of every family of kernels, so that commands find them compiled: no use of them.
COMPILES = "kernels.warmup"


@dataclass
class Piece:
    """A function, a class without its methods, a method, a variable, or the statements that a module runs when imported."""

    line: int
    nodes: list[ast.AST] = field(default_factory=list)


class Source:
    """The pieces of one module by name (`Class.method`; "" runs on import), and what its names mean."""

    def __init__(self, name: str, tree: ast.Module) -> None:
        self.name = name
        self.pieces: dict[str, Piece] = {"": Piece(1)}
        self.imported: dict[str, str] = {}
        self.words: set[str] = set()  # names after a dot, and texts that are names
        self.loaded: set[str] = set()  # modules that are imported by the text of their name
        self.foreign: set[str] = set()  # classes with a base of another library, which calls their methods
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                self.imported |= {(item.asname or item.name.split(".")[0]): item.name for item in node.names}
            elif isinstance(node, ast.ImportFrom):
                self.imported |= {(item.asname or item.name): f"{node.module}.{item.name}" for item in node.names}
        for node in tree.body:
            self._add(node)

    def _add(self, node: ast.stmt) -> None:
        if isinstance(node, ast.FunctionDef):
            self.pieces[node.name] = Piece(node.lineno, [node])
        elif isinstance(node, ast.ClassDef):
            methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
            rest = [item for item in node.body if item not in methods]
            self.pieces[node.name] = Piece(node.lineno, [*node.decorator_list, *node.bases, *node.keywords, *rest])
            for method in methods:
                self.pieces.setdefault(f"{node.name}.{method.name}", Piece(method.lineno)).nodes.append(method)
            if any(ast.unparse(base).split(".")[0].split("[")[0] not in self.pieces for base in node.bases):
                self.foreign.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [item.id for target in targets for item in ast.walk(target) if isinstance(item, ast.Name)]
            for name in names or [""]:
                self.pieces.setdefault(name, Piece(node.lineno)).nodes.append(node)
        elif not isinstance(node, ast.Import | ast.ImportFrom):
            self.pieces[""].nodes.append(node)


def sources(root: Path) -> dict[str, Source]:
    found = {}
    for path in sorted((*root.glob("engine/**/*.py"), *root.glob("kernels/**/*.py"))):
        name = path.relative_to(root).as_posix().removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        found[name] = Source(name, ast.parse(path.read_text()))
    return found


class Walk:
    """What is reached from the entries: pieces by module and name, and the words after a dot in them."""

    def __init__(self, modules: dict[str, Source], words: set[str]) -> None:
        self.modules, self.words = modules, words
        self.reached: set[tuple[str, str]] = set()
        self._open: list[tuple[str, str]] = []
        for name in ENTRIES:
            for piece in modules[name].pieces:
                self._reach(name, piece)
        for module, name in DOCUMENTED:
            self._reach(module, name)
        self._run()

    def _reach(self, module: str, name: str) -> None:
        if (module, name) not in self.reached and module in self.modules and name in self.modules[module].pieces:
            self.reached.add((module, name))
            self._open.append((module, name))

    def _run(self) -> None:
        while self._open:
            while self._open:
                module, name = self._open.pop()
                self._reach(module, "")
                for node in self.modules[module].pieces[name].nodes:
                    self._read(self.modules[module], node)
            for source in list(self.modules.values()):
                for module in source.loaded & set(self.modules):
                    for word in source.words:
                        self._reach(module, word)
            for module, source in self.modules.items():
                for name in source.pieces:
                    owner, _, method = name.partition(".")
                    if method and (module, owner) in self.reached and self._called(source, owner, method):
                        self._reach(module, name)

    def _called(self, source: Source, owner: str, method: str) -> bool:
        used = any(method in other.words for other in self.modules.values()) or method in self.words
        return used or method.startswith("__") or owner in source.foreign

    def _read(self, source: Source, piece: ast.AST) -> None:
        for node in ast.walk(piece):
            if isinstance(node, ast.Attribute):
                source.words.add(node.attr)
                self._mean(source, ast.unparse(node))
            elif isinstance(node, ast.Name):
                self._mean(source, node.id)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                self._text(source, node.value)

    def _mean(self, source: Source, dotted: str) -> None:
        first, *rest = dotted.split(".")
        if source.name == COMPILES and first in source.imported:
            return
        if first in source.pieces:
            self._reach(source.name, first)
        elif first in source.imported:
            self._absolute(".".join([source.imported[first], *rest]))

    def _text(self, source: Source, text: str) -> None:
        """Texts that name code: `package.module:function` of a command, a module, a program beside, a member, a kernel."""
        if re.fullmatch(r"engine(\.\w+)+:\w+", text):
            self._absolute(text.replace(":", "."))
        elif text in self.modules:
            source.loaded.add(text)
        elif text.endswith(".py"):
            self._reach(source.name.rpartition(".")[0] + "." + text.removesuffix(".py"), "")
        elif text.isidentifier():
            source.words.add(text)
            if source.name == "kernels.cuda":
                self._reach(source.name, text)

    def _absolute(self, dotted: str) -> None:
        parts = dotted.split(".")
        for cut in range(len(parts), 0, -1):
            module = ".".join(parts[:cut])
            if module in self.modules:
                self._reach(module, "")
                if cut < len(parts):
                    again = self.modules[module].imported.get(parts[cut])
                    if parts[cut] not in self.modules[module].pieces and again:
                        self._absolute(again)
                    self._reach(module, parts[cut])
                return


def unreached(root: Path) -> Iterator[str]:
    modules = sources(root)
    templates = (path for path in root.glob("engine/**/*") if path.suffix in (".html", ".j2"))
    walk = Walk(modules, {word for path in templates for word in re.findall(r"\w+", path.read_text())})
    for module, source in modules.items():
        for name, piece in source.pieces.items():
            defines = (
                any(isinstance(node, ast.FunctionDef) for node in piece.nodes) or f"{name}.__init__" in source.pieces
            )
            if (module, name) not in walk.reached and name:
                yield f"{module}:{piece.line} {name}" + ("" if defines else " (variable or class)")


def test_a_command_reaches_every_function_and_class() -> None:
    found = list(unreached(ROOT))
    assert not found, "no command reaches these; delete them, or name what calls them:\n" + "\n".join(found)
