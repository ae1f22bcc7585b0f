"""Every kernel is compiled for every GPU, through the functions that launch it. None of the GPUs is needed.

test_fake_gpu.py compiles every kernel for one GPU.
"""

from __future__ import annotations

from itertools import product

import pytest

from benchmarks.compile_table import PAGE, all_launches, table
from benchmarks.offline import TARGETS, Launch
from tests.objective.test_fake_gpu import all_kernels, fits

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def found() -> list[tuple[str, Launch]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        return all_launches()


def test_every_kernel_that_is_launched_compiles(found: list[tuple[str, Launch]]) -> None:
    assert {(launch.kernel, launch.target) for _, launch in found} == set(product(all_kernels(), TARGETS))


def test_every_kernel_compiles_for_sizes_divisible_by_16_and_for_odd_ones(found: list[tuple[str, Launch]]) -> None:
    """The compiler makes another kernel if sizes are divisible by 16, with other registers and other spills."""
    of_parity = {
        parity: {(launch.kernel, launch.target) for case, launch in found if ("odd" in case) == parity}
        for parity in (False, True)
    }
    assert of_parity[True] == of_parity[False] and len(of_parity[True]) == len(TARGETS) * len({x.kernel for _, x in found})


def test_nothing_spills_and_every_block_fits(found: list[tuple[str, Launch]]) -> None:
    """A spilled register costs a memory access per thread. A block that does not fit is refused when it is launched."""
    for case, launch in found:
        assert fits(launch), (case, launch)
    assert len(found) > 25 * len(TARGETS)


def test_the_page_shows_what_is_compiled(found: list[tuple[str, Launch]]) -> None:
    assert table(found) in PAGE.read_text(encoding="utf-8"), "python -m benchmarks.compile_table --write"
