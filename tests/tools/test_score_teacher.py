"""The command line, as a user and as a launcher run it."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.preprocess.plan import Slice
from megatron_vocagno.preprocess.shards import BuildConfig
from tests import tokenizers_for_tests as real
from tests.corpus.conftest import contents, make, write_jsonl
from tests.runs import REPOSITORY, environment, write_teacher
from tools.preprocess.score_commands import part_of
from tools.preprocess.score_progress import near_chance
from tools.preprocess.score_teacher import main, parser

Output = tuple[int, str, str]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, teacher_tokenizer: Path) -> Path:
    return write_teacher(tmp_path_factory.mktemp("score_teacher") / "teacher", teacher_tokenizer)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, teacher_tokenizer: Path) -> AlignedDataset:
    """Two shards and little text."""
    folder = tmp_path_factory.mktemp("small")
    corpus = write_jsonl(folder / "corpus.jsonl", real.multilingual_texts())
    settings = BuildConfig(student=str(real.mistral_tokenizer_path()), teacher=str(teacher_tokenizer))
    dataset = make([corpus], folder / "dataset", settings, shard_bytes=corpus.stat().st_size * 2 // 3)
    assert len(dataset.manifest.shards) == 2
    return dataset


@pytest.fixture
def run(built: AlignedDataset, teacher: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> Callable[..., Output]:
    """Runs it in this process on a copy. Returns exit status, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "150")
    folder = shutil.copytree(built.path, tmp_path / "dataset")

    def call(*words: str, **variables: int) -> Output:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        words = words or (str(folder), "--teacher", str(teacher), "--dtype", "float32", "--tokens-per-batch", "400")
        capsys.readouterr()
        return main(words), *capsys.readouterr()

    return call


OLD_AND_NEW = {"": "none", "--weights as-is": "none", "--weights int8": "int8", "--quantization fp8": "fp8"}


def test_it_reports_the_scored_shards_and_scores_nothing_twice(run: Callable[..., Output], tmp_path: Path) -> None:
    code, out, err = run()
    assert (code, err) == (0, "")
    shards = re.findall(r"shard (\d{4}), (\d) of 2: ([\d,]+) tokens, [\d,]+ per second, (\d+\.\d+) nats per token", out)
    assert [shard[:2] for shard in shards] == [("0000", "1"), ("0001", "2")]
    dataset = AlignedDataset.open(tmp_path / "dataset")
    total = dataset.manifest.teacher_losses.totals  # type: ignore[union-attr]
    assert sum(int(shard[2].replace(",", "")) for shard in shards) == total.tokens == dataset.totals.teacher_tokens
    for line in (f"{total.tokens:,} in 2 shards (0 were scored before)", f"{total.mean:.4f} nats per token", "0 NaN, 0 infinite"):
        assert line in out
    assert "256 tokens, windows every 128" in out and "tokens per second and process" in out

    before = contents(tmp_path / "dataset")
    code, out, _ = run()
    assert code == 0 and out.count("scored before") == 3 and "(2 were scored before)" in out
    assert contents(tmp_path / "dataset") == before


def test_losses_near_chance_are_reported_in_one_line(run: Callable[..., Output], tmp_path: Path) -> None:
    """The teacher of these tests has random weights."""
    where = "docs/troubleshooting.md#the-teacher-is-no-better-than-its-student-or-than-chance"
    code, out, _ = run()
    manifest = AlignedDataset.open(tmp_path / "dataset").manifest
    losses, vocabulary = manifest.teacher_losses, manifest.teacher.vocab_size
    assert losses is not None and code == 0
    [line] = [line for line in out.splitlines() if line.startswith("warning: ")]
    assert line == (
        f"warning: the teacher is hardly better than chance: {losses.totals.mean:.2f} nats per token, {math.log(vocabulary):.2f} "
        f"for equal probabilities of its {vocabulary:,} tokens. Does it read its usual prefix (--bos)? Other causes: {where}"
    )
    assert line in run("finalize", str(tmp_path / "dataset"))[1]
    guess = math.log(vocabulary) * (losses.totals.tokens - losses.totals.nan - losses.totals.infinite)
    for share, told in ((0.89, False), (0.91, True), (2.0, True), (0.0, False)):
        totals = losses.totals.model_copy(update={"nats": guess * share})
        assert (near_chance(losses.model_copy(update={"totals": totals}), vocabulary) is not None) == told
    page, _, section = where.partition("#")
    headings = [line.removeprefix("## ") for line in (REPOSITORY / page).read_text(encoding="utf-8").splitlines()]
    assert section in [heading.lower().replace(",", "").replace(" ", "-") for heading in headings]


def test_ranks_of_a_launcher_share_the_shards_without_talking(run: Callable[..., Output], tmp_path: Path) -> None:
    code, out, _ = run(RANK=1, WORLD_SIZE=2, LOCAL_RANK=1)
    assert code == 0 and "rank 1: shard 0001, 1 of 1: " in out and "the last process to end records all losses" in out
    assert AlignedDataset.open(tmp_path / "dataset").scoring is None
    code, out, _ = run("finalize", str(tmp_path / "dataset"))
    assert code == 2
    code, out, _ = run(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0)
    assert code == 0 and "rank 0: shard 0000, 1 of 1: " in out and "nats per token" in out
    assert AlignedDataset.open(tmp_path / "dataset").scoring is not None
    assert run("finalize", str(tmp_path / "dataset"))[0] == 0


def test_slices_of_slices_are_disjoint_and_whole() -> None:
    met = 0
    for n in range(1, 6):
        for world in range(1, 6):
            jobs = list(range(37))
            shares = [part_of(Slice(i, n), rank, world) or Slice() for i in range(1, n + 1) for rank in range(world)]
            taken = [job for share in shares for job in share.of(jobs)]
            assert sorted(taken) == jobs
            task = [job for rank in range(world) for job in (part_of(Slice(1, n), rank, world) or Slice()).of(jobs)]
            assert sorted(task) == jobs[::n], "the ranks of a task share what is the task's"
            met += world > 1 < n
    assert met > 15


def test_the_old_name_of_the_option_for_quantization_is_accepted() -> None:
    given = {words: parser().parse_args(["DATASET", "--teacher", "T", *words.split()]).quantization for words in OLD_AND_NEW}
    assert given == OLD_AND_NEW
    assert "--weights" not in parser().format_help() and "--quantization" in parser().format_help()


def test_an_error_is_one_line(run: Callable[..., Output], teacher: Path, tmp_path: Path) -> None:
    folder = str(tmp_path / "dataset")
    for words, message in (
        (("/nowhere", "--teacher", str(teacher)), "error: /nowhere is not a dataset: the path does not exist"),
        ((folder, "--teacher", "/nowhere"), "error: no model at /nowhere"),
        ((folder, "--teacher", str(teacher), "--context", "1000"), "error: --context 1,000: the teacher"),
        (("finalize", folder), "2 of 2 shards are not scored: shards/0000, shards/0001"),
    ):
        code, _, err = run(*words)
        assert code == 2 and message in err and err.count("\n") <= 2
    assert run()[0] == 0
    code, _, err = run(folder, "--teacher", str(teacher), "--stride", "100")
    assert code == 2 and "stride: 128 then, 100 now" in err and "dtype: float32 then, bfloat16 now" in err and "--replace" in err


def test_several_workers_on_one_gpu_are_an_error(
    run: Callable[..., Output], teacher: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    code, _, err = run(str(tmp_path / "dataset"), "--teacher", str(teacher), "--workers", "2")
    assert code == 2 and "--workers 2: the processes would share one GPU. Start one process per GPU: torchrun" in err
    assert "--nproc_per_node 8" in err


@pytest.mark.long
@pytest.mark.slow
def test_two_processes_and_a_kill_leave_what_one_process_makes(
    run: Callable[..., Output], built: AlignedDataset, teacher: Path, tmp_path: Path
) -> None:
    """As torchrun starts them; the first attempt is killed when its first file appears."""
    assert run()[0] == 0
    shared = Path(shutil.copytree(built.path, tmp_path / "shared"))
    words = [str(shared), "--teacher", str(teacher), "--dtype", "float32", "--tokens-per-batch", "400"]
    command = [sys.executable, "-m", "tools.preprocess.score_teacher", *words]

    def start(rank: int) -> subprocess.Popen[str]:
        variables = environment(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank))
        return subprocess.Popen(command, cwd=REPOSITORY, env=variables, stdout=subprocess.PIPE, text=True)

    victim = start(0)
    while victim.poll() is None and not list((shared / "shards" / "0000").glob("*teacher_loss*")):
        time.sleep(0.01)
    victim.kill()
    victim.communicate(timeout=60)
    ranks = [start(rank) for rank in range(2)]
    assert [rank.communicate(timeout=200) and rank.returncode for rank in ranks] == [0, 0]
    assert AlignedDataset.open(shared).scoring is not None
    assert contents(shared) == contents(tmp_path / "dataset")
