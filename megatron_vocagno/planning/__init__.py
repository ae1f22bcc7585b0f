"""BEFORE A RUN: what it would take, from its files alone. Nothing is started, no weights are read, no GPU is asked.

hardware.py   GPU types by their data sheets; what is assumed of them
sizes.py      a model's configuration -> parameters and FLOPs
trace.py      what autograd keeps of a layer, asked of PyTorch itself on the meta device
layouts.py    how a model and a batch are dealt to ranks
memory.py     bytes on the fullest rank
shapes.py     one micro-batch through a whole model on the meta device
cost.py       seconds of a step, hours of a run
comparison.py all layouts beside each other
report.py     what a plan says, as text and as JSON
question.py   what is asked: a run on a cluster, out of its files and the command line

Bytes are counted, FLOPs are counted, seconds are an estimate: docs/clusters.md says what it rests on.
"""
