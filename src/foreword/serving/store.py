"""Where soft prompts come from: folders and hub ids named at the start, and nothing outside them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from foreword.artifact.confined import inside
from foreword.artifact.ensemble import ENSEMBLE, is_ensemble
from foreword.artifact.folder import CONFIG
from foreword.artifact.hub import fetch
from foreword.errors import ForewordError
from foreword.hub_errors import HUB_ID

NAME_LIMIT = 200
"""Most characters of a name."""


class UnknownName(ForewordError):
    """There is no soft prompt of this name (HTTP 404)."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"there is no soft prompt {name[:NAME_LIMIT]!r}", "the store", "name one that is listed (GET /v1/models)"
        )


class Store:
    """Soft prompts by name. A name is looked up by its path: only a listing looks at all of ten thousand.

    Args:
        sources: adapter or ensemble folders (served under the folder's name), folders that hold such
            folders (each is served under its name, also those that appear later), and hub ids.

    Raises:
        ForewordError: no such folder, or two things of one name.
    """

    def __init__(self, sources: Sequence[str | Path]) -> None:
        self._folders: dict[str, Path] = {}
        self._parents: list[Path] = []
        self._hub: dict[str, Path | None] = {}
        """Hub ids; their folders once they were downloaded."""
        known: dict[str, str] = {}
        for source in sources:
            for name, place in self._take(str(source)):
                if known.setdefault(name, place) != place:
                    raise _two(name, [known[name], place])

    def names(self) -> list[str]:
        """Names of all soft prompts there now, sorted. Reads no weights; blocks for some 50 ms per 10,000."""
        below = {name for parent in self._parents for name in _listed(parent)}
        return sorted(below | self._folders.keys() | self._hub.keys())

    def knows(self, name: str) -> bool:
        """Whether there is such a name; nothing is downloaded for the answer."""
        return is_name(name) and (name in self._hub or bool(self._candidates(name)))

    def find(self, name: str) -> Path:
        """The folder of a name; blocks (a hub id is downloaded when first used).

        Raises:
            UnknownName: there is none, or the name leads outside.
            ForewordError: there are two by now, or the hub cannot be reached.
        """
        if name in self._hub:
            folder = self._hub[name] or fetch(name).resolve()
            self._hub[name] = folder
            return folder
        found = self._candidates(name) if is_name(name) else []
        if not found:
            raise UnknownName(name)
        if len(found) > 1:
            raise _two(name, ["a folder of the store", "another one"])
        return found[0]

    def home(self, folder: Path) -> Path | None:
        """Where links in a found folder may lead: the hub's cache is made of links; None: nowhere."""
        return folder.parents[1] if folder in self._hub.values() else None  # models--user--name/snapshots/COMMIT

    def renew(self, name: str) -> None:
        """The next ``find`` of a hub id asks the hub for what is newest."""
        if name in self._hub:
            self._hub[name] = None

    def inside(self, path: str) -> Path:
        """The folder at a path relative to a folder of the store, as an admin gives it.

        Raises:
            ForewordError: there is none, or the path is absolute, holds "..", or passes through a link.
        """
        found = [folder for parent in self._parents if (folder := inside(parent, path)) and is_served(folder)]
        if len(found) > 1:
            raise _two(path[:NAME_LIMIT], ["a folder of the store", "another one"])
        if not found:
            where = f"path {path[:NAME_LIMIT]!r}, relative to a folder given with --prompts"
            raise ForewordError(
                "there is no adapter or ensemble folder", where, "give a folder below one of those, without links"
            )
        return found[0]

    def _take(self, source: str) -> Iterator[tuple[str, str]]:
        """Takes a source in; yields its names, each with its place for messages."""
        path = Path(source).expanduser()
        if not path.exists():
            if not _looks_like_hub_id(source, path):
                raise ForewordError("no such folder", source, "check --prompts; hub ids look like user/name")
            self._hub[source] = None
            yield source, f"hub, {source}"
            return
        if not path.is_dir():
            raise ForewordError("a bare file is not served", source, "give an adapter folder")
        if not os.access(path, os.R_OK | os.X_OK):
            raise ForewordError("the folder cannot be read", source, "check its rights")
        real = path.resolve()
        if is_served(real):
            name = path.absolute().name or real.name
            self._folders[name] = real
            yield name, str(real)
        elif real not in self._parents:
            self._parents.append(real)
            yield from ((name, str(real / name)) for name in _listed(real))

    def _candidates(self, name: str) -> list[Path]:
        own = [self._folders[name]] if name in self._folders else []
        below = [inside(parent, name) for parent in self._parents] if "/" not in name else []
        return list(dict.fromkeys(own + [p for p in below if p and is_served(p)]))


def is_name(name: str) -> bool:
    """Whether a soft prompt could be called so."""
    return 0 < len(name) <= NAME_LIMIT and name.isprintable() and name == name.strip()


def is_served(folder: Path) -> bool:
    """Whether an adapter or an ensemble lies in the folder; finished runs are adapters."""
    return (folder / CONFIG).is_file() or is_ensemble(folder)


def _listed(parent: Path) -> list[str]:
    """Names of the adapter and ensemble folders in a folder; none in one that has gone meanwhile."""
    with suppress(OSError), os.scandir(parent) as entries:
        return [e.name for e in entries if _is_listed(e)]
    return []


def _is_listed(entry: os.DirEntry[str]) -> bool:
    if entry.name.startswith(".") or not is_name(entry.name) or not entry.is_dir(follow_symlinks=False):
        return False
    return os.path.lexists(f"{entry.path}/{CONFIG}") or os.path.lexists(f"{entry.path}/{ENSEMBLE}")


def _looks_like_hub_id(source: str, path: Path) -> bool:
    """As ``artifact.hub.locate`` tells them apart; a local path is never asked of the hub."""
    return bool(HUB_ID.fullmatch(source)) and not source.startswith("runs/") and not path.parent.is_dir()


def _two(name: str, places: Sequence[str]) -> ForewordError:
    return ForewordError(f"two soft prompts are called {name!r}", " and ".join(places), "rename one of the folders")
