"""Text -> files: an aligned dataset on disk. numpy only, no torch.

In the order in which data passes. What is read:

- `places`       a path or URL -> something to open
- `inputs`       files, folders, globs -> pieces of files; `streams`, `parquet`  their bytes, their rows
- `documents`    a piece -> documents, and records that are none

What is made of a text:

- `tokens`       a text -> `Tokens`: ids and the UTF-8 byte at which each token ends
- `encoders`     the libraries that give the ids; `sentencepiece_model`  a SentencePiece model -> tokenizer.json
- `spans`        two `Tokens` of one text -> `Spans`: the teacher tokens that cover each student token; the one-byte codec
- `aligner`      the same for a batch of texts at once, by arrays; `aligner_numba`  compiled
- `long_texts`   a text of many megabytes, in parts

What is written:

- `indexed`      Megatron `.bin`/`.idx` pairs: write, read
- `shard_writer` documents -> the pairs of one shard
- `shards`       `make_shard`, the one idempotent function that every engine runs
- `manifest`     dataset.json: its records, `create`
- `dataset`      `AlignedDataset`: open, read, merge; `verify`  read everything and find what changed
- `losses`       the losses of a teacher that has scored it

How it is run:

- `plan`         inputs -> which pieces make which shard
- `workers`      jobs in processes of this machine; `ray_engine`  on a Ray cluster
- `build`        plan, engine, dataset.json; locks, slices for job arrays

`docs/data_format.md` describes the files byte by byte.
"""


class CorpusError(Exception):
    """Something that a user can cause and repair: an input, a tokenizer, a damaged file. The message says what to do."""
