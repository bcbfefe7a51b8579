"""The shape of the package, read from its syntax trees: direction of imports, sizes, annotations."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[1]
PATHS = sorted(ROOT.glob("lightning_qnoise/**/*.py"))
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PATHS}
NAMES = {name.removesuffix(".__init__"): name for name in FILES}  # as imported -> as filed
PEERS = {"search", "prune", "distill", "data_free", "nas"}
FOLDERS = {"kernels": 0, "ops": 1, "schemes": 2, "layers": 3, "export": 4, "callbacks": 6, "demos": 8}
FOLDERS |= dict.fromkeys(PEERS, 5)
TOP_LEVEL = {"__init__": 7, "cli": 8, "__main__": 8}  # every other file at the top level is 4
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
each_file = pytest.mark.parametrize("name", FILES)


def rank(name: str) -> int:
    parts = name.split(".")
    if len(parts) == 2:
        return TOP_LEVEL.get(parts[1], 4)
    assert parts[1] in FOLDERS, f"give {parts[1]}/ a rank in FOLDERS"
    return FOLDERS[parts[1]]


def imports(name: str, node: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and module of every import, ours as filed; `if TYPE_CHECKING` is left out."""
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        children = node.orelse
    else:
        children = ast.iter_child_nodes(node)
    for child in children:
        if isinstance(child, ast.Import):
            yield from ((child.lineno, NAMES.get(alias.name, alias.name)) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            parents = name.split(".")[: -child.level] if child.level else []
            base = ".".join([*parents, *filter(None, [child.module])])
            full = [f"{base}.{alias.name}" for alias in child.names]
            yield from ((child.lineno, NAMES.get(f, NAMES.get(base, base))) for f in full)
        else:
            yield from imports(name, child)


def misplaced(name: str, tree: ast.AST) -> Iterator[str]:
    """Imports that go up, sideways between peers, or to Lightning or Triton from elsewhere."""
    folder, own = name.split(".")[1], rank(name)
    for line, target in imports(name, tree):
        top, sub = [*target.split("."), ""][:2]
        up = top == "lightning_qnoise" and rank(target) > own
        if up or (folder != sub and {folder, sub} <= PEERS):
            yield f"{name}:{line} imports {target}"
        elif top in LIGHTNING and folder not in {"callbacks", "cli", "__main__", "demos"}:
            yield f"{name}:{line} imports {target}"
        elif top == "triton" and folder != "kernels":
            yield f"{name}:{line} imports {target}"


def functions(node: ast.AST, public: bool = True) -> Iterator[tuple[ast.FunctionDef, bool]]:
    """Every function, with whether it is public: no private name around it, no other function either."""
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, (*FUNCTIONS, ast.ClassDef))
        visible = public and not (named and child.name.startswith("_") and not child.name.endswith("__"))
        if isinstance(child, FUNCTIONS):
            yield child, visible and "jit" not in " ".join(map(ast.unparse, child.decorator_list))
        yield from functions(child, visible and not isinstance(child, FUNCTIONS))


def unannotated(function: ast.FunctionDef) -> list[str]:
    a = function.args
    named = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])]
    return [arg.arg for arg in named if arg.annotation is None and arg.arg not in {"self", "cls"}]


@each_file
def test_imports_go_down(name):
    assert not list(misplaced(name, ast.parse(FILES[name].read_text())))


def test_imports_have_no_cycle():
    found = {name: list(imports(name, ast.parse(f.read_text()))) for name, f in FILES.items()}
    graph = {name: {t for _, t in targets if t in FILES and t != name} for name, targets in found.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        cycle = error.args[1][::-1]  # each imports the next
        lines = {(name, t): line for name, targets in found.items() for line, t in targets}
        pytest.fail(" -> ".join(f"{a}:{lines[a, b]}" for a, b in pairwise(cycle)))


@each_file
def test_files_and_functions_are_short(name):
    text = FILES[name].read_text()
    limit = 120 if name.split(".")[1] == "kernels" else 50
    long = [f for f, _ in functions(ast.parse(text)) if f.end_lineno - f.lineno >= limit]
    assert len(text.splitlines()) <= 250, name
    assert not [f"{name}:{f.lineno} {f.name} takes {f.end_lineno - f.lineno + 1} lines" for f in long]


def test_median_file_is_short():
    assert median(len(f.read_text().splitlines()) for f in FILES.values()) <= 90


@each_file
def test_public_arguments_are_annotated(name):
    public = [f for f, is_public in functions(ast.parse(FILES[name].read_text())) if is_public]
    assert not {f"{name}:{f.lineno} {f.name}": unannotated(f) for f in public if unannotated(f)}


def test_the_package_imports_neither_lightning_nor_triton():
    code = "import sys, lightning_qnoise; print({m.split('.')[0] for m in sys.modules} & set(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "triton", *LIGHTNING]
    run = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (run.stdout.strip(), run.stderr) == ("set()", "")


@pytest.mark.parametrize(
    ("name", "source", "count"),
    [
        ("schemes.new", "from ..layers.new import a\nfrom ..cli import b\nimport triton, lightning", 4),
        ("ops.new", "def f():\n    from lightning_qnoise import policy", 1),
        ("search.new", "from lightning_qnoise.nas import a\nfrom . import b\nfrom ..policy import c", 1),
        ("callbacks.new", "import lightning.pytorch as pl\nfrom ..noise import a", 0),
        ("policy", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import lightning", 0),
    ],
)
def test_a_misplaced_import_is_found(name, source, count):
    assert len(list(misplaced(f"lightning_qnoise.{name}", ast.parse(source)))) == count
