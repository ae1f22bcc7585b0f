"""Plan a run from its files: memory, time and cost. Needs no weights, no data and no GPU.

options.py       the command-line options of a plan
hardware.py      GPU types with their data-sheet rates; assumed efficiencies
model_config.py  finds the config.json of the student and the teachers
sizes.py         a model's configuration -> parameters and FLOPs
trace.py         memory of a decoder layer, counted on the meta device
layouts.py       layouts to compare: ZeRO stages, pipeline stages, micro-batches
memory.py        bytes on the fullest rank
cost.py          seconds per step, hours per run
comparison.py    all layouts of a run, ordered by cost
report.py        a plan as text and as JSON
request.py       from the options to a plan
shapes.py        shapes of one micro-batch in every layer, on the meta device
dry_run.py       all checks of a run that need no data, weights or GPU

Bytes and FLOPs are counted. Seconds are estimated from assumed efficiencies: docs/clusters.md lists them.
"""
