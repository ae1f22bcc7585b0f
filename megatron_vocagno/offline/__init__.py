"""SCORE ONCE: the teacher's losses of a whole dataset, written beside its ids.

windows.py   lengths of documents -> windows of context; pure
shard.py     `score_shard`, the one idempotent function that every engine runs
score.py     a dataset: its shards on an engine, and dataset.json when all are scored

The files are `corpus.losses`, what reads them in training is `batch.cached`.
"""
