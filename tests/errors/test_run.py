"""What a run says once its files are read: data that does not suit its models, losses, samples, and what ends it."""

from __future__ import annotations

import shutil
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from inline_snapshot import snapshot

from megatron_vocagno.batch.front import NO_FRONT
from megatron_vocagno.config import Run
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.engine import collectives, placement
from megatron_vocagno.engine.cached import open_scored
from megatron_vocagno.engine.distilling import check_vocabularies
from megatron_vocagno.errors import UserError
from megatron_vocagno.preprocess import score as scoring
from megatron_vocagno.preprocess.jobs import run_jobs
from megatron_vocagno.preprocess.plan import Slice
from megatron_vocagno.preprocess.score import ScoringOptions, finish, score
from megatron_vocagno.preprocess.workers import JobFailure
from megatron_vocagno.run_file import load_run
from megatron_vocagno.training import run_lock, sample_files
from megatron_vocagno.training.evaluation import Evaluator, HeldOut
from megatron_vocagno.training.loop import save_last, with_fields
from megatron_vocagno.training.monitor import NON_FINITE_FILE, Monitor
from megatron_vocagno.training.nonfinite import NonFiniteGuard, NonFiniteStep
from megatron_vocagno.training.run_lock import RunLock, make_output
from megatron_vocagno.training.setup import open_data
from tests.errors.telling import told
from tests.runs import Case
from tests.sources import samples_of, sources_of, training_rows


def run_of(case: Case, *overrides: str) -> Run:
    arguments = case.command("told", overrides)
    return load_run(Path(arguments[0]), arguments[4::2])


@pytest.fixture(scope="module")
def asked(case: Case) -> ScoringOptions:
    return ScoringOptions(case.teacher, "float32", context=64, stride=32)


@pytest.fixture(scope="module")
def scored(tiny: Path, asked: ScoringOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = shutil.copytree(tiny, tmp_path_factory.mktemp("scored") / "data")
    score(folder, asked)
    return folder


def test_data_that_does_not_suit_the_run(case: Case, tmp_path: Path) -> None:
    data = AlignedDataset.open(case.valid)
    student, teacher = data.student_tokenizer, data.teacher_tokenizer
    names = {"DATA": data.path, "STUDENT": student.fingerprint, "TEACHER": teacher.fingerprint, "MODEL": case.teacher}
    with told(
        snapshot(
            """\
DATA: its student ids were made with another tokenizer than that of the student model, MODEL, which could not have made them: MODEL/tokenizer.json: the end-of-text token '</s>' is not among its 49,152 tokens.
  Build the dataset again with that model's tokenizer, or use the model that it was built for.\
"""
        ),
        **names,
    ):
        data.require_tokenizer("student", case.teacher)
    with told(
        snapshot(
            """\
guidance.objective = 'kld' compares distributions over one vocabulary, but DATA was aligned for two: the student's tokenizer is STUDENT (32,000 ids), the teacher's TEACHER (49,152 ids).
  Use a teacher of the student's family and build the dataset with its tokenizer on both sides, or use guidance.objective = 'uld', which needs no common vocabulary.\
"""
        ),
        **names,
    ):
        check_vocabularies(run_of(case, "guidance.objective=kld").guidance, data)
    copy = shutil.copytree(case.valid, tmp_path / "copy")
    with told(
        snapshot("DIR/copy and DATA in data.train are the same dataset: use one, with the sum of weights"), DIR=tmp_path, **names
    ):
        open_data(run_of(case, f'data.train=[{{path="{case.valid}"}}, {{path="{copy}"}}]').data.train)
    assert with_fields(run_of(case, "data.train=/nowhere"), UserError("/nowhere is not a dataset: why", "/nowhere")) == (
        snapshot("data.train: /nowhere is not a dataset: why")
    )


def test_a_teacher_with_too_few_tokens(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "run_on_all_ranks", lambda action, *_: action())
    monkeypatch.setattr(placement, "open_teacher", lambda *_, **__: SimpleNamespace(vocab_size=5))
    data = AlignedDataset.open(case.valid)
    processes: Any = SimpleNamespace(device=torch.device("cpu"))
    with told(
        snapshot(
            "DATA: its teacher tokenizer has 49,152 tokens, but the teacher MODEL has 5. Was the dataset aligned for another teacher?"
        ),
        DATA=data.path,
        MODEL=case.teacher,
    ):
        placement.load_teacher(run_of(case).loaded_teacher, data, processes)


def test_losses_that_are_not_the_run_s(case: Case, tiny: Path, scored: Path) -> None:
    data, plain = AlignedDataset.open(scored), AlignedDataset.open(tiny)
    assert data.scoring is not None
    names = {"SCORED": scored, "DATA": plain.path, "MODEL": case.teacher, "HASH": data.scoring.teacher}
    with told(
        snapshot(
            "DATA has no losses of its teacher, and teacher.placement is 'cached': 0 of 4 shards are scored.\n"
            "  python -m tools.preprocess.score_teacher DATA --teacher MODEL"
        ),
        **names,
    ):
        training_rows(run_of(case, "teacher.placement=cached"), [plain])
    with told(
        snapshot(
            """\
SCORED holds the losses of teacher (HASH), teacher.path is org/other (whose weights are not on this machine).
  A dataset stores the losses of one teacher: name the teacher that scored it, score a copy of the dataset, or
  score it again (python -m tools.preprocess.score_teacher … --replace).\
"""
        ),
        **names,
    ):
        training_rows(run_of(case, "teacher.placement=cached", "teacher.path=org/other"), [data])
    other = AlignedDataset.open(scored)
    assert other.manifest.teacher_losses is not None
    losses = other.manifest.teacher_losses.model_copy(update={"scoring": data.scoring.model_copy(update={"dtype": "float16"})})
    other.manifest = other.manifest.model_copy(update={"teacher_losses": losses})
    with told(
        snapshot(
            """\
SCORED and SCORED were not scored in the same way:
  teacher='HASH' name='teacher' dtype='float16' weights='as-is' context=64 stride=32 before=0 front=() served=None
  teacher='HASH' name='teacher' dtype='float32' weights='as-is' context=64 stride=32 before=0 front=() served=None
  A run needs losses from one teacher with the same settings. Score one of the datasets again (python -m tools.preprocess.score_teacher … --replace).\
"""
        ),
        **names,
    ):
        open_scored(run_of(case, "teacher.placement=cached").teacher[0], [data, other])
    two = f'teacher=[{{placement="cached"}}, {{placement="cached", data=["{scored}"]}}]'
    with told(
        snapshot(
            """\
logging.samples needs one teacher, this run has 2: [[teacher]] 2 has no losses for data.valid (SCORED).
  Remove logging.samples, or use one teacher.\
"""
        ),
        **names,
        VALID=case.valid,
    ):
        sources_of(run_of(case, two, "logging.samples=2")).held_out([data], data)
    train = AlignedDataset.open(case.train)
    with told(
        snapshot(
            """\
SCORED and TRAIN do not contain the same documents: 4 documents in 4 shards, and 80 in 3; the first different shard is 0.
  Build both from the same input with the same --shard-mb, and look for documents that one build has quarantined.\
"""
        ),
        **names,
        TRAIN=case.train,
    ):
        open_scored(run_of(case, two).teacher[1], [train])
    train.manifest = train.manifest.model_copy(update={"student": train.manifest.teacher})
    tokenizers = {"STUDENT": data.student_tokenizer.fingerprint, "TEACHER": data.teacher_tokenizer.fingerprint}
    with told(
        snapshot("SCORED was built with the student tokenizer STUDENT, TRAIN with TEACHER"),
        **names,
        **tokenizers,
        TRAIN=case.train,
    ):
        open_scored(run_of(case, two).teacher[1], [train])


def test_a_dataset_that_cannot_be_scored(case: Case, tiny: Path, scored: Path, asked: ScoringOptions, tmp_path: Path) -> None:
    with told(snapshot("--context 1,000: the teacher MODEL reads 256 tokens"), MODEL=case.teacher):
        score(tiny, replace(asked, context=1000))
    with told(snapshot("--stride 65 is more than --context 64: tokens between windows would be skipped")):
        score(tiny, replace(asked, stride=65))
    with told(
        snapshot(
            """\
SCORED was scored with other settings:
  context: 64 then, 32 now
  Use the same options as then, or --replace to score it again.\
"""
        ),
        SCORED=scored,
    ):
        score(scored, replace(asked, context=32))
    data = shutil.copytree(tiny, tmp_path / "data")
    score(data, asked, part=Slice(1, 2))
    with told(
        snapshot(
            "DIR/data: 2 of 4 shards are not scored: shards/0001, shards/0003. Run their tasks again, or the command without --shards. Do all machines see this folder?"
        ),
        DIR=tmp_path,
    ):
        finish(data)
    with told(
        snapshot(
            """\
DIR/data/shards/0000 was scored with other settings:
  context: 64 then, 32 now
  Use the same options as then, or --replace to score it again.\
"""
        ),
        DIR=tmp_path,
    ):
        score(data, replace(asked, context=32), part=Slice(1, 2))
    small = write_teacher_of(tmp_path / "small", case.teacher)
    with told(
        snapshot(
            "DATA: its teacher tokenizer has 49,152 tokens, the teacher DIR/small has 500: the dataset was "
            "aligned for another teacher"
        ),
        DIR=tmp_path,
        DATA=tiny,
    ):
        score(tiny, replace(asked, teacher=small))


def test_scoring_that_does_not_end(case: Case, asked: ScoringOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    failure: Any = JobFailure(SimpleNamespace(name="0000"), "the worker died of signal 9")  # type: ignore[arg-type]
    with told(
        snapshot("1 of 1 shards could not be scored; the finished shards are kept\nshard 0000: the worker died of signal 9")
    ):
        run_jobs(lambda *_, **__: iter([failure]), len, [failure.job], (), lambda _: None, "scored")
    monkeypatch.setattr(scoring, "_record_if_complete", lambda _, manifest: manifest)
    monkeypatch.setattr(scoring, "unscored", lambda *_: [])
    with told(snapshot("DATA: its shards were scored with different settings; score it with --replace"), DATA=case.valid):
        finish(case.valid)


def write_teacher_of(folder: Path, teacher: Path) -> Path:
    shutil.copytree(teacher, folder)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"vocab_size": 49152', '"vocab_size": 500'))
    return folder


def test_sample_rows_that_are_not_the_run_s(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(case, "logging.samples=2", f"output={tmp_path}")
    data = AlignedDataset.open(case.valid)
    mine = samples_of(run, [data], data)
    sample_files.write_rows(tmp_path, replace(mine.rows, fingerprint="OTHER"))
    (tmp_path / "samples" / "step-00000001.safetensors").touch()
    with told(
        snapshot(
            """\
DIR/samples contains 2 rows of VALID (OTHER), this run has 2 of VALID (HASH).
  They differ in the dataset (data.valid), so they cannot be compared. Move the folder away, or restore that setting.\
"""
        ),
        DIR=tmp_path,
        VALID=case.valid,
        HASH=data.fingerprint,
    ):
        mine._prepare(tmp_path, 5, print)
    with told(
        snapshot(
            "DIR/samples/step-00000001.safetensors is not a sample file of a run: Error while deserializing header: header too small"
        ),
        DIR=tmp_path,
    ):
        sample_files.read_steps(tmp_path)
    nothing = {name: np.zeros(1, np.float32) for name in ("student_loss", "guide", "weight")}
    sample_files._write(tmp_path / "samples" / "step-00000001.safetensors", nothing, {"guidance": '{"keep": 7}'})
    with told(
        snapshot(
            "DIR/samples/step-00000001.safetensors contains a rule that this release does not know: guidance.keep: Input should be less than or equal to 1"
        ),
        DIR=tmp_path,
    ):
        sample_files.read_steps(tmp_path)
    monkeypatch.setattr("megatron_vocagno.training.samples.Rows", lambda *_: [])
    with told(snapshot("VALID contains fewer than two tokens: there is no row for logging.samples"), VALID=case.valid):
        samples_of(run, [data], data)
    sample_files._write(tmp_path / "samples" / "rows.safetensors", {}, {})
    with told(
        snapshot(
            "DIR/samples/rows.safetensors is not a sample file of a run: missing dataset, document, fingerprint, first, last, mapping, target, teacher, token"
        ),
        DIR=tmp_path,
    ):
        sample_files.read_rows(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(sample_files, "VERSION", "2")
    with told(
        snapshot(
            "DIR/samples/rows.safetensors has version 1, this release reads version 2: read it with the release that wrote it"
        ),
        DIR=tmp_path,
    ):
        sample_files.read_rows(tmp_path)
    with told(
        snapshot("DIR/checkpoints/samples/rows.safetensors is missing: a run writes it if logging.samples is set"),
        DIR=tmp_path,
    ):
        sample_files.read_rows(tmp_path / "checkpoints")
    monkeypatch.chdir(tmp_path)
    with told(
        snapshot("""\
no run at sampels: the folder does not exist
  The absolute path is DIR/sampels: relative paths start at the folder in which you run the command.
  Did you mean samples?\
"""),
        DIR=tmp_path.resolve(),
    ):
        sample_files.read_rows(Path("sampels"))


def test_an_output_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with told(snapshot("'output', DIR/file, is a file, but a run needs a folder: use another path"), DIR=tmp_path):
        make_output(tmp_path / "file")
    with told(snapshot("cannot create the folder of 'output', DIR/file/within: DIR/file is a file"), DIR=tmp_path):
        make_output(tmp_path / "file" / "within")
    (tmp_path / ".lock").mkdir()
    monkeypatch.setattr(run_lock, "run_on_rank0", lambda action, *_: action())
    with told(snapshot("cannot write to 'output', DIR: [Errno 21] Is a directory: 'DIR/.lock'"), DIR=tmp_path):
        RunLock(tmp_path).acquire(print, lambda: 0)
    (tmp_path / ".lock").rmdir()
    monkeypatch.setattr(run_lock, "all_gather", lambda item: [item, (False, "node2", "/disk/out")])
    monkeypatch.setattr(run_lock, "my_rank", lambda: 0)
    with told(
        snapshot(
            """\
not all ranks see the 'output' folder of rank 0 (DIR on HOST):
  rank 1 on node2: /disk/out
  A file that rank 0 wrote there was not visible to 1 of 2 ranks within 10 s. All ranks write checkpoints: use an absolute path on a shared file system.\
"""
        ),
        DIR=tmp_path,
        HOST=socket.gethostname(),
    ):
        RunLock(tmp_path).acquire(print, lambda: 0)
    monkeypatch.setattr(RunLock, "_try", lambda _: "held")
    with told(
        snapshot(
            """\
another run is using DIR, and has not ended within 0 s (.lock is locked).
  Wait for it, stop processes that an earlier start has left behind, or use another 'output'.\
"""
        ),
        DIR=tmp_path,
    ):
        RunLock(tmp_path, timeout=0).acquire(print, lambda: 0)
    monkeypatch.setattr("os.access", lambda *_: False)
    with told(
        snapshot("cannot write to 'output', DIR: permission denied. Use another folder, or change its permissions"), DIR=tmp_path
    ):
        make_output(tmp_path)
    (tmp_path / NON_FINITE_FILE).mkdir()
    with told(snapshot("cannot write to DIR: [Errno 21] Is a directory: 'DIR/not_finite.jsonl'"), DIR=tmp_path):
        Monitor(tmp_path, 1, 1).non_finite_step(NonFiniteStep(1, 0.0, 0.0, 0, False), {})


def test_a_run_whose_numbers_are_not_finite(tmp_path: Path) -> None:
    guard = NonFiniteGuard(2, 0)
    guard.in_a_row = 2
    last = NonFiniteStep(step=7, loss=float("nan"), grad_norm=float("inf"), nonfinite_tokens=3, skipped=False)
    with told(
        snapshot(
            """\
2 steps in a row were not finite (training.max_nonfinite_steps), last step 7 (loss nan, gradient norm inf, 3 tokens without a finite loss).
  The last checkpoint was written before them. Check:
  - the steps before them, in metrics.jsonl. If the gradient norm grew, the learning rate is too high.
  - their documents, in OUT/broken_steps.jsonl. If the same ones occur again, the text is broken (python -m tools.preprocess.show_document DATASET N shows one).
  - the initial weights, if the first step failed, and with fp16 the initial loss scale.\
"""
        )
    ):
        guard.stop_at_limit(last, Path("OUT/broken_steps.jsonl"))
    engine: Any = SimpleNamespace(has_finite_weights=lambda: False)
    position: Any = SimpleNamespace(step=7)
    with told(
        snapshot(
            "after step 7 the student's weights are not finite, so no checkpoint was written. The newest one is from step 4. Likely causes: too high a learning rate, or broken initial weights."
        )
    ):
        save_last(engine, None, position, 4, None)  # type: ignore[arg-type]


def test_held_out_rows_without_text(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_vocagno.training.evaluation.evaluation_batches", lambda *_: [])
    monkeypatch.setattr("megatron_vocagno.training.evaluation.sum_over_ranks", lambda *_: (0, 0))
    anything: Any = SimpleNamespace(layout=None, data_rank=0, data_group=None, device=None)
    data = AlignedDataset.open(case.valid)
    held_out = HeldOut(data, row_length=64, rows=1, front=NO_FRONT)
    evaluator = Evaluator(anything, held_out, None, None, anything, anything)
    with told(snapshot("VALID: the rows to evaluate contain no text (eval.rows = 1)"), VALID=case.valid):
        evaluator._bits_per_byte(held_out)


def test_what_one_machine_alone_meets(monkeypatch: pytest.MonkeyPatch) -> None:
    failure = collectives.Failure((1, 3), "no model at models/x: the path does not exist.")
    monkeypatch.setattr(collectives.ErrorCollector, "failure", lambda _: failure)
    monkeypatch.setattr(collectives.dist, "get_world_size", lambda: 4)
    with told(
        snapshot("""\
no model at models/x: the path does not exist.
  This happened only on rank 1, 3: do all machines see the same files?\
""")
    ):
        collectives.run_on_all_ranks(lambda: None)
