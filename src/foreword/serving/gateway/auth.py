"""Who is asking: keys, and what a browser on this machine may not do."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from foreword.serving.gateway.errors import ApiError
from foreword.serving.settings import ServeSettings, is_loopback

_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9.-]+))(?::[0-9]{1,5})?")
PUBLIC = frozenset({"/", "/health", "/ping"})
"""What needs no key: nothing in it tells of soft prompts."""


@dataclass(frozen=True)
class Caller:
    """The holder of a key. ``fingerprint``: knows it again in logs. ``salt``: whose cache it shares."""

    admin: bool = False
    fingerprint: str = ""
    salt: str = ""


ANYBODY = Caller(admin=True)
"""Who asks a server without keys, which only this machine reaches."""


class Keys:
    """The keys, as digests: comparing those takes as long for any two keys."""

    def __init__(self, users: Sequence[str], admins: Sequence[str]) -> None:
        by_key = dict.fromkeys(users, False) | dict.fromkeys(admins, True)
        self._callers = [(_digest(key), _caller(key, admin)) for key, admin in by_key.items()]

    def caller(self, authorization: str) -> Caller | None:
        """Whose ``Authorization`` header this is; every key is compared, whichever fits."""
        scheme, _, key = authorization.partition(" ")
        given = _digest(key.strip())
        found = [caller for digest, caller in self._callers if hmac.compare_digest(digest, given)]
        return found[0] if found and scheme.lower() == "bearer" else None


class Guard:
    """Lets requests through that may come in, and notes who asks."""

    def __init__(self, app: ASGIApp, settings: ServeSettings) -> None:
        self.app, self.open = app, settings.open
        self.keys = Keys(settings.api_keys, settings.admin_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] == "http":
            try:
                scope["state"]["call"].caller = self._caller(scope)
            except ApiError as e:
                await e.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _caller(self, scope: Scope) -> Caller:
        headers = Headers(scope=scope)
        if self.open:
            refuse_other_sites(headers, scope["scheme"])
            return ANYBODY
        if scope["path"] in PUBLIC and scope["method"] in ("GET", "HEAD"):
            return Caller()
        caller = self.keys.caller(headers.get("authorization", ""))
        if caller is None:
            raise ApiError(401, "no valid API key: send one as 'Authorization: Bearer KEY'", None, "invalid_api_key")
        return caller


def refuse_other_sites(headers: Headers, scheme: str) -> None:
    """Refuses what a web page from elsewhere could send to this machine through a browser here.

    A page under a name of its own that is pointed at 127.0.0.1 sends that name as Host (DNS rebinding); any
    other page sends its own address as Origin with whatever could change something.
    """
    hosts = headers.getlist("host")
    if len(hosts) != 1 or not is_loopback(host_name(hosts[0])):
        raise ApiError(403, "without keys only this machine is served, under a loopback name", None, "foreign_host")
    origin = headers.get("origin")
    if origin is not None and origin != f"{scheme}://{hosts[0]}":
        raise ApiError(403, "without keys no other site's pages are served", None, "foreign_origin")


def host_name(host: str) -> str:
    """The name in a Host header, its port and the brackets of IPv6 taken off; empty where it is none."""
    found = _HOST.fullmatch(host)
    return (found[1] or found[2]) if found else ""


def require_admin(caller: Caller) -> None:
    """Refuses keys that may not load and unload."""
    if not caller.admin:
        raise ApiError(403, "this needs an admin key", None, "admin_key_needed")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _caller(key: str, admin: bool) -> Caller:
    salt = hashlib.sha256(b"cache salt of " + key.encode()).hexdigest()[:32]
    return Caller(admin, _digest(key).hex()[:8], salt)
