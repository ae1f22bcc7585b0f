"""The page about a dataset, read as a browser and a stranger would."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from megatron_vocagno.batch.front import Front
from megatron_vocagno.batch.pack import SLACK, MappingStatus, Rows, TeacherIds
from tests import tokenizers_for_tests as real
from tests.datasets import build_dataset
from tests.tools.signs import NOT_THE_TEXT, text_of
from tools.preprocess import report_page
from tools.preprocess.report import main
from tools.preprocess.report_page import Overlap, bad_records, measure_rows, overlaps, page, sampled

ROW = 128
VOID = {"meta", "br"}
TAGS = """html head meta title style body header main h1 h2 h3 p dl div dt dd small table caption thead tbody tr th td
          svg rect line text desc figure figcaption article span code br details summary"""
ATTRIBUTES = """lang charset name content http-equiv class title role aria-hidden scope colspan
                width height x y x1 x2 y1 y2 rx dx text-anchor"""


class Reader(HTMLParser):
    """Tags in their order, and the text of each table row and tile."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag in ("tr", "dl"):
            self.rows.append([])
        if tag in ("th", "td", "dt", "dd"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.rows and self.rows[-1] and {"th", "td", "dt", "dd"} & set(self.open):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def source(small) -> str:
    return page(small.dataset, 1000, 0, ROW)


@pytest.fixture(scope="module")
def read(source) -> Reader:
    return Reader(source)


def test_tags_are_closed_and_none_is_foreign(read):
    assert read.open == []
    assert read.tags <= set(TAGS.split())
    assert read.attributes <= set(ATTRIBUTES.split()), "no src, href, style or on…: nothing is fetched, nothing runs"


def test_nothing_is_fetched_and_nothing_runs(source):
    assert "default-src 'none'; style-src 'unsafe-inline'" in source
    style = re.search(r"<style>(.*?)</style>", source, re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style
    assert source.count("<style>") == 1 and "<script" not in source and "<link" not in source


def test_hostile_documents_are_text(small, texts, monkeypatch):
    monkeypatch.setattr(report_page, "sampled", lambda count, sample, seed: np.arange(min(count, 3)))
    source = page(small.dataset, 1000, 0, ROW)
    assert "<script" not in source and "&lt;" in source
    read = Reader(source)
    assert read.tags <= set(TAGS.split()) and read.attributes <= set(ATTRIBUTES.split())
    assert "alert" in read.text and "totals" in read.text
    for character in "\x1b\u202e\x9b":
        assert character in texts[1] and character not in source


def test_hostile_ids_and_bad_lines_are_text_and_their_reasons_are_counted(with_ids):
    source = page(with_ids, 1000, 0, 2048)
    read = Reader(source)
    assert read.tags <= set(TAGS.split()) and read.attributes <= set(ATTRIBUTES.split())
    assert "<i␣onclick=x>&amp;" in read.text and "␛[31m[red]" in read.text
    assert "Reasons of the 4 quarantined lines" in read.text
    counts = {row[0]: row[-1] for row in read.rows if row}
    assert counts["bad lines"] == "4"
    assert counts["'text' is a number, not a string"] == "2"
    assert any("<b>&" in reason and count == "1" for reason, count in counts.items())


def test_a_quarantine_is_read_up_to_a_limit_and_that_is_said(with_ids, monkeypatch):
    assert bad_records(with_ids).complete and bad_records(with_ids).lines == 4
    monkeypatch.setattr(report_page, "QUARANTINE_BYTES", 400)
    assert not bad_records(with_ids).complete and bad_records(with_ids).lines == 2


def test_counts_are_those_of_the_documents(small, texts, read):
    dataset, widths = small.dataset, np.zeros(9, int)
    ends = zero_width = 0
    for i in range(len(dataset)):
        document = dataset[i]
        width = document.spans.last - document.spans.first
        ends += document.student_ids[-1] == dataset.student_tokenizer.eos_id
        zero_width += int((width[:-1] == 0).sum())
        widths += np.bincount(np.minimum(width, 8), minlength=9)
    mapped = int(widths[1:].sum())
    cells = {row[0]: row[1:] for row in reversed(read.rows) if row}  # the first of a name stands
    for width in range(1, 5):
        share = f"{100 * widths[width] / mapped:.3f} %"
        assert cells[str(width)][1:] == [share, f"{widths[width]:,}"] or widths[width] < 10, width
    assert widths[1] > 1000 and widths[2] > 100
    total = mapped + ends + zero_width
    assert cells["end of a document"] == [f"{100 * ends / total:.3f} %", f"{ends:,}"]
    assert cells["no text: a separate dummy prefix"] == [f"{100 * zero_width / total:.3f} %", f"{zero_width:,}"]
    assert ends == len(texts) and zero_width > 5
    tiles = next(row for row in read.rows if row and row[0] == "Documents")
    values = dict(zip(tiles[::2], tiles[1::2], strict=True))
    assert values["Documents"].startswith(f"{len(texts)}in ")
    assert values["Student tokens"].startswith(f"{total:,}")
    assert values["Teacher tokens"].startswith(f"{int(dataset.teacher_lengths.sum()):,}")
    assert values["Mapped"].startswith(f"{100 * mapped / total:.3f} %")
    assert values["IoS"].startswith("100 %")
    n_bytes = sum(len(text.encode()) for text in texts)
    assert values["Text"].startswith(f"{n_bytes / 1e6:.2f} MB")


def test_rows_are_those_of_training(small):
    dataset = small.dataset
    order = sampled(len(dataset), 1000, 0)
    assert sorted(order) == list(range(len(dataset)))
    measured = measure_rows(dataset, order, ROW, 0)
    front = Front((real.MISTRAL_BOS,))
    rows = Rows(dataset, order, ROW, front=front)
    whole = [rows[k] for k in range(len(rows) - 1)]
    lengths = [len(row.teacher_input_ids) for row in whole]
    assert measured.rows == len(whole) > 50
    assert measured.by_mapping == {k.name: sum(int((row.mapping == k).sum()) for row in whole) for k in MappingStatus}
    assert measured.by_mapping["NO_CONTEXT"] > 0
    assert (measured.teacher_mean, measured.teacher_max) == (np.mean(lengths), max(lengths))
    assert measured.starts == sum(measured.backs) == len(whole) - 1
    assert measured.backs[0] < measured.starts and len(measured.backs) <= SLACK + 1
    inside = 0
    for k in range(1, len(whole)):
        piece = rows.pieces(k)[0]
        spans = dataset.spans(piece.document)
        inside += piece.start > 0 and spans.first[piece.start] != spans.last[piece.start - 1]
    assert measured.inside == inside > 0
    assert [capacity.positions for capacity in measured.capacities][:2] == [ROW // 2, ROW * 3 // 4]
    assert measured.capacities[-1].rows == measured.capacities[-1].targets == 0
    for capacity in measured.capacities:
        limited = Rows(dataset, order, ROW, TeacherIds(dataset, capacity.positions), front)
        beyond = sum(int((limited[k].mapping == MappingStatus.BEYOND_TEACHER).sum()) for k in range(len(whole)))
        assert capacity.targets == beyond
        assert capacity.rows == sum(length > capacity.positions for length in lengths)
    assert measured.capacities[0].targets > 500


def test_a_sample_is_seeded_and_without_repetition():
    assert sampled(1000, 10, 3).tolist() == sampled(1000, 10, 3).tolist() != sampled(1000, 10, 4).tolist()
    assert len(set(sampled(6_000_000, 5000, 0).tolist())) == 5000


def test_vocabularies_overlap_as_counted_by_the_tokenizers_themselves(small):
    import sentencepiece
    import tokenizers

    model = sentencepiece.SentencePieceProcessor(str(real.mistral_tokenizer_path()))
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    # bytes that the model itself writes for a piece after another one, so that no space is stripped
    lead = model.piece_to_id("a")
    control = {i for i in range(len(pieces)) if model.is_control(i) or model.is_unknown(i)}
    text = {
        bytes([int(p[3:5], 16)]) if model.is_byte(i) else model.decode([lead, i])[1:].encode()
        for i, p in enumerate(pieces)
        if i not in control
    }
    # characters of the byte alphabet, as the library maps the bytes of a text that has them all
    every = "".join(map(chr, [*range(0x800), *range(0x800, 0xD800, 64), *range(0xE000, 0x110000, 4096)]))
    alphabet = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(every)[0][0]
    byte_of = dict(zip(alphabet, every.encode(), strict=True))
    teacher = tokenizers.Tokenizer.from_file(str(small.dataset.teacher_tokenizer.path / "tokenizer.json"))
    theirs = teacher.get_vocab(with_added_tokens=False)
    special = {token.content for token in teacher.get_added_tokens_decoder().values()}
    their_text = {bytes(byte_of[c] for c in p) for p in theirs if p not in special}
    by_string, by_bytes = overlaps(small)
    assert by_string == Overlap("strings as written", len(set(pieces) & set(theirs)), len(pieces), len(theirs))
    assert by_bytes == Overlap("bytes of text", len(text & their_text), len(text), len(their_text))
    assert by_bytes.common > 2 * by_string.common > 10_000


def test_a_vocabulary_overlaps_with_itself_whole(small, monkeypatch):
    monkeypatch.setattr(small, "teacher", small.student)
    for overlap in overlaps(small):
        assert overlap.common == overlap.student == overlap.teacher > 30_000


def test_the_same_dataset_and_seed_give_the_same_bytes(small, source, tmp_path, capsys):
    out = tmp_path / "report.html"
    assert main([str(small.dataset.path), "--out", str(out), "--row-length", str(ROW)]) == 0
    assert out.read_text(encoding="utf-8") == source
    assert f"{out.stat().st_size:,} bytes" in capsys.readouterr().out
    assert page(small.dataset, 1000, 1, ROW) != source


def test_pictures_are_described(source):
    charts = re.findall(r'<svg [^>]*role="img">\n<title>(.+?)</title>\n<desc>(.+?)</desc>', source)
    assert len(charts) == source.count('role="img"') == 2
    assert all("mean" in description and "p99" in description for _, description in charts)
    assert source.count("<svg") == len(charts) + source.count('aria-hidden="true"><rect')


def test_examples_show_their_documents(small, texts, source):
    order = sampled(len(small.dataset), 1000, 0)[: report_page.EXAMPLES]
    articles = re.findall(r"<article.*?</article>", source, re.DOTALL)
    assert len(articles) == report_page.EXAMPLES
    whole = 0
    for i, article in zip(order.tolist(), articles, strict=True):
        assert f"Document {i} " in article
        if NOT_THE_TEXT not in texts[i]:
            shown = text_of(html.unescape("".join(re.findall(r'<span class="[oe ]*">(.*?)</span>', article))))
            beneath = text_of(
                html.unescape("".join(re.findall(r'<span class="t[oe ]*" aria-hidden="true">(.*?)</span>', article)))
            )
            assert shown == beneath == texts[i][: len(shown)]
            assert shown == texts[i] or "the first" in article
            whole += shown == texts[i]
    assert whole > 5


def test_the_page_is_small_whatever_the_documents(tmp_path, teacher_tokenizer, monkeypatch):
    texts = [text * 5_000 for text in ("<&\">'", "\U0010fffd", "\x00", "</", "a", "☃\u0301")] * 2
    dataset = build_dataset(tmp_path / "data", texts, real.mistral_tokenizer_path(), teacher_tokenizer)
    monkeypatch.setattr(report_page, "MOST_SHARDS", 2)
    source = page(dataset, 1000, 0, 2048)
    assert source.count("<article") == 10
    assert f"{len(dataset.manifest.shards)} shards, the first 2" in source
    assert len(source.encode()) < 2_000_000
    assert Reader(source).tags <= set(TAGS.split())
