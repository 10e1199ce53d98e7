"""The architecture: which package may import which, no circles, names that say what they hold, and a light import."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "if_jax"
TREES = {path: ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}

# What each package, or module of its own, imports of the others, from the ground up.
EDGES: dict[str, set[str]] = {
    "diffusion": set(),
    "models": set(),
    "scenes": set(),
    "text": set(),
    "parallel": set(),
    "tracking": set(),
    "checkpoints": {"diffusion", "models", "text"},
    "data": {"checkpoints", "models", "parallel", "scenes", "text"},
    "config": {"checkpoints", "data", "diffusion", "models", "parallel", "text"},
    "recipes": {"checkpoints", "config"},
    "inference": {"checkpoints", "data", "diffusion", "models", "parallel", "text"},
    "training": {
        *("checkpoints", "config", "data", "diffusion", "inference", "models", "parallel", "scenes", "text"),
        "tracking",
    },
    "evaluation": {
        *(
            "checkpoints",
            "config",
            "data",
            "diffusion",
            "inference",
            "models",
            "parallel",
            "scenes",
            "text",
            "tracking",
        ),
        "training",
    },
    "planning": {"checkpoints", "config", "diffusion", "inference", "models", "parallel", "training"},
    "doctor": {"checkpoints", "config", "data", "models", "parallel", "training"},
    "serving": {"checkpoints", "data", "diffusion", "inference"},
    "cli_errors": {"checkpoints"},
    "cli_options": {"checkpoints"},
    "cli_recipe": {"cli_errors", "config", "parallel"},
    "cli_embed": {"checkpoints", "cli_errors", "cli_recipe", "config", "data", "parallel", "training"},
    "cli_data": {"cli_errors", "cli_options", "data", "inference"},
    "cli_draw": {"checkpoints", "cli_errors", "cli_options", "inference"},
    "cli_serve": {"cli_errors", "cli_options", "inference", "serving"},
    "cli_evaluate": {
        *("checkpoints", "cli_errors", "cli_options", "cli_recipe", "config", "evaluation", "inference", "parallel"),
    },
    "cli_plan": {"cli_errors", "cli_options", "cli_recipe", "config", "planning"},
    "cli": {
        *("checkpoints", "cli_data", "cli_draw", "cli_embed", "cli_errors", "cli_evaluate", "cli_options"),
        *("cli_plan", "cli_recipe", "cli_serve", "config", "doctor"),
        *("inference", "parallel", "tracking", "training"),
    },
    "__init__": {"inference"},
    "__main__": {"cli"},
}
VAGUE = {"told", "how", "found", "given", "one", "placed"}  # they have named a dozen kinds of things each


def _package(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {_module(path) for path in TREES}


def _imports(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """The modules of if_jax that these parts of a syntax tree import."""
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "if_jax":
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "if_jax")


def _at_import(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """The statements that importing a module runs, or a type checker: those in functions come later, if ever."""
    for node in body:
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for field in ("body", "orelse", "finalbody"):
                yield from _at_import(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from _at_import(handler.body)


def test_packages_import_what_the_table_names_and_no_more():
    edges = defaultdict(set)
    for path, tree in TREES.items():
        package = _package(path)
        edges[package] |= {name.split(".")[1] for name in _imports(ast.walk(tree)) if "." in name} - {package}
    assert dict(edges).keys() <= EDGES.keys(), "give a new package its line in EDGES"
    unnamed = {(package, other) for package in edges for other in edges[package] - EDGES[package]}
    assert not unnamed, f"no such import is meant: {sorted(unnamed)}"
    unused = {(package, other) for package in EDGES for other in EDGES[package] - edges[package]}
    assert not unused, f"take them out of EDGES: {sorted(unused)}"
    floor = {package: number for number, package in enumerate(EDGES)}
    upward = {(package, other) for package in EDGES for other in EDGES[package] if floor[other] > floor[package]}
    assert not upward, f"imports go downward: {sorted(upward)}"


def test_no_module_imports_itself_over_others():
    """Neither at run time nor for types alone."""
    graph = {_module(path): set(_imports(_at_import(tree.body))) for path, tree in TREES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' → '.join(reversed(error.args[1]))}")


def test_diffusion_knows_jax_and_numpy_only():
    for path in (ROOT / "diffusion").glob("*.py"):
        names = {
            alias.name.split(".")[0]
            for node in ast.walk(TREES[path])
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        assert names <= {"jax", "numpy"} | sys.stdlib_module_names, path


def test_private_modules_of_jax_are_used_in_one_place():
    users = set()
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            private_import = any("_src" in name.split(".") for name in names)
            if private_import or (isinstance(node, ast.Attribute) and node.attr == "_src"):
                users.add(path.relative_to(ROOT).as_posix())
    assert users == {"parallel/jax_internals.py"}


def _names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of all that a syntax tree names: variables, parameters, attributes, functions, classes."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()):
                yield node.lineno, name
            case ast.arg(arg=name) | ast.keyword(arg=str(name)):
                yield node.lineno, name
            case ast.Attribute(attr=name, ctx=ast.Store()):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.alias(asname=str(name)) | ast.ExceptHandler(name=str(name)):
                yield node.lineno, name
            case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)) | ast.MatchMapping(rest=str(name)):
                yield node.lineno, name


def test_names_say_what_they_hold():
    vague = [
        f"{path.relative_to(ROOT).as_posix()}:{line} {name}"
        for path, tree in TREES.items()
        for line, name in _names(tree)
        if name in VAGUE
    ]
    assert not vague, f"say what it is instead: {vague}"


def test_two_things_never_share_a_name():
    """Public classes and aliases of types."""
    homes = defaultdict(set)
    for path, tree in TREES.items():
        for node in tree.body:
            match node:
                case ast.ClassDef(name=name) | ast.Assign(targets=[ast.Name(id=name)]):
                    if name[0].isupper() and not name.isupper():
                        homes[name].add(_module(path))
    shared = {name: sorted(modules) for name, modules in homes.items() if len(modules) > 1}
    assert not shared


def test_pictures_are_opened_by_a_list_of_formats():
    """Left to itself Pillow starts Ghostscript on what only looks like a JPEG."""
    bare = [
        f"{path.relative_to(ROOT).as_posix()}:{node.lineno}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "Image.open"
        and "formats" not in {keyword.arg for keyword in node.keywords}
    ]
    assert not bare


def test_import_is_light():
    code = "import sys, if_jax; print(sorted({'jax', 'torch', 'transformers', 'tensorflow'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
