"""examples/with_hf_trainer.py computes the loss of the method, and runs from the command line."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from examples.with_hf_trainer import GuidedTrainer, main, read_texts
from megatron_vocagno.corpus import Tokenizer, open_tokenizer
from megatron_vocagno.errors import UserError
from megatron_vocagno.integrations.text_collator import TextCollator
from megatron_vocagno.model.teacher import open_teacher
from megatron_vocagno.objective import Rule, select_tokens
from megatron_vocagno.preprocess.documents import read
from megatron_vocagno.preprocess.inputs import cut
from tests import tokenizers_for_tests as real
from tests.library.naive import Naive
from tests.objective import plain

pytestmark = pytest.mark.slow


@pytest.fixture
def trainer(demo: Path, tmp_path: Path, tokenizers: tuple[Tokenizer, Tokenizer]) -> GuidedTrainer:
    return GuidedTrainer(
        AutoModelForCausalLM.from_pretrained(demo / ".demo" / "student-hf"),
        TrainingArguments(str(tmp_path), report_to=[], remove_unused_columns=False),
        data_collator=TextCollator(*tokenizers, length=512),
        teacher=open_teacher(demo / ".demo" / "teacher", torch.float32, "cpu"),
    )


def test_a_step_of_two_micro_batches_has_the_loss_and_the_gradient_of_the_method(trainer: GuidedTrainer, naive: Naive) -> None:
    texts = real.multilingual_texts()
    # lengths differ, so that the mean of the two means differs from the loss
    parts = [texts[:2], ["Zoë", texts[4], "x"]]
    batches, planned = trainer.get_batch_samples(
        iter([trainer.data_collator([{"text": text} for text in part]) for part in parts]), 2, torch.device("cpu")
    )
    trainer.model.train()
    losses = [trainer.compute_loss(trainer.model, batch, num_items_in_batch=planned) for batch in batches]
    sum(losses).backward()

    kept = [naive.kept(part) for part in parts]
    true = sum(map(sum, kept)) / sum(map(len, kept))
    true.backward()
    assert float(planned) == sum(map(len, kept))
    assert sum(losses).item() == pytest.approx(true.item(), rel=1e-5)
    means = [sum(part).item() / len(part) for part in kept]
    assert abs(sum(means) / 2 - true.item()) > 1e-3, "the case must distinguish one division from two"
    for mine, theirs in zip(trainer.model.parameters(), naive.student.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-6)


def test_evaluation_divides_by_its_own_tokens_and_adds_no_statistics(trainer: GuidedTrainer, naive: Naive) -> None:
    texts = real.multilingual_texts()[:3]
    found = trainer.evaluate([{"text": text} for text in texts])
    kept = naive.kept(texts)
    assert found["eval_loss"] == pytest.approx(sum(kept).item() / len(kept), rel=1e-4)
    assert not trainer.stats


def test_a_rule_of_chunks_gives_the_weights_of_plain_python(
    trainer: GuidedTrainer, tokenizers: tuple[Tokenizer, Tokenizer]
) -> None:
    """The text is cut at a length that divides a chunk."""
    trainer.rule = Rule(unit="chunk", weighting="control_variate")
    with pytest.raises(ValueError, match="the rule has unit 'chunk'"):
        GuidedTrainer(
            trainer.model, trainer.args, data_collator=trainer.data_collator, teacher=trainer.teacher, rule=trainer.rule
        )
    texts, met = [{"text": text} for text in real.multilingual_texts()], 0
    for length in range(3, 24):
        batch = TextCollator(*tokenizers, length=length, unit="chunk")(texts)
        whole = TextCollator(*tokenizers, length=512)(texts)
        loss, valid = torch.rand(batch["labels"].shape), batch["labels"] != -100
        teacher = torch.rand(batch["teacher_labels"].shape)
        got = select_tokens(loss, teacher, batch["first"], batch["last"], valid, trainer.rule)
        mapped = batch["first"] < batch["last"]
        for row in range(len(texts)):
            inputs = loss, teacher, batch["first"], batch["last"], valid
            chunks = plain.chunks(*(x[row].tolist() for x in inputs))
            for chunk in chunks:
                # the losses of the chunk are those of the complete text, from the first to the last of its tokens
                end = chunk.tokens[-1]
                following = int(whole["first"][row, end + 1]) if end + 1 < whole["first"].shape[1] else 10**6
                assert following >= int(batch["last"][row, end]) or whole["labels"][row, end + 1] == tokenizers[0].eos_id
                want = 1 - 0.25 * min(math.exp(-chunk.excess), 4)
                assert got.weight_BS[row, chunk.tokens].tolist() == pytest.approx([want] * len(chunk.tokens), abs=1e-5)
            met += int((valid & ~mapped)[row, length - 1])
    assert trainer._planned(batch) == int(valid.sum()) and met > 3


def test_the_command_trains_and_saves_a_model(
    demo: Path,
    tokenizers: tuple[Tokenizer, Tokenizer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(demo)
    student = shutil.copytree(".demo/student-hf", tmp_path / "student")
    (student / "chat_template.jinja").write_text("{{ messages | length }}")
    assert main(["--student", str(student), "--steps", "2", "--length", "32", "--out", str(tmp_path / "out")]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ messages | length }}"
    printed = capsys.readouterr().out
    assert printed.count("share_kept") == 2 and "'loss'" in printed
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (".demo/student-hf", tmp_path / "out"))
    assert not torch.equal(before.get_input_embeddings().weight, after.get_input_embeddings().weight)
    assert open_tokenizer(tmp_path / "out", "huggingface").fingerprint == tokenizers[0].fingerprint


def test_the_corpus_is_read_like_that_of_a_build(tmp_path: Path) -> None:
    texts = ["one\u2028two", "NEL \x85, form feed \x0c, \x1c\x1d\x1e", "\u2029", "CR \r LF \n", "  spaces ", "\ufeff mark"]
    rows = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts]
    file = tmp_path / "a.jsonl"
    for end in (b"\n", b"\r\n"):
        file.write_bytes(b"\xef\xbb\xbf" + end.join([*rows, b"", b'{"text": ""}', *rows]))
        built = [document.text for document in read(cut(file, 10**9)[0], "text", None, len) if document.text]
        assert [row["text"] for row in read_texts(file)] == built == texts * 2


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": null}', '"text" is not a string: None'),
        (b'{"text": 5}', '"text" is not a string: 5'),
        (b'{"body": "x"}', 'not JSON with a "text": KeyError'),
        (b'{"text": "\xff"}', 'not JSON with a "text": UnicodeDecodeError'),
        (b'{"text": "\\ud800"}', 'not JSON with a "text": UnicodeEncodeError'),
        (b"[1]", 'not JSON with a "text": TypeError'),
    ],
)
def test_a_line_without_a_text_is_named(line: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one\xe2\x80\xa8two"}\n\n' + line + b"\n")
    with pytest.raises(UserError) as refusal:
        read_texts(tmp_path / "a.jsonl")
    assert str(refusal.value).startswith(f"{tmp_path}/a.jsonl, line 3: {reason}")


def test_the_command_reports_a_missing_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--student", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: no model at {tmp_path}")
