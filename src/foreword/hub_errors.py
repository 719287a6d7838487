"""What the hub's client raises, as errors a user can act on."""

from __future__ import annotations

from foreword.errors import ForewordError

_TOKEN = "log in with `hf auth login` or set HF_TOKEN (with write access to push)"


def hub_error(error: BaseException, repo: str) -> ForewordError | None:
    """The error behind an exception chain from huggingface_hub, or None when it is none of its."""
    from huggingface_hub import errors as hub

    chain = _chain(error)
    for e in chain:
        if isinstance(e, hub.GatedRepoError):
            return ForewordError(
                "the repository is gated", f"hub, {repo}", "ask for access on its page, then " + _TOKEN
            )
        if isinstance(e, hub.RevisionNotFoundError):
            return ForewordError("no such revision", f"hub, {repo}", "check the branch, tag or commit")
        if isinstance(e, hub.RepositoryNotFoundError):
            status = _status(e)
            what = "not authorised (401)" if status == 401 else "no such repository, or a private one"
            return ForewordError(what, f"hub, {repo}", f"check the id; for private ones {_TOKEN}")
        if isinstance(e, hub.LocalEntryNotFoundError | hub.OfflineModeIsEnabled):
            return _offline(repo)
        if isinstance(e, hub.EntryNotFoundError):
            return ForewordError(
                f"the repository lacks a file: {_first(e)}", f"hub, {repo}", "check the id and revision"
            )
        if isinstance(e, hub.HFValidationError):
            return ForewordError("not a hub id", repo, "hub ids look like user/name; local paths start with ./")
        if isinstance(e, hub.HfHubHTTPError):
            status = _status(e)
            if status in (401, 403):
                return ForewordError(f"not authorised ({status})", f"hub, {repo}", _TOKEN)
            kind = "the hub is in trouble" if status >= 500 else "the hub refused"
            return ForewordError(f"{kind} ({status}): {_first(e)}", f"hub, {repo}", "try again later")
    if any(type(e).__module__.split(".")[0] in ("httpx2", "httpcore2", "httpx", "httpcore") for e in chain):
        return _offline(repo)
    return None


def _offline(repo: str) -> ForewordError:
    return ForewordError(
        "the hub cannot be reached and the cache does not hold it",
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
