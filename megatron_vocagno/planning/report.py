"""What a plan says: text for a terminal, which is Markdown too, and the same as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from megatron_vocagno.planning.comparison import Option, Task
from megatron_vocagno.planning.cost import Cluster
from megatron_vocagno.planning.memory import Memory

RATES = "the rates that the plan knows are those of 16-bit products"
REMEDIES = {
    "weights": "zero_optimization.stage 3, or more parallel.pipeline_stages",
    "gradients": "zero_optimization.stage 2 or 3, or more parallel.pipeline_stages",
    "optimizer": "more GPUs, or more parallel.pipeline_stages",
    "buffers": "a smaller zero_optimization.reduce_bucket_size, or stage3_max_live_parameters",
    "teacher": "teacher.placement = 'zero3' or 'cached', or teacher.weights = 'int8'",
    "activations": "parallel.activation_checkpointing = true, or a smaller train_micro_batch_size_per_gpu",
    "layer": "a smaller train_micro_batch_size_per_gpu",
    "head": "a smaller train_micro_batch_size_per_gpu",
    "scoring": "a smaller teacher.tokens_per_batch",
    "reduction": "zero_optimization.stage 2 or 3",
}
"""What makes a part of the memory smaller."""


def text(task: Task, cluster: Cluster, options: Sequence[Option], asked: Option | None, notes: Sequence[str]) -> str:
    parts = ["\n".join(_opening(task, cluster)), _costs(options, asked, task.timed), _memories(options)]
    if any(asked and option.candidate == asked.candidate for option in options):
        parts.append("* as the run's files have it")
    if not task.timed:
        parts.append(f"note: no times, as the run computes in float32: {RATES}. Bytes do not depend on them.")
    return "\n\n".join([*parts, *warnings(task, options, asked), *notes, *_changed(task, options)]) + "\n"


def _changed(task: Task, options: Sequence[Option]) -> list[str]:
    if not _ranks_micro_batches(task):
        return []
    if all(option.candidate.batch.micro_batch_rows == task.micro_batch_rows for option in options):
        return []
    return [
        f"note: the run ranks the tokens of {task.micro_batch_rows} rows together (guidance.scope = 'microbatch'); "
        "other micro-batches choose other tokens."
    ]


def _ranks_micro_batches(task: Task) -> bool:
    """Whether another micro-batch makes another run: it is the rows of one whose tokens are ranked together."""
    guidance = task.run.guidance
    return guidance.selects and guidance.scope == "microbatch"


def _opening(task: Task, cluster: Cluster) -> list[str]:
    gpu, assumed = cluster.gpu, cluster.assumed
    student = task.student.sizes
    lines = [f"student: {student.model_type}, {student.parameters / 1e6:,.0f} M parameters, {student.layers} layers"]
    for teacher in task.teachers:
        sizes = teacher.sizes
        lines.append(f"teacher: {sizes.model_type}, {sizes.parameters / 1e6:,.0f} M parameters, {sizes.layers} layers")
    lines += [
        f"run: {task.tokens / 1e9:.4g} G student tokens, {task.teacher_tokens / 1e9:.4g} G teacher tokens to score once; "
        f"{task.steps:,} steps of {task.rows:,} rows of {task.run.data.row_length:,}",
        f"GPUs: {cluster.gpus:,} in nodes of {cluster.per_node}; {gpu.flops:,.0f} TFLOP/s, {gpu.memory:g} GB, {gpu.link:g} GB/s "
        f"within a node, {gpu.network:g} GB/s a GPU between nodes ({gpu.source})",
        f"assumed, not measured: {assumed.mfu:.0%} of the peak rate for the student, {assumed.teacher_mfu:.0%} for the teacher, "
        f"{assumed.link_share:.0%} of the bandwidth, {assumed.memory_share:.0%} of the memory to use",
    ]
    return lines


def _costs(options: Sequence[Option], asked: Option | None, timed: bool) -> str:
    """timed: with what takes time, beside memory."""
    header = [
        "layout",
        "teacher",
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
    header += ["tokens/s/GPU", "hours", "scoring GPU-h", "all GPU-h"]
    rows = []
    for o in options:
        c, step = o.candidate, o.step
        rows.append(
            [
                c.name + " *" * (asked is not None and c == asked.candidate),
                c.placement or "none",
                str(c.batch.micro_batch_rows),
                str(c.batch.micro_batches),
                "yes" if c.recompute else "",
                f"{o.memory.total / 1e9:.1f}" + ("" if o.fits else " too much"),
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
    shown = len(header) if timed else header.index("GB") + 1
    return table(header[:shown], [row[:shown] for row in rows], left=2)


def _memories(options: Sequence[Option]) -> str:
    names = [field.name for field in fields(Memory)]
    rows = [
        [o.candidate.name, o.candidate.placement or "none"]
        + [f"{size / 1e9:.1f}" for size in [*(getattr(o.memory, name) for name in names), o.memory.total, o.capacity]]
        for o in options
    ]
    return table(["GB of the fullest rank", "teacher is", *names, "all", "there is"], rows, left=2)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """A Markdown table with straight columns; the first `left` ones begin at the left."""
    widths = [max(3, *(len(row[i]) for row in [header, *rows])) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(header), f"| {' | '.join(rule)} |", *map(line, rows)])


def warnings(task: Task, options: Sequence[Option], asked: Option | None) -> list[str]:
    """What will not fit of the run as its files have it: which part, both values, what to change."""
    if asked is None or asked.fits:
        return []
    parts = {field.name: int(getattr(asked.memory, field.name)) for field in fields(Memory)}
    largest = max(parts, key=lambda name: parts[name])
    lines = [
        f"warning: as its files have it, the run does not fit: {asked.memory.total / 1e9:.1f} GB on the fullest rank, "
        f"{asked.capacity / 1e9:.1f} to use.",
        f"  Its largest part is {largest} with {parts[largest] / 1e9:.1f} GB. Change: {REMEDIES[largest]}.",
    ]
    if "train_micro_batch_size_per_gpu" in REMEDIES[largest] and _ranks_micro_batches(task):
        lines.append(
            "  A smaller train_micro_batch_size_per_gpu also changes which tokens are ranked together, and so the run "
            "(guidance.scope = 'microbatch')."
        )
    if options and options[0].fits:
        best = options[0]
        first = "cheapest" if task.timed else "simplest"
        lines.append(f"  The {first} that fits is {describe(best)}: {best.memory.total / 1e9:.1f} GB.")
    elif options == [asked]:
        lines.append("  python -m megatron_vocagno.plan looks for a layout that fits.")
    else:
        lines.append("  None of the layouts fits: more memory, more GPUs or a smaller model.")
    return ["\n".join(lines)]


def describe(option: Option) -> str:
    candidate = option.candidate
    teacher = f", teacher {candidate.placement}" if candidate.placement else ""
    recompute = ", activation checkpointing" if candidate.recompute else ""
    return f"{candidate.name}{teacher}, {candidate.batch.micro_batch_rows} rows a micro-batch{recompute}"


def as_json(
    task: Task, cluster: Cluster, options: Sequence[Option], asked: Option | None, notes: Sequence[str]
) -> dict[str, Any]:
    """Bytes, seconds, FLOPs and hours, unrounded; without what takes time where no rates are known."""

    def one(option: Option) -> dict[str, Any]:
        times = {
            "step": {**asdict(option.step), "total": option.step.total},
            "tokens_per_second_per_gpu": option.tokens_per_second,
            "hours": option.hours,
            "scoring_gpu_hours": option.scoring,
            "gpu_hours": option.gpu_hours,
        }
        return {
            **asdict(option.candidate),
            "memory": {**asdict(option.memory), "total": option.memory.total, "capacity": option.capacity},
            "fits": option.fits,
            **(times if task.timed else {}),
        }

    return {
        "student": asdict(task.student.sizes),
        "teachers": [asdict(teacher.sizes) for teacher in task.teachers],
        "tokens": task.tokens,
        "teacher_tokens": task.teacher_tokens,
        "steps": task.steps,
        "gpus": cluster.gpus,
        "gpu": asdict(cluster.gpu),
        "assumed": asdict(cluster.assumed),
        "options": [one(option) for option in options],
        "as_asked": None if asked is None else one(asked),
        "warnings": [*warnings(task, options, asked), *notes],
    }
