"""Loading and unloading soft prompts while the server runs; for admin keys only."""

from __future__ import annotations

from starlette.responses import Response

from foreword.serving.gateway.auth import require_admin
from foreword.serving.gateway.logs import Call
from foreword.serving.gateway.replies import LoadReply, UnloadReply
from foreword.serving.gateway.schema import LoadRequest, UnloadRequest
from foreword.serving.gateway.service import Gateway


async def load_soft_prompt(gateway: Gateway, body: LoadRequest, call: Call) -> Response:
    """Loads one, or puts new content in the place of an old one's."""
    require_admin(call.caller)
    gateway.check_open()
    loaded = await gateway.registry.load(body.name, body.path, bool(body.load_inplace))
    call.model = loaded.name
    tokens = max(m.tokens for m in loaded.members)
    reply = LoadReply(name=loaded.name, revision=loaded.revision, tokens=tokens, nbytes=loaded.nbytes)
    return Response(reply.model_dump_json(), media_type="application/json")


async def unload_soft_prompt(gateway: Gateway, body: UnloadRequest, call: Call) -> Response:
    """Takes one away; requests that run with it go on to their end."""
    require_admin(call.caller)
    await gateway.registry.unload(body.name)
    return Response(UnloadReply(name=body.name).model_dump_json(), media_type="application/json")
