"""Text -> an aligned dataset on disk, and a teacher's losses of it. numpy only, but for the scoring.

Input:

- `inputs`        files, folders, globs -> splits of files; `streams`, `parquet`: their bytes, their rows
- `foreign`       files that are not an input
- `documents`     a split -> documents and bad records

Alignment of a batch of texts:

- `aligner`       all texts of a batch at once, with arrays; `aligner_numba`: compiled
- `long_texts`    a text of many megabytes, in parts

Output:

- `shard_writer`  documents -> the files of one shard
- `shards`        `make_shard`, the idempotent function that every engine runs
- `plan`          inputs -> which splits make which shard
- `workers`       jobs in processes of this machine; `ray_engine`: on a Ray cluster
- `build`         plan, jobs, dataset.json; locks, slices for job arrays

A teacher's losses:

- `windows`       lengths of documents -> windows of context
- `score_shard`   `score_shard`, the idempotent function that every engine runs
- `score`         a dataset: its shards, and dataset.json when all are scored
"""
