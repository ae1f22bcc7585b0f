"""Files as Hugging Face's Trainer, accelerate and people write them: each is refused in a sentence, or read as it was meant."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import pytest
from deepspeed.runtime import constants
from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, DeepSpeedConfig, get_pipeline_config
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig
from inline_snapshot import snapshot

from megatron_vocagno.engine.settings import precision, read_settings
from megatron_vocagno.engine.settings_file import FIELDS, NAMES, REFUSED, REMOVED, check_sections, notes
from megatron_vocagno.errors import RunError
from tests.errors.telling import told
from tests.runs import write_settings

LEFT_OUT = "leave it out for the default of DeepSpeed"
AUTO: list[tuple[dict[str, Any], dict[str, str]]] = [
    ({"train_batch_size": "auto"}, {"train_batch_size": "the rows of a step over all GPUs"}),
    (
        {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"},
        {
            "train_micro_batch_size_per_gpu": "the rows of a micro-batch on one GPU",
            "gradient_accumulation_steps": "leave it out: it follows from the other two",
        },
    ),
    ({"gradient_clipping": "auto"}, {"gradient_clipping": "the largest gradient norm, for example 1.0, or 0 for no limit"}),
    (
        {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}},
        {
            "optimizer.params.lr": "the highest learning rate, for example 3e-4",
            "optimizer.params.betas": "two numbers, for example [0.9, 0.95]",
            "optimizer.params.eps": "a number, for example 1e-8",
            "optimizer.params.weight_decay": "a number, for example 0.1",
        },
    ),
    (
        {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "offload_optimizer": {"device": "auto"}}},
        {"zero_optimization.reduce_bucket_size": LEFT_OUT, "zero_optimization.offload_optimizer.device": LEFT_OUT},
    ),
    ({"zero_optimization": {"stage": "auto"}}, {"zero_optimization.stage": "1, 2 or 3"}),
]


@pytest.mark.parametrize(("changes", "fields"), AUTO, ids=[" ".join(fields) for _, fields in AUTO])
def test_what_hugging_face_would_fill_in_is_named_with_what_to_write(
    tmp_path: Path, changes: dict[str, Any], fields: dict[str, str]
) -> None:
    lines = "\n  ".join(f"{field}: {advice}" for field, advice in fields.items())
    are = f"{', '.join(fields)} {'is' if len(fields) == 1 else 'are'}"
    with told(
        snapshot("""\
DIR/ds.json: FIELDS 'auto', which only Hugging Face's Trainer replaces by a value. Write
  LINES\
"""),
        DIR=tmp_path,
        FIELDS=are,
        LINES=lines,
    ):
        read_settings(write_settings(tmp_path / "ds.json", **changes), 0, "cpu")


def test_a_precision_that_is_auto_is_off_as_deepspeed_has_it_and_that_is_said(tmp_path: Path) -> None:
    both = {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto", "loss_scale": 0}}
    settings = read_settings(write_settings(tmp_path / "ds.json", **both), 0, "cpu")
    assert precision(settings) == "fp32" and settings["bf16"]["enabled"] is settings["fp16"]["enabled"] is False
    check_sections(tmp_path / "ds.json", settings)
    assert list(notes(settings)) == snapshot(
        [
            "note: bf16.enabled of the DeepSpeed file is 'auto', which DeepSpeed reads as false. Write true or false.",
            "note: fp16.enabled of the DeepSpeed file is 'auto', which DeepSpeed reads as false. Write true or false.",
        ]
    )
    assert not list(notes(read_settings(write_settings(tmp_path / "plain.json"), 0, "cpu")))


VALUES: list[tuple[dict[str, Any], str]] = [
    ({"zero_optimization": {"stage": "2"}}, snapshot("zero_optimization.stage is '2', a string: write 2 without quotes")),
    ({"train_batch_size": " 8"}, snapshot("train_batch_size is ' 8', a string: write 8 without quotes")),
    (
        {"optimizer": {"type": "AdamW", "params": {"lr": "3e-4"}}},
        snapshot("optimizer.params.lr is '3e-4', a string: write 3e-4 without quotes"),
    ),
    (
        {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, "0.95"]}}},
        snapshot("optimizer.params.betas is '0.95', a string: write 0.95 without quotes"),
    ),
    (
        {"zero_optimization": {"stage": 1, "overlap_comm": "False"}},
        snapshot("zero_optimization.overlap_comm is 'False', a string: write false without quotes"),
    ),
    ({"bf16": {"enabled": "off"}}, snapshot("bf16.enabled is 'off': expected true or false")),
    ({"fp16": {"enabled": None}}, snapshot("fp16.enabled is None: expected true or false")),
    (
        {"zero_optimization": {"stage": 2, "reduce_bucket_size": "large"}},
        snapshot(
            "zero_optimization.reduce_bucket_size is 'large': input should be a valid integer, unable to parse string as an integer"
        ),
    ),
    (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "gpu"}}},
        snapshot("zero_optimization.offload_optimizer.device is 'gpu': input should be 'none', 'cpu' or 'nvme'"),
    ),
    (
        {"zero_optimization": {"stage": 2, "ofload_optimizer": {"device": "cpu"}}},
        snapshot(
            "DeepSpeed does not know 'zero_optimization.ofload_optimizer'. Did you mean 'zero_optimization.offload_optimizer'?"
        ),
    ),
    (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"devise": "cpu"}}},
        snapshot("DeepSpeed does not know 'zero_optimization.offload_optimizer.devise': remove it"),
    ),
    ({"bf16": {"enabled": True, "fast": True}}, snapshot("DeepSpeed does not know 'bf16.fast': remove it")),
    (
        {"offload_optimizer": {"device": "cpu"}},
        snapshot("DeepSpeed does not know 'offload_optimizer', and would ignore it: it belongs in 'zero_optimization'"),
    ),
    (
        {"weight_decay": 0.1},
        snapshot("DeepSpeed does not know 'weight_decay', and would ignore it: it belongs in 'optimizer.params'"),
    ),
    (
        {"gradient_cliping": 1.0},
        snapshot("DeepSpeed does not know 'gradient_cliping', and would ignore it. Did you mean 'gradient_clipping'?"),
    ),
    ({"zero3_init_flag": False}, snapshot("DeepSpeed does not know 'zero3_init_flag', and would ignore it: remove it")),
    (
        {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decy": 0.1}}},
        snapshot("DeepSpeed does not know 'optimizer.params.weight_decy'. Did you mean 'optimizer.params.weight_decay'?"),
    ),
    (
        {"data_types": {"grad_acum_dtype": "fp32"}},
        snapshot("DeepSpeed does not know 'data_types.grad_acum_dtype'. Did you mean 'data_types.grad_accum_dtype'?"),
    ),
    ({"amp": {"enabled": True}}, snapshot("this release of DeepSpeed no longer has 'amp': remove it")),
]


@pytest.mark.parametrize(("changes", "message"), VALUES, ids=[str(changes) for changes, _ in VALUES])
def test_a_value_or_a_name_that_deepspeed_would_misread(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with told(message, after="DIR/ds.json: ", DIR=tmp_path):
        settings = read_settings(write_settings(tmp_path / "ds.json", **changes), 0, "cpu")
        check_sections(tmp_path / "ds.json", settings)


OPTIMIZER = '"optimizer": {"type": "AdamW", "params": {"lr": 0.001}}'
TEXTS = [
    (
        '{"gradient_clipping": 1.0, // norm\n' + OPTIMIZER + "}",
        "double quotes: line 1 column 28 (char 27).\n  JSON has no comments.",
    ),
    # Python 3.13 says "Illegal trailing comma", and counts another column
    ("{" + OPTIMIZER + ",}", ").\n  JSON has no comma before a closing bracket."),
    ("{'train_batch_size': 4}", "double quotes: line 1 column 2 (char 1).\n  JSON has double quotes."),
    (
        "compute_environment: LOCAL_MACHINE\ndeepspeed_config:\n  zero_stage: 2\n",
        "Expecting value: line 1 column 1 (char 0).\n  It looks like YAML. If it is a file of accelerate, use the JSON file "
        "that its 'deepspeed_config_file' names.",
    ),
    ('{"gradient_clipping": NaN, ' + OPTIMIZER + "}", "NaN is not a number in JSON"),
    ('{"gradient_clipping": 1.0, "gradient_clipping": 2.0}', "it has two values for 'gradient_clipping', 1.0 and 2.0"),
    ('{"zero_optimization": {"stage": 1, "stage": 2}}', "it has two values for 'stage', 1 and 2"),
]


@pytest.mark.parametrize(("text", "reason"), TEXTS, ids=[reason.splitlines()[-1] for _, reason in TEXTS])
def test_a_habit_that_is_no_json_is_named(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(RunError) as refusal:
        read_settings(tmp_path / "ds.json", 0, "cpu")
    assert str(refusal.value).startswith(f"{tmp_path}/ds.json is not JSON: ") and str(refusal.value).endswith(reason)


def test_a_number_beyond_floats_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"gradient_clipping": 1e999}')
    with told(snapshot("DIR/ds.json: gradient_clipping is too large for a float: use a smaller number"), DIR=tmp_path):
        read_settings(tmp_path / "ds.json", 0, "cpu")
    (tmp_path / "ds.json").write_bytes(b"\xff\xfe{\x00")
    with pytest.raises(RunError, match=r"ds\.json is not JSON: .* codec can.t decode"):
        read_settings(tmp_path / "ds.json", 0, "cpu")


def test_what_means_one_thing_is_read(tmp_path: Path) -> None:
    """A byte order mark, notes of one's own, offloading, and whatever else DeepSpeed knows."""
    fields = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False, "loss_scale": 0.0},
        "data_types": {"grad_accum_dtype": "fp32"},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 1e6, "offload_optimizer": {"device": "cpu"}},
        "zero_force_ds_cpu_optimizer": False,
    }
    (tmp_path / "ds.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(fields).encode())
    assert precision(read_settings(tmp_path / "ds.json", 0, "cpu")) == "bf16"
    read_settings(write_settings(tmp_path / "ds.json", _note="ours"), 0, "cpu")


class Asked(dict[str, Any]):
    """A configuration that notes what is asked of it."""

    def __init__(self, fields: dict[str, Any], names: set[str]) -> None:
        super().__init__(fields)
        self.names = names

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)

    def __contains__(self, name: object) -> bool:
        self.names.add(str(name))
        return super().__contains__(name)

    def keys(self) -> Any:
        return self

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()

    def __copy__(self) -> Asked:
        return self


def names_of_initialize() -> set[str]:
    """The names that deepspeed.initialize reads itself, before it makes a DeepSpeedConfig: `config["x"]` and `config.get("x")`."""
    source = ast.parse(inspect.getsource(deepspeed.initialize))
    names = set()
    for node in ast.walk(source):
        of_config = isinstance(node, ast.Subscript) and getattr(node.value, "id", "") == "config"
        gets = isinstance(node, ast.Call) and ast.unparse(node.func) == "config.get"
        if of_config or gets:
            name = node.slice if isinstance(node, ast.Subscript) else node.args[0]  # type: ignore[attr-defined]
            assert isinstance(name, ast.Constant)
            names.add(str(name.value))
    return names


def test_all_names_that_deepspeed_reads_are_accepted_or_refused_and_no_others(tmp_path: Path) -> None:
    """A release that adds a name fails here: is it harmless, or would it make another run?"""
    fields = json.loads(write_settings(tmp_path / "ds.json").read_text())
    names: set[str] = set()
    DeepSpeedConfig(Asked(fields, names))
    assert len(names) > 50
    initialize = names_of_initialize()
    assert {"sequence_parallel_size", "tensor_parallel"} < initialize
    refused = {place for place in REFUSED if "." not in place}
    assert names | initialize == {*NAMES, *refused, *REMOVED}
    assert len(NAMES) + len(refused) + len(REMOVED) == len({*NAMES, *refused, *REMOVED}), "a name has one place"
    assert set(REMOVED) == set(_REMOVED_TOP_LEVEL_CONFIG_KEYS)
    models = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config}
    for section, model in models.items():
        assert set(FIELDS[section]) == {info.alias or name for name, info in model.model_fields.items()}, section
    # constants have a name and its default, and those of the data types are read one by one
    own = {str(value) for name, value in vars(constants).items() if f"{name}_DEFAULT" in vars(constants)}
    assert set(FIELDS["data_types"]) < own
    pipeline = get_pipeline_config({}).keys() | {"use_reentrant"}
    assert set(FIELDS["pipeline"]) == pipeline
    for place in REFUSED:
        section, _, name = place.rpartition(".")
        assert not section or name in FIELDS.get(section, DeepSpeedZeroOffloadOptimizerConfig.model_fields), place


HINTS = {
    "scheduler": "set [training.schedule] in the run file",
    "sequence_parallel_size": "set parallel.sequence in the run file",
    "tensor_parallel": "docs/megatron.md",
    "pipeline.stages": "Set parallel.pipeline_stages",
    "checkpoint": "[checkpoint] in the run file",
}


@pytest.mark.parametrize("place", REFUSED)
def test_a_name_that_would_make_another_run_is_refused_with_its_field_or_the_reason(tmp_path: Path, place: str) -> None:
    def with_value(value: Any) -> Path:
        *sections, name = place.split(".")
        for section in reversed([*sections, name]):
            value = {section: value}
        return write_settings(tmp_path / "ds.json", **value)

    def read(value: Any) -> None:
        read_settings(with_value(value), 0, "cpu")

    for value in (True, 2, {"some": 1}, {"enabled": True}):
        with pytest.raises(RunError) as refusal:
            read(value)
        assert str(refusal.value).startswith(f"{tmp_path}/ds.json: '{place}' is not supported: ")
        assert HINTS.get(place, "") in str(refusal.value)
    if "." not in place:
        for off in (False, {"enabled": False}):
            read(off)


def test_gradients_that_are_not_checked(tmp_path: Path) -> None:
    with told(
        snapshot("DIR/ds.json: bf16.check_grad_overflow is false: steps with gradients that are not finite would be made"),
        DIR=tmp_path,
    ):
        read_settings(write_settings(tmp_path / "ds.json", bf16={"enabled": True, "check_grad_overflow": False}), 0, "cpu")
