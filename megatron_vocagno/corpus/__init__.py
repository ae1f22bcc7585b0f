"""Text -> files: an aligned dataset on disk. numpy only, no torch.

In the order in which data passes:

- `documents`  JSON-lines files -> texts, in batches
- `tokens`   a text -> `Tokens`: ids and the UTF-8 byte at which each token ends
- `sentencepiece_model`  a SentencePiece model -> tokenizer.json
- `spans`    two `Tokens` of one text -> `Spans`: the teacher tokens that cover each student token; the one-byte codec
- `indexed`  Megatron `.bin`/`.idx` pairs: write, read
- `dataset`  `AlignedDataset`: `dataset.json` and its shards; open, read, verify, merge
- `workers`  the local engine: jobs in processes, killed ones replaced
- `shards`   the plan, the one idempotent shard function, `build`

`docs/data_format.md` describes the files byte by byte.
"""


class CorpusError(Exception):
    """Something that a user can cause and repair: an input, a tokenizer, a damaged file. The message says what to do."""
