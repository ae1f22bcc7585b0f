"""Pretrain a small language model under the guidance of any frozen teacher, whatever the teacher's vocabulary.

Folders, in the order of the data:

preprocess/    text -> an aligned dataset on disk, and the losses of a teacher
serving/       losses from a server that runs the teacher
corpus/        the dataset that training reads: tokenizers, alignment, files
batch/         the dataset -> packed rows
objective/     losses -> weights -> the loss, in pure functions and kernels
model/         rows -> losses: the layers of the student, the frozen teacher
engine/        one step on DeepSpeed: engines, scoring, checkpoints
training/      one run: setup, loop, evaluation, monitoring
planning/      memory, time and cost of a run before it starts; the dry run
integrations/  the method inside other training loops

Files:

pretrain.py, plan.py, export.py  the commands
command.py                       shared by all commands
compat.py                        differences between accepted versions of packages
config.py, run_file.py           the fields of a run, read from a file
errors.py                        errors that a user can fix
files.py                         durable files, locks, hashes
hub.py                           models by Hub id
"""

__version__ = "0.1.0"
