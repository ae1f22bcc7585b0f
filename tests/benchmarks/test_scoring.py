"""The benchmark of scoring runs, and measures what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import scoring


@pytest.mark.long
@pytest.mark.slow
def test_scoring_and_reading_are_measured(tmp_path: Path) -> None:
    figures = scoring.scoring_figures(tmp_path, None, rounds=1, quick=True)
    assert [figure.goal for figure in figures] == ["", "≥ 0.95 ×", "", ""]
    assert 0.2 < float(figures[1].measured.split(" ×")[0]) < 2
    reading = scoring.reading_figures(tmp_path, quick=True)
    assert len(reading) == 3 and all(float(figure.measured.removesuffix(" M")) > 0.2 for figure in reading)


def test_what_is_read_again_grows_as_windows_get_shorter() -> None:
    [figure] = scoring.read_again()
    shares = [float(part.split(" %")[0].split("%")[0]) for part in figure.measured.split(", ") if "%" in part]
    assert shares == sorted(shares, reverse=True) and 5 < shares[-1] < shares[0] < 100
