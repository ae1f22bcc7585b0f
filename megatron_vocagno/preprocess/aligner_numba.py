"""The two-pointer walk of `aligner`, compiled by numba once and kept in its cache. Same output as the numpy road, bit for bit."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from megatron_vocagno.corpus.spans import ANCHOR_EVERY, ESCAPE, WIDEST
from megatron_vocagno.corpus.tokens import UNSURE


def walk(*arguments: Any) -> NDArray[np.int64]:
    """Compiled on first use; where no cache folder can be written, compiled in each process."""
    global _compiled
    if _compiled is None:
        try:
            _compiled = numba.njit(cache=True, nogil=True, boundscheck=False)(_walk)
        except RuntimeError:  # numba finds no place for its cache
            _compiled = numba.njit(nogil=True, boundscheck=False)(_walk)
    done: NDArray[np.int64] = _compiled(*arguments)
    return done


_compiled: Any = None


def _text(
    s_ids: Any,  # uint32 [S], all below len(s_bytes)
    s_prefix: Any,  # uint8: bytes of a dummy prefix, which the text does not have; or UNSURE
    s_bytes: Any,  # uint16 [V]
    t_ids: Any,  # uint32 [U]
    t_prefix: Any,
    t_bytes: Any,  # uint16 [W]
    n_bytes: Any,
    position: int,  # student token of its document at which the text starts
    origin: int,  # teacher token likewise
    eos: int,  # 1: the text ends its document
    codes: Any,  # uint8 [S + 1 or more], written
    anchors: Any,  # int32, written
    escapes: Any,  # int32 [E, 2], written
    widths: Any,  # int64 [9], added to
) -> Any:
    """One text: codes, anchors and escapes written, tokens covered whole; -1 for each where the bytes do not add up."""
    bad = (-1, -1, -1, -1)
    if len(s_ids) == 0 or len(t_ids) == 0 or s_prefix == UNSURE or t_prefix == UNSURE:
        return bad
    t = 1 if t_bytes[t_ids[0]] == t_prefix > 0 and len(t_ids) > 1 else 0  # 1: the teacher's dummy prefix stands alone
    t_end = np.int64(t_bytes[t_ids[t]]) - (0 if t else t_prefix)
    if t_end <= 0:
        return bad
    n_anchors = n_escapes = covered = 0
    start, last = np.int64(0), origin + t
    for i in range(len(s_ids) + eos):
        if (position + i) % ANCHOR_EVERY == 0:
            anchors[n_anchors] = last
            n_anchors += 1
        if i == len(s_ids):  # EOS, which covers nothing
            codes[i] = 0
            break
        stop = start + np.int64(s_bytes[s_ids[i]]) - (0 if i else s_prefix)
        if stop <= start:
            if stop < start or i > 0 or s_prefix == 0:  # only a dummy prefix may be without text
                return bad
            codes[i] = 0
            widths[0] += 1
            continue
        first = t + (t_end == start)  # the teacher's token may have ended with the token before
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


_compiled_text: Any = numba.njit(nogil=True, boundscheck=False)(_text)  # nothing is compiled before it is called


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
    """All texts, one after the other; what has one name here and in _text is the same.

    Returns int64 [4]: codes, anchors and escapes written, tokens covered whole.
    """
    done = np.zeros(4, np.int64)
    here = np.zeros(9, np.int64)
    for d in range(len(n_bytes)):
        here[:] = 0
        of_text = _compiled_text(
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
            here,
        )
        good[d] = of_text[0] >= 0
        if good[d]:
            widths += here
            for k in range(4):
                done[k] += of_text[k]
        n_anchors[d] = max(of_text[1], 0)
        n_escapes[d] = max(of_text[2], 0)
    return done
