"""FILES -> PACKED ROWS.

pack.py         pure functions that cut rows at common boundaries of both token streams
front.py        the prefix of a row: the ids, usually a BOS, that a model reads in front of text
loader.py       the batch of (step, micro-batch, data-parallel rank) as tensors
cached.py       the teacher's side of a row, read from cached losses
unguided.py     a constant or random guide, for baselines without a teacher
equal_parts.py  the teacher's side of a row under a coarser alignment, for comparison
whole_chunks.py the chunks that a row holds as a whole, and one loss of each from several teachers
text_losses.py  losses over text, in nats per token and bits per byte
blend.py        rows of several datasets, mixed in exact shares
forwards.py     rows of different lengths, grouped into forward passes
"""
