"""Pushing a run to the hub and fetching one, through the real huggingface_hub client."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from foreword.artifact.ensemble import ENSEMBLE, MEMBERS, is_ensemble, read_ensemble
from foreword.artifact.folder import CONFIG, LEGACY_WEIGHTS, WEIGHTS, read_adapter, weights_bytes
from foreword.artifact.sidecar import SIDECAR
from foreword.data.sources import file_name
from foreword.errors import ForewordError
from foreword.hub_errors import HUB_ID, hub_error
from foreword.recipe import RECIPE, load_recipe, to_yaml

MEMBER_FILES = (CONFIG, WEIGHTS, SIDECAR, "README.md")
"""Of each member of an ensemble."""
SHARED_FILES = (CONFIG, WEIGHTS, SIDECAR, "README.md", RECIPE)


def push(folder: Path, repo: str, private: bool = False, message: str = "Add soft prompt") -> str:
    """Uploads a run's adapter (an ensemble's members), sidecar, card and recipe; returns the commit's address.

    Weights in the older pickle format are shared as safetensors. The token comes from
    ``HF_TOKEN`` or the login that ``hf auth login`` stored.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    if not HUB_ID.fullmatch(repo):
        raise ForewordError("not a hub id", repo, "hub ids look like user/name")
    if folder.is_file():
        raise ForewordError("a bare file has no configuration to share", str(folder), "foreword export it to a folder")
    files = _ensemble_files(folder) if is_ensemble(folder) else _adapter_files(folder)
    if (folder / RECIPE).is_file():
        files[RECIPE] = _without_folders(folder / RECIPE)
    api = HfApi()
    with _explained(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(repo).private:  # it was there before, and public
            raise ForewordError("the repository is public", f"hub, {repo}", "make it private there, or use a new id")
        adds = [CommitOperationAdd(path_in_repo=n, path_or_fileobj=content) for n, content in files.items()]
        commit = api.create_commit(repo, adds, commit_message=message)
    return str(commit.commit_url)


def _adapter_files(folder: Path, names: Sequence[str] = SHARED_FILES) -> dict[str, Path | bytes]:
    """An adapter's files by name; what could not be loaded is never shared."""
    adapter = read_adapter(folder)
    files: dict[str, Path | bytes] = {n: folder / n for n in names if (folder / n).is_file()}
    files.setdefault(WEIGHTS, weights_bytes(adapter.tensors))
    return files


def _ensemble_files(folder: Path) -> dict[str, Path | bytes]:
    """An ensemble's own files and those of all its members."""
    files: dict[str, Path | bytes] = {n: folder / n for n in (ENSEMBLE, SIDECAR, "README.md") if (folder / n).is_file()}
    for member in members_of(folder):
        place = member.relative_to(folder.resolve()).as_posix()
        files |= {f"{place}/{n}": content for n, content in _adapter_files(member, MEMBER_FILES).items()}
    return files


def fetch(repo: str, revision: str | None = None) -> Path:
    """The local folder of a hub adapter, downloaded into huggingface_hub's cache."""
    from huggingface_hub import snapshot_download

    patterns = [*SHARED_FILES, LEGACY_WEIGHTS, ENSEMBLE, *(f"{MEMBERS}/*/{n}" for n in MEMBER_FILES)]
    with _explained(repo):
        folder = snapshot_download(repo, revision=revision, allow_patterns=patterns)
    return Path(folder)


def members_of(folder: Path) -> tuple[Path, ...]:
    """The members of an ensemble's folder, be it a local one or one of the hub's cache, which is made of links."""
    from huggingface_hub import constants

    real = folder.resolve()
    cached = real.is_relative_to(Path(constants.HF_HUB_CACHE).resolve())
    return read_ensemble(folder, real.parents[1] if cached else None)  # models--user--name/snapshots/COMMIT


def locate(path_or_id: str, revision: str | None = None) -> Path:
    """The folder of a local path or hub id; a path that looks local is never asked of the hub."""
    path = Path(path_or_id).expanduser()
    if path.exists():
        return path
    local = path_or_id.startswith("runs/") or path.parent.is_dir() or not HUB_ID.fullmatch(path_or_id)
    if local:
        raise ForewordError("no such run or adapter folder", path_or_id, "check the path; hub ids look like user/name")
    return fetch(path_or_id, revision)


def _without_folders(recipe: Path) -> bytes:
    """The recipe to share: files by their names alone, for folders are the author's own business."""
    found = load_recipe(recipe)
    data = found.data
    held_out = data.eval_path and file_name(data.eval_path)
    data = replace(data, path=file_name(data.path), eval_path=held_out)
    shared = replace(
        found,
        data=data,
        model=replace(found.model, id=file_name(found.model.id)),
        prompt=replace(found.prompt, init_adapter=file_name(found.prompt.init_adapter)),
        distill=replace(found.distill, text=file_name(found.distill.text)),
    )
    return to_yaml(shared).encode()


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    try:
        yield
    except Exception as e:  # the client's transport has an exception tree of its own
        known = hub_error(e, repo)
        if known is None:
            raise
        raise known from None
