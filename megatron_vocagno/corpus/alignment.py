"""One text, two tokenizers -> the teacher tokens that cover each student token.

This module is for your own code and for looking at texts; builds use `preprocess.aligner`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_vocagno.corpus.spans import Spans
from megatron_vocagno.corpus.spans import align as align_tokens
from megatron_vocagno.corpus.tokens import Tokenizer, Tokens, open_tokenizer


@dataclass(frozen=True, repr=False)
class Alignment:
    """Two tokenizations of a text, without BOS or EOS, and the spans between them.

    student, teacher  ids and byte ends of the N student tokens and the M teacher tokens
    spans             the teacher tokens [first, last) of each of the N student tokens

    Iteration yields, for each student token, its bytes and the bytes of the teacher tokens that cover it. `print` shows a table.
    """

    text: str
    student: Tokens
    teacher: Tokens
    spans: Spans

    def __iter__(self) -> Iterator[tuple[bytes, tuple[bytes, ...]]]:
        covering = self.teacher.pieces(self.text)
        ranges = zip(self.spans.first.tolist(), self.spans.last.tolist(), strict=True)
        for piece, (first, last) in zip(self.student.pieces(self.text), ranges, strict=True):
            yield piece, tuple(covering[first:last])

    def __str__(self) -> str:
        """One line per student token: its position, its text, its range, and the text of each teacher token in the range."""
        tokens = [(_shown(piece), "  ".join(map(_shown, cover)) or "unmapped") for piece, cover in self]
        ranges = [f"[{first}, {last})" for first, last in zip(self.spans.first, self.spans.last, strict=True)]
        width, range_width = (max(map(len, column), default=0) for column in ([student for student, _ in tokens], ranges))
        return "\n".join(
            f"{i:>{len(str(len(tokens)))}}  {student:{width}}  {range_:{range_width}}  {cover}"
            for i, ((student, cover), range_) in enumerate(zip(tokens, ranges, strict=True))
        )

    def __repr__(self) -> str:
        beginning = self.text if len(self.text) <= 40 else self.text[:40] + "…"
        return f"<Alignment of {len(self.student.ids):,} student and {len(self.teacher.ids):,} teacher tokens: {beginning!r}>"


def align(text: str, student: Tokenizer | str | Path, teacher: Tokenizer | str | Path) -> Alignment:
    """Both sides' tokens of a text, and for each student token the range of teacher tokens that contain its bytes.

    student, teacher  a folder, a tokenizer.json or a SentencePiece model, as for `open_tokenizer`. If you align many texts, open
                      each tokenizer once and pass the `Tokenizer`: opening takes a thousand times longer than one sentence.

    >>> pair = align("les êtres humains", "mistral", "smollm2")
    >>> print(pair)
    0  'les'   [0, 1)  'les'
    1  ' '     [1, 2)  b' \\xc3'
    2  'ê'     [1, 3)  b' \\xc3'  b'\\xaa'
    3  'tres'  [3, 5)  't'  'res'
    4  ' hum'  [5, 6)  ' hum'
    5  'ains'  [6, 7)  'ains'
    >>> pair.spans.first.tolist(), pair.spans.last.tolist()
    ([0, 1, 1, 3, 5, 6], [1, 2, 3, 5, 6, 7])

    Alignment compares bytes of the UTF-8 text (docs/method.md, Alignment): here SmolLM2 cuts `ê` after a space into two tokens.
    Two student tokens may share a teacher token, as 1 and 2 do. A token without text, for example a token that is only a dummy
    prefix, is unmapped. An empty text has no tokens.

    The text is not normalized. If a tokenizer normalizes text itself, byte positions change: pass
    `unicodedata.normalize("NFC", text)`, as build_dataset does.

    Raises TokenizerError for a tokenizer that does not exist or loses text, CorpusError if the two do not read the same bytes.
    """
    sides = [side if isinstance(side, Tokenizer) else open_tokenizer(side) for side in (student, teacher)]
    (student_tokens,), (teacher_tokens,) = (side.encode_batch([text]) for side in sides)
    return Alignment(text, student_tokens, teacher_tokens, align_tokens(student_tokens, teacher_tokens))


def _shown(piece: bytes) -> str:
    """A token's text, or its bytes if they are not complete characters."""
    try:
        return repr(piece.decode())
    except UnicodeDecodeError:
        return repr(piece)
