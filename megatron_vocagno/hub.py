"""Models by their Hub ids, `org/name` or `org/name@revision`: what the Hugging Face Hub has of them, as a folder in its cache.

A path that exists here is never an id, and neither is one below a folder that exists: `models/TinyLlama` beside a folder
`models` is a path with a mistake in it. An id with its whole commit is one everywhere. Files come by
huggingface_hub, which honours HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE; it locks each file in its cache, so of many
processes one downloads and the others wait. Pickled weights and code are never asked for.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_vocagno.errors import HubError, nearest
from megatron_vocagno.files import wait_for_lock

CONFIG = ("config.json",)
WEIGHTS = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja")
"""All that is read of a model: its configuration, its weights, its tokenizer, its chat templates."""
LEFT_OUT = ("*/*.safetensors", "*/*.json", "consolidated*")
"""Copies of the weights in other layouts: in folders below, and as Mistral writes them."""

ID = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")


def is_id(name: str | os.PathLike[str]) -> bool:
    """Whether this names a model on the Hub, and nothing on this machine."""
    found = ID.fullmatch(os.fspath(name))
    if found is None or Path(name).suffix == ".gguf":
        return False
    return _is_commit(found["revision"]) or not (_is_here(Path(name)) or _is_here(Path(Path(name).parts[0])))


def taken_for_id(name: str | os.PathLike[str]) -> str:
    """What to say of an id whose model is not on this machine: why it was not taken for a path."""
    found = ID.fullmatch(os.fspath(name))
    assert found, name
    if _is_commit(found["revision"]):
        return "It is taken for a Hub id, because it ends with a commit."
    return f"It is taken for a Hub id, because it reads org/name and there is no `{Path(name).parts[0]}` here."


def taken_for_path(name: str | os.PathLike[str]) -> str:
    """What to add to the error of a path that does not exist: why it was not asked of the Hub. See also errors.looked_for."""
    if ID.fullmatch(os.fspath(name)) and not is_id(name) and Path(name).suffix != ".gguf":
        return f"It is taken for a path, not for a Hub id, because `{Path(name).parts[0]}` is here."
    return "It is taken for a path: a Hub id is org/name or org/name@revision."


def short_name(name: str | os.PathLike[str]) -> str:
    """The last part of a path or an id, without its revision."""
    found = ID.fullmatch(os.fspath(name))
    return Path(found["repository"] if found and not _is_here(Path(name)) else name).name


def pinned(names: Sequence[str | os.PathLike[str]], record: Path) -> list[str]:
    """The same ids with commits: those of `record`, where it has them, or what their revisions mean today, then recorded.

    So an id means the same weights to all that share a record, and in a run that is resumed. What is no id stays as it is.
    record: a JSON file, id -> id with commit. Reads each model's config.json. Raises HubError, OSError.
    """
    texts = [os.fspath(name) for name in names]
    # a name with a commit needs no record; one that is here is a path
    unpinned = [t for t in texts if (found := ID.fullmatch(t)) and not _is_commit(found["revision"]) and not _is_here(Path(t))]
    # the record comes first: a run that writes into a folder named like the organisation must know its teacher again
    known = _read_record(record.read_text(encoding="utf-8"), record) if unpinned and record.exists() else {}
    # and it is written last, as it may make that folder
    if new := {text: _pin(text) for text in unpinned if text not in known and is_id(text)}:
        known = _recorded(new, record)
    return [known[text] if text in unpinned and text in known else text for text in texts]


def _pin(name: str) -> str:
    try:
        return f"{_parts(name)[0]}@{snapshot(name, CONFIG).name}"
    except HubError as error:
        raise HubError(f"no model at {name}: the path does not exist, and as a Hub id: {error}{nearest(name)}", name) from error


def _recorded(pins: dict[str, str], record: Path) -> dict[str, str]:
    """All pins of the record, with these. Of processes that pin one id at once the first has its way."""
    record.parent.mkdir(parents=True, exist_ok=True)
    with record.open("a+", encoding="utf-8") as file:
        wait_for_lock(file)
        file.seek(0)
        before = _read_record(file.read(), record)
        known = pins | before
        if known != before:
            file.truncate(0)
            file.write(json.dumps(known, indent=2) + "\n")
    return known


def _read_record(text: str, record: Path) -> dict[str, str]:
    try:
        known: dict[str, str] = json.loads(text or "{}")
        if not all(COMMIT.fullmatch(pin.rpartition("@")[2]) for pin in known.values()):
            raise ValueError("a name without its commit")
    except (ValueError, AttributeError) as error:
        raise HubError(f"{record}, the commits of Hub ids, cannot be read: {error}. Without it the Hub is asked anew.") from error
    return known


def snapshot(name: str | os.PathLike[str], files: Sequence[str] = WEIGHTS, offline: bool = False) -> Path:
    """The folder with these files of a model, named as its commit; downloads what the cache lacks.

    Where the Hub does not answer it may hold some of the files alone: see require_unlisted.

    files    glob patterns
    offline  only look into the cache

    Raises HubError: unknown, gated, not reachable, not in the cache.
    """
    # not before it is needed: most models are paths
    from huggingface_hub import errors, snapshot_download

    repository, revision = _parts(name)
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=list(files),
                ignore_patterns=list(LEFT_OUT),
                local_files_only=offline,
            )
        )
    except errors.GatedRepoError as error:
        reason = f"{repository} is gated: accept its terms on the Hub, and set HF_TOKEN to a token of that account"
        raise HubError(reason) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(f"the Hub has no {repository}, or hides it from those without its HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{repository} has no revision {revision!r} on the Hub") from error
    except errors.LocalEntryNotFoundError as error:
        # not the library's words, which name an argument of its own
        silence = "the Hub was not asked" if offline else _no_answer(error.__cause__)
        raise HubError(_not_cached(repository, revision, silence)) from error
    # what is left is the way to the Hub: timeouts, proxies, disks, each with an error class of its own
    except Exception as error:
        raise HubError(f"{repository} cannot be downloaded: {type(error).__name__}: {_first_line(error)}") from error


def require_unlisted(name: str | os.PathLike[str], files: Sequence[str]) -> None:
    """Raises HubError where the Hub may well have one of these files, which the cache lacks: it lists it, or does not answer."""
    from huggingface_hub import HfApi

    repository, revision = _parts(name)
    try:
        listed = HfApi().list_repo_files(repository, revision=revision)
    # whatever the reason, the Hub has not said that the file is missing
    except Exception as error:
        raise HubError(_not_cached(repository, revision, _no_answer(error))) from error
    if not set(files).isdisjoint(listed):
        raise HubError(
            _not_cached(repository, revision, "the Hub did not answer when it was asked for the rest, though it does now")
        )


def _is_commit(revision: str | None) -> bool:
    return revision is not None and COMMIT.fullmatch(revision) is not None


def _is_here(path: Path) -> bool:
    """Also where the system refuses to look: then the name is a path's."""
    try:
        return path.exists()
    except OSError:
        return True


def _parts(name: str | os.PathLike[str]) -> tuple[str, str | None]:
    found = ID.fullmatch(os.fspath(name))
    assert found, name
    return found["repository"], found["revision"]


def _no_answer(error: BaseException | None) -> str:
    """Why the Hub gave nothing."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "the Hub is not asked, because HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"
    return "the Hub does not answer" + (f" ({type(error).__name__}: {_first_line(error)})" if error else "")


def _not_cached(repository: str, revision: str | None, silence: str) -> str:
    from huggingface_hub import constants

    command = f"hf download {repository}" + (f" --revision {revision}" if revision else "") + " --exclude '*.bin'"
    return (
        f"{repository}{f'@{revision}' if revision else ''} is not, or not whole, in the Hub's cache {constants.HF_HUB_CACHE}, "
        f"and {silence}. Download it where there is a network: {command}."
    )


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
