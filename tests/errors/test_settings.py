"""What a DeepSpeed configuration is told, and layouts that do not fit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from inline_snapshot import snapshot

from megatron_vocagno.batch.loader import Layout
from megatron_vocagno.config import Parallel
from megatron_vocagno.engine import build
from megatron_vocagno.engine.pipeline import check_stages
from megatron_vocagno.engine.settings import batch_layout, read_settings
from megatron_vocagno.model.configuration import student_config
from megatron_vocagno.run_file import load_run
from tests.errors.telling import told
from tests.runs import Case, write_settings

CHANGES: list[tuple[dict[str, Any], int, str]] = [
    (
        {"optimizer": {}},
        0,
        snapshot(
            "DIR/ds.json: 'optimizer' with a 'type' is missing: the DeepSpeed configuration sets it, with its learning rate"
        ),
    ),
    (
        {"optimizer": {"type": "AdamW"}},
        0,
        snapshot(
            """\
DIR/ds.json: optimizer.params.lr is missing: expected the highest learning rate, a number above 0.
  [training.schedule] in the run file sets its warm-up and decay.\
"""
        ),
    ),
    (
        {"optimizer": {"type": "AdamW", "params": {"lr": -1.0}}},
        0,
        snapshot(
            """\
DIR/ds.json: optimizer.params.lr is -1.0: expected the highest learning rate, a number above 0.
  [training.schedule] in the run file sets its warm-up and decay.\
"""
        ),
    ),
    (
        {"train_batchsize": 8},
        0,
        snapshot("DIR/ds.json: DeepSpeed does not know 'train_batchsize', and would ignore it. Did you mean 'train_batch_size'?"),
    ),
    (
        {"zero_optimization": 1},
        0,
        snapshot('DIR/ds.json: zero_optimization is 1: expected a section {"...": ...}, as in ds_configs/ of the repository'),
    ),
    (
        {"bf16": True},
        0,
        snapshot('DIR/ds.json: bf16 is True: expected a section {"...": ...}, as in ds_configs/ of the repository'),
    ),
    (
        {"bf16": {"enabled": True}, "fp16": {"enabled": True}},
        0,
        snapshot("DIR/ds.json: bf16 and fp16 are both enabled: disable one of them"),
    ),
    (
        {"gradient_clipping": -1},
        0,
        snapshot("DIR/ds.json: gradient_clipping is -1: expected the largest gradient norm, or 0 for no limit"),
    ),
    ({"scheduler": {}}, 0, snapshot("DIR/ds.json: 'scheduler' is not read here: set [training.schedule] in the run file")),
    (
        {"tensor_parallel": {"autotp_size": 2}},
        0,
        snapshot(
            """\
DIR/ds.json: 'tensor_parallel' is not supported: the ranks that share a matrix would read different rows.
  Use pipeline stages, or ZeRO-2/3, or train in Megatron-LM (docs/megatron.md).\
"""
        ),
    ),
    (
        {"zero_optimization": {"stage": 0}},
        0,
        snapshot(
            """\
DIR/ds.json: zero_optimization.stage is 0; use 1, 2 or 3.
  Stage 0 makes steps with gradients that are not finite. In a pipeline, it only clips by the first stage's norm.\
"""
        ),
    ),
    (
        {"zero_optimization": {"stage": "two"}},
        0,
        snapshot(
            """\
DIR/ds.json: zero_optimization.stage is 'two'; use 1, 2 or 3.
  Stage 0 makes steps with gradients that are not finite. In a pipeline, it only clips by the first stage's norm.\
"""
        ),
    ),
    (
        {"zero_optimization": {"stage": 2}},
        2,
        snapshot(
            """\
DIR/ds.json: zero_optimization.stage is 2, parallel.pipeline_stages is 2: ZeRO-2 cannot run in a pipeline.
  Use stage 1, or pipeline_stages = 0, which is the engine without a pipeline.\
"""
        ),
    ),
    (
        {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "float32"}},
        0,
        snapshot("DIR/ds.json: data_types.grad_accum_dtype is 'float32'; use 'fp32', or leave it out"),
    ),
    (
        {"train_batch_size": True},
        0,
        snapshot("the DeepSpeed configuration has train_batch_size = True: expected a whole number above 0"),
    ),
]


@pytest.mark.parametrize(("changes", "stages", "message"), CHANGES, ids=[str(changes) for changes, _, _ in CHANGES])
def test_a_setting_that_cannot_work(tmp_path: Path, changes: dict[str, Any], stages: int, message: str) -> None:
    path = write_settings(tmp_path / "ds.json", **changes)
    with told(message, DIR=tmp_path):
        read_settings(path, stages, "cpu")


def test_a_file_that_is_no_configuration(tmp_path: Path) -> None:
    with told(snapshot("no DeepSpeed configuration at DIR/ds.json: No such file or directory"), DIR=tmp_path):
        read_settings(tmp_path / "ds.json", 0, "cpu")
    for text, message in (
        ("{", snapshot("DIR/ds.json is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)")),
        ("[]", snapshot("DIR/ds.json: expected a JSON object")),
    ):
        (tmp_path / "ds.json").write_text(text)
        with told(message, DIR=tmp_path):
            read_settings(tmp_path / "ds.json", 0, "cpu")


BATCHES: list[tuple[dict[str, Any], int, int, str]] = [
    (
        {},
        1,
        0,
        snapshot(
            "the DeepSpeed configuration must give train_micro_batch_size_per_gpu, and train_batch_size or "
            "gradient_accumulation_steps"
        ),
    ),
    (
        {"train_micro_batch_size_per_gpu": "auto"},
        1,
        0,
        snapshot("the DeepSpeed configuration has train_micro_batch_size_per_gpu = 'auto': expected a whole number above 0"),
    ),
    (
        {"train_micro_batch_size_per_gpu": 2, "train_batch_size": 7},
        1,
        0,
        snapshot(
            """\
train_batch_size is 7, but 2 rows per micro-batch (train_micro_batch_size_per_gpu) * 3 micro-batches (gradient_accumulation_steps, not given) * 1 data-parallel rank (1 process / 1 stage) is 6.
  It must be a multiple of 2, train_micro_batch_size_per_gpu.\
"""
        ),
    ),
    (
        {"train_micro_batch_size_per_gpu": 2, "train_batch_size": 8},
        3,
        0,
        snapshot(
            """\
train_batch_size is 8, but 2 rows per micro-batch (train_micro_batch_size_per_gpu) * 1 micro-batch (gradient_accumulation_steps, not given) * 3 data-parallel ranks (3 processes / 1 stage) is 6.
  It can be divided among 2 or 4 processes.\
"""
        ),
    ),
    (
        {"train_micro_batch_size_per_gpu": 2, "train_batch_size": 4, "gradient_accumulation_steps": 3},
        2,
        0,
        snapshot(
            """\
train_batch_size is 4, but 2 rows per micro-batch (train_micro_batch_size_per_gpu) * 3 micro-batches (gradient_accumulation_steps) * 2 data-parallel ranks (2 processes / 1 stage) is 12.
  It must be a multiple of 6, train_micro_batch_size_per_gpu * gradient_accumulation_steps.\
"""
        ),
    ),
    (
        {"train_micro_batch_size_per_gpu": 2, "train_batch_size": 8},
        3,
        2,
        snapshot(
            "3 processes cannot form pipelines of 2 stages (parallel.pipeline_stages): use a multiple of that number, for example deepspeed --num_gpus 4"
        ),
    ),
]


@pytest.mark.parametrize(("settings", "world", "stages", "message"), BATCHES, ids=range(len(BATCHES)))
def test_a_batch_that_cannot_be_dealt(settings: dict[str, Any], world: int, stages: int, message: str) -> None:
    with told(message):
        batch_layout(settings, world, stages)


@pytest.mark.parametrize(("name", "stages", "micro_batches"), [("bf16", 0, 2), ("bfloat16", 0, 2), ("bf16", 2, 4)])
def test_gradients_that_would_be_summed_in_bf16(name: str, stages: int, micro_batches: int) -> None:
    with told(
        snapshot(
            "bf16 with MICRO_BATCHES per step needs data_types.grad_accum_dtype = 'fp32' in the DeepSpeed configuration, not None: a sum of many gradients in bf16 loses the small ones"
        ),
        MICRO_BATCHES=f"{micro_batches} micro-batches",
    ):
        batch_layout({"train_micro_batch_size_per_gpu": 2, "train_batch_size": 8, name: {"enabled": True}}, 2, stages)


def test_stages_that_do_not_fit() -> None:
    with told(snapshot("parallel.pipeline_stages is 5, but the student has only 4 decoder layers")):
        check_stages(Parallel(pipeline_stages=5), 4)
    with told(snapshot("parallel.partition = [1, 1, 2] is for 3 stages, parallel.pipeline_stages is 2")):
        check_stages(Parallel(pipeline_stages=2, partition=(1, 1, 2)), 4)
    with told(
        snapshot(
            """\
parallel.partition = [1, 2] assigns 3 decoder layers, the student has 4.
  Do not count embedding and head: they belong to the first and the last stage.\
"""
        )
    ):
        check_stages(Parallel(pipeline_stages=2, partition=(1, 2)), 4)


def test_a_precision_that_the_device_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(build.get_accelerator()), "is_fp16_supported", lambda _: False)
    with told(
        snapshot("fp16 is enabled in the DeepSpeed configuration, but this cpu cannot multiply matrices in fp16. Use bf16")
    ):
        build.check_precision({"fp16": {"enabled": True}}, torch.device("cpu"))


def test_what_deepspeed_itself_refuses(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise AssertionError("Adem is not a supported DeepSpeed Optimizer")

    monkeypatch.setattr(build.deepspeed, "initialize", refuse)
    monkeypatch.setattr(build.dist, "get_world_group", lambda: None)
    arguments = case.command("refused")
    run = load_run(Path(arguments[0]))
    here: Any = SimpleNamespace(device=torch.device("cpu"))
    config = student_config(case.student, vocab_size=50)
    with told(snapshot("DeepSpeed rejects this configuration: AssertionError: Adem is not a supported DeepSpeed Optimizer")):
        build.build_engine(run, {"optimizer": {"type": "Adem"}}, config, None, Layout(1, 1, 1), 1, here)
