"""The worked example of docs/clusters.md: the printed plan, and a comparison of three clusters.

    python -m tests.planning.worked_example

writes both into the page.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks.page import write_section
from megatron_vocagno import plan
from tests.runs import REPOSITORY

PAGE = REPOSITORY / "docs/clusters.md"
EXAMPLE = [
    "examples/recipes/qwen2.5-math-instruct.toml",
    "--deepspeed_config",
    "ds_configs/gpu_zero1_bf16.json",
    "--student-config",
    "examples/plan/TinyLlama-1.1B.json",
    "--teacher-config",
    "examples/plan/Qwen2.5-Math-7B.json",
    "--gpu",
    "h100",
]


def printed(*arguments: str) -> str:
    """The output of the command for the example."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.chdir(REPOSITORY)
        assert plan.main([*EXAMPLE, *arguments]) == 0
    return out.getvalue()


def sections() -> dict[str, str]:
    """Section of the page -> its text."""
    command = ["python", "-m", "megatron_vocagno.plan", *EXAMPLE, "--gpus", "32"]
    lines = " \\\n    ".join([" ".join(command[:4]), " ".join(command[4:6]), " ".join(command[6:10]), " ".join(command[10:])])
    return {"plan": f"```\n$ {lines}\n\n{printed('--gpus', '32')}```", "clusters": clusters(), "long rows": long_rows()}


def clusters() -> str:
    """The best layouts on three clusters: with an online teacher, with cached losses, and the best pipeline."""
    rows = []
    for gpus in (32, 256, 1024):
        options = json.loads(printed("--gpus", str(gpus), "--json"))["options"]
        for name, chosen in (
            ("replicated", [o for o in options if o["placement"] == "replicated"]),
            ("cached", [o for o in options if o["placement"] == "cached"]),
            ("cached, pipelines alone", [o for o in options if o["placement"] == "cached" and o["stages"]]),
        ):
            rows.append(f"| {gpus:,} | {name} | {_cells(chosen[0])} |")
    header = "| GPUs | teacher | layout | rows a micro-batch | micro-batches | bubble | traffic | step, s | hours | GPU-hours |"
    return "\n".join([header, "|---:|---|---|---:|---:|---:|---:|---:|---:|---:|", *rows])


def long_rows() -> str:
    """The same batch of 1 M tokens in rows of 32k and of 128k tokens, divided among 1 to 8 ranks, with ZeRO-2 on 8 GPUs."""
    rows, settings = [], json.loads((REPOSITORY / EXAMPLE[2]).read_text())
    with tempfile.TemporaryDirectory() as folder:
        for length, batch in ((32_768, 32), (131_072, 8)):
            file = Path(folder) / "ds.json"
            file.write_text(json.dumps(settings | {"train_batch_size": batch, "train_micro_batch_size_per_gpu": 1}))
            for ranks in (1, 2, 4, 8):
                changes = (f"data.row_length={length}", f"parallel.sequence={ranks}", "teacher.placement=cached")
                sets = [part for change in changes for part in ("--set", change)]
                found = json.loads(printed("--deepspeed_config", str(file), "--gpus", "8", "--json", *sets))
                chosen = [o for o in found["options"] if o["zero"] == 2 and o["batch"]["sequence"] == ranks]
                [option] = [o for o in chosen if o["placement"] == "cached"]
                rows.append(f"| {length:,} | {ranks} | {_long_cells(option)} |")
    header = (
        "| tokens of a row | ranks per row | micro-batches | recompute | activations, GB | total, GB | traffic, s | step, s |"
    )
    return "\n".join([header, "|---:|---:|---:|---|---:|---:|---:|---:|", *rows])


def _long_cells(option: dict[str, Any]) -> str:
    memory, step = option["memory"], option["step"]
    total = f"{memory['total'] / 1e9:.1f}" + ("" if option["fits"] else " too large")
    cells = [option["batch"]["micro_batches"], "yes" if option["recompute"] else "", f"{memory['activations'] / 1e9:.1f}", total]
    return " | ".join(map(str, [*cells, f"{step['communication']:.2f}", f"{step['total']:.2f}"]))


def _cells(option: dict[str, Any]) -> str:
    layout = f"{option['stages']} stages" if option["stages"] else f"ZeRO-{option['zero']}"
    batch, step = option["batch"], option["step"]
    cells = [layout, batch["micro_batch_rows"], batch["micro_batches"], f"{step['bubble']:.0%}"]
    cells += [f"{step['communication'] / step['total']:.0%}", f"{step['total']:.2f}", f"{option['hours']:.2f}"]
    return " | ".join(map(str, [*cells, f"{option['gpu_hours']:,.0f}"]))


if __name__ == "__main__":
    for name, text in sections().items():
        write_section(name, text, PAGE)
