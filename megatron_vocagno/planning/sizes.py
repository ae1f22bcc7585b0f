"""A model's configuration -> parameters and FLOPs.

Parameters are counted on a model on the meta device, so no formula has to follow the architecture.

The product of [N, I] and [I, O] takes 2 * N * I * O FLOPs. Attention is causal: on average a token attends to half of its row.
Kernels skip the masked half, so half of the square is counted. (PaLM, arXiv 2204.02311, appendix B, counts the whole square.)
Norms, activation functions and other element-wise work are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

from megatron_vocagno.model.folder import skeleton


@dataclass(frozen=True)
class Sizes:
    """The numbers of a model that determine its memory and FLOPs."""

    model_type: str
    layers: int
    """Number of decoder layers. All have the same size."""
    hidden: int
    """H, the hidden size."""
    vocabulary: int
    """V, the rows of the embedding."""
    parameters: int
    """Parameters of the complete model. A head that is tied to the embedding counts once."""
    params_per_layer: int
    """Parameters of one decoder layer."""
    matmul_params_per_layer: int
    """Parameters of the linear layers in one decoder layer. Every token is multiplied with each of them."""
    attention_width: int
    """Number of query heads times the head dimension."""
    tied: bool
    """Whether the head is the embedding."""
    key_width: int
    """Number of key heads times the head dimension."""
    head_width: int
    """The head dimension."""

    @property
    def embedding(self) -> int:
        """Parameters of the embedding. The head has the same number."""
        return self.vocabulary * self.hidden

    def layer_flops(self, tokens: float, row_length: float) -> float:
        """FLOPs of one decoder layer's forward pass on `tokens` tokens in rows of `row_length`."""
        return tokens * (2 * self.matmul_params_per_layer + 4 * self.attention_width * (row_length + 1) / 2)

    def head_flops(self, tokens: float) -> float:
        """FLOPs of the logits of `tokens` tokens."""
        return tokens * 2 * self.embedding

    def forward_flops(self, tokens: float, row_length: float) -> float:
        """FLOPs of the model's forward pass."""
        return self.layers * self.layer_flops(tokens, row_length) + self.head_flops(tokens)


def sizes(config: PretrainedConfig) -> Sizes:
    """Count the model that transformers would build. Uses the meta device, so no memory is allocated."""
    config = config.get_text_config()
    model = skeleton(config)
    layer = model.get_decoder().layers[0]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Sizes(
        model_type=config.model_type,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        params_per_layer=sum(parameter.numel() for parameter in layer.parameters()),
        matmul_params_per_layer=sum(module.weight.numel() for module in layer.modules() if isinstance(module, nn.Linear)),
        attention_width=config.num_attention_heads * head_dim,
        head_width=head_dim,
        key_width=(getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head_dim,
        tied=bool(config.tie_word_embeddings),
    )
