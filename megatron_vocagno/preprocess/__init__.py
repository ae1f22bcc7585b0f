"""Text -> an aligned dataset on disk, and a teacher's losses for a dataset. Only a teacher in this process needs torch.

Input:

- `inputs`        files, folders, globs -> splits of files
- `streams`       the decompressed bytes of a file
- `parquet`       the rows of a parquet file
- `foreign`       recognizes files that are not input
- `documents`     a split -> documents and bad records

Alignment of a batch of texts:

- `aligner`       all texts of a batch at once, with numpy arrays
- `aligner_numba` the same, compiled
- `long_texts`    a text of many megabytes, in parts

Output:

- `shard_writer`  documents -> the files of one shard
- `shards`        `make_shard`, the idempotent function that every engine runs
- `plan`          inputs -> which splits make which shard, and which shards a task of a job array makes
- `build_folder`  the output folder: its lock, and the results of earlier builds
- `build`         plan, jobs, dataset.json

Jobs of building and scoring:

- `workers`       jobs in processes of this machine
- `ray_engine`    jobs on a Ray cluster
- `jobs`          runs the jobs of a dataset's shards on an engine and reports failures

A teacher's losses:

- `windows`       lengths of documents -> windows of context
- `reuse`         losses of another dataset for the same teacher tokens
- `score_served`  the losses of a shard from a server
- `score_local`   the losses of a shard from a teacher in this process
- `score_check`   a server's losses and those of this process, compared
- `score_shard`   `score_shard`, the idempotent function that every engine runs
- `loss_table`    the losses of a dataset as parquet files
- `score`         a dataset: its shards, and dataset.json when all are scored
"""
