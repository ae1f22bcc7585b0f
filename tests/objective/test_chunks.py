"""Chunks against brute force over bytes, and what the theory says of their weights."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch

from megatron_vocagno.corpus.alignment import align
from megatron_vocagno.corpus.tokens import Tokenizer, open_tokenizer
from megatron_vocagno.objective import guided_loss, summarize
from megatron_vocagno.objective.chunks import compare_chunks, find_chunks
from megatron_vocagno.objective.rule import Rule
from megatron_vocagno.objective.selection import select_tokens
from megatron_vocagno.objective.statistics import STATS
from tests import tokenizers_for_tests as real

TEXTS = [
    *(text[:3000] for name, text in sorted(topics.items())[:12] if len(text) > 500),
    "Donaudampfschifffahrtsgesellschaft — naïve café, 12345678 + 0.001 = …\n\n\t\tx\n",
    "日本語のテキスト 🙂🙃 и по-русски, שלום עולם",
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Tokenizer, Tokenizer]]:
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "own").mkdir()
    paths: list[Path] = [
        real.mistral_tokenizer_path(),
        real.smollm2_tokenizer_folder(folder / "smollm2"),
        real.byte_level_bpe(folder / "own", TEXTS, 500),
    ]
    opened = [open_tokenizer(str(path)) for path in paths]
    return list(itertools.permutations(opened, 2))


def chunks_by_bytes(student_ends: list[int], teacher_ends: list[int]) -> list[int]:
    """The chunk of each token, from the bytes at which both sides have a boundary. -1 for a token without bytes."""
    common = sorted(set(student_ends) & set(teacher_ends))
    starts = [0, *student_ends[:-1]]
    return [
        next(i for i, end in enumerate(common) if b <= end) if a < b else -1 for a, b in zip(starts, student_ends, strict=True)
    ]


def test_chunks_are_the_stretches_between_the_boundaries_of_both_sides(pairs: list[tuple[Tokenizer, Tokenizer]]) -> None:
    met = {"of several student tokens": 0, "of several teacher tokens": 0, "of many": 0}
    for student, teacher in pairs:
        for text in TEXTS:
            pair = align(text, student, teacher)
            want = chunks_by_bytes(pair.student.ends.tolist(), pair.teacher.ends.tolist())
            first, last = (torch.from_numpy(x.astype(np.int64))[None] for x in (pair.spans.first, pair.spans.last))
            found = find_chunks(first, last)
            # chunks without a student token are not numbered: compare by the tokens that share one
            assert torch.equal(found.chunk_BS[0] >= 0, torch.tensor(want) >= 0)
            numbers = {c: i for i, c in enumerate(sorted(set(want) - {-1}))}
            assert found.chunk_BS[0].tolist() == [numbers.get(c, -1) for c in want]
            tokens = torch.bincount(found.chunk_BS[found.chunk_BS >= 0])
            met["of several student tokens"] += int((tokens > 1).sum())
            met["of several teacher tokens"] += int((found.last_C - found.first_C > 1).sum())
            met["of many"] += int(((tokens > 1) & (found.last_C - found.first_C > 1)).sum())
    assert min(met.values()) > 20, met


def test_the_losses_of_a_chunk_are_the_sums_over_its_bytes_in_float64(pairs: list[tuple[Tokenizer, Tokenizer]]) -> None:
    generator = torch.Generator().manual_seed(0)
    for student, teacher in pairs:
        pair = align(TEXTS[0], student, teacher)
        first, last = (torch.from_numpy(x.astype(np.int64))[None] for x in (pair.spans.first, pair.spans.last))
        # a loss of a million before all others: a difference of sums over the row would lose the small ones
        student_BS = torch.rand(1, first.shape[1], generator=generator) * 1e-3
        teacher_BU = torch.rand(1, len(pair.teacher.ids), generator=generator) * 1e-3
        student_BS[0, 0] = teacher_BU[0, 0] = 1e6
        excess_BS, guide_BS, opens_BS = compare_chunks(student_BS, teacher_BU, first, last, torch.ones_like(first).bool())
        chunk_S = find_chunks(first, last).chunk_BS[0]
        for chunk in range(int(chunk_S.max()) + 1):
            (tokens,) = torch.where(chunk_S == chunk)
            l_s = student_BS[0, tokens].double().sum().float()
            l_t = teacher_BU[0, int(first[0, tokens[0]]) : int(last[0, tokens[-1]])].double().sum().float()
            assert (excess_BS[0, tokens] == l_s - l_t).all() and (guide_BS[0, tokens] == l_t / len(tokens)).all()
            assert opens_BS[0, tokens].tolist() == [True] + [False] * (len(tokens) - 1)


def spans_of_words(words: int, letters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each word is one teacher token and so many student tokens."""
    first = torch.arange(words).repeat_interleave(letters)[None]
    return first, first + 1


def test_the_control_variate_leaves_the_mean_gradient_as_it_is() -> None:
    """By enumeration of all texts of two letters, for any student and teacher. The teacher writes a text as one token."""
    torch.manual_seed(0)
    letters = 4
    texts = list(itertools.product(range(letters), repeat=2))
    first, last = spans_of_words(len(texts), 2)
    met = 0
    for _ in range(5):
        opening, following = torch.randn(letters, requires_grad=True), torch.randn(letters, letters, requires_grad=True)
        log_teacher = torch.log_softmax(torch.randn(len(texts)), 0)
        log_first, log_next = torch.log_softmax(opening, 0), torch.log_softmax(following, 1)
        student_BS = -torch.stack([torch.stack([log_first[a], log_next[a, b]]) for a, b in texts]).reshape(1, -1)
        ratio = torch.exp(-student_BS.detach().view(-1, 2).sum(1) - log_teacher)
        clip = float(ratio.max()) * 1.01
        rule = Rule(unit="chunk", weighting="control_variate", strength=1 / clip, clip=clip)
        valid = torch.ones_like(student_BS).bool()
        weight_BS = select_tokens(student_BS.detach(), -log_teacher[None], first, last, valid, rule).weight_BS
        assert torch.allclose(weight_BS.view(-1, 2), (1 - ratio / clip)[:, None].expand(-1, 2), atol=1e-6)
        probability = torch.exp(log_teacher)[:, None]
        means = [
            torch.autograd.grad((probability * w * student_BS.view(-1, 2)).sum(), (opening, following), retain_graph=True)
            for w in (torch.ones(1), weight_BS.view(-1, 2))
        ]
        for plain, weighted in zip(*means, strict=True):
            assert torch.allclose(plain, weighted, atol=1e-6) and plain.abs().max() > 0.01
        # per token, the same weights do not have this property
        rule = Rule(unit="token", weighting="control_variate", strength=1 / clip, clip=clip)
        other_BS = select_tokens(student_BS.detach(), -log_teacher[None], first, last, valid, rule).weight_BS
        biased = torch.autograd.grad((probability * other_BS.view(-1, 2) * student_BS.view(-1, 2)).sum(), following)
        met += int((biased[0] - means[0][1]).abs().max() > 1e-3)
    assert met >= 4


def test_text_of_the_teacher_is_below_the_threshold_no_more_often_than_the_bound() -> None:
    """Words drawn from a teacher, and students that know nothing of it, that imitate it, or that are sure of one letter."""
    generator = torch.Generator().manual_seed(1)
    letters, words = 3, 20_000
    texts = torch.tensor(list(itertools.product(range(letters), repeat=3)))
    log_teacher = torch.log_softmax(torch.randn(len(texts), generator=generator), 0)
    drawn = torch.multinomial(log_teacher.exp(), words, replacement=True, generator=generator)
    first, last = spans_of_words(words, 3)
    students = [torch.randn(letters, generator=generator), torch.zeros(letters), torch.tensor([3.0, 0.0, 0.0])]
    met = 0
    for scores in students:
        student_BS = -torch.log_softmax(scores, 0)[texts[drawn]].reshape(1, -1)
        for t in (0.25, 0.5, 1.0, 2.0):
            got = guided_loss(
                student_BS,
                -log_teacher[drawn][None],
                first,
                last,
                student_BS > 0,
                unit="chunk",
                weighting="threshold",
                threshold=t,
            )
            numbers = summarize(got)
            noise = 4 / math.sqrt(words)
            assert numbers["share_below"] <= math.exp(-t) + noise
            assert numbers["likelihood_ratio"] <= 1 + noise * 4
            assert numbers["share_kept"] == pytest.approx(1 - numbers["share_below"], abs=1e-9)
            met += numbers["share_below"] > 0.01
    assert met > 3


def test_chunks_that_begin_other_chunks_make_the_ratio_larger() -> None:
    """Both models are the same distribution over the words a, ab and abb, but the student writes letters: docs/method.md."""
    # an a is certain, then b follows in two words of three, and another b in one of two
    student_BS = torch.tensor([[0.0, 0.0, math.log(3 / 2), 0.0, math.log(3 / 2), math.log(2)]])
    first = torch.tensor([[0, 1, 1, 2, 2, 2]])
    teacher_BU = torch.full((1, 3), math.log(3))
    got = guided_loss(student_BS, teacher_BU, first, first + 1, first >= 0, unit="chunk", weighting="control_variate")
    assert summarize(got)["likelihood_ratio"] == pytest.approx((3 + 2 + 1) / 3)


def test_a_threshold_of_zero_keeps_what_require_positive_keeps() -> None:
    rng, met = random.Random(0), 0
    for _ in range(100):
        inputs = random_inputs(rng)
        zero = select_tokens(*inputs, Rule(unit="chunk", weighting="threshold", threshold=0.0))
        positive = select_tokens(*inputs, Rule(1.0, unit="chunk", require_positive=True))
        assert torch.equal(zero.weight_BS, positive.weight_BS) and torch.equal(zero.tokens_C, positive.tokens_C)
        met += bool(zero.weight_BS.any()) and not bool(zero.weight_BS.all())
    assert met > 50


def random_inputs(rng: random.Random) -> list[torch.Tensor]:
    rows, width = 2, rng.choice([4, 12])
    cuts = torch.randint(0, 3, (rows, width), generator=torch.Generator().manual_seed(rng.randrange(10**6)))
    first = (cuts > 0).long().cumsum(1)
    last = first + torch.where(cuts == 2, 2, 1)
    last = torch.maximum(last, last.cummax(1).values)
    teacher = torch.tensor([[rng.randint(0, 8) / 2 for _ in range(int(last.max()))] for _ in range(rows)])
    student = torch.tensor([[rng.randint(0, 8) / 2 for _ in range(width)] for _ in range(rows)])
    return [student, teacher, first, last, torch.ones_like(first).bool()]


def test_with_one_tokenizer_a_chunk_is_a_token() -> None:
    torch.manual_seed(0)
    student, teacher = torch.rand(3, 40) * 4, torch.rand(3, 40) * 4
    first = torch.arange(40).expand(3, 40)
    inputs = student, teacher, first, first + 1, torch.ones(3, 40).bool()
    for changes in ({}, {"weighting": "threshold"}, {"weighting": "control_variate"}):
        chunk = select_tokens(*inputs, Rule(0.6, "sum", unit="chunk", **changes))  # type: ignore[arg-type]
        token = select_tokens(*inputs, Rule(0.6, "sum", **changes))  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in zip(vars(chunk).values(), vars(token).values(), strict=True))
        assert 0 < chunk.weight_BS.sum() < 120


def test_what_cannot_be_compared_follows_unmapped() -> None:
    """A chunk over the whole row, a NaN of either model, padding inside of a chunk, and a token without text inside of one."""
    ones, nan, inf = torch.ones(1, 4), torch.nan, torch.inf
    first, last = torch.tensor([[0, 0, 0, 0]]), torch.tensor([[1, 1, 1, 1]])
    rule = Rule(unit="chunk", weighting="threshold", unmapped="exclude")

    def weights(student: torch.Tensor, teacher: list[float], valid: list[int] | None = None, rule: Rule = rule) -> list[float]:
        is_valid = torch.tensor([valid or [1, 1, 1, 1]]).bool()
        weight: list[float] = select_tokens(student, torch.tensor([teacher]), first, last, is_valid, rule).weight_BS[0].tolist()
        return weight

    include = Rule(unit="chunk", weighting="threshold")
    assert weights(ones, [5.9]) == [1] * 4 and weights(ones, [6.0]) == [0] * 4  # D > -2
    assert weights(ones, [nan]) == [0] * 4 and weights(ones, [nan], rule=include) == [1] * 4
    broken = torch.tensor([[1.0, nan, 1.0, 1.0]])
    assert weights(broken, [1.0]) == [0] * 4 and weights(broken, [1.0], rule=include) == [0] * 4
    assert weights(ones, [1.0], [1, 1, 0, 1]) == [0] * 4 and weights(ones, [1.0], [1, 1, 0, 1], include) == [1, 1, 0, 1]
    infinite = torch.tensor([[1.0, inf, 1.0, 1.0]])
    assert weights(infinite, [1.0]) == [1] * 4 and weights(infinite, [inf]) == [0] * 4
    assert weights(ones, [inf]) == [0] * 4 and weights(ones, [-inf]) == [1] * 4

    first, last = torch.tensor([[0, 1, 0, 2]]), torch.tensor([[2, 1, 2, 3]])
    got = select_tokens(ones, torch.tensor([[1.0, 2.0, 0.0]]), first, last, first >= 0, rule)
    assert got.weight_BS.tolist() == [[1, 0, 1, 1]]
    assert got.guide_BS[0].tolist()[::2] == [1.5, 1.5] and got.guide_BS[0, 1].isnan()
    assert dict(zip(STATS, got.stats.tolist(), strict=True))["units"] == 2


def test_ranges_that_are_not_ascending_are_refused() -> None:
    for first, last in (([1, 0], [2, 1]), ([0, 0], [2, 1])):
        with pytest.raises(ValueError, match="expected ascending ranges"):
            find_chunks(torch.tensor([first]), torch.tensor([last]))


def test_numbers_that_would_make_a_weight_negative_are_refused() -> None:
    with pytest.raises(ValueError, match="smallest weight is 1 - strength \\* clip = -1"):
        Rule(weighting="control_variate", strength=0.5, clip=4)
    with pytest.raises(ValueError, match="threshold = -1: expected nats, at least 0"):
        Rule(weighting="threshold", threshold=-1)
    with pytest.raises(ValueError, match="require_positive applies only to weighting 'top_k'"):
        Rule(weighting="threshold", require_positive=True)
