"""What every job needs, imported once in the process that they are forked from. It starts no thread: a fork has but one."""

# what transformers and DeepSpeed import by themselves only once they see a model and an optimizer
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import megatron_vocagno.export
import megatron_vocagno.preprocess.score
import megatron_vocagno.training.loop  # noqa: F401
import tools.preprocess.build_dataset
import tools.preprocess.score_teacher  # noqa: F401
