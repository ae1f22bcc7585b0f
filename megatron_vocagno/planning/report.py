"""A plan as text and as JSON. The text is valid Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from megatron_vocagno.planning.comparison import Estimate, Workload
from megatron_vocagno.planning.cost import Cluster
from megatron_vocagno.planning.memory import Memory

BEST = 3
"""Number of layouts that are shown in addition to the run's own."""
REMEDIES = {
    "weights": "zero_optimization.stage 3, or more parallel.pipeline_stages",
    "gradients": "zero_optimization.stage 2 or 3, or more parallel.pipeline_stages",
    "optimizer": "more GPUs, or more parallel.pipeline_stages",
    "buffers": "a smaller zero_optimization.reduce_bucket_size, or stage3_max_live_parameters",
    "teacher": "teacher.placement = 'zero3' or 'cached', or teacher.quantization = 'int8'",
    "activations": "parallel.activation_checkpointing = true, a smaller train_micro_batch_size_per_gpu, or parallel.sequence",
    "layer": "a smaller train_micro_batch_size_per_gpu, or parallel.sequence",
    "head": "a smaller train_micro_batch_size_per_gpu, or parallel.sequence",
    "scoring": "a smaller teacher.tokens_per_batch",
    "reduction": "zero_optimization.stage 2 or 3",
}
"""How to reduce each part of the memory."""


def select(found: Sequence[Estimate], asked: Estimate | None) -> list[Estimate]:
    """The layouts that are shown by default: the best ones, and the run's own.

    found  all layouts, best first
    asked  the run as its files describe it, if it can start
    """
    shown = list(found[:BEST])
    if asked and all(estimate.candidate != asked.candidate for estimate in shown):
        shown.append(asked)
    return shown


def text(
    workload: Workload,
    cluster: Cluster,
    found: Sequence[Estimate],
    asked: Estimate | None,
    notes: Sequence[str],
    shown: Sequence[Estimate],
) -> str:
    """The plan as text.

    found  all layouts, best first
    asked  the run as its files describe it, if it can start
    shown  the layouts to print
    """
    parts = ["\n".join(_header(workload, cluster)), _costs(shown, asked, workload.timed), _memories(shown, asked)]
    if asked and any(estimate.candidate == asked.candidate for estimate in shown):
        parts.append("* the layout of the run's files")
    if len(shown) < len(found):
        parts.append(f"{len(found)} layouts were compared. --all shows all of them.")
    if not workload.timed:
        parts.append("note: no times. The run computes in float32, and the plan only knows the rates of 16-bit products.")
    return "\n\n".join([*parts, *warnings(workload, found, asked), *notes, *_other_micro_batches(workload, shown)]) + "\n"


def _other_micro_batches(workload: Workload, shown: Sequence[Estimate]) -> list[str]:
    if not _ranks_micro_batches(workload):
        return []
    if all(estimate.candidate.batch.micro_batch_rows == workload.micro_batch_rows for estimate in shown):
        return []
    return [
        f"note: the run ranks the tokens of {workload.micro_batch_rows} rows together (guidance.scope = 'microbatch'). "
        "Another micro-batch size selects other tokens."
    ]


def _ranks_micro_batches(workload: Workload) -> bool:
    """Whether the micro-batch size decides which tokens are selected, because tokens are ranked within a micro-batch."""
    return workload.guidance.selects and workload.guidance.scope == "microbatch"


def _header(workload: Workload, cluster: Cluster) -> list[str]:
    gpu, assumed = cluster.gpu, cluster.assumed
    student = workload.student.sizes
    lines = [f"student: {student.model_type}, {student.parameters / 1e6:,.0f} M parameters, {student.layers} layers"]
    for teacher in workload.teachers:
        sizes = teacher.sizes
        lines.append(f"teacher: {sizes.model_type}, {sizes.parameters / 1e6:,.0f} M parameters, {sizes.layers} layers")
    scored = "to score once" if workload.placement == "cached" else "per pass over the data"
    scoring = f", {_count(workload.teacher_tokens)} teacher tokens {scored}" if workload.placement else ""
    lines += [
        f"run: {_count(workload.tokens)} student tokens in {workload.steps:,} steps of {workload.rows:,} rows of up to "
        f"{workload.student.row_length:,} tokens{scoring}",
        f"GPUs: {cluster.gpus:,}, {cluster.per_node} per node; {gpu.flops:,.0f} TFLOP/s, {gpu.memory:g} GB, {gpu.link:g} GB/s "
        f"within a node, {gpu.network:g} GB/s per GPU between nodes ({gpu.source})",
        f"assumptions (not measured): {assumed.mfu:.0%} of the peak rate for the student, {assumed.teacher_mfu:.0%} for the "
        f"teacher, {assumed.link_share:.0%} of the bandwidth, {assumed.memory_share:.0%} of the memory usable",
    ]
    return lines


def _count(tokens: float) -> str:
    """A readable number of tokens: 1.976 M, 15 G."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if tokens >= size:
            return f"{tokens / size:.4g} {unit}"
    return f"{tokens:,.0f}"


def _costs(shown: Sequence[Estimate], asked: Estimate | None, timed: bool) -> str:
    """timed: include the columns that need times."""
    header = [
        "layout",
        "placement",
        "rows",
        "m",
        "recompute",
        "GB",
        "PFLOP",
        "teacher s",
        "student s",
        "bubble",
        "traffic s",
        "step s",
    ]
    header += ["tokens/s/GPU", "hours", "scoring GPU-h", "total GPU-h"]
    rows = []
    for o in shown:
        c, step = o.candidate, o.step
        rows.append(
            [
                _name(o, asked),
                c.placement or "none",
                str(c.batch.micro_batch_rows),
                str(c.batch.micro_batches),
                "yes" if c.recompute else "",
                f"{o.memory.total / 1e9:.1f}" + ("" if o.fits else " too large"),
                f"{(step.teacher_flops + step.student_flops) / 1e15:.1f}",
                f"{step.teacher:.2f}",
                f"{step.student:.2f}",
                f"{step.bubble:.0%}",
                f"{step.communication:.2f}",
                f"{step.total:.2f}",
                f"{o.tokens_per_second:,.0f}",
                f"{o.hours:.2f}",
                f"{o.scoring:,.0f}",
                f"{o.gpu_hours:,.0f}",
            ]
        )
    columns = len(header) if timed else header.index("GB") + 1
    return table(header[:columns], [row[:columns] for row in rows], left=2)


def _memories(shown: Sequence[Estimate], asked: Estimate | None) -> str:
    names = [field.name for field in fields(Memory)]
    rows = [
        [_name(o, asked), o.candidate.placement or "none"]
        + [f"{size / 1e9:.1f}" for size in [*(getattr(o.memory, name) for name in names), o.memory.total, o.capacity]]
        for o in shown
    ]
    return table(["GB on the fullest rank", "placement", *names, "total", "usable"], rows, left=2)


def _name(estimate: Estimate, asked: Estimate | None) -> str:
    """The name of a layout. The run's own is marked with an asterisk."""
    own = asked is not None and estimate.candidate == asked.candidate
    return estimate.candidate.name + " *" * own


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """A Markdown table with aligned columns. The first `left` columns are aligned to the left, the others to the right."""
    widths = [max(3, *(len(row[i]) for row in [header, *rows])) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(header), f"| {' | '.join(rule)} |", *map(line, rows)])


def warnings(workload: Workload, found: Sequence[Estimate], asked: Estimate | None) -> list[str]:
    """A warning if the run does not fit as its files describe it: the largest part, both values, and what to change."""
    if asked is None or asked.fits:
        return []
    parts = {field.name: int(getattr(asked.memory, field.name)) for field in fields(Memory)}
    largest = max(parts, key=lambda name: parts[name])
    lines = [
        f"warning: the run does not fit with its current files: it needs {asked.memory.total / 1e9:.1f} GB on the fullest rank, "
        f"{asked.capacity / 1e9:.1f} GB are usable.",
        f"  The largest part is {largest} with {parts[largest] / 1e9:.1f} GB. Use {REMEDIES[largest]}.",
    ]
    if "train_micro_batch_size_per_gpu" in REMEDIES[largest] and _ranks_micro_batches(workload):
        lines.append(
            "  A smaller train_micro_batch_size_per_gpu also changes which tokens are ranked together, and so the result "
            "(guidance.scope = 'microbatch')."
        )
    if found and found[0].fits:
        best = found[0]
        first = "cheapest" if workload.timed else "simplest"
        lines.append(f"  The {first} layout that fits is {describe(best)}: {best.memory.total / 1e9:.1f} GB.")
    elif found == [asked]:
        lines.append("  python -m megatron_vocagno.plan searches for a layout that fits.")
    else:
        lines.append("  None of the layouts fits. Use more GPUs, GPUs with more memory, or a smaller model.")
    return ["\n".join(lines)]


def describe(estimate: Estimate) -> str:
    candidate = estimate.candidate
    teacher = f", teacher {candidate.placement}" if candidate.placement else ""
    recompute = ", activation checkpointing" if candidate.recompute else ""
    return f"{candidate.name}{teacher}, {candidate.batch.micro_batch_rows} rows per micro-batch{recompute}"


def as_json(
    workload: Workload, cluster: Cluster, found: Sequence[Estimate], asked: Estimate | None, notes: Sequence[str]
) -> dict[str, Any]:
    """All layouts with unrounded bytes, seconds, FLOPs and hours. Times are left out if they cannot be estimated."""

    def one(estimate: Estimate) -> dict[str, Any]:
        times = {
            "step": {**asdict(estimate.step), "total": estimate.step.total},
            "tokens_per_second_per_gpu": estimate.tokens_per_second,
            "hours": estimate.hours,
            "scoring_gpu_hours": estimate.scoring,
            "gpu_hours": estimate.gpu_hours,
        }
        return {
            **asdict(estimate.candidate),
            "memory": {**asdict(estimate.memory), "total": estimate.memory.total, "capacity": estimate.capacity},
            "fits": estimate.fits,
            **(times if workload.timed else {}),
        }

    return {
        "student": asdict(workload.student.sizes),
        "teachers": [asdict(teacher.sizes) for teacher in workload.teachers],
        "tokens": workload.tokens,
        "teacher_tokens": workload.teacher_tokens,
        "steps": workload.steps,
        "gpus": cluster.gpus,
        "gpu": asdict(cluster.gpu),
        "assumed": asdict(cluster.assumed),
        "options": [one(estimate) for estimate in found],
        "as_asked": None if asked is None else one(asked),
        "warnings": [*warnings(workload, found, asked), *notes],
    }
