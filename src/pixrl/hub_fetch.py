"""Checkpoints from the hub: what is fetched, pinned revisions, and errors that say what to do.

`owner/name@revision` pins a branch, a tag or a commit. With HF_HUB_OFFLINE=1, or without a connection, what lies in
the cache is taken. The hub's library is imported only where something is fetched.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from pixrl.errors import CheckpointError, InputError
from pixrl.libraries import check_torchvision

CONFIG_FILES = ("*.json", "*.txt", "*.model", "*/*.json", "*/*.txt", "*/*.model")
"""What describes a pipeline and its tokenizers, without weights."""
SAFETENSORS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
BINS = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")
"""The weights of a transformers model, whole or in shards."""
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(text: str) -> bool:
    """Whether it reads as `owner/name` or `owner/name@revision`."""
    repo, at, revision = text.partition("@")
    return _REPO.fullmatch(repo) is not None and (not at or bool(re.fullmatch(r"[\w./-]+", revision)))


def split_revision(ref: str) -> tuple[str, str | None]:
    """The repository and the pinned revision of `owner/name@revision`; None where nothing is pinned."""
    repo, _, revision = ref.partition("@")
    return repo, revision or None


def fetch_pipeline(ref: str, without: Sequence[str] = ()) -> Path:
    """The folder of a pipeline, downloaded but for the components `without` where it is not yet in the cache.

    Raises:
        CheckpointError: it cannot be had; says why and what to do.
    """
    repo, revision = split_revision(ref)
    check_torchvision()
    from diffusers import DiffusionPipeline

    try:
        return Path(
            DiffusionPipeline.download(
                repo, revision=revision, use_safetensors=True, **dict.fromkeys(without)
            )
        )
    except _failures() as error:
        raise explained(ref, error) from error


def fetch_files(ref: str, patterns: Sequence[str]) -> Path:
    """The folder of a repository with the files that match, downloaded where they are not yet in the cache.

    Raises:
        CheckpointError: it cannot be had; says why and what to do.
    """
    repo, revision = split_revision(ref)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except _failures() as error:
        raise explained(ref, error) from error


def fetch_model(ref: str, beside: Sequence[str]) -> Path:
    """The folder of a model: the files that match, and its safetensors, or pytorch_model.bin where it has none.

    Which of them the repository has is told by what came, so it works with the cache alone, too. Never both are
    downloaded.

    Raises:
        CheckpointError: it cannot be had; says why and what to do.
    """
    folder = fetch_files(ref, (*beside, *SAFETENSORS))
    has_safetensors = any(file for pattern in SAFETENSORS for file in folder.glob(pattern))
    return folder if has_safetensors else fetch_files(ref, BINS)


def _failures() -> tuple[type[Exception], ...]:
    """What the hub's library raises; without a connection that may be its transport's own error."""
    from huggingface_hub.errors import HTTPError

    return (OSError, ValueError, HTTPError)


def cached_folder(ref: str) -> Path | None:
    """Where the cache holds a repository, complete or not; nothing is asked of the hub. None where it does not."""
    repo, revision = split_revision(ref)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise InputError(f"{ref!r} is no hub id: {error}") from None


def is_offline() -> bool:
    """Whether the hub must not be asked (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def has_token() -> bool:
    """Whether a token of the hub is set."""
    from huggingface_hub import get_token

    return get_token() is not None


def explained(ref: str, error: BaseException) -> CheckpointError:
    """The hub's error as a sentence that says what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, revision = split_revision(ref)
    download = f"hf download {repo}" + (f" --revision {revision}" if revision else "")
    causes = list(_causes(error))
    is_gated = any(isinstance(one, GatedRepoError) for one in causes)
    is_unknown = any(isinstance(one, RepositoryNotFoundError) for one in causes)
    if is_gated:
        return CheckpointError(gated_sentence(repo, has_token()))
    if any(isinstance(one, RevisionNotFoundError) for one in causes):
        return CheckpointError(
            f"{repo} has no revision {revision!r}. Give a branch, a tag or a commit that "
            f"https://huggingface.co/{repo}/commits/main lists."
        )
    if is_unknown:
        hint = "" if has_token() else " If it is private, give a token: hf auth login"
        return CheckpointError(f"The hub has no repository {repo!r}, or none that you may see.{hint}")
    if is_offline() or not any(isinstance(one, HfHubHTTPError) for one in causes):
        why = (
            "HF_HUB_OFFLINE is set, and the cache does not hold all of it"
            if is_offline()
            else str(error).strip()
        )
        return CheckpointError(
            f"The checkpoint {ref!r} could not be fetched from the hub: {why}. Check the name and the connection, "
            f"download it once where there is one: {download}, or give a local folder."
        )
    return CheckpointError(f"The hub did not give {ref!r}: {error}. Try again, or download it: {download}")


def gated_sentence(repo: str, token: bool) -> str:
    """What to do about a model whose licence must be accepted on its page."""
    page = f"https://huggingface.co/{repo}"
    if token:
        return (
            f"{repo} is gated, and your token has no access: accept its licence at {page} with the token's account "
            "(hf auth whoami), then run the same command again."
        )
    return (
        f"{repo} is gated, and no token is set: accept its licence at {page}, make a read token at "
        "https://huggingface.co/settings/tokens, and type: hf auth login (or set HF_TOKEN)."
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and everything that it came from."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


@dataclass(frozen=True)
class Remote:
    """What the hub says of a repository that is not in the cache."""

    weights: int
    """Bytes of those of its weights that would be downloaded."""


def ask(ref: str) -> Remote:
    """Whether a repository can be downloaded, and how large it is; nothing is downloaded.

    Raises:
        CheckpointError: it cannot be; says why and what to do.
    """
    if is_offline():
        repo, revision = split_revision(ref)
        pinned = f" --revision {revision}" if revision else ""
        raise CheckpointError(
            f"{ref!r} is not in the cache, and HF_HUB_OFFLINE is set. Where there is a connection, type: "
            f"hf download {repo}{pinned}"
        )
    from huggingface_hub import HfApi

    repo, revision = split_revision(ref)
    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        if info.gated:
            HfApi().auth_check(repo)
    except _failures() as error:
        raise explained(ref, error) from error
    sizes = {one.rfilename: one.size or 0 for one in info.siblings or ()}
    return Remote(sum(sizes[name] for name in _downloaded(list(sizes))))


def _downloaded(names: Sequence[str]) -> list[str]:
    """The weights among a repository's files that are fetched: of a pipeline those in its parts' folders, else those
    of one model; of several variants (fp16) the plain one. Whole pipelines in one file are not fetched."""
    if "model_index.json" not in names:
        patterns = next((some for some in (SAFETENSORS, BINS) if _matching(names, some)), ("*.safetensors",))
        return _matching(names, patterns)
    found: list[str] = []
    for folder in (name.removesuffix("config.json") for name in names if name.count("/") == 1):
        inside = _matching(names, (f"{folder}*.safetensors",)) if folder.endswith("/") else []
        plain = [name for name in inside if name.removeprefix(folder).count(".") == 1]
        found += plain or inside
    return found


def _matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Weights among the names that one of the patterns fits."""
    fitting = [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]
    return [name for name in fitting if name.endswith((".safetensors", ".bin"))]


def cache_place() -> Path:
    """Where downloads go."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)
