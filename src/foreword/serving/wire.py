"""Between gateway and engine worker: one JSON object a line, over a socket pair nobody else can reach.

No pickle: a soft prompt travels as base64 of its float32 rows. Standard library and numpy only.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from foreword.serving.engine import Capabilities, Decoding, Request, Rows, ScoreRequest, Stats, Token

LINE_LIMIT = 1 << 30
"""Most bytes of a line (a prefix of 512 tokens of a 7B model is 268 MB)."""


def line(message: Mapping[str, Any]) -> bytes:
    """A message as one line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def parse(content: bytes) -> dict[str, Any]:
    """A line as a message."""
    found: dict[str, Any] = json.loads(content)
    return found


def pack_rows(rows: Rows) -> dict[str, Any]:
    """A soft prompt as JSON."""
    values = np.ascontiguousarray(rows.values, dtype="<f4")
    return {
        "key": rows.key,
        "kind": rows.kind,
        "shape": list(values.shape),
        "data": base64.b64encode(values.tobytes()).decode(),
    }


def unpack_rows(d: Mapping[str, Any]) -> Rows:
    """What ``pack_rows`` wrote."""
    values = np.frombuffer(base64.b64decode(d["data"]), dtype="<f4").reshape(d["shape"]).astype(np.float32)
    return Rows(d["key"], values, d["kind"])


def pack_request(request: Request) -> dict[str, Any]:
    """A request as JSON."""
    return {**vars(request), "decoding": vars(request.decoding)}  # asdict would copy every id


def unpack_request(d: Mapping[str, Any]) -> Request:
    """What ``pack_request`` wrote (JSON makes lists of tuples and texts of integer keys)."""
    decoding = dict(d["decoding"])
    decoding["stop_ids"] = tuple(decoding["stop_ids"])
    decoding["logit_bias"] = {int(k): float(v) for k, v in decoding["logit_bias"].items()}
    return Request(d["id"], tuple(d["ids"]), d["key"], Decoding(**decoding), d["salt"])


def pack_score(request: ScoreRequest) -> dict[str, Any]:
    """A score request as JSON."""
    return dict(vars(request))


def unpack_score(d: Mapping[str, Any]) -> ScoreRequest:
    """What ``pack_score`` wrote."""
    return ScoreRequest(d["id"], tuple(d["ids"]), tuple(map(tuple, d["branches"])), d["key"], d["salt"])


def pack_token(token: Token) -> list[Any]:
    """A token as a short list: there are many of them."""
    return [token.id, token.logprob, [list(t) for t in token.top], token.finish, token.cached]


def unpack_token(t: list[Any]) -> Token:
    """What ``pack_token`` wrote."""
    return Token(t[0], t[1], tuple((int(i), float(p)) for i, p in t[2]), t[3], t[4])


def pack_capabilities(found: Capabilities) -> dict[str, Any]:
    """Capabilities as JSON."""
    return asdict(found)


def unpack_capabilities(d: Mapping[str, Any]) -> Capabilities:
    """What ``pack_capabilities`` wrote."""
    return Capabilities(**{**d, "kinds": tuple(d["kinds"]), "samples": tuple(d["samples"])})


def pack_stats(stats: Stats) -> dict[str, Any]:
    """Stats as JSON."""
    return asdict(stats)


def unpack_stats(d: Mapping[str, Any]) -> Stats:
    """What ``pack_stats`` wrote."""
    return Stats(**d)
