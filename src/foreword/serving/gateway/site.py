"""What is no model's work: health, metrics, the page, and the description of the API."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from foreword.serving.gateway.replies import Health
from foreword.serving.gateway.service import Gateway

PAGE = Path(__file__).with_name("page.html")
STATS_SECONDS = 2.0
"""How long a busy engine may take to count; then its last counters are shown."""


async def health(gateway: Gateway, request: Request) -> Response:
    """200 while requests can be taken, else 503."""
    gateway.check_open()
    return Response(Health().model_dump_json(), media_type="application/json")


async def metrics(gateway: Gateway, request: Request) -> Response:
    """Prometheus' text format."""
    try:
        stats = await asyncio.wait_for(gateway.engine.stats(), STATS_SECONDS)
    except TimeoutError:
        stats = gateway.metrics.held.stats
    return Response(gateway.metrics.page(stats, gateway.registry.usage()), media_type=CONTENT_TYPE_LATEST)


class Page:
    """The page at ``/``, which may run its own script only and talk to nobody but this server."""

    def __init__(self) -> None:
        self._content = PAGE.read_bytes()
        self._headers = {"Content-Security-Policy": content_policy(self._content), "Cache-Control": "no-cache"}

    async def __call__(self, gateway: Gateway, request: Request) -> Response:
        """The page."""
        return Response(self._content, media_type="text/html", headers=self._headers)


def content_policy(page: bytes) -> str:
    """Lets a browser use the script and the styles that stand in the page, by their hashes, and nothing else."""
    return (
        f"default-src 'none'; script-src {_hashes(page, b'script')}; style-src {_hashes(page, b'style')}; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hashes(page: bytes, tag: bytes) -> str:
    found = re.findall(rb"<%s[^>]*>(.*?)</%s>" % (tag, tag), page, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(part).digest()).decode()}'" for part in found)
