"""One run, from its files to its last checkpoint.

loop            read, score, select, learn; evaluate and save
setup           everything that a run needs before its first step
fronts          the prefixes that both models read in front of text
consistency     checks that all ranks have the same configuration, data and models
evaluation      bits per byte of held-out text; samples: losses of some rows token by token, sample_files: their files
first_batch     the losses of both models on the first batch, and warnings
step_numbers    the metrics of a step
monitor         reports metrics on the console and in metrics.jsonl; tensorboard: in TensorBoard
nonfinite       stops a run whose loss or gradient stays NaN or infinite
stop_signal     requests to stop: signals and the time limit
run_lock        one run per output folder
pins            the commits of the Hub models that a run reads
"""
