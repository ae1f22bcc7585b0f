"""Every kernel is compiled for GPUs, one or all four, through the functions that launch it. None of the GPUs is needed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from benchmarks.compile_table import PAGE, all_launches, table
from benchmarks.offline import SHARED_LIMIT, TARGETS, Launch
from tests.runs import REPOSITORY

pytestmark = pytest.mark.slow
OBJECTIVE = REPOSITORY / "megatron_vocagno" / "objective"


ONE, ALL = ("sm_90",), tuple(TARGETS)
of_every_gpu = pytest.mark.parametrize("found", [pytest.param(ALL, marks=pytest.mark.long, id="every GPU")], indirect=True)
of_one_and_of_every_gpu = pytest.mark.parametrize(
    "found", [pytest.param(ONE, id="one GPU"), pytest.param(ALL, marks=pytest.mark.long, id="every GPU")], indirect=True
)


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> list[tuple[str, Launch]]:
    """Launches for the targets of the parameter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        launches = all_launches(request.param)
    assert {launch.target for _, launch in launches} == set(request.param)
    return launches


def targets_of(found: list[tuple[str, Launch]]) -> set[str]:
    return {launch.target for _, launch in found}


def launched(module: Path) -> set[str]:
    """Names of the functions that are called as kernel[grid](...)."""
    calls = (node.func for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
    kernels = (call.value for call in calls if isinstance(call, ast.Subscript))
    return {ast.unparse(kernel) for kernel in kernels}


@of_one_and_of_every_gpu
def test_every_kernel_that_is_launched_compiles(found: list[tuple[str, Launch]]) -> None:
    modules = list(OBJECTIVE.glob("*_triton.py"))
    kernels = set().union(*(launched(module) for module in modules))
    assert len(modules) >= 2 and len(kernels) >= 8, kernels
    assert {(launch.kernel, launch.target) for _, launch in found} == {
        (kernel, target) for kernel in kernels for target in targets_of(found)
    }


@of_one_and_of_every_gpu
def test_every_kernel_compiles_for_sizes_divisible_by_16_and_for_odd_ones(found: list[tuple[str, Launch]]) -> None:
    """The compiler makes another kernel if sizes are divisible by 16, with other registers and other spills."""
    of_parity = {
        parity: {(launch.kernel, launch.target) for case, launch in found if ("odd" in case) == parity}
        for parity in (False, True)
    }
    assert of_parity[True] == of_parity[False] and len(of_parity[True]) == len(targets_of(found)) * len(
        {x.kernel for _, x in found}
    )


@of_one_and_of_every_gpu
def test_nothing_spills_and_every_block_fits(found: list[tuple[str, Launch]]) -> None:
    """A spilled register costs a memory access per thread. A block that does not fit is refused when it is launched."""
    for case, launch in found:
        assert launch.spilled == 0, (case, launch)
        assert launch.shared <= SHARED_LIMIT[launch.target], (case, launch)
        assert 0 < launch.registers <= 255 and launch.warps * TARGETS[launch.target].warp_size <= 1024, (case, launch)
        assert all(0 < size < 2**16 for size in launch.grid[1:]) and 0 < launch.grid[0] < 2**31, (case, launch)
    assert len(found) > 25 * len(targets_of(found))


@of_every_gpu
def test_the_page_shows_what_is_compiled(found: list[tuple[str, Launch]]) -> None:
    assert table(found) in PAGE.read_text(encoding="utf-8"), "python -m benchmarks.compile_table --write"
