"""GPU types with the rates of their data sheets, and the efficiencies that a plan assumes."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vocagno.errors import RunError


@dataclass(frozen=True)
class GPU:
    """Peak rates of a GPU type. Bandwidths are for one direction."""

    memory: float
    """GB (10^9 bytes)."""
    flops: float
    """TFLOP/s of dense bf16 matrix products."""
    link: float
    """GB/s to the other GPUs of the node."""
    network: float
    """GB/s to other nodes, per GPU of a node."""
    source: str


# Data sheets give FLOP rates with sparsity (twice the dense rate) and bandwidths for both directions together: halved here.
GPUS = {
    "a100-40gb": GPU(40, 312, 300, 25, "NVIDIA A100 data sheet, SXM; DGX A100: 8 x 200 Gb/s"),
    "a100": GPU(80, 312, 300, 25, "NVIDIA A100 data sheet, SXM; DGX A100: 8 x 200 Gb/s"),
    "h100": GPU(80, 989, 450, 50, "NVIDIA H100 data sheet, SXM; DGX H100: 8 x 400 Gb/s"),
    "h200": GPU(141, 989, 450, 50, "NVIDIA H200 data sheet, SXM; DGX H200: 8 x 400 Gb/s"),
    "b200": GPU(180, 2250, 900, 50, "NVIDIA HGX B200 and DGX B200 data sheets: 8 x 400 Gb/s"),
    "mi300x": GPU(192, 1307, 448, 50, "AMD Instinct MI300X data sheet; Azure ND MI300X v5: 8 x 400 Gb/s"),
    "l40s": GPU(48, 362, 32, 6.25, "NVIDIA L40S data sheet, PCIe 4.0; AWS g6e.48xlarge: 400 Gb/s for 8"),
}


def gpu(name: str) -> GPU:
    """The GPU type of this name. Raises RunError if it is unknown."""
    if name not in GPUS:
        raise RunError(f"unknown GPU type {name!r} (--gpu). Known types: {', '.join(GPUS)}")
    return GPUS[name]


@dataclass(frozen=True)
class Assumptions:
    """Efficiencies and ratios that no file contains. Each is a command-line option. The efficiencies were not measured here."""

    mfu: float = 0.40
    """Share of the peak FLOP rate that the student's forward and backward passes reach.

    Meta reports 38 to 43 % for Llama 3 405B on H100 (arXiv 2407.21783). The authors of TinyLlama report 56 % on A100.
    """
    teacher_mfu: float = 0.45
    """Share of the peak FLOP rate that the teacher's forward pass reaches. A guess: it consists of large products only."""
    link_share: float = 0.8
    """Share of the peak bandwidth that collectives reach. A guess."""
    memory_share: float = 0.92
    """Share of the GPU memory that tensors may use. The driver, NCCL and fragmentation take the rest. A guess."""
    teacher_tokens: float = 1.0
    """Teacher tokens per student token if there is no dataset to read it from. A larger vocabulary needs fewer tokens."""
    unmapped: float = 0.003
    """Share of student tokens that no teacher token maps to, if there is no dataset to read it from: that of the quickstart."""
    reread: float = 1.29
    """Tokens that `score_teacher` reads per token that it scores, for documents of 2,000 tokens on average: docs/teachers.md."""
