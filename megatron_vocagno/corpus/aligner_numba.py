"""The two-pointer walk of `aligner`, compiled by numba once and kept in its cache. Same output as the numpy road, bit for bit."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from megatron_vocagno.corpus.spans import ANCHOR_EVERY, ESCAPE, WIDEST


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


def _walk(
    s_ids: Any,  # uint32 [N], all below len(s_bytes)
    s_bounds: Any,  # int64 [D + 1]
    s_prefix: Any,  # uint8 [D]
    s_bytes: Any,  # uint16 [V]
    t_ids: Any,  # uint32 [M]
    t_bounds: Any,
    t_prefix: Any,
    t_bytes: Any,
    n_bytes: Any,  # int64 [D]
    position: int,  # student token of its document at which each text starts
    origin: int,  # teacher token likewise
    eos: int,  # 1: each text ends its document
    codes: Any,  # uint8 [N + D], written
    anchors: Any,  # int32, written
    n_anchors: Any,  # int64 [D], written
    escapes: Any,  # int32 [E, 2], written
    n_escapes: Any,  # int64 [D], written
    good: Any,  # bool [D], written
    widths: Any,  # int64 [9], added to
) -> Any:
    """Returns int64 [4]: codes, anchors and escapes written, tokens covered whole."""
    code_at = anchor_at = escape_at = 0
    covered: Any = 0
    here = np.zeros(9, np.int64)
    for d in range(len(n_bytes)):
        code_0, anchor_0, escape_0, covered_0 = code_at, anchor_at, escape_at, covered
        here[:] = 0
        t, t_stop, total = t_bounds[d], t_bounds[d + 1], n_bytes[d]
        t_start = 0
        t_end: Any = -1
        if t < t_stop:
            t_end = np.int64(t_bytes[t_ids[t]]) - t_prefix[d]
            if t_end == 0 and t_prefix[d] > 0 and t + 1 < t_stop:  # the teacher's dummy prefix stands alone
                t += 1
                t_end = np.int64(t_bytes[t_ids[t]])
        shift = origin - t_bounds[d]  # teacher positions of the document
        last = t + shift
        fine = t_end > 0 and s_bounds[d] < s_bounds[d + 1]
        start: Any = 0
        at = position
        for i in range(s_bounds[d], s_bounds[d + 1]):
            if not fine:
                break
            if at % ANCHOR_EVERY == 0:
                anchors[anchor_at] = last
                anchor_at += 1
            length = np.int64(s_bytes[s_ids[i]])
            if i == s_bounds[d]:
                length -= s_prefix[d]
            if length <= 0:
                fine = length == 0 and i == s_bounds[d] and s_prefix[d] > 0  # only a dummy prefix may be without text
                codes[code_at] = 0
                here[0] += 1
            else:
                stop = start + length
                first, first_start = t + shift, t_start
                while t_end < stop:
                    t += 1
                    if t == t_stop:
                        fine = False
                        break
                    grown = np.int64(t_bytes[t_ids[t]])
                    if grown == 0:
                        fine = False
                        break
                    t_start = t_end
                    t_end += grown
                covered += first_start <= start and t_end >= stop
                width = t + shift + 1 - first
                code = width << 1 | (last - first)
                last = first + width
                here[min(width, 8)] += 1
                if width > WIDEST:
                    escapes[escape_at, 0] = at
                    escapes[escape_at, 1] = code
                    escape_at += 1
                    code = ESCAPE
                codes[code_at] = code
                if t_end == stop and t + 1 < t_stop:
                    t += 1
                    t_start = t_end
                    t_end += np.int64(t_bytes[t_ids[t]])
                    fine = fine and t_end > t_start
                start = stop
            code_at += 1
            at += 1
        if eos and at % ANCHOR_EVERY == 0 and fine:
            anchors[anchor_at] = last
            anchor_at += 1
        if eos and fine:
            codes[code_at] = 0
            code_at += 1
        good[d] = fine and start == total and t_end == total and t + 1 == t_stop
        if good[d]:
            widths += here
        else:
            code_at, anchor_at, escape_at, covered = code_0, anchor_0, escape_0, covered_0
        n_anchors[d] = anchor_at - anchor_0
        n_escapes[d] = escape_at - escape_0
    return np.array([code_at, anchor_at, escape_at, covered])
