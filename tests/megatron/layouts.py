"""Guided steps of a tiny GPTModel in many layouts, by megatron-core's own schedules, gradients and optimizer, on CPUs.

    python -W ignore -m tests.megatron.layouts CASES.json

    [{"name": …, "tensor": 1, "pipeline": 1, "context": 1, "data": 1, "rule": {…}, …}, …]      see Case

The imports take longer than a layout, so this process imports once and forks the ranks. The layouts of one number of ranks run
one after another in the same processes. A case leaves NAME.json with the losses and the gradient norms of its steps, the reported
means, and the weights that were chosen, by row.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator, unset_num_microbatches_calculator
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from safetensors.torch import load_file
from torch import Tensor

from megatron_vocagno.integrations.megatron import step
from megatron_vocagno.integrations.megatron.dataset import AlignedGPTDataset, GuidedGPTDataset
from megatron_vocagno.objective.rule import Rule
from tests.megatron import cpu

ROW, ROWS_PER_STEP, MICRO_BATCH = 64, 8, 2


@dataclass(frozen=True)
class Case:
    name: str
    student: str
    """A Hugging Face folder of a Llama."""
    data: str
    out: str
    rule: dict[str, Any] = field(default_factory=dict)
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data_parallel: int = 1
    micro_batch: int = MICRO_BATCH
    steps: int = 3
    first_row: int = 0
    distributed_optimizer: bool = False
    evaluate: bool = False
    """Instead of training: the loss of the first step's rows without a guide."""

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data_parallel

    @property
    def micro_batches(self) -> int:
        return ROWS_PER_STEP // self.micro_batch // self.data_parallel


class GatheredAttention(torch.nn.Module):
    """Causal attention over the keys and values of all context-parallel ranks, in place of Transformer Engine's, which needs a
    GPU. Positions are those of Megatron's own cut.
    """

    def __init__(self, config: TransformerConfig, *_: Any, **__: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """[P, B, heads, D], and keys and values of groups of heads -> [P, B, heads * D]"""
        ranks, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
        group = parallel_state.get_context_parallel_group()
        part_RP = torch.arange(len(query) * ranks).view(2 * ranks, -1)
        position_RP = torch.stack([part_RP[[r, 2 * ranks - 1 - r]].flatten() for r in range(ranks)])
        key, value = (
            # zeros for the parts of other ranks, and a sum: torch's all_gather has no gradient on gloo
            dist_nn.all_reduce(torch.stack([part * (r == rank) for r in range(ranks)]), group=group)
            .flatten(0, 1)
            .repeat_interleave(query.shape[2] // part.shape[2], 2)
            for part in (key, value)
        )
        scores = torch.einsum("pbhd,sbhd->bhps", query, key) / query.shape[-1] ** 0.5
        later = position_RP[rank][:, None] < position_RP.flatten()
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        return torch.einsum("bhps,sbhd->pbhd", weights, value).flatten(2)


# ---- the model, with the weights of a Hugging Face Llama


def build(case: Case) -> tuple[GPTModel, TransformerConfig]:
    llama = json.loads((Path(case.student) / "config.json").read_text())
    config = TransformerConfig(
        num_layers=llama["num_hidden_layers"],
        hidden_size=llama["hidden_size"],
        num_attention_heads=llama["num_attention_heads"],
        num_query_groups=llama["num_key_value_heads"],
        ffn_hidden_size=llama["intermediate_size"],
        layernorm_epsilon=llama["rms_norm_eps"],
        tensor_model_parallel_size=case.tensor,
        pipeline_model_parallel_size=case.pipeline,
        context_parallel_size=case.context,
        use_cpu_initialization=True,
        pipeline_dtype=torch.float32,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        calculate_per_token_loss=True,
    )
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    if case.context > 1:
        layer.submodules.self_attention.submodules.core_attention = GatheredAttention
    model = GPTModel(
        config,
        layer,
        vocab_size=llama["vocab_size"],
        max_sequence_length=ROW,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=llama["tie_word_embeddings"],
        position_embedding_type="rope",
    )
    model.model_type = ModelType.encoder_or_decoder
    load(model, case, llama)
    return model, config


def load(model: GPTModel, case: Case, llama: dict[str, Any]) -> None:
    """This rank's part of the weights."""
    weights: dict[str, Tensor] = {}
    for file in Path(case.student).glob("*.safetensors"):
        weights |= load_file(file)
    rank, ranks = parallel_state.get_tensor_model_parallel_rank(), case.tensor
    groups = llama["num_key_value_heads"]
    offset = parallel_state.get_pipeline_model_parallel_rank() * llama["num_hidden_layers"] // case.pipeline
    for name, parameter in model.named_parameters():
        whole = llamas(name, weights, offset, groups)
        if len(whole) == 2 and whole[0].dim() == 2:  # gate and up are cut each
            own = torch.cat([part.chunk(ranks)[rank] for part in whole])
        else:
            (own,) = whole
            if own.shape != parameter.shape:
                dim = next(d for d in range(own.dim()) if own.shape[d] != parameter.shape[d])
                own = own.chunk(ranks, dim)[rank]
        assert own.shape == parameter.shape, (name, own.shape, parameter.shape)
        with torch.no_grad():
            parameter.copy_(own)


def llamas(name: str, weights: dict[str, Tensor], offset: int, groups: int) -> list[Tensor]:
    """The weights of a Llama that are one parameter of megatron-core, whole. offset: the first layer of this stage"""
    outside = {
        "embedding.word_embeddings.weight": "model.embed_tokens",
        "decoder.final_layernorm.weight": "model.norm",
        "output_layer.weight": "lm_head" if "lm_head.weight" in weights else "model.embed_tokens",
    }
    if name in outside:
        return [weights[outside[name] + ".weight"]]
    _, _, layer, part = name.split(".", 3)

    def of(kind: str) -> Tensor:
        return weights[f"model.layers.{int(layer) + offset}.{kind}.weight"]

    if part == "self_attention.linear_qkv.weight":
        # for each group of heads: its queries, its key, its value
        by_group = [of(f"self_attn.{kind}_proj").chunk(groups) for kind in "qkv"]
        return [torch.cat([kind[group] for group in range(groups) for kind in by_group])]
    if part == "mlp.linear_fc1.weight":
        return [of("mlp.gate_proj"), of("mlp.up_proj")]
    inside = {
        "input_layernorm.weight": "input_layernorm",
        "self_attention.linear_proj.weight": "self_attn.o_proj",
        "pre_mlp_layernorm.weight": "post_attention_layernorm",
        "mlp.linear_fc2.weight": "mlp.down_proj",
    }
    return [of(inside[part])]


# ---- a run


def samples(case: Case) -> Iterator[list[int]]:
    """Numbers of the rows of this rank's micro-batches, as Megatron-LM's MegatronPretrainingSampler orders them."""
    row = case.first_row
    while True:
        begin = row + parallel_state.get_data_parallel_rank() * case.micro_batch
        yield list(range(begin, begin + case.micro_batch))
        row += case.micro_batch * case.data_parallel


def run(case: Case) -> None:
    parallel_state.initialize_model_parallel(case.tensor, case.pipeline, context_parallel_size=case.context)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    unset_num_microbatches_calculator()
    init_num_microbatches_calculator(dist.get_rank(), None, ROWS_PER_STEP, case.micro_batch, case.data_parallel)
    model, config = build(case)
    rule = Rule(**case.rule)
    where = (case.data, ROW, 1000, model.vocab_size, 0)
    data = AlignedGPTDataset(*where) if case.evaluate else GuidedGPTDataset(*where, rule)
    read: list[list[int]] = []

    def batches() -> Iterator[dict[str, Tensor]]:
        for rows in samples(case):
            read.append(rows)
            yield torch.utils.data.default_collate([data[row] for row in rows])

    chosen: dict[int, list[float]] = {}
    select = step.select_tokens

    def select_and_note(*inputs: Any, **options: Any) -> Any:
        selection = select(*inputs, **options)
        chosen.update(zip(read[len(chosen) // case.micro_batch], selection.weight_BS.tolist(), strict=True))
        return selection

    step.select_tokens = select_and_note
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=case.distributed_optimizer, grad_reduce_in_fp32=True)
    trained = DistributedDataParallel(config, ddp, model)
    config.finalize_model_grads_func = finalize_model_grads
    settings = OptimizerConfig(
        optimizer="adam",
        lr=3e-3,
        weight_decay=0.0,
        adam_beta1=0.9,
        adam_beta2=0.95,
        clip_grad=1.0,
        use_distributed_optimizer=case.distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(settings, [trained])
    forward_backward, rows = get_forward_backward_func(), batches()
    found: dict[str, list[float]] = {}
    if case.evaluate:
        trained.eval()
    for _ in range(case.steps):
        trained.zero_grad_buffer()
        optimizer.zero_grad()
        reports = forward_backward(
            forward_step_func=partial(step.forward_step, rule=rule),
            data_iterator=rows,
            model=[trained],
            num_microbatches=case.micro_batches,
            seq_length=ROW,
            micro_batch_size=case.micro_batch,
            forward_only=case.evaluate,
        )
        norm = None if case.evaluate else optimizer.step()[1]
        for name in reports[0] if reports else ():
            # as Megatron-LM's train_step does
            pair = torch.vstack([report[name].view(-1) for report in reports]).sum(0)
            dist.all_reduce(pair, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
            found.setdefault(name, []).append(float(pair[0] / pair[1]))
            if name == "lm loss":
                found.setdefault("number", []).append(float(pair[1]))
        if norm is not None:
            found.setdefault("gradient norm", []).append(float(norm))
    step.select_tokens = select
    # the last stage of each data-parallel rank knows its rows
    everything: list[Any] = [None] * case.ranks
    dist.all_gather_object(everything, (found if "lm loss" in found else None, chosen))
    alike = {row: weights for _, part in everything for row, weights in part.items()}
    assert all(part[row] == alike[row] for _, part in everything for row in part), "ranks of one group chose differently"
    if dist.get_rank() == 0:
        told = [of_rank for of_rank, _ in everything if of_rank]
        assert len(told) == case.ranks // case.pipeline
        # as text, in which NaN equals NaN
        assert len(set(map(json.dumps, told))) == 1, (case, told)
        weights = [alike[row] for row in sorted(alike)]
        Path(case.out, f"{case.name}.json").write_text(json.dumps(told[0] | {"weights": weights}))
    parallel_state.destroy_model_parallel()


def become_rank(rank: int, ranks: int, port: int, cases: list[Case]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    cpu.pretend()
    dist.init_process_group("gloo")
    for case in cases:
        run(case)
    dist.barrier()
    dist.destroy_process_group()


def start(ranks: int, cases: list[Case]) -> None:
    """Fork the ranks and wait for them. Raises SystemExit if one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(ranks):
        if not (child := os.fork()):
            code = 1
            try:
                become_rank(rank, ranks, port, cases)
                code = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        children.append(child)
    failed = []
    for _ in children:
        child, status = os.wait()
        if status and not failed:
            failed.append(status)
            for other in children:
                if other != child:
                    os.kill(other, 9)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    told = [Case(**case) for case in json.loads(Path(sys.argv[1]).read_text())]
    assert not any(name in sys.modules for name in ("deepspeed", "transformers"))
    for ranks in sorted({case.ranks for case in told}):
        start(ranks, [case for case in told if case.ranks == ranks])
