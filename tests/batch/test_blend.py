"""A blend holds its shares in any window, at any place, on any number of ranks; a resumed run reads the same one or stops."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_vocagno.batch.blend import BlendedRows, Mixture
from megatron_vocagno.batch.front import Front
from megatron_vocagno.batch.loader import Batches, Layout, TrainRows
from megatron_vocagno.config import Source
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.errors import DatasetError, RunError
from megatron_vocagno.training.setup import open_data
from tests import tokenizers_for_tests as real
from tests.batch.test_loader import same
from tests.datasets import build_dataset
from tests.runs import Case, metrics, spawn

S = 64


def bound(k: int) -> float:
    """Rows by which a window may miss a share, less than."""
    return 1 + sum(1 / n for n in range(1, k - 1))


def random_weights(random: np.random.Generator, k: int) -> list[float]:
    match random.integers(3):
        case 0:
            return [1.0] * k
        case 1:
            return [float(w) for w in random.integers(1, 9, k)]
        case _:  # over four orders of magnitude
            return [float(f"{10**x:.3g}") for x in random.uniform(-3, 1, k)]


@pytest.mark.parametrize("k", [2, 3, 4, 5, 6])
def test_every_window_has_its_shares(k: int) -> None:
    random = np.random.default_rng(k)
    worst, windows = 0.0, 0
    for _ in range(60):
        mixture = Mixture(random_weights(random, k))
        assert sum(mixture.shares) == 1
        origin = int(random.choice([0, 10**6, 10**12]))
        counts = np.array([mixture.counts(origin + n) for n in range(600)])
        shares = np.array([float(share) for share in mixture.shares])
        # the error of a window is the difference of those at its ends
        errors = counts - counts[0] - np.arange(600)[:, None] * shares
        worst = max(worst, float((errors.max(0) - errors.min(0)).max()))
        windows += 600 * 599 // 2
    assert bound(k) / 2 < worst < bound(k), "the bound holds, and was approached"
    assert windows > 10**7


def test_places_are_a_pure_function_and_each_dataset_is_read_in_order() -> None:
    random = np.random.default_rng(0)
    met = 0
    for k in (1, 2, 3, 6):
        for _ in range(20):
            mixture = Mixture(random_weights(random, k))
            following = [0] * k
            for index in range(400):
                dataset, own = mixture.place(index)
                assert own == following[dataset]
                following[dataset] += 1
                met += 1
            assert following == mixture.counts(400)
    assert met == 4 * 20 * 400


def test_weights_are_exact_decimals_and_their_unit_is_free() -> None:
    assert [str(share) for share in Mixture([0.7, 0.2, 0.1]).shares] == ["7/10", "1/5", "1/10"]
    assert Mixture([0.7, 0.2, 0.1]).counts(10**15) == [7 * 10**14, 2 * 10**14, 10**14]
    assert Mixture([7, 2, 1]).counts(12345) == Mixture([0.07, 0.02, 0.01]).counts(12345)
    assert Mixture([3.0]).place(17) == (0, 17)


def test_a_fingerprint_is_that_of_the_rows() -> None:
    fingerprint = Mixture([0.7, 0.3]).fingerprint(["aa", "bb"])
    assert fingerprint == "7/10 of aa, 3/10 of bb"
    # the same rows, written otherwise
    assert Mixture([14, 6]).fingerprint(["aa", "bb"]) == Mixture([0.3, 0.7]).fingerprint(["bb", "aa"]) == fingerprint
    others = [
        Mixture([0.6, 0.4]).fingerprint(["aa", "bb"]),
        Mixture([0.7, 0.3]).fingerprint(["aa", "cc"]),
        Mixture([1]).fingerprint(["aa"]),
    ]
    # of equal shares the first one gives first
    others += [Mixture([1, 1]).fingerprint(["aa", "bb"]), Mixture([1, 1]).fingerprint(["bb", "aa"])]
    assert len({fingerprint, *others}) == 6


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory, teacher_tokenizer: Path) -> AlignedDataset:
    out = tmp_path_factory.mktemp("second") / "all"
    return build_dataset(out, real.multilingual_texts(), real.mistral_tokenizer_path(), teacher_tokenizer)


def blend(datasets: list[AlignedDataset], weights: list[float]) -> BlendedRows:
    return BlendedRows([TrainRows(ds, S, seed=3) for ds in datasets], Mixture(weights))


def test_rows_are_the_next_ones_of_their_datasets(dataset: AlignedDataset, second: AlignedDataset) -> None:
    rows = blend([dataset, second], [3, 1])
    alone = [TrainRows(ds, S, seed=3) for ds in (dataset, second)]
    following = [0, 0]
    for index in range(4 * alone[1].rows_in_epoch + 40):
        d = rows.mixture.place(index)[0]
        assert np.array_equal(rows[index].target_ids, alone[d][following[d]].target_ids)
        following[d] += 1
    assert following[1] > alone[1].rows_in_epoch + 5, "the small one is in its second epoch"
    assert rows.epochs(sum(following)) == [n / part.rows_in_epoch for n, part in zip(following, alone, strict=True)]
    lengths = [len(rows[index].target_ids) for index in range(4 * alone[1].rows_in_epoch)]
    assert abs(np.mean(lengths) - rows.tokens_per_row) < 1


def test_a_blend_makes_the_same_micro_batches_on_any_number_of_ranks(dataset: AlignedDataset, second: AlignedDataset) -> None:
    one, two = Layout(2, 4, 1), Layout(2, 2, 2)
    compared = 0
    for step in range(3):
        alone = Batches(blend([dataset, second], [0.6, 0.4]), one, 0).step(step * 8)
        shared = [Batches(blend([dataset, second], [0.6, 0.4]), two, rank).step(step * 8) for rank in range(2)]
        for micro in range(4):
            assert same(alone[micro], shared[micro // 2][micro % 2])
            compared += 1
    assert compared == 12


@pytest.mark.slow
def test_a_run_reports_its_shares_and_does_not_resume_on_another_blend(small_case: Case, tmp_path: Path) -> None:
    case, tokenizers = small_case, [small_case.tokenizer(side) for side in ("student", "teacher")]
    second = build_dataset(tmp_path / "second", real.multilingual_texts(), *tokenizers)
    blended = f'data.train=[{{path="{case.train}", weight=3}}, {{path="{second.path}"}}]'
    arguments = case.command("blend", [blended, "training.steps=2"])
    finished = spawn(1, arguments)
    assert finished.returncode == 0, finished.stdout[-3000:]
    first = AlignedDataset.open(case.train)
    for ds, share in ((first, 0.75), (second, 0.25)):
        n = TrainRows(ds, S, seed=0, front=Front((real.MISTRAL_BOS,))).rows_in_epoch
        assert (
            f"{100 * share:.0f} % of the rows from {ds.path}: {len(ds):,} documents make {n:,} rows per epoch" in finished.stdout
        )
        steps = [line for line in metrics(case.out("blend")) if "loss/train" in line]
        assert [line[f"data/epochs/{ds.path}"] for line in steps] == [step * 8 * share / n for step in (1, 2)]

    refused = spawn(1, case.command("blend", [blended.replace("=3", "=4"), "training.steps=4"]))
    assert refused.returncode == 2, refused.stdout[-3000:]
    a, b = (f"of {ds.fingerprint}" for ds in (first, second))
    assert (
        f"{case.train}, {second.path} (3/4 {a}, 1/4 {b}), this run has " in refused.stdout
        and f"(4/5 {a}, 1/5 {b}): " in refused.stdout
    )


def test_datasets_that_do_not_belong_together_are_refused(
    dataset: AlignedDataset, teacher_tokenizer: Path, tmp_path: Path
) -> None:
    """Another tokenizer, with both paths and what differs; the same dataset twice."""
    other = build_dataset(tmp_path / "other", real.multilingual_texts(), teacher_tokenizer, teacher_tokenizer)
    with pytest.raises(DatasetError) as error:
        open_data([Source(path=dataset.path), Source(path=other.path)])
    made = f"{other.path}: its student ids were made with another tokenizer than those of {dataset.path}. They differ in: "
    assert made in str(error.value) and "number of tokens (49,152 and 32,000)" in str(error.value)
    moved = Path(shutil.copytree(dataset.path, tmp_path / "moved"))
    with pytest.raises(RunError, match="are the same dataset: use one") as twice:
        open_data([Source(path=dataset.path), Source(path=moved)])
    assert str(dataset.path) in str(twice.value) and str(moved) in str(twice.value)
