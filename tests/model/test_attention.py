"""What a token sees: a document in a row is what it is alone, for every family, both models and both ways of computing it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import modeling_flash_attention_utils as flash
from transformers.integrations import flash_attention

from megatron_vocagno.errors import ModelError
from megatron_vocagno.model.attention import document_bounds, document_positions, layer_arguments, resolve_attention
from megatron_vocagno.model.configuration import student_config
from megatron_vocagno.model.folder import PretrainedWeights
from megatron_vocagno.model.student import Student
from megatron_vocagno.model.teacher import open_teacher
from tests.model.tiny import FAMILIES, SIZES, batch, write_model

LENGTH = 29
# (row, first, last) of each document; windows are 6 wide, so some are longer and some shorter
DOCUMENTS = [(0, 0, 1), (0, 1, 2), (0, 2, 14), (0, 14, 29), (1, 0, 20), (1, 20, 25), (1, 25, 29), (2, 0, 29)]

each_architecture = pytest.mark.parametrize(
    "spec", [pytest.param({"model_type": family, **SIZES, **extra}, id=family) for family, extra in FAMILIES.items()]
)


def segments() -> Tensor:
    segment_BS = torch.zeros(3, LENGTH, dtype=torch.int32)
    for row, first, last in DOCUMENTS:
        segment_BS[row, first:last] = first
    return segment_BS


def student_losses(folder: Path, ids_BS: Tensor, target_BS: Tensor, recompute: bool = False) -> tuple[Tensor, Tensor, Student]:
    """Losses [B, S] of the rows cut into documents, and of each document alone put where it stands; their sums have gradients."""
    student = Student(student_config(folder), seed=0, recompute=recompute)
    student.load(PretrainedWeights(folder))
    in_row_BS = student((ids_BS, document_positions(segments())), target_BS)
    alone = {(row, first): student(ids_BS[row : row + 1, first:last], target_BS[row : row + 1, first:last])[0]
             for row, first, last in DOCUMENTS}  # fmt: skip
    alone_BS = torch.stack([torch.cat([alone[row, first] for r, first, _ in DOCUMENTS if r == row]) for row in range(3)])
    return in_row_BS, alone_BS, student


@each_architecture
@pytest.mark.parametrize("recompute", [False, True])
def test_a_document_in_a_students_row_has_the_losses_of_a_separate_row(
    spec: dict[str, Any], recompute: bool, tmp_path: Path
) -> None:
    folder = write_model(tmp_path, spec)
    ids_BS, target_BS = batch(3, LENGTH)
    in_row_BS, alone_BS, student = student_losses(folder, ids_BS, target_BS, recompute)
    torch.testing.assert_close(in_row_BS, alone_BS, rtol=0, atol=1e-5)
    over_row_BS = student(ids_BS, target_BS)
    assert ((over_row_BS - in_row_BS).abs() > 1e-2).sum() > 20, "documents did not matter"
    torch.testing.assert_close(over_row_BS[2], in_row_BS[2], rtol=0, atol=1e-5)

    gradients = []
    for losses in (in_row_BS, alone_BS):
        student.zero_grad()
        losses.sum().backward(retain_graph=True)
        gradients.append([parameter.grad.clone() for parameter in student.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * max(1.0, one.abs().max().item()))


@pytest.mark.parametrize(
    "spec",
    [
        *(pytest.param({"model_type": family, **extra}, id=family) for family, extra in FAMILIES.items()),
        pytest.param({"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 4}, id="learned-positions"),
        pytest.param({"model_type": "gpt_neox"}, id="parallel-residual"),
        pytest.param({"model_type": "mixtral"}, id="experts"),
        pytest.param(
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "model_type": "llama"},
            id="rope-by-length",
        ),
    ],
)
def test_a_document_in_a_teachers_row_has_the_losses_of_a_separate_row(spec: dict[str, Any], tmp_path: Path) -> None:
    teacher = open_teacher(write_model(tmp_path, {**SIZES, **spec}), torch.float32, "cpu")
    input_BU, target_BU = batch(3, LENGTH)
    loss_BU = teacher.loss(input_BU, target_BU, segments())
    for row, first, last in DOCUMENTS:
        alone_1U = teacher.loss(input_BU[row : row + 1, first:last], target_BU[row : row + 1, first:last])
        torch.testing.assert_close(loss_BU[row : row + 1, first:last], alone_1U, rtol=0, atol=1e-5)
    assert ((teacher.loss(input_BU, target_BU) - loss_BU).abs() > 1e-2).sum() > 20


@each_architecture
def test_neither_a_later_token_nor_another_document_reaches_a_token(spec: dict[str, Any], tmp_path: Path) -> None:
    """Not even by a rounding: what is cut off is multiplied by an exact zero."""
    folder = write_model(tmp_path, spec)
    student, teacher = Student(student_config(folder), seed=0), open_teacher(folder, torch.float32, "cpu")
    (ids_BS, target_BS), segment_BS = batch(3, LENGTH), segments()
    position_BS, met = document_positions(segment_BS), 0
    for model in (lambda ids: student((ids, position_BS), target_BS), lambda ids: teacher.loss(ids, target_BS, segment_BS)):
        before_BS = model(ids_BS)
        for row, changed in ((0, 1), (0, 8), (0, 14), (1, 19), (1, 22)):
            other_BS = ids_BS.clone()
            other_BS[row, changed] = (ids_BS[row, changed] + 1) % 200
            reached_BS = model(other_BS) != before_BS
            allowed_BS = torch.zeros_like(reached_BS)
            allowed_BS[row] = (segment_BS[row] == segment_BS[row, changed]) & (torch.arange(LENGTH) >= changed)
            assert not (reached_BS & ~allowed_BS).any()
            met += int((reached_BS & allowed_BS).sum())
    assert met > 30


# ---- flash-attn, which no CPU runs: transformers' own road to it, with a reference in the place of its kernels --------


def reference_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """flash_attn_varlen_func as its documentation has it: [tokens, heads, size], one sequence after the other."""
    assert causal and dropout_p == 0 and cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert isinstance(max_seqlen_q, int) and int(cu_seqlens_q.diff().max()) <= max_seqlen_q == max_seqlen_k
    assert cu_seqlens_q[0] == 0 and cu_seqlens_q[-1] == len(q) and (cu_seqlens_q.diff() > 0).all()
    reference_varlen.sequences.append(len(cu_seqlens_q) - 1)
    out = []
    for first, last in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True):
        queries, keys, values = (part[first:last].transpose(0, 1) for part in (q, k, v))
        keys, values = (part.repeat_interleave(len(queries) // len(part), 0) for part in (keys, values))
        logits = queries @ keys.transpose(1, 2) * softmax_scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        distance = torch.arange(last - first)[:, None] - torch.arange(last - first)
        seen = (distance >= 0) if window_size[0] < 0 else (distance >= 0) & (distance <= window_size[0])
        out.append(logits.masked_fill(~seen, -torch.inf).softmax(-1) @ values)
    return torch.cat(out, 1).transpose(0, 1)


reference_varlen.sequences = []


def reference_whole(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """flash_attn_func: [B, S, heads, size], every row one sequence."""
    rows, length = q.shape[:2]
    bounds = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32)
    flat = (part.flatten(0, 1) for part in (q, k, v))
    return reference_varlen(*flat, bounds, bounds, length, length, **options).view(q.shape)


@pytest.fixture
def flash_by_reference(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """transformers calls the references where it would call flash-attn. Returns how many sequences each call had."""
    functions = (reference_whole, reference_varlen, None, flash._pad_input, flash._unpad_input)
    kwargs_of = flash._lazy_define_process_function(reference_varlen)
    # transformers before 5.19 expects one function, and newer versions a pair
    processing = (kwargs_of, dict) if hasattr(flash, "_process_with_kvcache_kwargs_fn") else kwargs_of
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *_, **__: (functions, processing))
    monkeypatch.setattr(flash_attention, "_use_top_left_mask", False)
    monkeypatch.setattr(reference_varlen, "sequences", [])
    return reference_varlen.sequences


@each_architecture
@pytest.mark.parametrize("documents", [False, True])
def test_what_flash_attention_is_handed_means_the_same(
    spec: dict[str, Any], documents: bool, flash_by_reference: list[int], tmp_path: Path
) -> None:
    folder = write_model(tmp_path, spec)
    student, teacher = Student(student_config(folder), seed=0), open_teacher(folder, torch.float32, "cpu")
    student.load(PretrainedWeights(folder))
    (ids_BS, target_BS), segment_BS = batch(3, LENGTH), segments()
    inputs = (ids_BS, document_positions(segment_BS)) if documents else ids_BS
    expected_BS = student(inputs, target_BS)
    assert not flash_by_reference
    # the models have it for their configuration, from where transformers reads it at each call
    student.config._attn_implementation = teacher.config._attn_implementation = "flash_attention_2"
    student_BS = student(inputs, target_BS)
    teacher_BS = teacher.loss(ids_BS, target_BS, segment_BS if documents else None)
    torch.testing.assert_close(student_BS, expected_BS, rtol=0, atol=1e-5)
    torch.testing.assert_close(teacher_BS, expected_BS, rtol=0, atol=1e-5)
    calls = flash_by_reference[:3] + flash_by_reference[-3:]
    assert calls == [len(DOCUMENTS) if documents else 3] * 6
    if documents:
        student_BS.sum().backward()
        assert all(parameter.grad is not None for parameter in student.parameters())


def test_a_window_is_a_mask_where_it_is_shorter_than_the_row_and_nothing_where_it_is_not() -> None:
    config = student_config({"model_type": "mistral", **SIZES, "sliding_window": 6})
    assert layer_arguments(config, 0, torch.zeros(2, 6, 48), None) == {"attention_mask": None}
    mask_BSS = layer_arguments(config, 0, torch.zeros(2, 7, 48), None)["attention_mask"][:, 0]
    distance = torch.arange(7)[:, None] - torch.arange(7)
    assert (mask_BSS == ((distance >= 0) & (distance < 6))).all() and mask_BSS.shape == (2, 7, 7)


def test_positions_and_bounds_of_documents() -> None:
    segment_BS = torch.tensor([[0, 0, 1, 2, 2], [5, 5, 5, 5, 5]])
    position_BS = document_positions(segment_BS)
    assert position_BS.tolist() == [[0, 1, 0, 0, 1], [0, 1, 2, 3, 4]] and position_BS.dtype == torch.int32
    bounds = document_bounds(position_BS)
    assert bounds["cu_seq_lens_q"].tolist() == [0, 2, 3, 5, 10] and bounds["max_length_q"] == 5


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param({"model_type": "mamba", "state_size": 8}, id="recurrent-state"),
        pytest.param({"model_type": "opt", "word_embed_proj_dim": 48, "ffn_dim": 64}, id="positions-not-asked"),
    ],
)
def test_an_architecture_through_which_documents_leak_is_refused_when_it_is_asked_to_cut(
    spec: dict[str, Any], tmp_path: Path
) -> None:
    teacher = open_teacher(write_model(tmp_path, {**SIZES, **spec, "pad_token_id": 0}), torch.float32, "cpu")
    assert teacher.loss(*batch(3, LENGTH)).shape == (3, LENGTH)
    with pytest.raises(ModelError, match=r"data.attention = 'row'"):
        teacher.loss(*batch(3, LENGTH), segments())


def test_positions_outside_of_the_mask_are_refused_or_right(tmp_path: Path) -> None:
    """Falcon's alibi positions leaked until transformers 5.23. The check is of the losses, not of the version."""
    spec = {**SIZES, "model_type": "falcon", "alibi": True, "pad_token_id": 0}
    teacher = open_teacher(write_model(tmp_path, spec), torch.float32, "cpu")
    (ids_BS, target_BS), segment_BS = batch(3, LENGTH), segments()
    try:
        loss_BS = teacher.loss(ids_BS, target_BS, segment_BS)
    except ModelError as refusal:
        assert "data.attention = 'row'" in str(refusal)
        return
    for row, of_row_S in enumerate(segment_BS):
        for document in of_row_S.unique():
            own_S = of_row_S == document
            alone_1S = teacher.loss(ids_BS[row, own_S][None], target_BS[row, own_S][None])
            assert torch.allclose(loss_BS[row, own_S], alone_1S[0], atol=1e-5)


def test_the_code_that_computes_attention_can_do_what_the_model_asks() -> None:
    llama, gemma = (student_config({"model_type": family, **SIZES, **FAMILIES[family]}) for family in ("llama", "gemma2"))
    assert resolve_attention(llama, "auto", torch.bfloat16, "cpu") == "sdpa"
    assert resolve_attention(llama, "auto", torch.float32, "cuda") == "sdpa"
    assert resolve_attention(llama, "flash_attention_2", torch.bfloat16, "cuda") == "flash_attention_2"
    assert resolve_attention(gemma, "auto", torch.bfloat16, "cpu") == "eager"
    assert resolve_attention(gemma, "flash_attention_2", torch.bfloat16, "cuda") == "flash_attention_2"
    with pytest.raises(ModelError, match=r"sdpa cannot compute the attention of a gemma2 model"):
        resolve_attention(gemma, "sdpa", torch.bfloat16, "cpu")
    gemma.use_bidirectional_attention = True
    with pytest.raises(ModelError, match="predicts none of them"):
        resolve_attention(gemma, "auto", torch.bfloat16, "cpu")
