"""BATCH -> LOSSES: Hugging Face causal language models as this project uses them. Knows no engine.

    folder.py         a Hugging Face folder: found, its tensors read lazily, written
    headers.py        what its safetensors hold, and where: index and headers, checked
    weights.py        whether its weights are those of its configuration
    attention.py      what a token sees: its row, or its document's part of it; which code computes that
    configuration.py  the student's: from a folder or from keys
    student.py        the model that learns: a flat list of pipeline layers with Hugging Face names, or one module
    proof.py          whether losses are those of the model's own logits
    teacher.py        the frozen model: token ids -> one loss per token, no logits kept
    fingerprint.py    which teacher it was
    quantised.py      the teacher's matrices in 8 bits
    gguf.py           a GGUF file -> a Hugging Face folder, once
    gguf_keys.py      what the file says of its model -> the configuration

Axes: B rows, S student positions, U teacher positions, V student vocabulary, W teacher vocabulary, H hidden size.
Losses are float32, in nats; a target of -100 is no token, and its loss is 0.
"""
