"""A DeepSpeed configuration that this machine cannot run is refused, and what is accepted does not change what is learned."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_vocagno.engine import build
from megatron_vocagno.engine.settings_file import BATCHES, FIELDS, NAMES, REFUSED
from megatron_vocagno.errors import RunError
from tests.runs import Case, metrics


@pytest.mark.parametrize("supported", [False, True])
def test_fp16_is_refused_where_the_device_has_none(monkeypatch: pytest.MonkeyPatch, supported: bool) -> None:
    monkeypatch.setattr(type(build.get_accelerator()), "is_fp16_supported", lambda _: supported)
    half, cpu = {"fp16": {"enabled": True}}, torch.device("cpu")
    build.check_precision({}, cpu)
    build.check_precision({"bf16": {"enabled": True}}, cpu)
    if supported:
        build.check_precision(half, cpu)
    else:
        with pytest.raises(RunError, match="this cpu cannot multiply matrices in fp16"):
            build.check_precision(half, cpu)


PURPOSE = {
    *BATCHES,
    *("optimizer", "gradient_clipping", "zero_optimization", "bf16", "bfloat16", "fp16", "data_types"),
    *("activation_checkpointing", "pipeline", "communication_data_type"),
}
"""Accepted because they say how the student is trained, in the precision that they name. The layouts' tests run them."""
ELSEWHERE = {"aio", "wandb", "comet", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"}
"""For offloading to disks and for loggers of other packages, and two that only allow or refuse a configuration."""
HARMLESS: dict[str, Any] = {
    "prescale_gradients": True,
    "seq_parallel_communication_data_type": "bf16",
    "disable_allgather": True,
    "steps_per_print": 1,
    "dump_state": True,
    "wall_clock_breakdown": True,
    "memory_breakdown": True,
    "flops_profiler": {"enabled": True, "profile_step": 1},
    "tensorboard": {},
    "csv_monitor": {},
    "timers": {"throughput": {"enabled": False}},
    "log_level": "error",
    "disable_python_gc": True,
    "dataloader_drop_last": True,
    "vocabulary_size": 7,
    "torch_autocast": {"enabled": False},
}
ALONE = {"gradient_predivide_factor": 4.0}
"""With ZeRO-2/3 and its reduce-scatter, DeepSpeed rejects this and `prescale_gradients`."""
ZERO: dict[str, Any] = {
    "contiguous_gradients": False,
    "reduce_scatter": False,
    "reduce_bucket_size": 1_000,
    "use_multi_rank_bucket_allreduce": False,
    "allgather_partitions": False,
    "allgather_bucket_size": 1_000,
    "overlap_comm": True,
    "load_from_fp32_weights": False,
    "elastic_checkpoint": True,
    "sub_group_size": 10_000,
    "stage3_gather_16bit_weights_on_model_save": True,
    "ignore_unused_parameters": False,
    "round_robin_gradients": True,
    "parameter_alignment": True,
    "zero_hpz_partition_size": 2,
    "memory_efficient_linear": False,
    "pipeline_loading_checkpoint": True,
    "override_module_apply": False,
    "log_trace_cache_warnings": True,
    "enable_sanity_checks": True,
    "save_muon_momentum_buffer_in_memory": True,
}
APART = (
    {"leaf_module": {"classes": [], "names": ["layers.1"]}},
    {"stage3_param_persistence_threshold": 0, "stage3_model_persistence_threshold": 1},
    {"stage3_max_live_parameters": 1, "stage3_max_reuse_distance": 1, "stage3_prefetch_bucket_size": 1_000},
    {"stage3_use_all_reduce_for_fetch_params": True, "stage3_allgather_sequential": True},
)
"""Of ZeRO-3, in separate runs."""
ZERO_ELSEWHERE = {
    *("stage", "compute_grad_norm", "offload_param", "offload_optimizer"),
    "stage3_module_granularity_threshold",
    *("cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory", "stage3_gather_fp16_weights_on_model_save"),
}
"""The stage; offloading, which needs a compiler; old names; a threshold with which a small student ends with a traceback."""


def test_every_accepted_name_has_its_proof() -> None:
    """A name that a release adds must be proven harmless by the runs below, or refused."""
    assert set(NAMES) | {"torch_autocast"} == PURPOSE | ELSEWHERE | HARMLESS.keys() | ALONE.keys()
    refused = {place.removeprefix("zero_optimization.") for place in REFUSED}
    assert set(FIELDS["zero_optimization"]) - refused == ZERO_ELSEWHERE | ZERO.keys() | {
        name for fields in APART for name in fields
    }


@pytest.mark.slow
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long), 3])
def test_accepted_settings_do_not_change_what_is_learned(small_case: Case, stage: int) -> None:
    monitor = {"enabled": True, "job_name": "x", "output_path": str(small_case.folder)}
    harmless = HARMLESS | {"tensorboard": monitor, "csv_monitor": monitor}
    runs: list[tuple[dict[str, Any], dict[str, Any]]] = [(harmless, ZERO), (ALONE, {"reduce_scatter": False})]
    if stage == 3:
        # DeepSpeed rejects prescaling and predividing
        del harmless["prescale_gradients"]
        runs = [(harmless, ZERO), *(({}, fields) for fields in APART)]
    overrides = ["training.steps=3", "eval.rows=2"]
    plain = small_case.run(f"plain-{stage}", 2, overrides, {"zero_optimization": {"stage": stage}})
    for number, (settings, zero) in enumerate(runs):
        sections = {**settings, "zero_optimization": {"stage": stage, **zero}}
        output = small_case.run(f"harmless-{stage}-{number}", 2, overrides, sections)
        for name in ("loss/train", "optimizer/grad_norm", "optimizer/learning_rate", "eval/loss"):
            a, b = ([line[name] for line in metrics(of) if name in line] for of in (plain, output))
            assert len(a) >= 2 and b == pytest.approx(a, rel=1e-6), name
