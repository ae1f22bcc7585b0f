"""The teacher: a frozen causal language model that turns token ids into one loss per token, and keeps nothing else.

From a Hugging Face folder (safetensors) or a GGUF file (see gguf.py). It runs in evaluation mode, holds no gradient, and its
logits exist only as the tiles of `token_loss`. Rows are padded on the right: attention is causal, so what follows a token
cannot reach it, and padded targets are -100.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from megatron_vocagno.errors import ModelError
from megatron_vocagno.model.attention import Attention, check_documents, resolve_attention, teacher_arguments
from megatron_vocagno.model.folder import PretrainedWeights, model_folder, quiet, read_config
from megatron_vocagno.model.gguf import cached_folder
from megatron_vocagno.model.headers import readable
from megatron_vocagno.model.proof import Evidence, probe
from megatron_vocagno.model.quantised import Quantization, quantise
from megatron_vocagno.model.student import LossHead, logit_softcap
from megatron_vocagno.model.weights import check_weights


class Teacher(nn.Module):
    """A module, so that an engine can shard it: head and decoder are called, never read from outside.

    vocab_size        rows of its head, W
    max_positions     longest row that it reads, None if its configuration names no limit
    parameters_count  a tied head counts once
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        config = model.config.get_text_config()
        head = _plain_head(model, config.model_type)
        self.vocab_size = int(config.vocab_size)
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None)
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self.config, self._cuts_documents = config, False
        self.decoder = model.get_decoder()
        self.head = LossHead(head.weight, logit_softcap(config))
        # ds_numel: under ZeRO-3 a parameter is an empty shell that remembers its size
        self.parameters_count = sum(int(getattr(weight, "ds_numel", weight.numel())) for weight in self.parameters())
        # until its losses are proven to be those of its own logits; an engine that shards must know all that is called
        self.whole: nn.Module | None = model
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        """Stays in evaluation mode: whoever switches an engine to training must not switch on the teacher's dropout."""
        return super().train(False)

    def loss(self, input_BU: Tensor, target_BU: Tensor, segment_BU: Tensor | None = None) -> Tensor:
        """Losses of the targets given the inputs up to the same position.

        input_BU    [B, U] int64, teacher ids; any valid id where the row is padded
        target_BU   [B, U] int64, the ids one position later; -100 where the row is padded
        segment_BU  [B, U] int, which document a position is of; then it sees that document's inputs alone. None: all of its row
        returns     [B, U] float32, nats; 0 where the target is -100

        Raises ModelError: a row too long, or segments for an architecture that cannot be cut at them.
        """
        # not inference_mode: its tensors cannot be saved for a backward pass, and these weigh the student's loss
        with torch.no_grad():
            self._check(input_BU, segment_BU)
            loss_BU: Tensor = self(input_BU, target_BU, segment_BU)
        return loss_BU

    @torch.no_grad()
    def hidden_states(self, input_BU: Tensor, segment_BU: Tensor | None = None) -> Tensor:
        """[B, U, H] of the teacher's dtype: what its head makes predictions of. Arguments and errors as for loss.

        Not of a teacher that an engine shards: nothing gathers its weights here.
        """
        self._check(input_BU, segment_BU)
        return self._decode(input_BU, segment_BU)

    def _check(self, input_BU: Tensor, segment_BU: Tensor | None) -> None:
        if self.max_positions is not None and input_BU.shape[1] > self.max_positions:
            raise ModelError(
                f"a row has {input_BU.shape[1]:,} teacher tokens, the teacher reads {self.max_positions:,}. Use shorter rows "
                "(data.row_length): one text can have more teacher tokens than student tokens."
            )
        if segment_BU is not None and not self._cuts_documents:
            check_documents(self.decoder, self.config, input_BU.device)
            self._cuts_documents = True

    def forward(self, input_BU: Tensor, target_BU: Tensor, segment_BU: Tensor | None = None) -> Tensor:
        loss_BU: Tensor = self.head(self._decode(input_BU, segment_BU), target_BU)
        return loss_BU

    def probe(self) -> Evidence:
        """What `check` of the answer judges: losses by this module, and by the logits of transformers' model, which is dropped.

        Collective where an engine shards the weights. Raises ModelError: the model does not run.
        """
        whole, self.whole = self.whole, None
        assert whole is not None, "a teacher is proven once"
        return probe(whole, self.loss, self.head, self.vocab_size, self.max_positions, self.device)

    def _decode(self, input_BU: Tensor, segment_BU: Tensor | None) -> Tensor:
        arguments = {} if segment_BU is None else teacher_arguments(self.config, segment_BU)
        hidden_BUH: Tensor = self.decoder(input_ids=input_BU, use_cache=False, **arguments).last_hidden_state
        # Mamba's norm answers in float32 whatever the weights are
        return hidden_BUH.to(self.head.weight.dtype)


def _plain_head(model: Any, model_type: str) -> Any:
    head = model.get_output_embeddings()
    if head is None or model.get_decoder() is model:
        raise ModelError(f"this {model_type} teacher has no separate decoder and head")
    if getattr(head, "bias", None) is not None:
        raise ModelError(f"this {model_type} teacher has a bias in its head, which is not supported yet")
    return head


def teacher_folder(path: str | os.PathLike[str], cache: str | os.PathLike[str] | None = None) -> Path:
    """The Hugging Face folder of a teacher; for a .gguf file the one in `cache`, made now if it is not there."""
    path = Path(path).expanduser()
    return model_folder(cached_folder(path, cache) if path.suffix == ".gguf" else path)


@dataclass(frozen=True)
class Found:
    """A teacher whose weights are known to be those of its configuration, and are not read yet."""

    folder: Path
    config: Any
    dtype: torch.dtype
    device: torch.device
    attention: str


def find_teacher(
    path: str | os.PathLike[str], dtype: torch.dtype, device: torch.device | str, attention: Attention = "auto"
) -> Found:
    """The teacher in a Hugging Face folder or in a .gguf file, which is converted once (teacher_folder).

    Raises ModelError: before gigabytes are read, and not while an engine shards what transformers makes.
    """
    folder = teacher_folder(path)
    config = check_weights(PretrainedWeights(folder), read_config(folder))
    implementation = resolve_attention(config.get_text_config(), attention, dtype, device)
    return Found(folder, config, dtype, torch.device(device), implementation)


def load_teacher(found: Found, quantization: Quantization = "none") -> Teacher:
    """Load the teacher. `int8` and `fp8` quantise the linear layers of its decoder, see quantised.py. Raises ModelError."""
    with quiet(), readable(found.folder):
        model = AutoModelForCausalLM.from_pretrained(
            found.folder,
            config=found.config,
            dtype=found.dtype,
            attn_implementation=found.attention,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    if quantization != "none":
        # before the move: the device then never holds the unquantised weights
        quantise(model.get_decoder(), quantization, found.device)
    return Teacher(model.to(found.device))


def open_teacher(
    path: str | os.PathLike[str],
    dtype: torch.dtype,
    device: torch.device | str,
    attention: Attention = "auto",
    quantization: Quantization = "none",
) -> Teacher:
    """A teacher that is known to score as its own logits do, see find_teacher and load_teacher. Raises ModelError."""
    teacher = load_teacher(find_teacher(path, dtype, device, attention), quantization)
    teacher.probe().check(teacher.config.model_type)
    return teacher
