"""Pretrain a small language model under the guidance of any frozen teacher, whatever the teacher's vocabulary.

In the order in which data passes:

corpus/      text -> an aligned dataset on disk
batch/       the dataset -> packed rows
objective/   losses -> weights -> the loss; pure
model/       rows -> losses: the student as layers, the frozen teacher
offline/     the teacher's losses of a whole dataset, scored once
engine/      the step: DeepSpeed, scoring, checkpoints
planning/    what a run would take; plan.py, dryrun.py: its commands

config.py    the run, run_file.py: read from its file
pretrain.py  the command       train.py    the loop, step.py: a step of it
opening.py   what it opens before        evaluation.py  held-out text
stopping.py  what asks a run to leave    health.py   what ends one that goes wrong
first_batch.py  what both models know of the first batch
monitor.py   what a run tells, board.py: in TensorBoard, samples.py: token by token
export.py    a checkpoint as a Hugging Face folder
hub.py       models by their Hub ids
command.py   what all commands share      errors.py    what a user can mend
files.py     how they come onto the disk  locks.py     what locks on files are worth
"""

__version__ = "0.1.0"
