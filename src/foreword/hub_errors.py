"""What the hub's client raises, as errors a user can act on."""

from __future__ import annotations

import re
from collections.abc import Callable

from foreword.errors import ForewordError

_TOKEN = "log in with `hf auth login` or set HF_TOKEN (with write access to push)"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""What the hub takes as user/name."""
_UNREACHABLE = "the hub cannot be reached and the cache does not hold it"
_TRANSPORT = ("httpx2", "httpcore2", "httpx", "httpcore")

Explain = Callable[[BaseException, str], ForewordError]
"""An exception of the client and the repository's id -> the error for the user."""


def hub_error(error: BaseException, repo: str) -> ForewordError | None:
    """The error behind an exception chain from huggingface_hub, or None when it is none of its.

    The client wraps what it caught ("cannot find it in the cache" around a server's 500), so the
    whole chain is searched for the most telling exception before the next kind is tried.
    """
    chain = _chain(error)
    for kind, explain in _table():
        found = next((e for e in chain if isinstance(e, kind)), None)
        if found is not None:
            return explain(found, repo)
    if any(type(e).__module__.split(".")[0] in _TRANSPORT for e in chain):
        return _unreachable(error, repo)
    return None


def is_unreachable(error: BaseException) -> bool:
    """Whether there is no way to the hub at all (no network, or offline mode)."""
    found = hub_error(error, "")
    return found is not None and found.what == _UNREACHABLE


def _table() -> list[tuple[type[BaseException] | tuple[type[BaseException], ...], Explain]]:
    """Exceptions of the client, the most telling first; imported late, for it takes half a second."""
    from huggingface_hub import errors as hub

    return [
        (hub.GatedRepoError, _gated),
        (hub.RevisionNotFoundError, _no_revision),
        (hub.RepositoryNotFoundError, _no_repository),
        (hub.RemoteEntryNotFoundError, _no_file),
        (hub.HFValidationError, _no_id),
        (hub.HfHubHTTPError, _refused),
        ((hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled), _unreachable),
        (hub.EntryNotFoundError, _no_file),
    ]


def _gated(error: BaseException, repo: str) -> ForewordError:
    return ForewordError("the repository is gated", f"hub, {repo}", f"ask for access on its page, then {_TOKEN}")


def _no_revision(error: BaseException, repo: str) -> ForewordError:
    return ForewordError("no such revision", f"hub, {repo}", "check the branch, tag or commit")


def _no_repository(error: BaseException, repo: str) -> ForewordError:
    what = "not authorised (401)" if _status(error) == 401 else "no such repository, or a private one (404)"
    return ForewordError(what, f"hub, {repo}", f"check the id; for private ones {_TOKEN}")


def _no_file(error: BaseException, repo: str) -> ForewordError:
    return ForewordError(f"the repository lacks a file: {_first(error)}", f"hub, {repo}", "check the id and revision")


def _no_id(error: BaseException, repo: str) -> ForewordError:
    return ForewordError("not a hub id", repo, "hub ids look like user/name; local paths start with ./")


def _refused(error: BaseException, repo: str) -> ForewordError:
    status = _status(error)
    if status in (401, 403):
        return ForewordError(f"not authorised ({status})", f"hub, {repo}", _TOKEN)
    kind, fix = "the hub refused", "check the id, the revision and your token"
    if status >= 500 or status == 429:  # its own failure, or too many requests
        kind, fix = "the hub is in trouble", "try again later"
    return ForewordError(f"{kind} ({status}): {_first(error)}", f"hub, {repo}", fix)


def _unreachable(error: BaseException, repo: str) -> ForewordError:
    return ForewordError(
        _UNREACHABLE,
        f"hub, {repo}",
        "check the network (HF_ENDPOINT, HF_HUB_OFFLINE), or give a local folder",
    )


def _chain(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _status(error: BaseException) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
