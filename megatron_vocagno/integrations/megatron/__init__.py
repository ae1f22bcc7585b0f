"""Guided pretraining in Megatron-LM, for students that need tensor, context or expert parallelism (docs/megatron.md).

dataset.py      rows as Megatron's GPTDataset gives them, and with them the stored losses of the teacher
step.py         forward_step and loss_func, as pretrain_gpt.py has them; the only file that imports megatron.core
arguments.py    the flags, and the settings of Megatron-LM under which a run would be another one

Neither DeepSpeed nor transformers is imported. examples/megatron/pretrain_vocagno.py puts the parts together.
"""
