"""Experiments for two CPU cores: when the guidance helps, when it does not, and which of its choices matter.

    python -m examples.evidence                      prepare, run and report everything that is missing
    python -m examples.evidence run mechanism        one step of one experiment

An arm is a run file in `arms/` over `base.toml`. An experiment sets the data and the number of steps on top of it.
The training command trains every student.
"""
