"""FILES -> PACKED ROWS.

pack.py     rows cut at common boundaries of both token streams; pure
front.py    what a tokenizer puts in front of a text, and so of a row
loader.py   the batch of (step, micro-batch, data-parallel rank) as tensors; position
cached.py   the teacher's side of rows where its losses are cached
unguided.py the same for baselines that select without a teacher
text_losses.py   what a model's losses say of text, in nats a token and bits a byte
chunked.py  the same with another alignment, for comparison
blend.py    rows of several datasets, mixed in exact shares
forwards.py rows of different lengths, read together
"""
