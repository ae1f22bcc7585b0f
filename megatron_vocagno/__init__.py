"""Pretrain a small language model under the guidance of any frozen teacher, whatever the teacher's vocabulary.

In the order in which data passes:

preprocess/    text -> an aligned dataset on disk, and a teacher's losses of it
corpus/        the dataset: tokenizers, alignment, files; what training reads
batch/         the dataset -> packed rows
objective/     losses -> weights -> the loss; pure functions and kernels
model/         rows -> losses: the student as layers, the frozen teacher
engine/        one step on DeepSpeed: engines, scoring, checkpoints
training/      one run: setup, loop, evaluation, monitoring
planning/      memory, time and cost of a run before it starts; the dry run
integrations/  the method inside other training loops

pretrain.py plan.py export.py  the commands
command.py   what all commands share       config.py  the run, run_file.py: read from its file
errors.py    the errors of a user          files.py   durable files, locks, hashes
hub.py       models by their Hub ids
"""

__version__ = "0.1.0"
