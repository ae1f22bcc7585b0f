"""Models by their Hub ids, `org/name` or `org/name@revision`: what the Hugging Face Hub has of them, as a folder in its cache.

A path that exists here is never an id, and neither is one below a folder that exists: `models/TinyLlama` beside a folder
`models` is a path with a mistake in it. Files come by huggingface_hub, which honours HF_HOME, HF_ENDPOINT, HF_TOKEN and
HF_HUB_OFFLINE; it locks each file in its cache, so of many processes one downloads and the others wait. Pickled weights and
code are never asked for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

CONFIG = ("config.json",)
WEIGHTS = ("*.safetensors", "*.json", "tokenizer.model")
"""All that is read of a model: its configuration, its weights, its tokenizer."""
LEFT_OUT = ("*/*", "consolidated*")
"""Copies of the weights in other layouts: in folders below, and as Mistral writes them."""

ID = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")


class HubError(Exception):
    """A model that the Hub does not give: which, and why."""


def is_id(name: str | os.PathLike[str]) -> bool:
    """Whether this names a model on the Hub, and nothing on this machine."""
    text, path = os.fspath(name), Path(name)
    if not ID.fullmatch(text) or path.suffix == ".gguf":
        return False
    return not path.exists() and not Path(path.parts[0]).exists()


def short_name(name: str | os.PathLike[str]) -> str:
    """The last part of a path or an id, without its revision."""
    repository = os.fspath(name).partition("@")[0] if is_id(name) else name
    return Path(repository).name


def pinned(name: str | os.PathLike[str]) -> str:
    """The same id with the commit that its revision means today. Reads the model's config.json. Raises HubError."""
    repository, revision = _parts(name)
    if revision is not None and COMMIT.fullmatch(revision):
        return os.fspath(name)
    return f"{repository}@{snapshot(name, CONFIG).name}"


def snapshot(name: str | os.PathLike[str], files: Sequence[str] = WEIGHTS, offline: bool = False) -> Path:
    """The folder with these files of a model, named as its commit; downloads what the cache lacks.

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
        raise HubError(f"{_not_cached(repository, revision)} {_first_line(error)}") from error
    # what is left is the way to the Hub: timeouts, proxies, disks, each with an error class of its own
    except Exception as error:
        raise HubError(f"{repository} cannot be downloaded: {type(error).__name__}: {_first_line(error)}") from error


def _parts(name: str | os.PathLike[str]) -> tuple[str, str | None]:
    found = ID.fullmatch(os.fspath(name))
    assert found, name
    return found["repository"], found["revision"]


def _not_cached(repository: str, revision: str | None) -> str:
    from huggingface_hub import constants

    command = f"hf download {repository}" + (f" --revision {revision}" if revision else "") + " --exclude '*.bin'"
    return (
        f"{repository}{f'@{revision}' if revision else ''} is not, or not whole, in the Hub's cache {constants.HF_HUB_CACHE}, "
        f"and the Hub is not asked or does not answer. Download it where there is a network: {command}."
    )


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
