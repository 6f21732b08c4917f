"""No pickle crosses a process boundary: nothing that could make or load one is imported or called anywhere."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("actors", "benchmarks", "common", "deploy", "learner", "rewarders")
# A benchmark starts processes of its own machine by `multiprocessing`, which pickles what it starts them with, over a
# pipe that nobody else has. The system under test never does.
MAY_SPAWN = ("benchmarks",)
FORBIDDEN_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
# Calls that pickle behind the caller's back.
FORBIDDEN_CALLS = {
    "send_pyobj",
    "recv_pyobj",
    "send_serialized",
    "all_gather_object",
    "gather_object",
    "broadcast_object_list",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
}


def violations(tree: ast.AST, may_spawn: bool = False) -> Iterator[str]:
    """What a module does that it must not, with its line."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            spawns = name.startswith("multiprocessing") and not may_spawn
            if name.split(".")[0] in FORBIDDEN_MODULES or spawns:
                yield f"line {node.lineno}: imports {name}"  # type: ignore[attr-defined]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield from _call_violations(node, node.func)


def _call_violations(node: ast.Call, function: ast.Attribute) -> Iterator[str]:
    if function.attr in FORBIDDEN_CALLS:
        yield f"line {node.lineno}: calls {function.attr}"
    owner = function.value.id if isinstance(function.value, ast.Name) else ""
    if owner == "torch" and function.attr in ("load", "save"):
        yield f"line {node.lineno}: calls torch.{function.attr}: use safetensors"
    if owner in ("np", "numpy") and function.attr == "load" and not _refuses_pickles(node):
        yield f"line {node.lineno}: calls numpy.load: say allow_pickle=False, or use frombuffer or safetensors"


def _refuses_pickles(call: ast.Call) -> bool:
    return any(word.arg == "allow_pickle" and ast.unparse(word.value) == "False" for word in call.keywords)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_of_a_package_pickles(package: str) -> None:
    paths = sorted((ROOT / package).rglob("*.py"))
    assert paths
    found = {str(path): list(violations(ast.parse(path.read_text()), package in MAY_SPAWN)) for path in paths}
    assert {path: problems for path, problems in found.items() if problems} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import dumps",
        "import multiprocessing as mp",
        "socket.send_pyobj(x)",
        "dist.all_gather_object(a, b)",
        "torch.load(path)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_each_way_to_pickle_is_found(source: str) -> None:
    assert list(violations(ast.parse(source)))
