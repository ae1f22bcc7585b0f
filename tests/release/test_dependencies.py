"""Ranges, pins, licenses and imports name the same packages."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import licenses
import pytest
from dependencies import requirements
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as canonical
from packaging.version import Version

from tests.runs import REPOSITORY

PINNED = ("pinned.txt", "quantized.txt", "evaluation.txt")
NOT_PINNED = {"flash-attn"}
"""Needs a GPU's compiler, which `make install` does not ask for."""
MODULES = {"google": "protobuf", "upath": "universal-pathlib", "backports": "backports-zstd"}
"""Where the name that is imported is another than the package's."""
GIVEN = {"triton", "torchao", "megatron"}
"""torch brings the first on GPUs; the second is an extra of its own, without its dependencies; Megatron-LM brings the third."""


def pins() -> dict[str, Requirement]:
    lines = [line for file in PINNED for line in (REPOSITORY / "requirements" / file).read_text(encoding="utf-8").splitlines()]
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonical(requirement.name): requirement for requirement in found}


def asked() -> list[Requirement]:
    return [requirement for of_extra in requirements().values() for requirement in of_extra]


def version(pin: Requirement) -> str:
    (exact,) = pin.specifier
    assert exact.operator == "=="
    return exact.version


def test_every_dependency_is_pinned_within_its_range() -> None:
    pinned = pins()
    for requirement in asked():
        if requirement.name not in NOT_PINNED:
            pin = pinned[canonical(requirement.name)]
            assert requirement.specifier.contains(version(pin)), f"{pin} is not in {requirement}"
    assert len(asked()) > 35


def test_what_is_installed_for_everybody_is_asked_for_by_setup_py() -> None:
    names = {canonical(requirement.name) for requirement in asked()}
    lines = (REPOSITORY / "requirements/pinned.txt").read_text(encoding="utf-8").splitlines()
    assert {canonical(Requirement(line).name) for line in lines if line and not line.startswith("#")} <= names


def test_the_tests_of_the_ranges_exist() -> None:
    named = re.findall(r"tests/[\w/.]+(?:::\w+)*", (REPOSITORY / ".ci/ranges").read_text(encoding="utf-8"))
    for file, *names in (name.split("::") for name in named):
        assert (REPOSITORY / file).exists(), file
        text = (REPOSITORY / file).read_text(encoding="utf-8") if names else ""
        assert all(re.search(rf"(def|class) {name}\b", text) for name in names), (file, names)
    assert len(named) > 5


@pytest.mark.parametrize("file", ["oldest.txt", "cluster.txt"])
def test_a_set_is_exact_and_within_the_ranges(file: str) -> None:
    lines = (REPOSITORY / "requirements" / file).read_text(encoding="utf-8").splitlines()
    exact = {canonical(each.name): each for line in lines if line[0] != "#" for each in [Requirement(line)]}
    met = 0
    for requirement in asked():
        if requirement.marker and not requirement.marker.evaluate({"python_version": "3.10", "python_full_version": "3.10.0"}):
            continue
        if pin := exact.get(canonical(requirement.name)):
            lowest = min((each.version for each in requirement.specifier if each.operator == ">="), key=Version)
            # the GGUF reader needs a newer transformers than the rest, and neither set has it
            if "5.19" not in str(requirement.specifier):
                assert requirement.specifier.contains(version(pin)), f"{pin} is not in {requirement}"
                assert file != "oldest.txt" or Version(version(pin)) == Version(lowest), f"{pin}: {requirement}"
            met += 1
    assert met > 30


def test_a_gpu_image_and_its_missing_packages_are_enough_to_train() -> None:
    """Training is the last part of `make gpu-check`. The versions are those of the set for clusters."""
    cluster, lacking = (
        {canonical(each.name): each for line in lines if line[0] != "#" for each in [Requirement(line)]}
        for file in ("cluster.txt", "gpu_image.txt")
        for lines in [(REPOSITORY / "requirements" / file).read_text(encoding="utf-8").splitlines()]
    )
    image = {"torch", "transformers", "tokenizers", "huggingface-hub", "numpy", "safetensors", "typing-extensions"}
    needed = {
        canonical(each.name)
        for each in (*requirements()[""], *requirements()["train"])
        if not each.marker or each.marker.evaluate({"python_version": "3.12"})
    }
    assert needed - image - {"deepspeed"} <= lacking.keys() and len(needed) > 20
    same = cluster.keys() & lacking.keys()
    assert len(same) > 12 and all(version(cluster[name]) == version(lacking[name]) for name in same)
    assert not lacking.keys() & (image | {"triton", "deepspeed"}), "an installation must not replace packages of the image"


def imported(folder: Path) -> Iterator[str]:
    """Packages from outside; relative imports are from inside."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module.split(".")[0]


def test_what_the_wheel_imports_it_asks_for() -> None:
    plain, extras = requirements()[""], requirements()
    names = {canonical(each.name) for each in (*plain, *extras["train"], *extras["fast"], *extras["gguf"], *extras["ray"])}
    found = {*imported(REPOSITORY / "megatron_vocagno"), *imported(REPOSITORY / "tools")}
    # modules of newer versions of Python, and of type checkers
    foreign = found - {*sys.stdlib_module_names, "compression", "tomllib", "_typeshed", "megatron_vocagno"}
    assert {canonical(MODULES.get(name, name)) for name in foreign} - GIVEN <= names
    assert len(foreign) > 15


def test_the_tools_import_each_other_wherever_they_are_installed() -> None:
    """`tools` at the repository's root is megatron_vocagno.tools in a wheel."""
    assert "tools" not in {*imported(REPOSITORY / "tools"), *imported(REPOSITORY / "megatron_vocagno")}


# ---- licenses


def rows() -> dict[tuple[str, str], str]:
    """(package, extra) -> license, as the page has it."""
    found = licenses.TABLE.search(licenses.PAGE.read_text(encoding="utf-8"))
    assert found
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in found[0].splitlines()[2:]]
    return {(name, extra.replace("every installation", "")): license for name, extra, license in cells}


def test_the_page_names_every_dependency_and_no_other() -> None:
    assert list(rows()) == [(each.name, extra) for extra, of_extra in requirements().items() for each in of_extra]


def test_the_page_has_the_license_that_each_package_names() -> None:
    pinned, met = pins(), 0
    for (name, _), license in rows().items():
        pin = pinned.get(canonical(name))
        try:
            same = pin is not None and metadata.version(name).partition("+")[0] == version(pin)
        except metadata.PackageNotFoundError:
            continue
        if same:
            assert licenses.license(name) == license
            met += 1
    if any(metadata.version(name) != version(pinned[name]) for name in ("transformers", "deepspeed")):
        pytest.skip("transformers or deepspeed are not the pinned ones: this is another environment than `make install` makes")
    assert met >= 30


def test_what_tests_and_demo_read_is_on_the_page_too() -> None:
    page = licenses.PAGE.read_text(encoding="utf-8")
    lines = (REPOSITORY / "requirements/containers.txt").read_text(encoding="utf-8").splitlines()
    names = [Requirement(line).name for line in lines if line and not line.startswith("#")]
    assert len(names) == 3
    assert all(f"\n| {name} |" in page for name in names)
