"""The flags of a guided run, and the settings of Megatron-LM under which it would silently be another run.

Megatron-LM parses its own flags into one namespace (`get_args()`). Only the names that are read here are needed of it.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import get_args

from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.errors import RunError
from megatron_vocagno.integrations.megatron.dataset import AlignedGPTDataset, GuidedGPTDataset
from megatron_vocagno.objective.rule import PAPER, Aggregate, Rule, Scope, Unit, Unmapped, Weighting

OTHER_DATA = {
    "data_path": "it names Megatron's own data",
    "data_args_path": "it names Megatron's own data",
    "train_data_path": "it names Megatron's own data",
    "valid_data_path": "it names Megatron's own data",
    "test_data_path": "it names Megatron's own data",
    "per_split_data_args_path": "it names Megatron's own data",
    "mock_data": "it replaces the data",
    "fim_data": "its order of tokens is not that of the dataset",
    "sft": "its rows are packed conversations",
    "reset_position_ids": "position ids count over the whole row",
    "reset_attention_mask": "attention is over the whole row",
    "dataloader_inter_document_masking": "attention is over the whole row",
    "eod_mask_loss": "the token that ends a document is a label, and --unmapped determines its weight",
    "hybrid_context_parallel": "it cuts rows by their length",
}


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the flags, for Megatron-LM's `extra_args_provider`. The defaults are the paper's values."""
    group = parser.add_argument_group("vocagno", "guided pretraining, see docs/megatron.md")
    group.add_argument("--vocagno-data", required=True, help="aligned dataset with stored losses of its teacher")
    group.add_argument("--vocagno-valid", help="aligned dataset to evaluate on: the mean loss of all tokens")
    group.add_argument("--keep", type=float, default=PAPER.keep, help="share of the mapped tokens that is kept")
    group.add_argument(
        "--unit", choices=get_args(Unit), default=PAPER.unit, help="unit of text over which both models are compared"
    )
    group.add_argument("--weighting", choices=get_args(Weighting), default=PAPER.weighting, help="how an excess becomes a weight")
    group.add_argument("--scope", choices=get_args(Scope), default=PAPER.scope, help="which tokens are ranked together")
    group.add_argument("--unmapped", choices=get_args(Unmapped), default=PAPER.unmapped, help="weight of unmapped tokens: 1 or 0")
    group.add_argument(
        "--aggregate", choices=get_args(Aggregate), default=PAPER.aggregate, help="guide of several teacher tokens"
    )
    group.add_argument("--threshold", type=float, default=PAPER.threshold, help="nats, of weighting threshold")
    group.add_argument("--strength", type=float, default=PAPER.strength, help="of weighting control_variate")
    group.add_argument("--clip", type=float, default=PAPER.clip, help="highest likelihood ratio of weighting control_variate")
    group.add_argument("--require-positive", action="store_true", help="of the kept tokens, only those with an excess above 0")
    return parser


def rule_of(args: Namespace) -> Rule:
    """The rule by which a run selects tokens. Raises RunError for a number out of range."""
    names = ("keep", "aggregate", "scope", "unmapped", "require_positive", "unit", "weighting", "threshold", "strength", "clip")
    try:
        return Rule(**{name: getattr(args, name) for name in names})
    except ValueError as error:
        raise RunError(f"a flag of the rule is out of range: {error}") from None


def open_datasets(args: Namespace, train_samples: int, valid_samples: int) -> tuple[GuidedGPTDataset, AlignedGPTDataset | None]:
    """The rows for training and for evaluation (None without --vocagno-valid).

    Raises RunError, DatasetError for a dataset that does not fit the run, see require_supported and GuidedGPTDataset.
    """
    require_supported(args)
    same = (args.seq_length, args.padded_vocab_size, args.seed)
    train = GuidedGPTDataset(args.vocagno_data, same[0], train_samples, same[1], same[2], rule_of(args))
    _require_tokenizer(train.data, args)
    if args.vocagno_valid is None:
        return train, None
    valid = AlignedGPTDataset(args.vocagno_valid, same[0], valid_samples, same[1], same[2])
    _require_tokenizer(valid.data, args)
    return train, valid


def require_supported(args: Namespace) -> None:
    """Raises RunError for a flag of Megatron-LM under which the run would be another one."""
    for name, why in OTHER_DATA.items():
        if getattr(args, name, None):
            raise RunError(f"{flag(name)} is set, but rows come from --vocagno-data ({args.vocagno_data}): {why}. Remove it.")
    if args.dataloader_type not in (None, "single"):
        raise RunError(
            f"--dataloader-type {args.dataloader_type} orders the samples by itself: the rows are in their order already, "
            "and a restart continues with the row after the last consumed one. Use --dataloader-type single."
        )
    if args.vocagno_valid is None and args.eval_iters:
        raise RunError(
            f"--eval-iters {args.eval_iters} without data to evaluate on: add --vocagno-valid DATASET, or --eval-iters 0"
        )


def notes(args: Namespace) -> list[str]:
    """Lines about settings that have another meaning in a guided run, for its start."""
    coefficient = getattr(args, "moe_aux_loss_coeff", 0)
    coefficient = max(coefficient) if isinstance(coefficient, list) else coefficient
    if not getattr(args, "num_experts", None) or not coefficient or args.weighting != "top_k":
        return []
    return [
        f"note: --moe-aux-loss-coeff {coefficient:g}: Megatron divides the router's auxiliary loss by the kept tokens too, so it "
        f"counts up to {1 / args.keep:.3g} times as much per token as in a run that keeps all."
    ]


def flag(name: str) -> str:
    """The flag of an argument."""
    return "--" + name.replace("_", "-")


def _require_tokenizer(data: AlignedDataset, args: Namespace) -> None:
    """Compares the run's tokenizer with the dataset's if it is a Hugging Face folder, else the sizes of the vocabularies."""
    own, folder = data.student_tokenizer, Path(args.tokenizer_model or "")
    if args.tokenizer_type == "HuggingFaceTokenizer" and folder.is_dir():
        data.require_tokenizer("student", folder)
        return
    # NullTokenizer adds its own id
    most = own.vocab_size + 1 + args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    if args.padded_vocab_size > most:
        raise RunError(
            f"{data.path}: its student tokenizer has {own.vocab_size:,} ids, and --tokenizer-type {args.tokenizer_type} gives "
            f"the model {args.padded_vocab_size:,}, more than padding adds: was the dataset built for another student?\n"
            f"  The dataset's own tokenizer is --tokenizer-type HuggingFaceTokenizer --tokenizer-model {own.path}"
        )
