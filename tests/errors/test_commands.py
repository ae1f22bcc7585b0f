"""What the other commands say: plan, report, show_document, build_dataset, score_teacher and the values of their options."""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from huggingface_hub.constants import HF_HUB_CACHE
from inline_snapshot import snapshot

from megatron_vocagno import command, plan, pretrain
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.decoding import token_bytes
from megatron_vocagno.errors import UserError
from megatron_vocagno.files import sha256
from megatron_vocagno.planning.model_config import given_config, read_config
from megatron_vocagno.run_file import load_run
from megatron_vocagno.training.sample_files import SampleStep, write_rows, write_step
from tests.errors.telling import refused, told
from tests.runs import REPOSITORY, Case
from tests.sources import samples_of
from tools.preprocess import arguments, build_commands, build_dataset, report, score_teacher, show_document

SETTINGS = REPOSITORY / "ds_configs" / "gpu_zero1_bf16.json"


def run_file(case: Case, *overrides: str) -> list[str]:
    path, *_ = case.command("commands")
    return [path, *(part for override in overrides for part in ("--set", override))]


def test_a_plan_that_cannot_be_made(case: Case, tmp_path: Path) -> None:
    def asked(*arguments: object, settings: Path = SETTINGS) -> None:
        refused(plan.main, *run_file(case), "--deepspeed_config", settings, *arguments)

    with told(snapshot("--gpus is 0 and --gpus-per-node is 8: both must be at least 1")):
        asked("--gpus", 0)
    with told(snapshot("unknown GPU type 'h1000' (--gpu). Known types: a100-40gb, a100, h100, h200, b200, mi300x, l40s")):
        asked("--gpus", 8, "--gpu", "h1000")
    with told(snapshot("no layout divides a global batch of 512 rows over 7 GPUs: change train_batch_size or --gpus")):
        asked("--gpus", 7)
    with told(snapshot("--mfu is 3: it must be above 0 and at most 1")):
        asked("--gpus", 8, "--mfu", 3)
    with told(snapshot("no such file: DIR/x.json (--teacher-config)"), DIR=tmp_path):
        asked("--gpus", 8, "--teacher-config", tmp_path / "x.json")
    (tmp_path / "bert.json").write_text('{"model_type": "bert"}')
    with told(
        snapshot(
            "cannot plan a student of type 'bert'. Supported types: llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3_text"
        )
    ):
        asked("--gpus", 8, "--student-config", tmp_path / "bert.json")
    with told(
        snapshot(
            "a cached teacher has no teacher.path, and the plan includes the cost of scoring: give its config.json with "
            "--teacher-config, once per teacher"
        )
    ):
        asked("--gpus", 8, "--set", 'teacher={placement="cached"}')
    with told(snapshot("parallel.partition lists 2 stages with 2 decoder layers in total, but there are 2 stages and 3 layers")):
        asked("--gpus", 8, "--set", "parallel.pipeline_stages=2", "--set", "parallel.partition=[1,1]")


def test_a_dry_run_that_finds_a_fault(case: Case, tmp_path: Path) -> None:
    config = (case.teacher / "config.json").read_text().replace('"vocab_size": 49152', '"vocab_size": 500')
    (tmp_path / "small.json").write_text(config)
    with told(
        snapshot(
            "TRAIN: the teacher tokenizer has 49,152 tokens, but the teacher has a vocab_size of 500. Was the dataset aligned for "
            "another teacher?"
        ),
        TRAIN=case.train,
    ):
        arguments = ["--deepspeed_config", case.folder / "commands" / "ds.json", "--teacher-config", tmp_path / "small.json"]
        refused(pretrain.main, *run_file(case), *arguments, "--dry-run", "--gpus", 1)


def test_a_configuration_that_cannot_be_read(tmp_path: Path) -> None:
    with told(
        snapshot(
            """\
no configuration of the teacher at DIR/nowhere: there is no config.json. The name counts as a path, because a Hub id has the form org/name or org/name@revision.
  Give its config.json with --teacher-config. examples/plan in the repository has those of the recipes.\
"""
        ),
        DIR=tmp_path,
    ):
        read_config(tmp_path / "nowhere", "teacher")
    with told(
        snapshot(
            """\
no configuration of the student at org/name: org/name is missing or incomplete in the Hub's cache CACHE, and the Hub was not contacted. Download it on a machine with a network: hf download org/name --exclude '*.bin'.
  Give its config.json with --student-config. examples/plan in the repository has those of the recipes.\
"""
        ),
        CACHE=HF_HUB_CACHE,
    ):
        read_config(Path("org/name"), "student")
    (tmp_path / "lama.json").write_text('{"model_type": "lama"}')
    with told(
        snapshot(
            "DIR/lama.json is not a configuration that transformers can read: The checkpoint you are trying to load has model type `lama` but Transformers does not recognize this architecture. This could be because of an issue with the checkpoint, or because your version of Transformers is out of date."
        ),
        DIR=tmp_path,
    ):
        given_config(tmp_path / "lama.json", "--student-config")
    (tmp_path / "binary.json").write_bytes(b"\xff")
    with told(
        snapshot(
            "DIR/binary.json is not a configuration that transformers can read: It looks like the config file at 'DIR/binary.json' is not a valid JSON file."
        ),
        DIR=tmp_path,
    ):
        given_config(tmp_path / "binary.json", "--student-config")


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (command.positive_int, "0", snapshot("'0' is not a whole number of at least 1")),
        (command.positive_float, "-1", snapshot("-1 is not a finite number above 0")),
        (command.positive_float, "many", snapshot("'many' is not a number")),
        (command.fraction, "2", snapshot("2 is not between 0 and 1")),
        (report.row_length, "8", snapshot("8 is too short: at least 17")),
        (score_teacher.bos_of, "<bos>", snapshot("'<bos>' is not auto, none or the id of a token")),
        (show_document.number, "x", snapshot("must be a document number, not 'x'; to search by id, use --id x")),
        (arguments.slice_of, "3/2", snapshot("'3/2' is not of the form I/N with I from 1 to N")),
    ],
)
def test_values_of_options(read: Any, text: str, message: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as refusal:
        read(text)
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("main", "words", "message"),
    [
        (build_dataset.main, "a --student b --output c", "unrecognized arguments: --output; did you mean --out?"),
        (build_dataset.main, "verfy c", "no input named 'verfy'; did you mean the command 'verify'?"),
        (pretrain.main, "a --dryrun", "unrecognized arguments: --dryrun; did you mean --dry-run?"),
        (
            pretrain.main,
            "a --deepspeed-config=b",
            "unrecognized arguments: --deepspeed-config=b; did you mean --deepspeed_config?",
        ),
        (pretrain.main, "a --dry-run", "the following arguments are required: --deepspeed_config, --gpus"),
    ],
)
def test_misspelled_words_of_a_command(main: Any, words: str, message: str) -> None:
    with pytest.raises(UserError) as refusal:
        refused(main, *words.split())
    assert str(refusal.value).splitlines()[0] == message
    assert str(refusal.value).endswith(" --dry-run --help" if "--dry-run" in words else " --help")


def test_documents_that_are_not_there(case: Case) -> None:
    with told(snapshot("DATA: no document 10. There are 10, and the first one is 0"), DATA=case.valid):
        refused(show_document.main, case.valid, 10)
    with told(snapshot("DATA has no ids: it was built without --id-key. Use the number of a document"), DATA=case.valid):
        refused(show_document.main, case.valid, "--id", "x")
    with told(snapshot("document 0 has 433 student tokens: [5, 2) is out of range"), DATA=case.valid):
        refused(show_document.main, case.valid, 0, "--start", 5, "--stop", 2)
    with told(snapshot("data/tokenizer.json: token 0, 'ab', cannot have the 4 bytes that byte_lengths.npy records")):
        token_bytes(Path("data/tokenizer.json"), {"ab": 0}, np.array([4], np.int32))


def test_pages_that_cannot_be_made(case: Case, tmp_path: Path) -> None:
    run = load_run(Path(run_file(case)[0]), ["logging.samples=1"])
    data = AlignedDataset.open(case.valid)
    rows = samples_of(run, [data], data).rows
    page = tmp_path / "page.html"
    write_rows(tmp_path, replace(rows, dataset="/nowhere", fingerprint="OTHER"))
    with told(
        snapshot("DIR has no evaluation of its sample rows yet: the first one is written before the first step"), DIR=tmp_path
    ):
        refused(report.main, "--run", tmp_path, "--out", page)
    nothing = np.zeros(rows.target_RS.shape, np.float32)
    write_step(tmp_path, SampleStep(1, nothing, nothing, nothing, run.guidance))
    with told(
        snapshot(
            """\
/nowhere is not a dataset: the path does not exist
  DIR has sample rows of this dataset. If you have moved it, specify its new place: --data FOLDER.\
"""
        ),
        DIR=tmp_path,
    ):
        refused(report.main, "--run", tmp_path, "--out", page)
    with told(
        snapshot("""\
DATA (HASH) is not the dataset of the sample rows in DIR (OTHER).
  Specify that dataset: --data FOLDER.\
"""),
        DIR=tmp_path,
        DATA=case.valid,
        HASH=data.fingerprint,
    ):
        refused(report.main, "--run", tmp_path, "--out", page, "--data", case.valid)


def test_builds_that_cannot_be(case: Case, tmp_path: Path) -> None:
    with told(snapshot("DIR is not a dataset: the folder has no dataset.json"), DIR=tmp_path):
        refused(build_dataset.main, "verify", tmp_path)
    args, progress = argparse.Namespace(engine="local", workers=2), SimpleNamespace(within=None)
    with told(snapshot("--out memory://out is in the memory of one process: use --workers 1")):
        build_commands.engine_of(args, build_commands.place("memory://out"), progress)  # type: ignore[arg-type]
    copy = shutil.copytree(case.valid, tmp_path / "copy")
    file = copy / "shards" / "0000" / "spans.bin"
    names = {"DIR": tmp_path, "WAS": sha256(file)}
    file.write_bytes(bytes(file.stat().st_size))
    with told(
        snapshot(
            """\
DIR/copy has changed since it was written:
DIR/copy/shards/0000/spans.bin: sha256 NOW, recorded WAS: changed since it was written
Delete the folder of each damaged shard and run the build again: it makes the missing shards.\
"""
        ),
        NOW=sha256(file),
        **names,
    ):
        refused(build_dataset.main, "verify", copy, "--workers", 1)
