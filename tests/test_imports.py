"""Imports go one way, and private torch names stay in one file.

`cost_model` and `runtime` import neither `compiler` nor each other; the solver knows neither torch nor graphs; nothing but
`torch_compat.py` touches torch names with a leading underscore or under `torch.testing`.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("cost_model", "runtime", "compiler")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")) + sorted(ROOT.glob("*.py"))
FORBIDDEN = {"cost_model": {"compiler", "runtime"}, "runtime": {"compiler", "cost_model"}, "compiler/solver": {"runtime", "cost_model"}}
# Names whose underscore is part of a public namespace: torch.ops.aten._to_copy is an operator, not an internal of torch.
OPERATOR_NAMESPACES = ("aten", "opweave", "ops", "prims")


def _name(path):
    return str(path.relative_to(ROOT))


def _imports(path):
    """Dotted names a file imports; relative ones from the root of the package, with a leading dot."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            prefix = "." if node.level else ""
            inner = ".".join([*base, *(node.module.split(".") if node.module else [])])
            yield from (f"{prefix}{inner}.{alias.name}".replace("..", ".") for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_imports_go_one_way(path):
    forbidden = set().union(*(names for folder, names in FORBIDDEN.items() if _name(path).startswith(folder + "/")))
    bad = [name for name in _imports(path) if name.lstrip(".").removeprefix("opweave.").split(".")[0] in forbidden]
    assert not bad, f"{_name(path)} imports {bad}"


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_imports_inside_the_package_are_relative(path):
    bad = [name for name in _imports(path) if name.split(".")[0] in ("opweave", *PACKAGES)]
    assert not bad, f"{_name(path)} imports {bad}; write it relative"


@pytest.mark.parametrize("path", sorted((ROOT / "compiler" / "solver").rglob("*.py")), ids=_name)
def test_the_solver_knows_numbers_only(path):
    bad = [name for name in _imports(path) if name.split(".")[0] in ("torch", "transformers", "networkx")]
    assert not bad, f"{_name(path)} imports {bad}"


@pytest.mark.parametrize("folder", ["runtime", "cost_model"])
def test_running_and_pricing_need_no_solver(folder):
    for path in (ROOT / folder).rglob("*.py"):
        bad = [name for name in _imports(path) if name.split(".")[0] in ("ortools", "numba")]
        assert not bad, f"{_name(path)} imports {bad}"


def _dotted(node):
    """"torch.fx._x" of an attribute chain that starts at a name, else ""."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def _is_private(name):
    parts = name.split(".")
    if parts[0] != "torch" or (len(parts) > 1 and parts[1] in OPERATOR_NAMESPACES):
        return False
    private = any(part.startswith("_") and not part.startswith("__") for part in parts)
    return private or parts[1:2] == ["testing"]


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name != "torch_compat.py"], ids=_name)
def test_private_torch_names_stay_in_torch_compat(path):
    used = {name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute) and (name := _dotted(node))}
    bad = sorted(name for name in used.union(_imports(path)) if _is_private(name))
    assert not bad, f"{_name(path)} uses {bad}; go through torch_compat"
