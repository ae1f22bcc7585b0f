"""The comparison of two revisions' losses reports every difference."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.prove_same_loss import COMPARED, check_out, report

LINES = [{"step": float(step), **dict.fromkeys(COMPARED, 1.5 + step)} for step in range(1, 4)]


def changed(step: int, **numbers: float) -> list[dict[str, float]]:
    """With the names' slashes as two underscores."""
    named = {name.replace("__", "/"): value for name, value in numbers.items()}
    return [line | named if line["step"] == step else line for line in LINES]


def test_the_same_bits_are_the_same() -> None:
    assert report("HEAD", LINES, LINES, 0) == 0
    both_nan = changed(2, loss__train=math.nan)
    assert report("HEAD", both_nan, [dict(line) for line in both_nan], 0) == 0


@pytest.mark.parametrize("value", [math.nextafter(3.5, 4), math.nan, math.inf])
def test_one_bit_of_one_number_is_seen_and_shown(value: float, capsys: pytest.CaptureFixture[str]) -> None:
    assert report("HEAD", LINES, changed(2, optimizer__grad_norm=value), 0) == 1
    shown = capsys.readouterr().out
    assert f"step 2: 3.5 -> {value!r}" in " ".join(shown.split())
    assert "step 3" not in shown


def test_a_tolerance_is_relative_and_allows_no_nan() -> None:
    near = changed(2, loss__train=3.5 * (1 + 1e-6))
    assert report("HEAD", LINES, near, 1e-5) == 0
    assert report("HEAD", LINES, near, 1e-7) == 1
    assert report("HEAD", LINES, changed(2, loss__train=math.nan), 1e9) == 1


def test_a_number_that_a_side_lacks_is_a_difference() -> None:
    assert report("HEAD", LINES, LINES[:2], 0) == 1
    infinite = changed(2, loss__train=math.inf)
    assert report("HEAD", infinite, infinite, 0) == 0
    assert (
        report("HEAD", infinite, [{k: v for k, v in line.items() if (k, v) != ("loss/train", math.inf)} for line in infinite], 0)
        == 1
    )
    without = [{name: value for name, value in line.items() if name != "loss/train"} for line in LINES]
    assert report("HEAD", LINES, without, 0) == 1
    assert report("HEAD", without, without, 0) == 1


def test_a_revision_is_checked_out_whole(tmp_path: Path) -> None:
    tree = check_out("HEAD", tmp_path / "tree")
    for file in (
        "examples/quickstart.toml",
        "ds_configs/cpu_pp2.json",
        "megatron_vocagno/training/loop.py",
        "tools/preprocess/build_dataset.py",
    ):
        assert (tree / file).is_file()
    with pytest.raises(SystemExit, match="2"):
        check_out("no-such-revision", tmp_path / "none")
