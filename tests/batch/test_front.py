"""What a tokenizer puts in front of a text stands at the head of all that a model reads, and nothing else moves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_vocagno.batch.front import Front
from megatron_vocagno.batch.loader import IGNORE, Batches, Layout, TrainRows, collate, evaluation_batches
from megatron_vocagno.batch.pack import SLACK, MappingStatus, Row, Rows, TeacherIds
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.front import front_of
from megatron_vocagno.engine.scoring import ReplicatedScorer
from megatron_vocagno.errors import RunError
from megatron_vocagno.model.teacher import open_teacher
from tests.runs import write_teacher
from tests.tokenizers_with_bos import with_front

LENGTH = 64
FRONTS = [(7,), (7, 9)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, teacher_tokenizer: Path) -> Path:
    """A random model, whose attention lets a first token matter."""
    return write_teacher(tmp_path_factory.mktemp("front") / "teacher", teacher_tokenizer)


def file_order(dataset: AlignedDataset) -> np.ndarray:
    return np.arange(len(dataset), dtype=np.int32)


def equal_but_for_the_front(mine: Row, other: Row) -> bool:
    names = ("target_ids", "starts_document", "first", "last", "mapping", "teacher_target_ids", "teacher_starts_document")
    return all(np.array_equal(getattr(mine, name), getattr(other, name)) for name in names)


@pytest.mark.parametrize("ids", FRONTS)
def test_a_row_gives_its_first_positions_to_the_front_and_is_a_shorter_row_otherwise(
    dataset: AlignedDataset, ids: tuple[int, ...]
) -> None:
    order = file_order(dataset)
    rows = Rows(dataset, order, LENGTH, TeacherIds(dataset, front=Front(ids)), Front(ids))
    shorter = Rows(dataset, order, LENGTH - len(ids))
    assert len(rows) == len(shorter) > 100 and rows.stride == LENGTH - SLACK - len(ids)
    inside = 0
    for k in range(0, len(rows), 3):
        mine, plain = rows[k], shorter[k]
        assert equal_but_for_the_front(mine, plain) and np.array_equal(mine.input_ids, plain.input_ids)
        assert len(mine.lead_ids) + len(mine.input_ids) <= LENGTH
        starts_document = rows.pieces(k)[0].start == 0
        read, read_plainly = [*mine.teacher_lead_ids, *mine.teacher_input_ids.tolist()], plain.teacher_input_ids.tolist()
        # a document's first token is predicted from the last id in front instead of EOS
        assert read == [*ids, *(read_plainly[1:] if starts_document else read_plainly)]
        inside += not starts_document
    assert inside > 20


@pytest.mark.parametrize("ids", FRONTS)
def test_a_batch_has_the_front_at_its_head_and_no_target_there(dataset: AlignedDataset, ids: tuple[int, ...]) -> None:
    rows = TrainRows(dataset, LENGTH, 3, TeacherIds(dataset, front=Front(ids)), Front(ids))
    (batch,) = Batches(rows, Layout(8, 1, 1), 0).step(0)
    lead = len(ids)
    assert batch.lead == lead and batch.input_BS.shape == (8, LENGTH)
    assert batch.input_BS[:, :lead].tolist() == [list(ids)] * 8
    assert (batch.target_BS[:, :lead] == IGNORE).all() and (batch.first_BS == batch.last_BS)[:, :lead].all()
    for b, row in enumerate(rows[k] for k in range(8)):
        n = len(row.input_ids)
        assert batch.input_BS[b, lead : lead + n].tolist() == row.input_ids.tolist()
        assert batch.target_BS[b, lead : lead + n].tolist() == row.target_ids.tolist()
        assert (batch.target_BS[b, lead + n :] == IGNORE).all()
    assert sum(batch.row_mapped) + sum(batch.row_unmapped) == int((batch.target_BS != IGNORE).sum()), "no position is a target"


def test_with_document_attention_each_document_has_its_own_prefix(dataset: AlignedDataset) -> None:
    bos = 7
    front = Front((bos,), each_document=True)
    rows = Rows(dataset, file_order(dataset), 512, TeacherIds(dataset, front=front), front)
    met = 0
    for k in range(0, len(rows), 5):
        batch = collate([rows[k]], 512)
        n = batch.lead + len(rows[k].input_ids)
        sides = [
            (batch.input_BS[0, :n].numpy(), batch.segment_BS[0, :n].numpy()),
            (batch.teacher_inputs[0], batch.teacher_segments[0]),
        ]
        for read, segment in sides:
            heads = np.flatnonzero(np.diff(segment, prepend=-1))
            assert (read[heads] == bos).all() and np.count_nonzero(read == bos) == len(heads)
            met += len(heads) > 1
    assert met > 10, "hardly a row had two documents"


def losses_by_transformers(model: torch.nn.Module, read: list[int], targets: list[int]) -> Tensor:
    """Of the last len(targets) positions of one row, alone and unpadded."""
    logits = model(torch.tensor([read]), use_cache=False).logits[0].float()
    return F.cross_entropy(logits[-len(targets) :], torch.tensor(targets), reduction="none")


@pytest.mark.parametrize("ids", [(), *FRONTS])
@torch.no_grad()
def test_online_losses_are_those_of_the_row_behind_its_front(
    dataset: AlignedDataset, teacher: Path, ids: tuple[int, ...]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    rows = TrainRows(dataset, LENGTH, 5, TeacherIds(dataset, 256, Front(ids)))
    batches = Batches(rows, Layout(3, 3, 1), 0).step(0)
    opened = open_teacher(teacher, torch.float32, "cpu")
    scored = ReplicatedScorer(opened, None, 300, torch.device("cpu")).score(batches)
    met = 0
    for batch, loss_BU in zip(batches, scored, strict=True):
        for b, targets in enumerate(batch.teacher_targets):
            read = batch.teacher_inputs[b].tolist()
            assert tuple(read[: len(ids)]) == ids
            expected = losses_by_transformers(model, read, targets.tolist())
            assert loss_BU[b, : len(targets)] == pytest.approx(expected, abs=2e-5)
            assert not loss_BU[b, len(targets) :].any()
            met += len(targets)
    assert met > 300


@torch.no_grad()
def test_what_a_teacher_reads_of_a_whole_document_are_the_ids_of_its_tokenizer(
    dataset: AlignedDataset, teacher_tokenizer: Path, tmp_path: Path
) -> None:
    folder = with_front(teacher_tokenizer, tmp_path / "bos", ["<|im_start|>"])
    front = Front(front_of("auto", [tmp_path, folder], "teacher.bos", 49_152))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert front.ids == (tokenizer.convert_tokens_to_ids("<|im_start|>"),)
    met = 0
    for document in range(0, len(dataset), 7):
        rows, text = Rows(dataset, np.array([document]), 100_000, TeacherIds(dataset, front=front)), dataset.text(document)
        if len(rows) and "<|" not in text:  # a control token is plain text here
            row, own = rows[0], tokenizer(text).input_ids
            assert [*row.teacher_lead_ids, *row.teacher_input_ids.tolist()] == own[: len(row.teacher_target_ids)]
            assert row.teacher_target_ids.tolist()[: len(own) - 1] == own[1:]
            met += len(own)
    assert met > 5_000


def test_the_limit_of_the_teacher_counts_the_front(dataset: AlignedDataset) -> None:
    limit, met = 40, 0
    rows = Rows(dataset, file_order(dataset), LENGTH, TeacherIds(dataset, limit, Front((7, 9))))
    for k in range(0, len(rows), 5):
        row = rows[k]
        read = len(row.teacher_lead_ids) + len(row.teacher_input_ids)
        assert read <= limit
        met += MappingStatus.BEYOND_TEACHER in row.mapping
    assert met > 10


def test_evaluation_reads_the_front_and_scores_the_same_text(dataset: AlignedDataset) -> None:
    """Rows of one position more, so that both cut the text alike."""
    arguments = (dataset, dataset.student_byte_lengths)
    plain = list(evaluation_batches(*arguments, LENGTH, Layout(2, 1, 1), 0, limit=20))
    found = list(evaluation_batches(*arguments, LENGTH + 1, Layout(2, 1, 1), 0, 20, Front((7,))))
    assert [(step.tokens, step.text_bytes) for step in plain] == [(step.tokens, step.text_bytes) for step in found]
    for mine, other in zip(found, plain, strict=True):
        assert (mine.batches[0].input_BS[:, 0] == 7).all()
        assert torch.equal(mine.batches[0].target_BS[:, 1:], other.batches[0].target_BS)


def test_an_id_in_the_run_file_overrides_the_tokenizer(teacher_tokenizer: Path, tmp_path: Path) -> None:
    two = with_front(teacher_tokenizer, tmp_path / "two", ["<|im_start|>", "<|im_end|>"])
    assert front_of("auto", [two, teacher_tokenizer], "student.bos", 49_152) == (1, 2)
    assert front_of("auto", [teacher_tokenizer, two], "student.bos", 49_152) == (), "a tokenizer that says nothing has spoken"
    assert front_of("none", [two], "student.bos", 49_152) == () and front_of(5, [two], "student.bos", 6) == (5,)
    with pytest.raises(RunError, match=r"student.bos = 6 .* 6 rows, ids 0 to 5"):
        front_of(6, [two], "student.bos", 6)
    with pytest.raises(RunError, match=r"teacher.bos = 'auto': .* 1 "):
        front_of("auto", [two], "teacher.bos", 1)
