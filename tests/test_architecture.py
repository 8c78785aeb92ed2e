# SPDX-License-Identifier: Apache-2.0
"""Imports point one way only, read from the source with `ast`; and the package imports without its optional parts."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

# A part may import parts of a lower layer, and parts of its own layer as long as those do not lead back to it.
LAYERS = {
    "errors": 0, "environment": 0, "_extension": 0, "config": 0,
    "ops": 1,
    "grids": 2, "rounding": 2, "modules": 2,
    "calibration": 3, "formats": 3, "solver": 3, "planning": 3, "allocation": 3,
    "rotation": 4, "evaluation": 4, "integrations": 4, "run": 4, "api": 4, "generation": 4, "progress": 4,
    "cli": 5, "__main__": 6,
    "_C": 1, "triton_kernels": 1,
}  # fmt: skip
LAZY = (
    "triton", "transformers", "datasets", "matplotlib", "gguf", "onnx", "onnxruntime", "discquant._C",
    "discquant.triton_kernels",
)  # fmt: skip


def imports(path: Path, package: str) -> list[tuple[str, int, bool]]:
    """(module, line, at module level) of each import in a file; `package` resolves relative imports."""
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for outer in ast.walk(tree)
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(outer)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno, id(node) not in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                kept = parents[: len(parents) - node.level + 1]
                base = ".".join([*kept, base] if base else kept)
            # `from discquant import grids` imports discquant.grids as much as `import discquant.grids` does.
            found += [(f"{base}.{alias.name}", node.lineno, id(node) not in inside) for alias in node.names]
    return found


def package_of(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).parent.parts)


def python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def area(module: str) -> str:
    return module.split(".")[1]


@pytest.fixture(scope="module")
def edges(repo_root: Path) -> list[tuple[str, str, str]]:
    """(importing part, imported part, place) within the package."""
    found = []
    for path in python_files(repo_root / "discquant"):
        relative = path.relative_to(repo_root / "discquant")
        if relative.parts == ("__init__.py",):
            continue
        here = relative.parts[0].removesuffix(".py")
        for module, line, _ in imports(path, package_of(path, repo_root)):
            if module.startswith("discquant."):
                found.append((here, area(module), f"{path.relative_to(repo_root)}:{line} imports {module}"))
    return found


def test_every_part_has_a_layer(repo_root: Path) -> None:
    parts = {
        path.relative_to(repo_root / "discquant").parts[0].removesuffix(".py")
        for path in python_files(repo_root / "discquant")
    }
    assert not parts - {"__init__"} - LAYERS.keys(), "add the new part to LAYERS"


def test_arrows_point_down(edges: list[tuple[str, str, str]]) -> None:
    assert edges, "no import was found: the test reads the wrong folder"
    wrong = [place for here, there, place in edges if here != there and LAYERS.get(there, 99) > LAYERS[here]]
    assert not wrong, "\n".join(wrong)


def test_only_ops_reach_for_kernels(edges: list[tuple[str, str, str]]) -> None:
    wrong = [place for here, there, place in edges if there in ("_C", "triton_kernels") and here != "ops"]
    assert not wrong, "\n".join(wrong)


def test_no_cycle_between_parts(edges: list[tuple[str, str, str]]) -> None:
    graph: dict[str, set[str]] = {}
    for here, there, _ in edges:
        if here != there:
            graph.setdefault(here, set()).add(there)
    # `environment` asks `_extension` for its facts; every other cycle raises here and names its members.
    list(graphlib.TopologicalSorter(graph).static_order())


def test_no_cycle_between_modules(repo_root: Path) -> None:
    """Imports inside functions count: a late import hides a cycle, it does not undo it."""
    modules = {}
    for folder in ("discquant", "triton_kernels"):
        for path in python_files(repo_root / folder):
            parts = path.relative_to(repo_root).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph = {}
    for name, path in modules.items():
        if name == "discquant":  # its API is imported on first use by name, above that for type checkers only
            continue
        found = (module for module, _, _ in imports(path, package_of(path, repo_root)))
        # `from a.b import c` imports the module a.b.c where there is one, else a.b.
        whole = {module if module in modules else module.rpartition(".")[0] for module in found}
        graph[name] = (whole & modules.keys()) - {name}
    assert any(graph.values()), "no import was found: the test reads the wrong folder"
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail("modules import each other: " + " <- ".join(error.args[1]))


def test_references_stand_alone(repo_root: Path) -> None:
    """A reference imports torch and leaves only: no kernel, no other op."""
    wrong = []
    for path in python_files(repo_root / "discquant" / "ops" / "reference"):
        for module, line, _ in imports(path, package_of(path, repo_root)):
            inner = module.startswith("discquant.")
            allowed = inner and (
                module.startswith("discquant.ops.reference") or LAYERS.get(area(module), 99) == 0
            )
            if (inner and not allowed) or module.split(".")[0] == "triton":
                wrong.append(f"{path.relative_to(repo_root)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_triton_kernels_is_a_leaf(repo_root: Path) -> None:
    wrong = [
        f"{path.relative_to(repo_root)}:{line} imports {module}"
        for path in python_files(repo_root / "triton_kernels")
        for module, line, _ in imports(path, package_of(path, repo_root))
        if module.split(".")[0] in ("discquant", "transformers", "datasets")
    ]
    assert not wrong, "\n".join(wrong)


def test_heavy_packages_are_imported_inside_functions(repo_root: Path) -> None:
    wrong = [
        f"{path.relative_to(repo_root)}:{line} imports {module}"
        for path in python_files(repo_root / "discquant")
        for module, line, top in imports(path, package_of(path, repo_root))
        if top and module.startswith(LAZY)
    ]
    assert not wrong, "\n".join(wrong)


def test_tests_and_benchmarks_do_not_import_each_other(repo_root: Path) -> None:
    wrong = [
        f"{path.relative_to(repo_root)}:{line} imports {module}"
        for folder in ("tests", "benchmarks")
        for path in python_files(repo_root / folder)
        for module, line, _ in imports(path, package_of(path, repo_root))
        if module.split(".")[0] in ("tests", "benchmarks")
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_without_triton_and_extension(tmp_path: Path) -> None:
    """A fresh process without triton and discquant._C: the package imports, the extension says why it is absent."""
    script = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton" or name == "discquant._C":
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
import discquant
heavy = [name for name in ("triton", "transformers", "datasets", "matplotlib", "discquant._C") if name in sys.modules]
assert not heavy, f"import discquant imported {heavy}"
from discquant import _extension, environment
assert not _extension.available()
assert "discquant._C is blocked" in _extension.failure()
try:
    _extension.load()
except RuntimeError as error:
    assert "discquant._C is blocked" in str(error) and "pip install" in str(error), error
else:
    raise AssertionError("load() must raise")
assert environment.facts()["extension"]["available"] is False
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "fine", done.stderr
