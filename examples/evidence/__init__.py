"""Experiments that anyone can repeat on two cores: does the guidance work, where does it not, and which of its choices matter.

    python -m examples.evidence                      prepare, run and report everything; what is there already is not done again
    python -m examples.evidence run mechanism        one step of one experiment

An arm is a run file in `arms/` over `base.toml`; what an experiment learns from and how long it learns is laid over it. Nothing
here trains: every student comes out of the training command.
"""
