"""THE STEP: the only home of deepspeed.

processes.py    start the process group; device and threads of this rank
settings.py     the DeepSpeed configuration: read, checked against the run
build.py        model + objective -> engine: pipeline, or plain with ZeRO-1/2/3, behind one door
scoring.py      where the teacher runs: score, then train
counts.py       what all ranks know of a step before it starts: tokens, unmapped tokens by reason, the divisor of the loss
manifest.py     what a checkpoint is on disk, and which one is whole
checkpoint.py   atomic save, exact resume
"""
