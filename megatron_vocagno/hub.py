"""Downloads models by their Hub ids, `org/name` or `org/name@revision`, into the cache of the Hugging Face Hub.

A path that exists on this machine is never an id. A path inside an existing folder is not an id either: if there is a folder
`models`, then `models/TinyLlama` is a path, possibly with a typo. A name with a full commit hash is always an id. Files are
downloaded with huggingface_hub, which uses HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE. It locks each file in its cache, so
that one process downloads while others wait. Pickled weights and code are never downloaded.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_vocagno.compat import use_only_cache
from megatron_vocagno.errors import HubError, nearest
from megatron_vocagno.files import wait_for_lock

CONFIG = ("config.json",)
WEIGHTS = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja")
"""The files of a model that are read: configuration, weights, tokenizer, chat templates."""
LEFT_OUT = ("*/*.safetensors", "*/*.json", "consolidated*")
"""Copies of the weights in other layouts: in subfolders, and in Mistral's format."""

ID = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")


def is_id(name: str | os.PathLike[str]) -> bool:
    """Whether a name is a Hub id, and not a path on this machine."""
    found = ID.fullmatch(os.fspath(name))
    if found is None or Path(name).suffix == ".gguf":
        return False
    return _is_commit(found["revision"]) or not (_exists(Path(name)) or _exists(Path(Path(name).parts[0])))


def why_id(name: str | os.PathLike[str]) -> str:
    """The end of a message about an id whose model is not on this machine: the reason why the name counts as an id."""
    found = ID.fullmatch(os.fspath(name))
    assert found, name
    if _is_commit(found["revision"]):
        return "The name counts as a Hub id, because it ends with a commit."
    return f"The name counts as a Hub id, because it has the form org/name and `{Path(name).parts[0]}` does not exist."


def why_path(name: str | os.PathLike[str]) -> str:
    """The end of a message about a path that does not exist: the reason why it counts as a path. See errors.missing_path_hint."""
    if ID.fullmatch(os.fspath(name)) and not is_id(name) and Path(name).suffix != ".gguf":
        return f"The name counts as a path, not as a Hub id, because `{Path(name).parts[0]}` exists."
    return "The name counts as a path, because a Hub id has the form org/name or org/name@revision."


def short_name(name: str | os.PathLike[str]) -> str:
    """The last part of a path or an id, without the revision."""
    found = ID.fullmatch(os.fspath(name))
    return Path(found["repository"] if found and not _exists(Path(name)) else name).name


def pinned(names: Sequence[str | os.PathLike[str]], record: Path) -> list[str]:
    """The names, with a commit added to each id. Commits come from `record`, or else from the Hub, and are then recorded.

    An id therefore means the same weights for all processes that share a record, and in a resumed run. Other names do not change.

    record  a JSON file, id -> id with commit

    Downloads the config.json of each new id. Raises HubError, OSError.
    """
    texts = [os.fspath(name) for name in names]
    # a name with a commit needs no record, and a name that exists is a path
    unpinned = [t for t in texts if (found := ID.fullmatch(t)) and not _is_commit(found["revision"]) and not _exists(Path(t))]
    # read the record first: a run may create a folder with the organization's name, and must still recognize its teacher
    known = _read_record(record.read_text(encoding="utf-8"), record) if unpinned and record.exists() else {}
    # write the record last, because this may create that folder
    if new := {text: _pin(text) for text in unpinned if text not in known and is_id(text)}:
        known = _add_to_record(new, record)
    return [known[text] if text in unpinned and text in known else text for text in texts]


def _pin(name: str) -> str:
    try:
        return f"{_split(name)[0]}@{snapshot(name, CONFIG).name}"
    except HubError as error:
        raise HubError(f"no model at {name}: the path does not exist, and as a Hub id: {error}{nearest(name)}", name) from error


def _add_to_record(pins: dict[str, str], record: Path) -> dict[str, str]:
    """Add pins to the record and return all of its pins. If the record already has an id, its commit is kept."""
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
            raise ValueError("a name without a commit")
    except (ValueError, AttributeError) as error:
        raise HubError(
            f"{record}, the record of the commits of Hub ids, cannot be read: {error}. If you delete it, the current commits are "
            "used."
        ) from error
    return known


def snapshot(name: str | os.PathLike[str], files: Sequence[str] = WEIGHTS, offline: bool = False) -> Path:
    """The folder with these files of a model, named after its commit. Downloads files that the cache lacks.

    If the Hub does not answer, the folder may hold only some of the files, see require_unlisted.

    files    glob patterns
    offline  use only the cache

    Raises HubError: the model is unknown, gated, not reachable, or not in the cache.
    """
    # imported only when it is needed, because most models are paths
    from huggingface_hub import errors, snapshot_download

    repository, revision = _split(name)
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=list(files),
                ignore_patterns=list(LEFT_OUT),
                local_files_only=use_only_cache(offline),
            )
        )
    except errors.GatedRepoError as error:
        reason = f"{repository} is gated: accept its terms on the Hub, and set HF_TOKEN to a token of that account"
        raise HubError(reason) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(f"the Hub has no {repository}, or it is private and HF_TOKEN does not give access to it") from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{repository} has no revision {revision!r} on the Hub") from error
    except errors.LocalEntryNotFoundError as error:
        # not the library's message, which names one of the library's arguments
        reason = "the Hub was not contacted" if offline else _no_answer(error.__cause__)
        raise HubError(_not_cached(repository, revision, reason)) from error
    # other errors concern the connection or the disk: timeouts, proxies and others, with many error classes
    except Exception as error:
        raise HubError(f"{repository} cannot be downloaded: {type(error).__name__}: {_first_line(error)}") from error


def require_unlisted(name: str | os.PathLike[str], files: Sequence[str]) -> None:
    """Raises HubError if the Hub lists one of these files, which the cache lacks, or if the Hub does not answer."""
    from huggingface_hub import HfApi

    repository, revision = _split(name)
    try:
        listed = HfApi().list_repo_files(repository, revision=revision)
    # after any error, it is unknown whether the Hub has the file
    except Exception as error:
        raise HubError(_not_cached(repository, revision, _no_answer(error))) from error
    if not set(files).isdisjoint(listed):
        raise HubError(
            _not_cached(repository, revision, "the Hub did not answer when the other files were requested, although it does now")
        )


def _is_commit(revision: str | None) -> bool:
    return revision is not None and COMMIT.fullmatch(revision) is not None


def _exists(path: Path) -> bool:
    """Whether a path exists. If the system denies access, it counts as existing, and the name counts as a path."""
    try:
        return path.exists()
    except OSError:
        return True


def _split(name: str | os.PathLike[str]) -> tuple[str, str | None]:
    found = ID.fullmatch(os.fspath(name))
    assert found, name
    return found["repository"], found["revision"]


def _no_answer(error: BaseException | None) -> str:
    """The reason why the Hub did not answer."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "the Hub is not contacted, because HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"
    return "the Hub does not answer" + (f" ({type(error).__name__}: {_first_line(error)})" if error else "")


def _not_cached(repository: str, revision: str | None, reason: str) -> str:
    from huggingface_hub import constants

    command = f"hf download {repository}" + (f" --revision {revision}" if revision else "") + " --exclude '*.bin'"
    return (
        f"{repository}{f'@{revision}' if revision else ''} is missing or incomplete in the Hub's cache {constants.HF_HUB_CACHE}, "
        f"and {reason}. Download it on a machine with a network: {command}."
    )


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
