"""BATCH -> LOSSES: the Hugging Face causal language models of this project. Does not depend on an engine.

    folder.py         finds a Hugging Face folder, reads its tensors lazily, writes one
    headers.py        reads and checks the index and the headers of its safetensors
    weights.py        checks that its weights match its configuration
    attention.py      attention over the row or by document, and the implementation that computes it
    ulysses.py        attention over rows that are divided among ranks
    configuration.py  the student's configuration, from a folder or from keys
    student.py        the student: a flat list of pipeline layers with Hugging Face names, or one module
    proof.py          checks that losses match the model's own logits
    teacher.py        the frozen teacher: token ids -> one loss per token, no logits kept
    fingerprint.py    a hash that identifies a teacher
    quantized.py      the teacher's matrices in 8 bits
    gguf.py           converts a GGUF file to a Hugging Face folder, once
    gguf_keys.py      converts the keys of a GGUF file to a configuration

Axes: B rows, S student positions, U teacher positions, V student vocabulary, W teacher vocabulary, H hidden size.
Losses are float32, in nats. A target of -100 is ignored, and its loss is 0.
"""
