"""The baselines that compare distributions: the distances and the loss are the same in every layout. Uses real processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from megatron_vocagno.batch.front import Front
from megatron_vocagno.batch.loader import IGNORE, Batch, Batches, Layout, TrainRows
from megatron_vocagno.batch.pack import TeacherIds
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.engine.distilling import Distiller
from megatron_vocagno.errors import RunError
from megatron_vocagno.model.teacher import open_teacher
from megatron_vocagno.objective.distance import Kind
from megatron_vocagno.run_file import load_run
from tests import tokenizers_for_tests as real
from tests.datasets import build_dataset
from tests.model.tiny import SIZES, write_model
from tests.runs import Case, metrics, spawn

LLAMA = {**SIZES, "model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": False}
FEW, MANY = 400, 900
"""Ids of two tokenizers. The heads of all models have more rows, as many do."""

WEIGHT = 1.5
STEPS = 3
HALF: dict[str, Any] = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
RUNS: dict[str, tuple[Kind, int, list[str], int]] = {
    "uld": ("uld", 1, [], 1),
    "uld-dp2": ("uld", 2, [], 1),
    "uld-zero3-dp2": ("uld", 2, ["parallel.activation_checkpointing=true"], 3),
    "kld": ("kld", 1, ["data.attention=document"], 1),
    "kld-zero2-dp2": ("kld", 2, ["data.attention=document", "teacher.tokens_per_batch=10000"], 2),
}


def write_tokenizer(folder: Path, size: int) -> Path:
    """A byte-level BPE of its own, learned from the texts, that puts <s> (1) in front of a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["</s>", "<s>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(real.texts()[:40], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Case]:
    """A student of FEW ids, with a teacher of MANY, and with one of the same."""
    folder, texts = tmp_path_factory.mktemp("distilling"), real.texts()
    few, many = write_tokenizer(folder / "few", FEW), write_tokenizer(folder / "many", MANY)
    write_model(folder / "student", {**LLAMA, "vocab_size": FEW + 5})
    cases: dict[Kind, Case] = {}
    kinds: tuple[tuple[Kind, Path, int], ...] = (("uld", many, MANY + 30), ("kld", few, FEW + 60))
    for seed, (kind, tokenizer, head) in enumerate(kinds, 1):
        root = folder / kind
        # paragraphs: rows of several documents
        train = build_dataset(
            root / "train", "\n\n".join(texts[:6]).split("\n\n") + real.multilingual_texts()[:8], few, tokenizer
        )
        valid = build_dataset(root / "valid", texts[12:14], few, tokenizer)
        spec = {**LLAMA, "model_type": "gemma2", "head_dim": 12, "pad_token_id": None, "query_pre_attn_scalar": 12}
        spec |= {"vocab_size": head, "max_position_embeddings": 256, "sliding_window": 32, "final_logit_softcapping": 4.0}
        teacher = write_model(root / "teacher", {**spec, "tie_word_embeddings": True}, seed)
        cases[kind] = Case(root, train.path, valid.path, teacher, {"model_type": "llama"})
    return cases


def student_of(case: Case) -> Path:
    return case.folder.parent / "student"


def probabilities(logits_V: Tensor, ids: int) -> Tensor:
    return logits_V[:ids].double().softmax(0)


def expected_step(case: Case, kind: Kind, rows: int, documents: bool) -> dict[str, float]:
    """Of the first step, from whole distributions of transformers' own models, one token after the other."""
    data = AlignedDataset.open(case.train)
    front = Front((1,), documents)
    batch = Batches(TrainRows(data, 64, 0, TeacherIds(data, front=front), front), Layout(rows, 1, 1), 0).step(0)[0]
    assert {len(read) - len(targets) for read, targets in zip(batch.teacher_inputs, batch.teacher_targets, strict=True)} <= {0, 1}
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        for folder in (student_of(case), case.teacher)
    )
    assert int(batch.segment_BS.max()) > 0, "no row has two documents"
    losses, distances, mapped = [], [], 0
    for b in range(rows):
        student_SV = whole_row(student, batch.input_BS[b], batch.segment_BS[b], documents)
        inputs, segments = (torch.from_numpy(part[b]) for part in (batch.teacher_inputs, batch.teacher_segments))
        teacher_UW = whole_row(teacher, inputs.long(), segments, documents)
        reached, lead = 0, batch.teacher_leads[b]
        for s, target in enumerate(batch.target_BS[b].tolist()):
            if target == IGNORE:
                continue
            losses.append(F.cross_entropy(student_SV[s].double(), torch.tensor(target)).item())
            first, last = int(batch.first_BS[b, s]), int(batch.last_BS[b, s])
            mapped += first < last
            if first < last and first >= reached:
                one, other = (
                    probabilities(student_SV[s], FEW),
                    probabilities(teacher_UW[lead + first], MANY if kind == "uld" else FEW),
                )
                if kind == "uld":
                    ranked = torch.zeros(max(len(one), len(other)), dtype=torch.float64)
                    ranked[: len(one)] += torch.tensor(sorted(one.tolist(), reverse=True), dtype=torch.float64)
                    ranked[: len(other)] -= torch.tensor(sorted(other.tolist(), reverse=True), dtype=torch.float64)
                    distances.append(ranked.abs().sum().item())
                else:
                    distances.append((other * (other.log() - one.log())).sum().item())
            reached = max(reached, last)
    assert len(distances) == mapped if kind == "kld" else 50 < len(distances) < mapped - 20
    mean_loss, mean_distance = sum(losses) / len(losses), sum(distances) / len(distances)
    return {
        "loss/all_tokens": mean_loss,
        "distance/mean": mean_distance,
        "distance/share_compared": len(distances) / len(losses),
        "loss/train": mean_loss + WEIGHT * mean_distance,
    }


@torch.no_grad()
def whole_row(model: torch.nn.Module, ids_S: Tensor, segment_S: Tensor, documents: bool) -> Tensor:
    """Logits [S, V] of a row, or of each of its documents alone."""
    if not documents:
        logits_SV: Tensor = model(input_ids=ids_S[None]).logits[0]
        return logits_SV
    parts = [ids_S[segment_S == segment] for segment in range(int(segment_S.max()) + 1)]
    return torch.cat([model(input_ids=part[None]).logits[0] for part in parts])


def lines(pairs: dict[Kind, Case], name: str) -> list[dict[str, float]]:
    kind, processes, overrides, stage = RUNS[name]
    case = pairs[kind]
    if not case.out(name).exists():
        asked = [f"guidance.objective={kind}", f"guidance.distance_weight={WEIGHT}", f"training.steps={STEPS}"]
        asked.append(f"student.pretrained={student_of(case)}")
        case.run(name, processes, [*asked, *overrides], {"zero_optimization": {"stage": stage}})
    return metrics(case.out(name))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["uld", "kld"])
def test_the_first_step_is_that_of_whole_distributions(pairs: dict[Kind, Case], kind: Kind) -> None:
    said = [line for line in lines(pairs, kind) if "loss/train" in line]
    assert len(said) == STEPS and said[-1]["loss/train"] < said[0]["loss/train"]
    for name, number in expected_step(pairs[kind], kind, 8, documents=kind == "kld").items():
        assert said[0][name] == pytest.approx(number, rel=1e-5), name
    assert said[0]["distance/mean"] > 0.05
    assert not any(name.startswith("guidance/") for name in said[0])


@pytest.mark.slow
@pytest.mark.parametrize(("one", "other"), [("uld", "uld-dp2"), ("uld", "uld-zero3-dp2"), ("kld", "kld-zero2-dp2")])
def test_every_layout_learns_the_same(pairs: dict[Kind, Case], one: str, other: str) -> None:
    compared = 0
    for a, b in zip(lines(pairs, one), lines(pairs, other), strict=True):
        for name in ("loss/train", "loss/all_tokens", "distance/mean", "optimizer/grad_norm", "eval/bits_per_byte"):
            assert (name in a) == (name in b)
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-5), (name, a["step"])
                compared += 1
        assert a.get("distance/share_compared") == b.get("distance/share_compared")
    assert compared == 4 * STEPS + 2
    # micro-batches of different sizes: there a mean of means would differ
    kind = RUNS[one][0]
    batches = Batches(TrainRows(AlignedDataset.open(pairs[kind].train), 64, 0), Layout(2, 4, 1), 0).step(0)
    assert len({sum(batch.row_mapped) for batch in batches}) > 1


@pytest.mark.slow
def test_a_tied_student_in_bf16_and_zero3_is_as_far_from_its_teacher(pairs: dict[Kind, Case]) -> None:
    """The head that is embedding too is gathered, in 16 bits, where its distribution is taken; so is the teacher's."""
    case = pairs["kld"]
    tied = write_model(case.folder / "tied", {**LLAMA, "vocab_size": FEW + 5, "tie_word_embeddings": True})
    asked = ["guidance.objective=kld", f"student.pretrained={tied}", "training.steps=2", "eval.rows=2"]
    whole = case.run("tied", 1, asked)
    half = case.run("tied-half", 2, [*asked, "teacher.dtype=bfloat16"], {**HALF, "zero_optimization": {"stage": 3}})
    compared = 0
    for a, b in zip(metrics(whole), metrics(half), strict=True):
        if "distance/mean" in a:
            assert b["distance/share_compared"] == a["distance/share_compared"]
            # they differ by 1e-4 and 2e-4 of it
            assert b["distance/mean"] == pytest.approx(a["distance/mean"], rel=1e-3)
            assert b["distance/mean"] != pytest.approx(a["distance/mean"], rel=1e-6), "not in bf16"
            compared += 1
    assert compared == 2


@pytest.mark.slow
def test_evaluation_knows_nothing_of_the_teacher(pairs: dict[Kind, Case]) -> None:
    case = pairs["uld"]
    plain = case.run("clm", 1, ["guidance.objective=clm", f"student.pretrained={student_of(case)}", "training.steps=1"])
    uld, clm = (next(line for line in run if "eval/loss" in line) for run in (lines(pairs, "uld"), metrics(plain)))
    assert uld["step"] == clm["step"] == 0 and uld["eval/bits_per_byte"] == clm["eval/bits_per_byte"] > 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["uld", "kld"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(pairs: dict[Kind, Case], kind: Kind) -> None:
    case = pairs["kld"]
    twin = student_of(case)
    overrides = [f"guidance.objective={kind}", f"student.pretrained={twin}", f"teacher.path={twin}", "training.steps=1"]
    overrides.append("data.row_length=48")  # as one row of the teacher's may be longer than the student's
    [first] = [line for line in metrics(case.run(f"twin-{kind}", 1, overrides)) if "loss/train" in line]
    assert first["distance/mean"] < 1e-5 and first["distance/share_compared"] > 0.9
    assert first["loss/train"] == pytest.approx(first["loss/all_tokens"], abs=1e-5)


@pytest.mark.slow
def test_a_divergence_over_two_vocabularies_is_refused_before_anything_is_written(pairs: dict[Kind, Case]) -> None:
    case = pairs["uld"]
    command = case.command("two", ["guidance.objective=kld", f"student.pretrained={student_of(case)}"])
    finished = spawn(1, command)
    data = AlignedDataset.open(case.train)
    assert finished.returncode == 2 and finished.stdout.count("error: ") == 1 and "Traceback" not in finished.stdout
    for side, ids in ((data.student_tokenizer, FEW), (data.teacher_tokenizer, MANY)):
        assert f"{side.fingerprint} ({ids:,} ids)" in finished.stdout
    assert "guidance.objective = 'uld'" in finished.stdout and not case.out("two").exists()


@pytest.mark.parametrize("documents", [False, True])
def test_a_teacher_predicts_of_each_row_what_it_does_of_the_row_alone(pairs: dict[Kind, Case], documents: bool) -> None:
    case = pairs["uld"]
    teacher = open_teacher(case.teacher, torch.float32, "cpu")
    model = AutoModelForCausalLM.from_pretrained(case.teacher, dtype=torch.float32, attn_implementation="eager")
    data = AlignedDataset.open(case.train)
    met = cut = 0
    for batch in Batches(TrainRows(data, 64, seed=2), Layout(5, 4, 1), 0).step(0):
        for budget in (1, 150, 10**6):
            found = Distiller(teacher, "uld", (FEW, MANY), budget, torch.device("cpu"), documents).reference(batch)
            assert found.head_WH.shape[0] == MANY and not found.head_WH.requires_grad and not found.hidden_NH.requires_grad
            check_reference(found.tokens_N.tolist(), 4 * (found.hidden_NH @ found.head_WH.T / 4).tanh(), batch, model, documents)
            met += len(found.tokens_N)
        cut += sum(int(segments.max()) for segments in batch.teacher_segments)
    assert met > 2000 and cut > 5


def check_reference(tokens_N: list[int], logits_NW: Tensor, batch: Batch, model: torch.nn.Module, documents: bool) -> None:
    whole = [
        whole_row(model, torch.from_numpy(ids).long(), torch.from_numpy(segments), documents)
        for ids, segments in zip(batch.teacher_inputs, batch.teacher_segments, strict=True)
    ]
    places = [divmod(place, 64) for place in tokens_N]
    expected = torch.stack([whole[b][int(batch.first_BS[b, s]), :MANY] for b, s in places])
    torch.testing.assert_close(logits_NW, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("teacher.placement=cached", "needs one teacher with placement 'replicated'"),
        ("parallel.pipeline_stages=2", "does not run in a pipeline"),
    ],
)
def test_what_has_no_distributions_at_hand_is_refused(pairs: dict[Kind, Case], override: str, words: str) -> None:
    run, *_ = pairs["uld"].command("refused", ["guidance.objective=uld"])
    with pytest.raises(RunError, match=words):
        load_run(Path(run), ["guidance.objective=uld", override])
