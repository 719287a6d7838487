"""Pushing a run to the hub and fetching one, through the real huggingface_hub client."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from foreword.artifact.folder import CONFIG, LEGACY_WEIGHTS, WEIGHTS, read_adapter
from foreword.artifact.sidecar import SIDECAR
from foreword.errors import ForewordError
from foreword.hub_errors import hub_error

SHARED_FILES = (CONFIG, WEIGHTS, SIDECAR, "README.md", "recipe.yaml")


def push(folder: Path, repo: str, private: bool = False, message: str = "Add soft prompt") -> str:
    """Uploads a run's adapter, sidecar, card and recipe; returns the commit's address.

    The token comes from ``HF_TOKEN`` or the login that ``hf auth login`` stored.
    """
    from huggingface_hub import HfApi

    read_adapter(folder)  # never share what could not be loaded
    api = HfApi()
    with _explained(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=list(SHARED_FILES), commit_message=message
        )
    return str(commit.commit_url)


def fetch(repo: str, revision: str | None = None) -> Path:
    """The local folder of a hub adapter, downloaded into huggingface_hub's cache."""
    from huggingface_hub import snapshot_download

    with _explained(repo):
        folder = snapshot_download(repo, revision=revision, allow_patterns=[*SHARED_FILES, LEGACY_WEIGHTS])
    return Path(folder)


def locate(path_or_id: str, revision: str | None = None) -> Path:
    """The folder of a local path or hub id; a path that looks local is never asked of the hub."""
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    local = path_or_id.startswith((".", "/", "~", "runs/")) or path_or_id.count("/") != 1 or path.exists()
    if local or path.parent.is_dir():
        raise ForewordError("no such run or adapter folder", path_or_id, "check the path; hub ids look like user/name")
    return fetch(path_or_id, revision)


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    try:
        yield
    except Exception as e:  # the client's transport has an exception tree of its own
        known = hub_error(e, repo)
        if known is None:
            raise
        raise known from None
