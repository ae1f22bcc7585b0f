"""THE STEP: the only home of deepspeed.

pins.py         models by their Hub ids: the commit that the first start meant
processes.py    start the process group; device and threads of this rank
settings.py     the DeepSpeed configuration: read, checked against the run
settings_file.py  its file: what DeepSpeed would misread, or pass over
counts.py       what all ranks know of a step before it starts: tokens, unmapped tokens by reason, the divisor of the loss
scoring.py      where the teacher runs: score, then train
hearing.py      what both models' losses say of a step's text
sharded.py      a teacher that is spread over all ranks
cached.py       a teacher that has spoken already: rows bring its losses along
placement.py    the teacher of a run: opened, and put where it scores
learning.py     losses and labels -> the loss of a micro-batch
distilling.py   a teacher beside the student, whose distributions are compared
stages.py       the student as a pipeline module
trainers.py     the two engines as the loop sees them
samples.py      rows of held-out text that a run looks at, token by token
build.py        model + objective -> engine: pipeline, or plain with ZeRO-1/2/3, behind one door
manifest.py     what a checkpoint is on disk, and which one is whole
state.py        what an engine has learned, in a form that knows no layout
checkpoint.py   atomic save, exact resume, in any layout
occupancy.py    one run at a time in an output folder
agreement.py    what one rank meets, all ranks act on
fronts.py       what a run's models read in front of text
alike.py        what decides a run is one on all ranks
"""
