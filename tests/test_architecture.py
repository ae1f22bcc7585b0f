"""Imports go one way, and each foreign package has one door."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "megatron_vocagno"

# what each part of the package may import of it
DIRECTION = {
    "errors": set(),
    "compat": set(),
    "files": {"compat"},
    "command": {"errors", "__version__"},
    "hub": {"errors", "files", "compat"},
    "config": {"errors"},
    "run_file": {"config", "errors", "compat"},
    "objective": {"compat"},
    "corpus": {"hub", "errors", "files", "compat"},
    "batch": {"config", "errors"},
    "model": {"objective", "config", "hub", "errors", "files", "compat"},
    "integrations": {"corpus", "batch", "objective", "errors"},
    "serving": {"corpus", "errors"},
    "preprocess": {"serving", "corpus", "model", "batch", "config", "hub", "errors", "files", "compat"},
    "engine": {"model", "batch", "objective", "corpus", "config", "run_file", "hub", "errors", "files"},
    "planning": {"engine", "model", "batch", "corpus", "objective", "config", "run_file", "hub", "command", "errors"},
    "training": {
        *("engine", "model", "batch", "objective", "corpus", "config", "run_file"),
        *("hub", "command", "errors", "files", "__version__"),
    },
    "plan": {"planning", "command"},
    "export": {"engine", "model", "command", "errors"},
    "pretrain": {"training", "planning", "engine", "config", "run_file", "command", "errors"},
}
# foreign package: the only files or folders that may import it
DOORS = {
    "deepspeed": ["engine"],
    "transformers": ["model", "engine", "training", "planning", "export.py", "corpus/front.py"],
    "huggingface_hub": ["hub.py", "compat.py"],
    "tokenizers": ["corpus/encoders.py"],
    "gigatoken": ["corpus/encoders.py"],
    "numba": ["preprocess/aligner_numba.py"],
    "pyarrow": ["preprocess/parquet.py", "preprocess/loss_table.py"],
    "isal": ["preprocess/streams.py"],
    "backports": ["compat.py"],
    "upath": ["corpus/places.py"],
    "ray": ["preprocess/ray_engine.py"],
    "httpx2": ["serving/client.py"],
    "sentencepiece": ["corpus"],
    "tensorboard": ["training/tensorboard.py"],
    "rich": [],
    "gguf": ["model/gguf.py"],
    "torchao": ["model/quantized.py"],
    "megatron": ["integrations/megatron/step.py"],
    "triton": ["objective/linear_ce_triton.py", "objective/selection_kernels_triton.py", "objective/selection_triton.py"],
}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_nothing_imports_upward_or_sideways() -> None:
    met = 0
    for path in PACKAGE.rglob("*.py"):
        part = part_of(path)
        for name in imports(path):
            if name.startswith("megatron_vocagno.") and (other := name.split(".")[1]) != part:
                assert other in DIRECTION[part], f"{path.relative_to(ROOT)} imports {name}"
                met += 1
    assert met > 30


def test_each_foreign_package_has_its_doors() -> None:
    met = dict.fromkeys(DOORS, 0)
    for path in PACKAGE.rglob("*.py"):
        for name in imports(path):
            package = "tensorboard" if name.startswith("torch.utils.tensorboard") else name.split(".")[0]
            if package in DOORS:
                place = path.relative_to(PACKAGE).as_posix()
                assert any(place.startswith(door) for door in DOORS[package]), f"{place} imports {name}"
                met[package] += 1
    assert all(met[package] > 0 for package in DOORS if DOORS[package])


def test_the_corpus_needs_no_torch_and_the_objective_no_model() -> None:
    asks = PACKAGE / "corpus" / "front.py"  # transformers, where a class of it decides what is put in front of a text
    for path in (PACKAGE / "corpus").rglob("*.py"):
        heavy = {name.split(".")[0] for name in imports(path)} & {"torch", "transformers", "deepspeed"}
        assert heavy == ({"transformers"} if path == asks else set()), path
    for path in (PACKAGE / "objective").rglob("*.py"):
        assert not any(name.split(".")[0] in ("transformers", "deepspeed", "numpy") for name in imports(path)), path


def test_importing_the_objective_imports_only_torch() -> None:
    """So that it takes no longer than importing torch."""
    program = """
import sys, torch
before = set(sys.modules)
import megatron_vocagno.objective
print(sorted({name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    # tomli is the tomllib of Python 3.10
    assert run.stdout in ("['megatron_vocagno']\n", "['megatron_vocagno', 'tomli']\n" if sys.version_info < (3, 11) else "")


def test_every_module_says_what_it_is() -> None:
    for path in (*PACKAGE.rglob("*.py"), *(ROOT / "tools").rglob("*.py"), *(ROOT / "examples").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert not text or ast.get_docstring(ast.parse(text)), f"{path.relative_to(ROOT)} has no docstring"


def test_every_module_is_on_the_map_of_its_folder() -> None:
    met = 0
    for path in PACKAGE.rglob("*.py"):
        inner = path.with_name("__init__.py")
        if path != inner:
            assert re.search(rf"\b{path.stem}\b", ast.get_docstring(ast.parse(inner.read_text(encoding="utf-8"))) or ""), path
            met += 1
    assert met > 80
