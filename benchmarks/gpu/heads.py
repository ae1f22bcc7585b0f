"""The head's loss and the selection, in time and memory, against dense logits, torch's and Liger's fused loss, in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib.metadata import version

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import selection_arms
from benchmarks.gpu.record import Task
from benchmarks.gpu.timing import ROUNDS, Arm, Rates, Work, contest, reason, report
from benchmarks.gpu.work import QWEN_7B, TINYLLAMA, Head, dense_work, tiles_work
from benchmarks.head_arms import Loss, dense, torch_chunked
from megatron_vocagno.objective.linear_ce import SelectedTokens, token_loss

KEPT = 0.4
STUDENTS = (
    TINYLLAMA,
    # the shapes for which NeMo-RL and Liger publish their figures
    Head("Qwen3-1.7B", 2048, 2048, 151_936),
    Head("Qwen3-1.7B", 12_288, 2048, 151_936),
    Head("Liger's benchmark", 8192, 4096, 131_072),
)
TEACHERS = (TINYLLAMA, QWEN_7B)
TINY = (Head("tiny", 64, 16, 300),)


def run(task: Task) -> None:
    device, rates, rounds = torch.device(task.device), Rates.of(task), 2 if task.rehearse else ROUNDS
    students, teachers = (TINY, TINY) if task.rehearse else (STUDENTS, TEACHERS)
    _note_missing(task)
    groups: list[tuple[str, Callable[[], list[Arm]]]] = [
        *((f"{head}, forward and backward", lambda head=head: learning_arms(head, device)) for head in students),
        *((f"{head}, forward", lambda head=head: scoring_arms(head, device)) for head in teachers),
        (f"selection, {selection_arms.ROWS} x {selection_arms.WIDTH:,} tokens", lambda: arms_of_selection(device)),
    ]
    for number, (case, make) in enumerate(groups):
        seconds = 0.6 * task.left / (len(groups) - number)
        try:
            arms = make()
        except torch.OutOfMemoryError as error:
            task.add(case, result=reason(error))
            continue
        report(task, case, arms, contest(arms, device, rounds, seconds), rates)
        del arms
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _note_missing(task: Task) -> None:
    if not _torch_has_fused_loss():
        task.note("This torch has no torch.nn.functional.linear_cross_entropy, so the arm is left out.")
    if task.rehearse:
        task.note("Liger's kernels do not run on a CPU, so the arm is left out.")
    elif _liger() is None:
        task.note("Liger is not installed (liger-kernel), so the arm is left out.")


def _torch_has_fused_loss() -> bool:
    return hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions")


class _Inputs:
    """Hidden states, a head and targets of one shape."""

    def __init__(self, head: Head, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        draw = {"generator": generator, "device": device, "dtype": torch.bfloat16}
        self.hidden_NH = torch.randn(head.tokens, head.size, **draw).requires_grad_()  # type: ignore[call-overload]
        head_VH = torch.randn(head.vocabulary, head.size, **draw)  # type: ignore[call-overload]
        self.head_VH = head_VH.mul_(head.size**-0.5).requires_grad_()
        self.target_N = torch.randint(0, head.vocabulary, (head.tokens,), generator=generator, device=device)
        order_N = torch.rand(head.tokens, generator=generator, device=device).argsort()
        self.kept_R = order_N[: round(KEPT * head.tokens)].sort().values
        self.all_N = torch.arange(head.tokens, device=device)

    def weight(self, tokens_R: Tensor) -> Tensor:
        """[N], of a mean over these tokens."""
        return torch.zeros(len(self.target_N), device=tokens_R.device).index_fill_(0, tokens_R, 1.0 / len(tokens_R))


def learning_arms(head: Head, device: torch.device) -> list[Arm]:
    """Arms with forward and backward."""
    x = _Inputs(head, device)
    kept_N, every_N = x.weight(x.kept_R), x.weight(x.all_N)

    def ours(gradient_N: Tensor, learned_R: Tensor) -> None:
        selected = SelectedTokens()
        loss_N = token_loss(x.hidden_NH, x.head_VH, x.target_N, selected=selected)
        selected.set(learned_R)
        torch.autograd.grad(loss_N, (x.hidden_NH, x.head_VH), gradient_N)

    def learn(loss: Loss) -> None:
        loss_N = loss(x.hidden_NH, x.head_VH, x.target_N).float()
        torch.autograd.grad((loss_N * kept_N).sum(), (x.hidden_NH, x.head_VH))

    return [
        Arm(f"ours, {KEPT:.0%} kept", lambda: ours(kept_N, x.kept_R), tiles_work(head, KEPT), ours=True),
        Arm("ours, 100% kept", lambda: ours(every_N, x.all_N), tiles_work(head, 1.0), ours=True),
        Arm("F.cross_entropy, dense float32 logits", lambda: learn(dense), dense_work(head, learns=True)),
        *(Arm(name, lambda loss=loss: learn(loss)) for name, loss in _others(device)),  # type: ignore[misc]
    ]


def scoring_arms(head: Head, device: torch.device) -> list[Arm]:
    """Arms with a forward only, as a teacher has it."""
    x = _Inputs(head, device)

    @torch.no_grad()
    def score(loss: Loss) -> None:
        loss(x.hidden_NH, x.head_VH, x.target_N)

    return [
        Arm("ours", lambda: score(token_loss), tiles_work(head, None), ours=True),
        Arm("F.cross_entropy, dense float32 logits", lambda: score(dense), dense_work(head, learns=False)),
        *(Arm(name, lambda loss=loss: score(loss)) for name, loss in _others(device)),  # type: ignore[misc]
    ]


def _others(device: torch.device) -> Sequence[tuple[str, Loss]]:
    """The fused losses of other libraries that can run here."""
    found: list[tuple[str, Loss]] = [("F.linear_cross_entropy", torch_chunked)] if _torch_has_fused_loss() else []
    if device.type != "cpu" and (liger := _liger()) is not None:
        found.append((f"Liger {version('liger-kernel')}", liger))
    return found


def _liger() -> Loss | None:
    """Liger's loss, or None if Liger is not installed."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # type: ignore[import-not-found]
    except ImportError:
        return None
    loss = LigerFusedLinearCrossEntropyLoss(reduction="none")

    def run(hidden_NH: Tensor, head_VH: Tensor, target_N: Tensor) -> Tensor:
        loss_N: Tensor = loss(head_VH, hidden_NH, target_N)
        return loss_N

    return run


def arms_of_selection(device: torch.device) -> list[Arm]:
    """The arms of `benchmarks/selection_arms.py`, with the aggregate `max`."""
    on_cpu = selection_arms.inputs()
    x = selection_arms.Inputs(*(getattr(on_cpu, field.name).to(device) for field in fields(on_cpu)))
    least = sum(getattr(x, field.name).nbytes for field in fields(x)) + x.student_BS.numel() * (4 + 4 + 8)

    def arm(run: selection_arms.Arm, scope: str) -> Callable[[], object]:
        def on_device() -> object:
            with device:  # the naive arm creates tensors on it
                return run(x, "max", scope)

        return on_device

    return [
        Arm("ours, microbatch", arm(selection_arms.ours, "microbatch"), Work(0.0, float(least)), ours=True),
        Arm("topk and gather, microbatch", arm(selection_arms.padded, "microbatch")),
        Arm("ours, sequence", arm(selection_arms.ours, "sequence"), Work(0.0, float(least)), ours=True),
        Arm("topk and gather, sequence", arm(selection_arms.padded, "sequence")),
    ]
