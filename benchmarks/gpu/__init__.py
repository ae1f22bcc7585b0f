"""Check and measure everything that needs a GPU, in minutes, on a machine without a network.

    python -m benchmarks.gpu --minutes 8
    python -m benchmarks.gpu --rehearse --out FOLDER

`make gpu-check` is the first command. It runs the parts of `check.PARTS` in their order, each in a process with a time limit:

    card       the card and the versions of the packages
    ceilings   the rates that this card reaches: copies, and products of bfloat16
    kernels    every kernel against float64, at odd and even shapes
    heads      the head's loss and the selection, and those of other implementations
    step       guided steps of a student in the shape of TinyLlama-1.1B, with cached losses, and plain steps
    teachers   teachers of 0.5B and 7B parameters that score documents
    quickstart ten steps of the quickstart under DeepSpeed with ZeRO-1 and with two stages, and the losses of a CPU
    tests      tests/kernels

All models have random weights. The parts before `quickstart` need neither DeepSpeed nor pytest, and those before `step` need only
torch, Triton and numpy. If a package is missing, a row says so.

After each part, docs/gpu/DATE-CARD.json and a page with the same name are written. A part that exceeds its time limit is ended,
and keeps the rows that it measured. A rehearsal runs all parts with tiny shapes on the CPU, and the kernels in Triton's
interpreter. Its figures are meaningless.
"""
