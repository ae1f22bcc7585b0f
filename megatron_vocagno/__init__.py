"""Pretrain a small language model under the guidance of any frozen teacher, whatever the teacher's vocabulary.

In the order in which data passes:

corpus/      text -> an aligned dataset on disk
batch/       the dataset -> packed rows
objective/   losses -> weights -> the loss; pure
model/       rows -> losses: the student as layers, the frozen teacher
engine/      the step: DeepSpeed, scoring, checkpoints
config.py    the run file      monitor.py   what a run tells
pretrain.py  the command       train.py     the loop
export.py    a checkpoint as a Hugging Face folder
"""
