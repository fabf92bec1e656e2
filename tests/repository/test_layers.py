"""Imports point one way only."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from pytest import mark

import grjca_kernels

ROOT = Path(__file__).parents[2]
KERNELS, TRAINING = ROOT / "grjca_kernels", ROOT / "python" / "grjca"
pytestmark = mark.skipif(not KERNELS.exists(), reason="needs the sources")
ORDER = [
    "problem", "memory", "keeping", "native", "modes", "call", "dropout", "reference", "manual_backward",
    "triton_kernels", "cuda", "cpu", "verification", "verdicts", "backends", "execution", "flops", "ops",
    "functional",
    "projections", "gates", "recognition", "released", "module", "__init__",
]  # fmt: skip


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name or "") of every import that runs; what is imported for types alone is no dependency."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        yield node
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    for node in walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from ((node.module or "", alias.name) for alias in node.names)


def layer(path: Path) -> str:
    return path.relative_to(KERNELS).parts[0].removesuffix(".py")


def imported_layers(path: Path) -> set[str]:
    layers = {p.stem for p in KERNELS.glob("*.py")} | {p.name for p in KERNELS.iterdir() if p.is_dir()} | {"_native"}
    found = set()
    for module, name in imports(path):
        package, _, rest = module.partition(".")
        if package == "grjca_kernels":
            first = rest.partition(".")[0] or (name if name in layers else "__init__")
            found.add(first)
    return found - {"_native"}


def sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def back_edges(graph: dict[str, set[str]]) -> list[str]:
    return [f"{a} -> {b}" for a in graph for b in sorted(graph[a]) if ORDER.index(b) > ORDER.index(a)]


def test_no_layer_imports_one_above_it():
    graph: dict[str, set[str]] = {}
    for path in sources(KERNELS):
        assert layer(path) in ORDER, f"{path}: give it a place in ORDER"
        graph.setdefault(layer(path), set()).update(imported_layers(path) - {layer(path)})
    assert {"problem", "reference", "ops", "module", "__init__"} <= graph.keys()
    assert graph["problem"] == set() and "problem" in graph["reference"] and "ops" in graph["functional"]
    assert back_edges(graph) == []


def test_a_back_edge_would_be_found():
    assert back_edges({"problem": {"ops"}, "ops": {"problem"}}) == ["problem -> ops"]


def test_no_layer_imports_the_training_package():
    for path in sources(KERNELS):
        assert not any(module.partition(".")[0] == "grjca" for module, _ in imports(path)), path


def test_one_layer_imports_the_library():
    users = {layer(path) for path in sources(KERNELS) if ("grjca_kernels._native", "") in imports(path)}
    assert users == {"native"}


@mark.parametrize("path", sources(TRAINING), ids=lambda path: str(path.relative_to(TRAINING)))
def test_the_training_package_uses_public_names_only(path):
    for module, name in imports(path):
        if module.partition(".")[0] == "grjca_kernels":
            assert module == "grjca_kernels", f"{path}: imports {module}"
            assert name in grjca_kernels.__all__, f"{path}: {name or 'the package'} is not public"


def modules() -> dict[str, Path]:
    """The file of every module by its name, in both packages, the benchmarks and what the tests share."""
    found = {path.stem: path for path in sources(ROOT / "tests" / "support")}
    for folder in (KERNELS, TRAINING, ROOT / "benchmarks"):
        for path in sources(folder):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def test_no_module_imports_itself_through_others():
    of = modules()
    assert {"grjca_kernels.module", "grjca.training.train", "benchmarks.cases", "tolerances"} <= of.keys()
    graph = {}
    for name, path in of.items():
        found = {f"{module}.{what}" if f"{module}.{what}" in of else module for module, what in imports(path)}
        graph[name] = found & of.keys() - {name}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle
    with pytest.raises(CycleError):
        TopologicalSorter(graph | {"grjca_kernels.problem": {"grjca_kernels.module"}}).prepare()


def test_native_code_includes_no_torch():
    files = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    assert files
    included = re.compile(r"^\s*#\s*include\s*[<\"](torch|ATen|c10|caffe2)\b", re.MULTILINE)
    assert included.search("  #include <torch/extension.h>")
    assert [path for path in files if included.search(path.read_text())] == []
