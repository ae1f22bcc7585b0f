"""Import the modules that every job needs, once, in the process that jobs are forked from. No import may start a thread."""

# transformers and DeepSpeed import these lazily, when they first see a model and an optimizer
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import megatron_vocagno.export
import megatron_vocagno.preprocess.score
import megatron_vocagno.training.loop  # noqa: F401
import tools.preprocess.build_commands
import tools.preprocess.score_commands  # noqa: F401
