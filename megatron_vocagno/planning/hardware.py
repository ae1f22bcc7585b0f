"""GPU types by their vendors' data sheets, and what is assumed of them."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vocagno.errors import RunError


@dataclass(frozen=True)
class GPU:
    """Rates are peaks, and bandwidths are of one direction."""

    memory: float
    """GB, 10^9 bytes."""
    flops: float
    """TFLOP/s of dense bf16 products."""
    link: float
    """GB/s to the other GPUs of its node."""
    network: float
    """GB/s to other nodes, for each GPU of a node."""
    source: str


GPUS = {
    "a100-40gb": GPU(40, 312, 300, 25, "NVIDIA A100 data sheet, SXM; DGX A100: 8 x 200 Gb/s"),
    "a100": GPU(80, 312, 300, 25, "NVIDIA A100 data sheet, SXM; DGX A100: 8 x 200 Gb/s"),
    "h100": GPU(80, 989, 450, 50, "NVIDIA H100 data sheet, SXM; DGX H100: 8 x 400 Gb/s"),
    "h200": GPU(141, 989, 450, 50, "NVIDIA H200 data sheet, SXM; DGX H200: 8 x 400 Gb/s"),
    "b200": GPU(180, 2250, 900, 50, "NVIDIA HGX B200 and DGX B200 data sheets: 8 x 400 Gb/s"),
    "mi300x": GPU(192, 1307, 448, 50, "AMD Instinct MI300X data sheet; Azure ND MI300X v5: 8 x 400 Gb/s"),
    "l40s": GPU(48, 362, 32, 6.25, "NVIDIA L40S data sheet, PCIe 4.0; AWS g6e.48xlarge: 400 Gb/s for 8"),
}
"""Data sheets name rates with sparsity, twice the dense ones, and links in both directions together: all halved here."""


def gpu(name: str) -> GPU:
    """Raises RunError for a type that is not in the table."""
    if name not in GPUS:
        raise RunError(f"no GPU type {name!r}; these are known: {', '.join(GPUS)}")
    return GPUS[name]


@dataclass(frozen=True)
class Assumptions:
    """What no file says. Each can be given on the command line; none was measured by this project."""

    mfu: float = 0.40
    """Share of the peak rate that the student's forward and backward reach.

    Meta reports 38 to 43 % for Llama 3 405B on H100 (arXiv 2407.21783); the authors of TinyLlama 56 % for it on A100.
    """
    teacher_mfu: float = 0.45
    """The same of the teacher's forward: large products and nothing else, so a little more. No source."""
    link_share: float = 0.8
    """Share of the peak bandwidth that collectives reach. No source."""
    memory_share: float = 0.92
    """Share of the memory that tensors may take; the rest is the driver's, NCCL's, and lost between blocks. No source."""
    teacher_tokens: float = 1.0
    """Teacher tokens for each student token, where there is no dataset to ask. Larger vocabularies need fewer."""
    unmapped: float = 0.003
    """Share of the student's tokens that no teacher token maps to, where there is no dataset to ask: the quickstart's run."""
    reread: float = 1.29
    """Tokens that `score_teacher` reads for each that it scores: documents of 2,000 tokens in the mean, docs/teachers.md."""
