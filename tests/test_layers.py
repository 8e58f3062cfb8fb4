"""The layers of docs/design.md, held to by walking the imports. A forbidden import fails here, by name."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "edgeward_wire": ROOT / "wire/edgeward_wire",
    "edgeward_runtime": ROOT / "agent/edgeward_runtime",
    "edgeward_agent": ROOT / "agent/edgeward_agent",
    "edgeward_cloud": ROOT / "cloud/edgeward_cloud",
    "edgeward_ctl": ROOT / "cloud/edgeward_ctl",
    "edgeward_models": ROOT / "models/edgeward_models",
}
MAY_IMPORT = {
    "edgeward_wire": set(),
    "edgeward_runtime": {"edgeward_wire"},
    "edgeward_agent": {"edgeward_wire", "edgeward_runtime"},
    "edgeward_cloud": {"edgeward_wire"},
    "edgeward_models": {"edgeward_wire", "edgeward_runtime"},
    "edgeward_ctl": {"edgeward_wire", "edgeward_models"},
}
# The children, and the commands that work without a cloud: nothing else of the agent loads the runtime.
CHILDREN = {"runner", "qualify", "local_cli", "results", "sources_cli", "in_runner", "protocol", "app"}
# Adapters: one module of a package imports each of these.
ONE_IMPORTER = (
    "paho",
    "httpx",
    "tuf",
    "securesystemslib",
    "cryptography",
    "jwt",
    "onnxruntime",
    "cv2",
    "uvicorn",
    "matplotlib",
    "pycocotools",
    "sklearn",
    "skl2onnx",
    "torch",
    "ultralytics",
)
# Tools around ONNX Runtime, each with its adapter; sessions are edgeward_runtime's alone.
TOOLS = {"quantiser.py", "optimiser.py"}
# Packages in which a whole folder stands for the adapter.
FOLDERS = {
    ("edgeward_cloud", "tuf"): "registry",
    ("edgeward_cloud", "securesystemslib"): "registry",
    ("edgeward_models", "torch"): "export",
}


def modules(package: str) -> list[Path]:
    return sorted(PACKAGES[package].rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every module that a file names in an import, at any depth, but for type checking only."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_it_stands_on(package: str) -> None:
    forbidden = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(package)
        for name in imports(path)
        if (top := name.split(".")[0]) in PACKAGES and top != package and top not in MAY_IMPORT[package]
    }
    assert not forbidden


def test_only_the_children_load_the_runtime() -> None:
    loaders = {
        path.stem
        for path in modules("edgeward_agent")
        if any(re.match(r"(edgeward_runtime|numpy|cv2|onnxruntime)\b", name) for name in imports(path))
    }
    assert loaders <= CHILDREN


def test_the_wire_does_no_input_or_output() -> None:
    for path in modules("edgeward_wire"):
        if path.stem == "schemas":  # writes the generated files when it is run as a program
            continue
        tops = {name.split(".")[0] for name in imports(path)}
        assert not tops & {"os", "socket", "pathlib", "subprocess", "threading", "asyncio", "time"}, path.name


@pytest.mark.parametrize("package", PACKAGES)
def test_a_library_has_one_importer(package: str) -> None:
    importers: dict[str, set[str]] = defaultdict(set)
    for path in modules(package):
        for top in {name.split(".")[0] for name in imports(path)} & set(ONE_IMPORTER):
            place = path.relative_to(PACKAGES[package])
            if package == "edgeward_models" and path.name in TOOLS:
                assert "onnxruntime" not in imports(path), "the whole library: that is for the runtime"
                continue
            folder = FOLDERS.get((package, top))
            importers[top].add(place.parts[0] if folder == place.parts[0] else str(place))
    crowded = {library: sorted(places) for library, places in importers.items() if len(places) > 1}
    assert not crowded


def test_functions_stay_readable() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {length} lines"
        for package in PACKAGES
        for path in modules(package)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or node.lineno) - node.lineno + 1) > 80
    ]
    assert not long
