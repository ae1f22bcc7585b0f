"""One step on DeepSpeed. No other folder imports deepspeed.

processes       start the process group; device and threads of this rank
collectives     exchange values and errors between ranks
settings        the DeepSpeed configuration, checked against the run; settings_file: its file, checked for what DeepSpeed ignores
build           model + objective -> engine: pipeline, or data-parallel with ZeRO-1/2/3
engines         the engines, with one interface for the loop
outliers        skip steps whose loss or gradient norm is an outlier
pipeline        the student as a pipeline module
sequence        sequence parallelism: the ranks that share rows, and the proof of their attention
loss            per-token losses -> the loss of a micro-batch, with the selection
distilling      the engine of the baselines that compare distributions
placement       load the teacher, on every rank or sharded, and make its scorer
lockstep        a sharded teacher for ranks that score texts independently
scoring         run the teacher on the rows of a step
cached          the teacher's side of rows; checks of losses that are stored with the dataset
step_counts     counts that all ranks know before a step: tokens, unmapped tokens by reason, the divisor of the loss
text_losses     sums of both models' losses over the text of a step
checkpoint      atomic save, exact resume in any layout
decay_start     a run that only decays, from a checkpoint of another run
manifest        the files of a checkpoint, and which checkpoint is complete
state           weights, optimizer and counters in a form that does not depend on the layout
"""
