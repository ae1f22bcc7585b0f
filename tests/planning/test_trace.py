"""Activations of a plan, compared with the tensors that autograd saves and the bytes that the allocator hands out, on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_vocagno.compat import product_precision
from megatron_vocagno.model.attention import ULYSSES
from megatron_vocagno.model.configuration import student_config
from megatron_vocagno.model.student import DecoderLayer, Student
from megatron_vocagno.model.ulysses import exchange_over, register_ulysses
from megatron_vocagno.objective.distance import Kind, Reference, distance
from megatron_vocagno.objective.linear_ce import CPU_TILE_BYTES, SelectedTokens, token_loss
from megatron_vocagno.planning import memory
from megatron_vocagno.planning.layouts import Candidate, Layout, Stage
from megatron_vocagno.planning.memory import StudentSpec
from megatron_vocagno.planning.model_config import read_config
from megatron_vocagno.planning.sizes import sizes
from megatron_vocagno.planning.trace import student_layer_memory, teacher_layer_peak
from tests.planning.test_sizes import SIZES, each_model
from tests.runs import REPOSITORY

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
SHAPES = [(1, 64), (2, 96), (5, 33)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Each thread of a 16-bit product takes scratch memory, which is not part of a layer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def skip_without_fused_attention() -> None:
    """Skip a comparison with this CPU if torch 2.8 has no fused attention for fewer heads of keys than of queries."""
    query, key = (torch.zeros(1, heads, 8, 16, requires_grad=True) for heads in (4, 2))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, key, enable_gqa=True)
    if "Flash" not in str(out.grad_fn):
        assert product_precision() is None, "torch 2.9 and newer have it"
        pytest.skip("no fused attention on this CPU")


def kept_by_autograd(layer: torch.nn.Module, hidden_BSH: Tensor) -> int:
    """Bytes of the storages that a real forward pass hands to autograd, the layer's parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(hidden_BSH)
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in parameters)


def highest(run: Any) -> int:
    """The most bytes that the allocator had handed out at once while `run` ran, and not taken back."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    sizes: list[tuple[int, int]] = []
    pending = list(profiler.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.typed[0].name == "Allocation":
            sizes.append((event.start_time_ns, event.extra_fields.alloc_size))
    now = most = 0
    for _, size in sorted(sizes):
        now += size
        most = max(most, now)
    assert len(sizes) > 20
    return most


def decoder(spec: dict[str, Any], dtype: torch.dtype) -> DecoderLayer:
    layer = DecoderLayer(student_config(spec), 0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return layer.to(dtype)


@each_model
@each_dtype
def test_the_bytes_kept_of_a_layer_are_those_that_autograd_keeps(spec: dict[str, Any], dtype: torch.dtype) -> None:
    skip_without_fused_attention()
    layer = decoder(spec, dtype)
    for rows, length in SHAPES:
        hidden_BSH = torch.randn(rows, length, spec["hidden_size"], dtype=dtype, requires_grad=True)
        measured = kept_by_autograd(layer, hidden_BSH)
        assert student_layer_memory(student_config(spec), rows, length, dtype).saved == measured > 10_000


@each_model
@each_dtype
def test_the_peak_of_a_layer_is_that_of_the_allocator(spec: dict[str, Any], dtype: torch.dtype) -> None:
    skip_without_fused_attention()
    layer = decoder(spec, dtype)
    hidden_BSH = torch.randn(2, 96, spec["hidden_size"], dtype=dtype, requires_grad=True)
    gradient_BSH = torch.randn_like(hidden_BSH)
    layer(hidden_BSH.detach()).sum().backward()  # what is made once
    layer.zero_grad(set_to_none=True)
    measured = highest(lambda: layer(hidden_BSH).backward(gradient_BSH))
    # kernels of a CPU take a little scratch for shapes that they do not like
    assert student_layer_memory(student_config(spec), 2, 96, dtype).peak == pytest.approx(measured, rel=0.01)

    with torch.no_grad():
        layer(hidden_BSH)
        measured = highest(lambda: layer(hidden_BSH)) + hidden_BSH.untyped_storage().nbytes()
    assert teacher_layer_peak(student_config(spec), 2, 96, dtype) == pytest.approx(measured, rel=0.01)


@each_dtype
@pytest.mark.parametrize(("heads", "ranks"), [((4, 2), 2), ((4, 2), 4), ((4, 4), 4)])
def test_the_bytes_of_a_layer_on_divided_rows(tmp_path: Path, dtype: torch.dtype, heads: tuple[int, int], ranks: int) -> None:
    """The same bytes, sent by one process to itself."""
    skip_without_fused_attention()
    spec = SIZES | {"model_type": "llama", "num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    layer, rows, length = decoder(spec, dtype), 2, 1536
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        register_ulysses(exchange_over(dist.group.WORLD), ranks)  # type: ignore[arg-type]
        layer.config._attn_implementation = ULYSSES
        hidden_BPH = torch.randn(rows, length // ranks, spec["hidden_size"], dtype=dtype, requires_grad=True)
        gradient_BPH = torch.randn_like(hidden_BPH)
        kept = kept_by_autograd(layer, hidden_BPH)
        layer(hidden_BPH.detach()).sum().backward()  # what is made once
        layer.zero_grad(set_to_none=True)
        peak = highest(lambda: layer(hidden_BPH).backward(gradient_BPH))
    finally:
        dist.destroy_process_group()
    counted = student_layer_memory(student_config(spec), rows, length, dtype, ranks)
    assert counted.saved == kept > 10_000
    if dtype == torch.float32:  # in 16 bits, the attention of a CPU takes scratch memory that is not small beside one head
        assert counted.peak == pytest.approx(peak, rel=0.01)
    assert counted.saved < 1.3 / ranks * student_layer_memory(student_config(spec), rows, length, dtype).saved


def test_a_llama_layer_keeps_what_the_docs_say() -> None:
    config = read_config(REPOSITORY / "examples/plan/TinyLlama-1.1B.json", "student")
    H, F, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    A, K = heads * config.head_dim, config.num_key_value_heads * config.head_dim
    for rows in (1, 4):
        tokens = rows * 2048
        rope = 2 * 2048 * config.head_dim * 2
        per_token = 16 * H + 8 * F + 4 * A + 4 * K + 4 * heads + 8
        assert student_layer_memory(config, rows, 2048, torch.bfloat16).saved == tokens * per_token + rope


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_the_peak_of_the_head_is_that_of_the_allocator(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "GPU_TILE_BYTES", CPU_TILE_BYTES)
    tokens, H, V = 1024, 1024, 2048
    learned = round(share * tokens)
    count = sizes(student_config({"model_type": "llama", **SIZES, "vocab_size": V, "hidden_size": H}))
    hidden_NH, head_VH = torch.randn(tokens, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    target_N = torch.randint(0, V, (tokens,))

    def learn() -> None:
        selected = SelectedTokens()
        loss_N = token_loss(hidden_NH, head_VH, target_N, selected=selected)
        selected.set(torch.arange(learned))
        (loss_N * (torch.arange(tokens) < learned)).sum().backward()

    learn()
    hidden_NH.grad = head_VH.grad = None
    measured = highest(learn)
    # what the norm before it keeps, and hands on, is not made here
    norm = 4 * tokens * H + 2 * 4 * tokens * H + 4 * tokens
    assert memory.head_bytes(tokens, learned, count, 4) - norm == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "V", "W", "tile"), [("uld", 2048, 3072, 256), ("uld", 3072, 2048, 64), ("kld", 2048, 2048, 256)]
)
@each_dtype
def test_the_peak_of_a_distance_is_bounded_and_no_more_than_half_above(
    kind: Kind, V: int, W: int, tile: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "GPU_TILE_BYTES", tile * 4 * (V + W))
    tokens, H, teacher_H = 512, 256, 320
    student = sizes(student_config({"model_type": "llama", **SIZES, "vocab_size": V, "hidden_size": H}))
    teacher = sizes(student_config({"model_type": "llama", **SIZES, "vocab_size": W, "hidden_size": teacher_H}))
    hidden_NH, head_VH = (torch.randn(count, H, dtype=dtype, requires_grad=True) for count in (tokens, V))
    said = Reference(kind, torch.arange(tokens), torch.randn(tokens, teacher_H), torch.randn(W, teacher_H), None, V)

    def learn() -> None:
        distance(hidden_NH, head_VH, None, said, tile).sum().backward()

    learn()
    hidden_NH.grad = head_VH.grad = None
    measured = highest(learn)
    counted = memory.distance_bytes(kind, tokens, student, teacher, hidden_NH.element_size())
    assert measured < counted < 1.5 * measured


@pytest.mark.parametrize("recompute", [False, True])
def test_the_peak_of_a_whole_micro_batch_is_that_of_the_allocator(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_without_fused_attention()
    monkeypatch.setattr(memory, "GPU_TILE_BYTES", CPU_TILE_BYTES)
    spec = {"model_type": "llama", **SIZES, "num_hidden_layers": 8, "vocab_size": 4096, "max_position_embeddings": 256}
    config = student_config(spec)
    rows, length, share = 4, 256, 0.4
    student, count = Student(config, 0, recompute), sizes(config)
    ids_BS = torch.randint(0, count.vocabulary, (rows, length))

    def learn() -> None:
        selected = SelectedTokens()
        loss_BS = student(ids_BS, ids_BS, selected)
        learned = round(share * rows * length)
        selected.set(torch.arange(learned))
        (loss_BS.flatten() * (torch.arange(rows * length) < learned)).sum().backward()

    learn()
    student.zero_grad(set_to_none=False)  # gradients are there, and are counted apart
    measured = highest(learn)
    planned = memory.memory(
        Candidate(1, 0, Layout(rows, 1, 1), recompute, None),
        [Stage(count.layers, embedding=True, head=True)],
        StudentSpec(config, count, length),
        {"zero_optimization": {"stage": 1}},
        share,
        None,
    )
    total = planned.activations + max(planned.layer, planned.head)
    assert measured < total < 1.1 * measured
