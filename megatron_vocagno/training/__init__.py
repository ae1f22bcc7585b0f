"""One run, from its files to its last checkpoint.

loop            read, score, select, learn; evaluate and save
setup           everything that a run needs before its first step
fronts          the ids that both models read in front of text
consistency     all ranks compare what they read, and refuse if it differs
evaluation      bits per byte of held-out text; samples: rows of it token by token, sample_files: their files
first_batch     the losses of both models on the first batch, and warnings
step_numbers    the numbers of a step
monitor         console, metrics.jsonl; tensorboard: the same numbers there
nonfinite       stops a run whose loss or gradient stays NaN or infinite
stop_signal     signals and the time limit
run_lock        one run per output folder
pins            which commit of a Hub model a run reads
"""
