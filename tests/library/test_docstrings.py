"""Run the examples in docstrings, and check that public definitions have a docstring that lists their errors."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from megatron_vocagno import corpus, objective
from tests.runs import REPOSITORY

PACKAGE = REPOSITORY / "megatron_vocagno"
PARTS = ("objective", "corpus", "batch", "model")
Definition = ast.FunctionDef | ast.ClassDef


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def public(node: ast.Module | ast.ClassDef, inside: str = "") -> Iterator[tuple[str, Definition]]:
    """Public definitions, without the members of a protocol: the classes that implement it describe these."""
    for child in node.body:
        if isinstance(child, Definition) and not child.name.startswith("_"):
            yield f"{inside}{child.name}", child
            if isinstance(child, ast.ClassDef) and "Protocol" not in map(ast.unparse, child.bases):
                yield from public(child, f"{inside}{child.name}.")


def definitions() -> Iterator[tuple[str, Definition]]:
    for part in PARTS:
        for file in sorted((PACKAGE / part).glob("*.py")):
            yield from ((f"{part}/{file.name}: {name}", node) for name, node in public(tree(file)))


def modules_with_examples() -> list[str]:
    """Found without importing, because some modules need a GPU compiler."""
    files = [file for file in PACKAGE.rglob("*.py") if ">>> " in file.read_text(encoding="utf-8")]
    return sorted(".".join(file.relative_to(REPOSITORY).with_suffix("").parts) for file in files)


@pytest.mark.parametrize("module", modules_with_examples())
def test_the_examples_of_a_module_run(module: str, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if module == "megatron_vocagno.integrations.megatron.step":
        pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    monkeypatch.chdir(scratch)
    found = doctest.testmod(importlib.import_module(module), optionflags=doctest.FAIL_FAST)
    assert found.attempted > 0 and not found.failed, f"{module}: {found.failed} of {found.attempted}, printed above"


def test_the_public_functions_have_an_example() -> None:
    without = [
        f"{module.__name__}.{name}"
        for module in (objective, corpus)
        for name in module.__all__
        if inspect.isfunction(getattr(module, name)) and ">>> " not in (inspect.getdoc(getattr(module, name)) or "")
    ]
    assert not without
    assert len(modules_with_examples()) > 12


def test_public_definitions_have_a_docstring() -> None:
    """Methods that implement a protocol, and `forward`, need a docstring only once."""
    found = list(definitions())
    described = {node.name for name, node in found if "." in name.split(": ")[1] and ast.get_docstring(node)} | {"forward"}
    undocumented = [name for name, node in found if not ast.get_docstring(node) and not implements(name, node, described)]
    assert not undocumented, "\n".join(undocumented)
    assert len(found) > 300


def implements(name: str, node: Definition, described: set[str]) -> bool:
    return isinstance(node, ast.FunctionDef) and "." in name.split(": ")[1] and node.name in described


def test_errors_are_documented() -> None:
    raising = {name: node for name, node in definitions() if isinstance(node, ast.FunctionDef) and raises(node)}
    undocumented = [name for name, node in raising.items() if "aises" not in (ast.get_docstring(node) or "")]
    assert not undocumented, "\n".join(undocumented)
    assert len(raising) > 50


def raises(function: ast.FunctionDef) -> bool:
    return any(isinstance(node, ast.Raise) and node.exc is not None for node in ast.walk(function))
