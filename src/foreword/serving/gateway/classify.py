"""``POST /v1/classify``: label probabilities from a soft prompt's own template and label words."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.responses import Response

from foreword.records import Row
from foreword.serving.engine import ScoreRequest
from foreword.serving.gateway.errors import refused
from foreword.serving.gateway.limits import all_of
from foreword.serving.gateway.logs import Call
from foreword.serving.gateway.replies import Classification, Classified, MemberAnswer, PromptDetails, Usage
from foreword.serving.gateway.schema import ClassifyRequest
from foreword.serving.gateway.service import Gateway, Ids, Target, reading, retried
from foreword.serving.text import Reader

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Judge:
    """What scores label words: a soft prompt, or the plain model (``key`` None)."""

    key: str | None
    reader: Reader
    tokens: int = 0
    unseen: int = 0


@dataclass(frozen=True)
class Verdict:
    """Label words' log-probabilities ``[inputs, classes]`` of one judge, its biases, and tokens it read."""

    logprobs: Floats
    biases: tuple[float, ...]
    tokens: int
    virtual: int

    @property
    def probabilities(self) -> Floats:
        """Of the classes."""
        from foreword.evaluation.scoring import rebalanced, softmax

        return rebalanced(softmax(self.logprobs), self.biases)


async def classify(gateway: Gateway, body: ClassifyRequest, call: Call) -> Response:
    """Answers with the probability of every class for each input."""
    gateway.check_open()
    rows = body.input if isinstance(body.input, list) else [body.input]
    if len(rows) > gateway.settings.max_texts:
        raise refused(f"{len(rows)} inputs in one request; at most {gateway.settings.max_texts}", "input")
    with gateway.queue.place(len(rows)):
        classes, verdicts = await retried(lambda: _judged(gateway, body, rows, call))
    usage = _usage(verdicts)
    call.prompt_tokens = usage.prompt_tokens
    gateway.metrics.classified(call.model, len(rows), usage.prompt_tokens)
    reply = Classification(
        id=f"classify-{uuid.uuid4().hex}",
        object="classification",
        created=int(time.time()),
        model=body.model,
        data=[_answer(body, classes, verdicts, i) for i in range(len(rows))],
        usage=usage,
    )
    return Response(reply.model_dump_json(exclude_unset=True), media_type="application/json")


async def _judged(
    gateway: Gateway, body: ClassifyRequest, rows: Sequence[str | Row], call: Call
) -> tuple[Sequence[str], list[Verdict]]:
    """The classes, and what each judge says."""
    plain = body.model == gateway.base.name
    if plain and body.task_of is None:
        raise refused("the plain model has no classes of its own: name a soft prompt in 'task_of'", "task_of")
    if not plain and body.task_of is not None:
        raise refused("'task_of' goes with the plain model only", "task_of")
    async with gateway.target(body.task_of or body.model) as target:
        call.model = gateway.base.name if plain else target.name
        judges = judges_of(target, plain)
        verdicts = [await _verdict(gateway, judge, rows, call) for judge in judges]
        return judges[0].reader.classes, verdicts


def judges_of(target: Target, plain: bool) -> list[Judge]:
    """Who scores: the soft prompt's members, or the plain model with their (same) task."""
    members = [m for m in target.members if m is not None]
    if not members or not members[0].reader.classes:
        raise refused(f"'{target.name}' writes text and has no classes", "model")
    if plain:
        return [Judge(None, members[0].reader.plain())]
    return [Judge(m.key, m.reader, m.tokens, m.unseen) for m in members]


async def _verdict(gateway: Gateway, judge: Judge, rows: Sequence[str | Row], call: Call) -> Verdict:
    from foreword.evaluation.scoring import scored_branches

    branches = tuple(map(tuple, scored_branches(judge.reader.label_ids)))
    texts = [r if isinstance(r, str) else "".join(map(str, r.values())) for r in rows]
    contexts = await reading(gateway.base, texts, lambda: [judge.reader.row(r) for r in rows])

    def request(ids: Ids) -> ScoreRequest:
        return ScoreRequest(uuid.uuid4().hex, ids, branches, judge.key, call.caller.salt)

    scores = await all_of(gateway.engine.score(request(ids)) for ids in contexts)
    read = sum(map(len, contexts)) + judge.unseen * len(contexts)
    return Verdict(np.array(scores), judge.reader.biases, read, judge.tokens * len(contexts))


def _answer(body: ClassifyRequest, classes: Sequence[str], verdicts: Sequence[Verdict], i: int) -> Classified:
    each = [v.probabilities[i] for v in verdicts]
    found = Classified(index=i, num_classes=len(classes), **_said(classes, np.mean(each, axis=0)))
    if body.logprobs and len(verdicts) == 1:
        found.logprobs = dict(zip(classes, map(float, verdicts[0].logprobs[i]), strict=True))
    if body.members:
        found.members = [MemberAnswer(**_said(classes, p)) for p in each]
    return found


def _said(classes: Sequence[str], p: Floats) -> dict[str, Any]:
    values = [float(x) for x in p]
    return {
        "label": classes[int(p.argmax())],
        "probs": values,
        "probabilities": dict(zip(classes, values, strict=True)),
    }


def _usage(verdicts: Sequence[Verdict]) -> Usage:
    read = sum(v.tokens for v in verdicts)
    details = PromptDetails(cached_tokens=0, virtual_tokens=sum(v.virtual for v in verdicts))
    return Usage(prompt_tokens=read, completion_tokens=0, total_tokens=read, prompt_tokens_details=details)
