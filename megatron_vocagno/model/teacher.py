"""The teacher: a frozen causal language model that computes one loss per token from token ids.

A teacher is opened from a Hugging Face folder (safetensors) or a GGUF file (see gguf.py). It runs in evaluation mode without
gradients, and its logits exist only as tiles inside `token_loss`. Rows are padded on the right. Because attention is causal,
padding does not affect earlier tokens. Targets in the padding are -100.
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
from megatron_vocagno.model.gguf import cached_folder, naming_file
from megatron_vocagno.model.headers import readable
from megatron_vocagno.model.proof import ProbeResult, probe
from megatron_vocagno.model.quantized import Quantization, quantize
from megatron_vocagno.model.student import LossHead, logit_softcap
from megatron_vocagno.model.weights import check_weights


class Teacher(nn.Module):
    """The teacher as a module. An engine can shard it, because other code only calls its head and decoder and reads no weights.

    vocab_size        rows of the head, W
    max_positions     longest row that the teacher reads; None if its configuration has no limit
    parameters_count  number of parameters; a tied head counts once
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
        # ds_numel: under ZeRO-3 a parameter is empty, and this attribute has its full size
        self.parameters_count = sum(int(getattr(weight, "ds_numel", weight.numel())) for weight in self.parameters())
        # kept until `probe` has run; an engine that shards must know every module that is called
        self.whole: nn.Module | None = model
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        """Keeps evaluation mode, so that a switch of the engine to training mode does not enable the teacher's dropout."""
        return super().train(False)

    def loss(self, input_BU: Tensor, target_BU: Tensor, segment_BU: Tensor | None = None) -> Tensor:
        """The loss of each target, given the inputs up to the same position.

        input_BU    [B, U] int64, teacher ids; any valid id in the padding
        target_BU   [B, U] int64, the ids one position later; -100 in the padding
        segment_BU  [B, U] int, number of the document of a position: attention is within documents. None: over the whole row
        returns     [B, U] float32, nats; 0 if the target is -100

        Raises ModelError: the row is too long, or the architecture does not support attention within documents.
        """
        # not inference_mode: its tensors cannot be saved for a backward pass, and these losses weight the student's loss
        with torch.no_grad():
            self._check(input_BU, segment_BU)
            loss_BU: Tensor = self(input_BU, target_BU, segment_BU)
        return loss_BU

    @torch.no_grad()
    def hidden_states(self, input_BU: Tensor, segment_BU: Tensor | None = None) -> Tensor:
        """The inputs of the teacher's head, [B, U, H] in the teacher's dtype. Arguments and errors are those of `loss`.

        Do not call this for a teacher that an engine shards, because its weights are not gathered here.
        """
        self._check(input_BU, segment_BU)
        return self._decode(input_BU, segment_BU)

    def _check(self, input_BU: Tensor, segment_BU: Tensor | None) -> None:
        if self.max_positions is not None and input_BU.shape[1] > self.max_positions:
            raise ModelError(
                f"a row has {input_BU.shape[1]:,} teacher tokens, but the teacher reads at most {self.max_positions:,}. Use "
                "shorter rows (data.row_length): a text can have more teacher tokens than student tokens."
            )
        if segment_BU is not None and not self._cuts_documents:
            check_documents(self.decoder, self.config, input_BU.device)
            self._cuts_documents = True

    def forward(self, input_BU: Tensor, target_BU: Tensor, segment_BU: Tensor | None = None) -> Tensor:
        loss_BU: Tensor = self.head(self._decode(input_BU, segment_BU), target_BU)
        return loss_BU

    def probe(self) -> ProbeResult:
        """Compute losses with this module and with the logits of transformers' model, which is then freed. Call once, and then
        call `check` on the result.

        Collective if an engine shards the weights. Raises ModelError: the model does not run.
        """
        whole, self.whole = self.whole, None
        assert whole is not None, "probe was called twice"
        return probe(whole, self.loss, self.head, self.vocab_size, self.max_positions, self.device)

    def _decode(self, input_BU: Tensor, segment_BU: Tensor | None) -> Tensor:
        arguments = {} if segment_BU is None else teacher_arguments(self.config, segment_BU)
        hidden_BUH: Tensor = self.decoder(input_ids=input_BU, use_cache=False, **arguments).last_hidden_state
        # Mamba's norm returns float32 for any dtype of the weights
        return hidden_BUH.to(self.head.weight.dtype)


def _plain_head(model: Any, model_type: str) -> Any:
    head = model.get_output_embeddings()
    if head is None or model.get_decoder() is model:
        raise ModelError(f"this {model_type} teacher has no separate decoder and head")
    if getattr(head, "bias", None) is not None:
        raise ModelError(f"this {model_type} teacher has a bias in its head, which is not supported yet")
    return head


def teacher_folder(path: str | os.PathLike[str], cache: str | os.PathLike[str] | None = None) -> Path:
    """The Hugging Face folder of a teacher. For a .gguf file, the converted folder in `cache`, which is created if necessary.

    Raises ModelError.
    """
    path = Path(path).expanduser()
    return model_folder(cached_folder(path, cache) if path.suffix == ".gguf" else path)


@dataclass(frozen=True)
class TeacherFolder:
    """A teacher whose weights match its configuration and are not loaded yet."""

    folder: Path
    config: Any
    dtype: torch.dtype
    device: torch.device
    attention: str


def find_teacher(
    path: str | os.PathLike[str], dtype: torch.dtype, device: torch.device | str, attention: Attention = "auto"
) -> TeacherFolder:
    """Check the teacher in a Hugging Face folder or in a .gguf file, which is converted once (see teacher_folder).

    Call this before load_teacher: errors are raised before gigabytes are read, and outside the context in which an engine shards
    the model.

    Raises ModelError.
    """
    folder = teacher_folder(path)
    with naming_file(path):
        config = check_weights(PretrainedWeights(folder), read_config(folder))
    implementation = resolve_attention(config.get_text_config(), attention, dtype, device)
    return TeacherFolder(folder, config, dtype, torch.device(device), implementation)


def load_teacher(found: TeacherFolder, quantization: Quantization = "none") -> Teacher:
    """Load the teacher. `int8` and `fp8` quantize the linear layers of its decoder, see quantized.py. Raises ModelError."""
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
        # before the move: the device then never holds the unquantized weights
        quantize(model.get_decoder(), quantization, found.device)
    return Teacher(model.to(found.device))


def open_teacher(
    path: str | os.PathLike[str],
    dtype: torch.dtype,
    device: torch.device | str,
    attention: Attention = "auto",
    quantization: Quantization = "none",
) -> Teacher:
    """A teacher that is known to score as its own logits do, see find_teacher and load_teacher. Raises ModelError."""
    found = find_teacher(path, dtype, device, attention)
    with naming_file(path):
        teacher = load_teacher(found, quantization)
    teacher.probe().check(teacher.config.model_type)
    return teacher
