"""The two-pointer walk of `aligner`, compiled by numba once and kept in its cache. The output equals the numpy backend's."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from megatron_vocagno.corpus.spans import ANCHOR_EVERY, ESCAPE, WIDEST
from megatron_vocagno.corpus.tokens import UNSURE


def walk(*arguments: Any) -> NDArray[np.int64]:
    """Compiled on first use, and again in each process if numba cannot write its cache."""
    global _compiled
    if _compiled is None:
        try:
            _compiled = numba.njit(cache=True, nogil=True, boundscheck=False)(_walk)
        except RuntimeError:  # numba finds no folder for its cache
            _compiled = numba.njit(nogil=True, boundscheck=False)(_walk)
    done: NDArray[np.int64] = _compiled(*arguments)
    return done


_compiled: Any = None


def _text(
    s_ids: Any,  # uint32 [S], all below len(s_bytes)
    s_prefix: Any,  # uint8: bytes of a dummy prefix that is not in the text, or UNSURE
    s_bytes: Any,  # uint16 [V]
    t_ids: Any,  # uint32 [U]
    t_prefix: Any,
    t_bytes: Any,  # uint16 [W]
    n_bytes: Any,
    position: int,  # student tokens of the document before the text
    origin: int,  # teacher tokens of the document before the text
    eos: int,  # 1: the text ends its document
    codes: Any,  # uint8 [S + 1 or more], written
    anchors: Any,  # int32, written
    escapes: Any,  # int32 [E, 2], written
    widths: Any,  # int64 [9], added to
) -> Any:
    """Align one text.

    Returns the numbers of codes, anchors and escapes written and of tokens covered completely; -1 for each if the bytes of the
    tokens do not add up to the text.
    """
    bad = (-1, -1, -1, -1)
    if len(s_ids) == 0 or len(t_ids) == 0 or s_prefix == UNSURE or t_prefix == UNSURE:
        return bad
    t = 1 if t_bytes[t_ids[0]] == t_prefix > 0 and len(t_ids) > 1 else 0  # 1: the first token is only a dummy prefix
    t_end = np.int64(t_bytes[t_ids[t]]) - (0 if t else t_prefix)
    if t_end <= 0:
        return bad
    n_anchors = n_escapes = covered = 0
    start, last = np.int64(0), origin + t
    for i in range(len(s_ids) + eos):
        if (position + i) % ANCHOR_EVERY == 0:
            anchors[n_anchors] = last
            n_anchors += 1
        if i == len(s_ids):  # EOS, which has no text
            codes[i] = 0
            break
        stop = start + np.int64(s_bytes[s_ids[i]]) - (0 if i else s_prefix)
        if stop <= start:
            if stop < start or i > 0 or s_prefix == 0:  # only a dummy prefix may have no text
                return bad
            codes[i] = 0
            widths[0] += 1
            continue
        first = t + (t_end == start)  # the teacher's token may have ended with the previous student token
        while t_end < stop:
            t += 1
            if t == len(t_ids) or t_bytes[t_ids[t]] == 0:
                return bad
            t_end += np.int64(t_bytes[t_ids[t]])
        covered += int(t_end >= stop)
        width = t + 1 - first
        code = width << 1 | (last - origin - first)
        last = origin + t + 1
        widths[min(width, 8)] += 1
        if width > WIDEST:
            escapes[n_escapes, 0], escapes[n_escapes, 1] = position + i, code
            n_escapes += 1
            code = ESCAPE
        codes[i] = code
        start = stop
    if start != n_bytes or t_end != n_bytes or t + 1 != len(t_ids):
        return bad
    return len(s_ids) + eos, n_anchors, n_escapes, covered


_compiled_text: Any = numba.njit(nogil=True, boundscheck=False)(_text)  # compiled when it is first called


def _walk(
    s_ids: Any,  # uint32 [N]
    s_bounds: Any,  # int64 [D + 1]
    s_prefix: Any,  # uint8 [D]
    s_bytes: Any,  # uint16 [V]
    t_ids: Any,  # uint32 [M]
    t_bounds: Any,
    t_prefix: Any,
    t_bytes: Any,
    n_bytes: Any,  # int64 [D]
    position: int,
    origin: int,
    eos: int,
    codes: Any,  # uint8 [N + D], written
    anchors: Any,
    n_anchors: Any,  # int64 [D], written
    escapes: Any,
    n_escapes: Any,  # int64 [D], written
    good: Any,  # bool [D], written
    widths: Any,  # int64 [9], added to
) -> Any:
    """Align all texts in sequence. The arguments have the same meaning as in `_text`.

    Returns int64 [4]: the numbers of codes, anchors and escapes written, and of tokens covered completely.
    """
    done = np.zeros(4, np.int64)
    text_widths = np.zeros(9, np.int64)
    for d in range(len(n_bytes)):
        text_widths[:] = 0
        counts = _compiled_text(
            s_ids[s_bounds[d] : s_bounds[d + 1]],
            s_prefix[d],
            s_bytes,
            t_ids[t_bounds[d] : t_bounds[d + 1]],
            t_prefix[d],
            t_bytes,
            n_bytes[d],
            position,
            origin,
            eos,
            codes[done[0] :],
            anchors[done[1] :],
            escapes[done[2] :],
            text_widths,
        )
        good[d] = counts[0] >= 0
        if good[d]:
            widths += text_widths
            for k in range(4):
                done[k] += counts[k]
        n_anchors[d] = max(counts[1], 0)
        n_escapes[d] = max(counts[2], 0)
    return done
