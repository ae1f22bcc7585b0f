"""The commands of build_dataset: each gets the parsed options, and prints its result."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from rich.table import Table
from rich.text import Text

from megatron_vocagno.corpus.dataset import local_folder, merge
from megatron_vocagno.corpus.manifest import Manifest, read_manifest
from megatron_vocagno.corpus.places import Place, place
from megatron_vocagno.corpus.verify import shard_checks, verify_frame, verify_shard
from megatron_vocagno.errors import CorpusError, DatasetError, counted, tool
from megatron_vocagno.preprocess.build import build, finish
from megatron_vocagno.preprocess.inputs import find
from megatron_vocagno.preprocess.jobs import JobRunner
from megatron_vocagno.preprocess.plan import plan
from megatron_vocagno.preprocess.shards import BuildConfig, ShardJob, ShardResult
from megatron_vocagno.preprocess.workers import JobFailure, run_local

from .console import Terminal, absolute
from .progress import BuildProgress, VerifyProgress, summary


def build_dataset(args: argparse.Namespace) -> None:
    settings = settings_of(args)
    out = absolute(place(args.out))
    with BuildProgress(Terminal(quiet=args.quiet), args.verbose) as progress:
        # first, because a tokenizer takes seconds to open
        inputs = [absolute(file) for file in find(args.inputs, progress.note)]
        note_encoders(settings, progress)
        build(
            inputs,
            out,
            settings,
            engine=engine_of(args, out, progress),
            shard_bytes=int(args.shard_mb * 2**20),
            max_documents=args.max_documents,
            max_bad_fraction=args.max_bad_fraction,
            force=args.force,
            part=args.shards,
            on_plan=progress.plan,
            on_shard=progress.shard,
            on_note=progress.note,
        )
    if args.shards:
        prog = tool("preprocess.build_dataset")
        print(f"part {args.shards.i} of {args.shards.n} is done. When all parts are done, run: {prog} finalize --out {out} …")
        return
    print_summary(out, progress.reused, args)


def show_plan(args: argparse.Namespace) -> None:
    made = plan(
        find(args.inputs, lambda note: print(f"note: {note}")), settings_of(args), int(args.shard_mb * 2**20), args.max_documents
    )
    table = Table(
        title=f"{counted(len(made.shards), 'shard')}, about {made.text_bytes / 1e6:,.1f} MB of text", title_justify="left"
    )
    for name in ("shard", "from", "to", "files", "about MB of text"):
        table.add_column(name, justify="left" if name in ("from", "to") else "right", overflow="fold")
    for i, pieces in enumerate(made.shards):
        ends = (
            Text(f"{place(piece.url).name}:{at:,}") for piece, at in ((pieces[0], pieces[0].start), (pieces[-1], pieces[-1].stop))
        )
        table.add_row(f"{i:04}", *ends, str(len(pieces)), f"{sum(p.weight for p in pieces) / 1e6:,.1f}")
    Terminal().print(table)


def finalize(args: argparse.Namespace) -> None:
    def note(text: str) -> None:
        if not args.quiet:
            print(f"note: {text}")

    out = finish(absolute(place(args.out)), settings_of(args), args.max_bad_fraction, note)
    print_summary(out, 0, args)


def verify(args: argparse.Namespace) -> None:
    manifest = verify_dataset(place(args.dataset), args.workers, args.quiet)
    documents = manifest.totals.documents
    shards, verb = counted(len(manifest.shards), "shard"), "is" if documents == 1 else "are"
    print(f"{args.dataset}: {counted(documents, 'document')} in {shards} {verb} intact")


def verify_dataset(dataset: Place, workers: int, quiet: bool = False) -> Manifest:
    """Read the complete dataset. Raises DatasetError that lists everything that has changed since it was written."""
    root = local_folder(dataset)
    manifest = read_manifest(root)
    complaints = verify_frame(root, manifest)
    with VerifyProgress(Terminal(quiet=quiet), manifest) as progress:
        for found in run_local(verify_shard, shard_checks(root, manifest), workers):
            complaints += [found.reason] if isinstance(found, JobFailure) else found
            progress.shard()
    if complaints:
        advice = "Delete the folder of each damaged shard and run the build again: it makes the missing shards."
        raise DatasetError("\n".join([f"{dataset} has changed since it was written:", *complaints, advice]))
    return manifest


def merge_datasets(args: argparse.Namespace) -> None:
    dataset = merge(args.datasets, args.out)
    print(f"{dataset.path}: {counted(len(dataset), 'document')} of {counted(len(args.datasets), 'dataset')}")


# ---- options


@contextmanager
def naming_ggufs(args: argparse.Namespace) -> Iterator[None]:
    """Errors name the GGUF files of the options instead of their converted folders."""
    with ExitStack() as stack:
        for path in (getattr(args, "student", ""), getattr(args, "teacher", "")):
            if path.endswith(".gguf"):
                # torch and transformers take seconds to import
                from megatron_vocagno.model.gguf import naming_file

                stack.enter_context(naming_file(path))
        yield


def settings_of(args: argparse.Namespace) -> BuildConfig:
    return BuildConfig(
        student=tokenizer_of(args.student),
        teacher=tokenizer_of(args.teacher),
        student_eos=args.student_eos,
        teacher_eos=args.teacher_eos,
        text_key=tuple(args.text_key or ["text"]),
        id_key=tuple(args.id_key or []),
        on_bad_line=args.on_bad_line,
        nfc=args.nfc,
        backend=args.backend,
    )


def tokenizer_of(path_or_id: str) -> str:
    """The absolute path of a tokenizer, because workers of a cluster run in another folder; a Hub id stays as it is. For a GGUF
    file, the path of its converted folder, which training uses too.
    """
    path = Path(path_or_id).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        # torch and transformers take seconds to import
        from megatron_vocagno.model.gguf import cached_folder

        path = cached_folder(path)
    return str(absolute(path)) if path.exists() else path_or_id


def engine_of(args: argparse.Namespace, out: Place, progress: BuildProgress) -> JobRunner[ShardResult, ShardJob]:
    if args.engine == "ray":
        from megatron_vocagno.preprocess.ray_engine import run_ray

        return partial(run_ray, address=args.ray_address)
    if args.workers > 1 and not isinstance(out, Path) and out.protocol == "memory":
        raise CorpusError(f"--out {out} is in the memory of one process: use --workers 1")
    return partial(run_local, workers=args.workers, on_progress=progress.within)


# ---- results


def note_encoders(settings: BuildConfig, progress: BuildProgress) -> None:
    for side, tokenizer in zip(("student", "teacher"), settings.tokenizers, strict=True):
        why = f" ({tokenizer.not_fast})" if tokenizer.not_fast else ""
        progress.note(f"tokenizer backend of the {side}: {tokenizer.encoder.name}{why}")
        if tokenizer.eos_why:
            end = f"the {side}'s documents end with {tokenizer.eos_token}, {tokenizer.eos_why}"
            progress.note(f"{end}. To change this, set --{side}-eos")


def print_summary(out: Place, reused: int, args: argparse.Namespace) -> None:
    verified = args.verify and isinstance(out, Path)
    manifest = verify_dataset(out, args.workers, args.quiet) if verified else read_manifest(out)
    Terminal().print(summary(out, manifest, reused))
