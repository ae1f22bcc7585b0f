"""Files, flags, fields and messages that the documentation names exist, and so do the targets of links.

`make docs` (mkdocs build --strict) checks the links and anchors of the pages of the site, and that each page is in it once.
The links of all other pages are checked here.
"""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from megatron_vocagno.compat import tomllib
from megatron_vocagno.config import Run
from megatron_vocagno.planning.hardware import Assumptions
from tests.docs.markdown import anchors, blocks, code_spans, links, tables

ROOT = Path(__file__).parents[2]
SOURCES = ("megatron_vocagno", "tools", "examples", "benchmarks")
PAGES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/README.md"))
    if path.name not in ("AGENTS.md", "CLAUDE.md")
)
EXCLUDED = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=yaml.BaseLoader)["exclude_docs"].split()


def in_site(page: Path) -> bool:
    return page.parent == ROOT / "docs" and page.name not in EXCLUDED


each_page = pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])

FILES = (".md", ".py", ".toml", ".json", ".jsonl", ".bin", ".idx", ".safetensors")
# names that docs/tour.md has with their files
PLACES = {
    "megatron_vocagno/model/configuration.py": ["SUPPORTED"],
    "megatron_vocagno/model/student.py": ["_parts", "Embedding", "LossHead", "FinalNorm", "hf_name", "logit_softcap"],
    "tests/model/tiny.py": ["FAMILIES"],
    "megatron_vocagno/config.py": ["Aggregate", "Parallel"],
    "megatron_vocagno/objective/rule.py": ["Aggregate"],
    "megatron_vocagno/objective/selection.py": ["_COMBINE", "gather_guide"],
    "megatron_vocagno/batch/cached.py": ["guides"],
    "megatron_vocagno/objective/selection_kernels_triton.py": ["_aggregate"],
    "tests/objective/plain.py": ["guide"],
    "tests/objective/test_guide.py": ["HOWS"],
    "tests/objective/selection_cases.py": ["SETTINGS"],
    "tests/batch/test_cached.py": ["AGGREGATES", "expected_guide"],
    "benchmarks/compile_table.py": ["AGGREGATES"],
    "megatron_vocagno/engine/engines.py": [
        "TrainEngine",
        "DataParallelEngine",
        "PipelineEngine",
        "_training_loss",
        "reduce_metrics",
    ],
    "megatron_vocagno/engine/build.py": ["build_engine"],
    "megatron_vocagno/engine/distilling.py": ["DistillingEngine"],
    "megatron_vocagno/engine/state.py": ["EngineState", "_partitions", "_link_states", "_gather", "_scatter"],
    "megatron_vocagno/engine/checkpoint.py": ["CheckpointManager"],
}
# the files that docs/tour.md has in its first part, from the package
TOUR = ["corpus/spans.py", "batch/pack.py", "objective/selection.py", "objective/linear_ce.py", "training/loop.py"]
# options of external commands that pages name
FOREIGN_FLAGS = {
    *("--enable-scale-out", "--model-path"),
    "--calculate-per-token-loss", "--tokenizer-type", "--tokenizer-model", "--tensor-model-parallel-size",  # Megatron-LM
    "--seq-length", "--micro-batch-size", "--global-batch-size", "--train-iters", "--eval-iters", "--eval-interval",
    "--mtp-num-layers",
    "--dataloader-type", "--data-path", "--mock-data", "--fim-data", "--sft", "--reset-position-ids", "--eod-mask-loss",
    "--reset-attention-mask", "--hybrid-context-parallel", "--moe-aux-loss-coeff",
    "--no-check-for-nan-in-loss-and-grad", "--check-for-spiky-loss", "--inprocess-restart",
    "--num_gpus", "--hostfile", "--master_addr", "--master_port", "--module", "--local_rank", "--nproc_per_node",  # launchers
    "--array", "--cpus-per-task", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--parsable", "--dependency",  # Slurm
    "--signal", "--kill-on-bad-exit", "--wait",
    "--exclude", "--include", "--repo-type", "--local-dir", "--revision",  # hf download
    "--ray-address", "--address", "--head", "--generate", "--disable-usage-stats", "--yes",  # ray
    "--from-file", "--follow", "--selector",  # kubectl
    "--no-index", "--find-links", "--wheel-dir", "--only-binary", "--python-version", "--dest",  # pip
    "--no-deps", "--target", "--requirement", "--logdir", "--shm-size", "--inject_missing_state",  # pip, tensorboard, docker
    "--strict", "--inline-snapshot",  # pip-audit, pytest
    "--model_name_or_path", "--output_dir", "--split", "--prompt_type", "--use_vllm", "--save_outputs", "--data_names",
    "--temperature", "--num_test_sample",  # math-evaluation-harness
}  # fmt: skip
# messages of external programs that a page explains
FOREIGN_MESSAGES = {
    "Address already in use", "pdsh: command not found", "No space left on device", "Hugging Face's tokenizers",
}  # fmt: skip


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES if not in_site(page)])
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in links(page):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), f"{page.name}: {link}: no such file"
        assert target.resolve().is_relative_to(ROOT), f"{page.name}: {link} leaves the repository"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}: {target.name} has {sorted(anchors(target))}"


def test_links_are_met() -> None:
    assert sum(1 for page in PAGES if not in_site(page) for _ in links(page)) > 30


@each_page
def test_every_file_that_is_named_exists(page: Path) -> None:
    for name in _named_files(page):
        places = (ROOT, ROOT / "megatron_vocagno", ROOT / "docs", page.parent, ROOT / "examples/evidence")
        assert any((place / name).exists() for place in places), f"{page.name} names `{name}`"


def test_files_are_found() -> None:
    assert sum(1 for page in PAGES for _ in _named_files(page)) > 15


@pytest.mark.parametrize("file", PLACES)
def test_the_tour_names_definitions_that_exist(file: str) -> None:
    page, tree = (ROOT / "docs/tour.md").read_text(encoding="utf-8"), ast.parse((ROOT / file).read_text(encoding="utf-8"))
    made = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            made |= {target.id for target in targets if isinstance(target, ast.Name)}
    for name in PLACES[file]:
        assert name in made, f"{file} has no {name}"
        assert f"`{file}`" in page and re.search(rf"\b{name}\b", page), f"docs/tour.md does not name {name} of {file}"


def test_the_tour_has_five_files_in_the_order_of_the_data() -> None:
    page = (ROOT / "docs/tour.md").read_text(encoding="utf-8")
    assert re.findall(r"^### .*`(.*)`$", page, re.MULTILINE) == TOUR


@each_page
def test_every_option_that_is_named_exists(page: Path) -> None:
    known = _flags() | FOREIGN_FLAGS
    found = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", "\n".join([*code_spans(page), *blocks(page)])))
    assert found <= known, f"{page.name} names {sorted(found - known)}"


def test_no_foreign_option_is_listed_in_vain() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert not [flag for flag in FOREIGN_FLAGS if flag not in text]


@each_page
def test_every_field_of_a_run_that_is_named_exists(page: Path) -> None:
    sections = "|".join(name for name in Run.model_fields if name != "output")
    for span in code_spans(page):
        for field in re.findall(rf"(?<![\w./-])(?:{sections})(?:\.[a-z_]+)+(?![\w/(.-])", span):
            if Path(field).suffix not in FILES:
                assert field in _fields(), f"{page.name} names `{field}`"


def test_the_tables_of_fields_are_current() -> None:
    """If it fails: python docs/fields.py --write."""
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    assert page == runpy.run_path(str(ROOT / "docs/fields.py"))["with_tables"](page)


def test_every_field_of_a_run_is_documented() -> None:
    rows = [row for table in tables(ROOT / "docs/training.md") for row in table]
    meanings = {row[0].strip("`"): row[-1] for row in rows if len(row) == 4}
    for field in _fields():
        # a section is documented by its fields, the tables of a blend by data.train
        if f"{field}." not in " ".join(_fields()) or field == "data.train":
            assert meanings.get(field) or field.startswith("data.train."), field


def test_the_run_file_of_training_is_one() -> None:
    whole = [text for text in map(_inner, blocks(ROOT / "docs/training.md")) if text.startswith("output = ")]
    assert len(whole) == 1
    assert Run.model_validate(tomllib.loads(whole[0])).training.tokens == 15_000_000_000


def test_every_message_that_is_explained_exists() -> None:
    said, met = "\n".join(_literals()), 0
    for table in tables(ROOT / "docs/troubleshooting.md"):
        if not table[0][0].startswith("you see"):
            continue
        for row in table[1:]:
            for message in re.findall(r"`([^`]+)`", row[0]):
                for part in re.split(r"\s*(?:…|\bN\b)\s*", message):
                    if len(part.split()) > 2 and part not in FOREIGN_MESSAGES:
                        assert part in said, f"no message has {part!r}"
                        met += 1
    assert met > 15


# ---- helpers


def _inner(block: str) -> str:
    """A fenced block without its fences."""
    return "\n".join(block.splitlines()[1:-1])


def _named_files(page: Path) -> Iterator[str]:
    """Names of source and documentation files. Output of a run, and placeholders, begin with a capital, a dot or a ~."""
    for span in code_spans(page):
        for name in re.findall(r"(?<![\w./~$…*{}-])(?:[\w.-]+/)+[\w.-]+\.(?:py|md|toml|sh|sbatch|yaml)(?![\w/])", span):
            first = name.split("/")[0]
            if first[0].islower() and first not in ("runs", "models", "data", "corpus"):
                yield name


@cache
def _flags() -> frozenset[str]:
    """Every option of a command or script of the repository."""
    text = "\n".join(
        path.read_text(encoding="utf-8")
        for folder in SOURCES
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".sh", ".sbatch")
    )
    assumed = {f"--{field.name.replace('_', '-')}" for field in fields(Assumptions)}
    return frozenset(re.findall(r"(?<![\w-])--[a-z][a-z_-]+(?=[\"' )|=\]])", text)) | assumed


@cache
def _fields() -> frozenset[str]:
    """`section.field` of every field of a run file, and the sections."""
    return frozenset(_fields_of(Run, ""))


def _fields_of(model: type[BaseModel], before: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{before}{name}"
        for part in _parts(field.annotation):
            yield from _fields_of(part, f"{before}{name}.")


def _parts(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _parts(inner)


@cache
def _literals() -> frozenset[str]:
    """Every string of the sources, with … for the values inside."""
    found: set[str] = set()
    for folder in ("megatron_vocagno", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
                elif isinstance(node, ast.JoinedStr):
                    found.add("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values))
    return frozenset(found)
