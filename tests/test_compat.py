"""Each difference between versions, on both of its sides."""

from __future__ import annotations

import ast
import hashlib
import io
import sys
import traceback
from importlib import metadata

import huggingface_hub.constants
import pytest
import torch
from packaging.version import Version

from megatron_vocagno import compat
from tests.runs import REPOSITORY


def test_no_other_module_looks_at_a_version() -> None:
    looking = set()
    for path in (REPOSITORY / "megatron_vocagno").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        names |= {f"{node.module}.{name.name}" for node in nodes if isinstance(node, ast.ImportFrom) for name in node.names}
        if names & {"version_info", "hexversion", "importlib.metadata"}:
            looking.add(path.name)
    # consistency.py compares the versions between ranks, and decides nothing by them
    assert looking == {"compat.py", "consistency.py"}


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 3 << 20])
def test_a_stream_has_the_hash_of_its_bytes(size: int) -> None:
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    assert compat.sha256_of(io.BytesIO(data)) == hashlib.sha256(data).hexdigest()


def test_zstd_has_the_functions_that_streams_use() -> None:
    zstd = compat.zstd()
    packed = zstd.compress(b"text" * 100)
    assert zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: 27}).decompress(packed) == b"text" * 100


def test_a_note_is_added_as_python_3_11_adds_it() -> None:
    error = ValueError("wrong")
    compat.add_note(error, "one")
    compat.add_note(error, "two")
    assert error.__notes__ == ["one", "two"]
    if sys.version_info >= (3, 11):
        assert traceback.format_exception(error)[-2:] == ["one\n", "two\n"]


def test_torch_before_2_9_has_no_switch_for_products(monkeypatch: pytest.MonkeyPatch) -> None:
    switch = compat.product_precision()
    assert switch is None or switch.fp32_precision in ("none", "ieee", "bf16", "tf32")
    monkeypatch.setattr(torch.backends, "mkldnn", object())
    assert compat.product_precision() is None


@pytest.mark.parametrize(("asked", "environment", "offline"), [(False, False, False), (True, False, True), (False, True, True)])
def test_the_environment_makes_the_hub_offline(
    monkeypatch: pytest.MonkeyPatch, asked: bool, environment: bool, offline: bool
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", environment)
    assert compat.use_only_cache(asked) is offline


def test_the_tests_of_gguf_files_are_skipped_only_with_older_packages() -> None:
    assert bool(compat.gguf_remedy()) == (Version(metadata.version("transformers")) < Version("5.19"))


@pytest.mark.parametrize(
    ("transformers", "gguf", "remedy"),
    [
        ("5.18.1", True, "transformers 5.19 or newer (installed: 5.18.1): pip install 'transformers>=5.19'"),
        ("5.19.0", True, ""),
        ("5.100.0", True, ""),
        ("5.19.0", False, "gguf: pip install 'megatron-vocagno[gguf]'"),
    ],
)
def test_gguf_files_need_newer_packages(monkeypatch: pytest.MonkeyPatch, transformers: str, gguf: bool, remedy: str) -> None:
    monkeypatch.setattr(metadata, "version", {"transformers": transformers}.__getitem__)
    if not gguf:
        monkeypatch.setitem(sys.modules, "gguf", None)
    assert compat.gguf_remedy() == remedy
