"""A vLLM server that runs elsewhere, started with ``--enable-prompt-embeds``: the engine over HTTP.

A request with a soft prompt carries the embeddings of its whole context: rows where the local ids are
virtual, and under the text what the model's own embedding gives, read from its files here. Nothing that a
client sent as embeddings ever gets there. The server counts cached tokens only when it was started with
``--enable-prompt-tokens-details``, and tells with the last token.
"""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from foreword.errors import ForewordError
from foreword.serving import wire
from foreword.serving.engine import (
    SAMPLES,
    Capabilities,
    EngineDown,
    EngineError,
    EngineRefused,
    Request,
    Rows,
    ScoreRequest,
    Stats,
    Token,
)
from foreword.serving.engines.held import HeldRows
from foreword.serving.engines.model_files import ModelFiles, open_files
from foreword.serving.engines.one_token import Turns, summed
from foreword.serving.engines.vllm_server import COMPLETIONS, VllmServer
from foreword.serving.engines.vllm_words import (
    MOST_NAMED,
    check_length,
    check_rows,
    closes,
    finish_of,
    likeliest,
    stats_of,
    words,
)

MEBI = 1 << 20
NAMED = "token_id:"
"""How the server names tokens when asked for ids."""


@dataclass(frozen=True)
class VllmHttpConfig:
    """Which server, and which model it runs."""

    url: str
    """Where it is: http://HOST:PORT."""
    model: str
    """The model it runs, by a name that this machine finds its files under."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    api_key: str = ""
    """What the server was given as --api-key."""
    served: str = ""
    """The model's name on the server; empty: the first one it lists."""
    dtype: str = "auto"
    """Type of the server's weights: auto (as they are stored), float32, bfloat16 or float16."""
    prompt_memory: float = 64.0
    """MB of soft prompts held at once."""
    patience: float = 30.0
    """Seconds that the server may take to come up."""
    beat: float = 2.0
    """Seconds between two looks at its health; so long, too, it may take to answer (a second at least)."""


SILENT_LOOKS = 3
"""Looks without an answer in time after which a server counts as gone: a busy one answers late."""


def make(config: Mapping[str, Any]) -> VllmHttpEngine:
    """The engine of a worker, from its configuration as JSON."""
    return VllmHttpEngine(VllmHttpConfig(**config))


class VllmHttpEngine:
    """Asks a vLLM server. See ``engine.Engine``."""

    def __init__(self, config: VllmHttpConfig) -> None:
        self.config = config
        self._running: dict[str, asyncio.Queue[Token | Exception]] = {}
        self._turns = Turns()
        self._watching: asyncio.Task[None] | None = None
        self._up = False
        self.epoch = 0

    # --- starting and ending ---------------------------------------------------------------------

    async def start(self) -> Capabilities:
        """Finds the server and its model, and checks that it reads embeddings as it reads text."""
        c = self.config
        self._files = await asyncio.to_thread(open_files, c.model, c.revision)
        self._server = VllmServer(c.url, c.api_key, c.beat)
        try:
            await self._wait()
            self.capabilities = found = await self._capabilities(self._files)
            dtype = getattr(torch, found.dtype)
            self._held = HeldRows(found.vocab_size, found.hidden_size, dtype, int(c.prompt_memory * MEBI))
            await self._check()
        except BaseException:
            await self._server.close()
            raise
        self.epoch += 1
        self._watching = asyncio.create_task(self._watch())
        return found

    async def _wait(self) -> None:
        """Until the server answers."""
        until = asyncio.get_running_loop().time() + self.config.patience
        while not await self._server.healthy():
            if asyncio.get_running_loop().time() > until:
                raise ForewordError(
                    f"no vLLM server answers at {self.config.url}",
                    "--vllm-url",
                    "start one with: vllm serve MODEL --enable-prompt-embeds",
                )
            await asyncio.sleep(self.config.beat)
        self._up = True

    async def _capabilities(self, files: ModelFiles) -> Capabilities:
        try:
            cards = {card["id"]: card for card in (await self._server.ask("GET", "/v1/models"))["data"]}
        except EngineError as e:
            raise ForewordError(str(e), self.config.url, "give the key that the server was started with") from None
        self._model = self.config.served or next(iter(cards), "")
        if self._model not in cards:
            raise ForewordError(
                f"the vLLM server has no model '{self._model}'", self.config.url, f"it has: {', '.join(cards)}"
            )
        stored = str(files.table.dtype).removeprefix("torch.")
        return Capabilities(
            engine="vllm",
            model=self.config.model,
            vocab_size=files.vocab_size,
            hidden_size=files.hidden_size,
            window=cards[self._model]["max_model_len"],
            end_id=files.end_id,
            dtype=stored if self.config.dtype == "auto" else self.config.dtype,
            samples=SAMPLES,
            fingerprint=files.fingerprint,
        )

    async def _check(self) -> None:
        probe, c = self._files.probe(), self.capabilities
        try:
            await check_rows(self, wire.unpack_rows(probe["rows"]), probe["ids"], c.vocab_size, c.dtype)
        except EngineRefused as e:
            raise ForewordError(
                f"the vLLM server takes no embeddings: {e}", self.config.url, "start it with --enable-prompt-embeds"
            ) from None

    async def close(self) -> None:
        """Ends running requests and the connections."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
            self._watching, self._up = None, False
            self._end_all(Token(-1, finish="abort"))
            await self._server.close()

    async def _watch(self) -> None:
        """Looks after the server's health: requests of one that is gone end at once, of a silent one a little later."""
        silent = 0
        while True:
            await asyncio.sleep(self.config.beat)
            healthy = await self._server.healthy()
            silent = silent + 1 if healthy is None else 0
            self._up = bool(healthy) or (self._up and 0 < silent < SILENT_LOOKS)
            if not self._up:
                self._end_all(EngineDown("the vLLM server does not answer"))

    def _end_all(self, last: Token | Exception) -> None:
        for queue in self._running.values():
            queue.put_nowait(last)
        self._server.give_up()

    @property
    def alive(self) -> bool:
        """Whether the server answered when last looked at."""
        return self._up

    # --- soft prompts ----------------------------------------------------------------------------

    async def put(self, rows: Rows) -> None:
        """Takes a soft prompt in; the server sees it with each request."""
        self._held.put(rows)

    async def drop(self, key: str) -> None:
        """Forgets a soft prompt."""
        self._held.drop(key)

    # --- requests --------------------------------------------------------------------------------

    async def generate(self, request: Request) -> AsyncIterator[Token]:
        """Tokens as they come; closing the iterator closes the connection, upon which the server aborts."""
        queue = self._admit(request)
        reading = asyncio.create_task(self._read(request, self._held.find(request.key, request.ids), queue))
        try:
            while True:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.finish:
                    return
        finally:
            del self._running[request.id]
            reading.cancel()
            await asyncio.wait([reading])

    def _admit(self, request: Request) -> asyncio.Queue[Token | Exception]:
        if not self._up:
            raise EngineDown("the vLLM server does not answer")
        if request.id in self._running:
            raise EngineRefused(f"request {request.id} runs already")
        rows = self._held.find(request.key, request.ids)
        check_length(len(request.ids), request.decoding.max_tokens, self.capabilities.window)
        if rows is not None and request.decoding.repetition_penalty != 1.0:
            raise EngineRefused("repetition_penalty with a soft prompt: the server is given embeddings and no ids")
        queue = self._running[request.id] = asyncio.Queue()
        return queue

    async def abort(self, request_id: str) -> None:
        """Ends a request with finish "abort"."""
        if queue := self._running.get(request_id):
            queue.put_nowait(Token(-1, finish="abort"))

    async def score(self, request: ScoreRequest) -> list[float]:
        """Summed log-probability of each branch."""
        if not self._up:
            raise EngineDown("the vLLM server does not answer")
        if not request.branches or not all(request.branches):
            raise EngineRefused("nothing to score: a branch without tokens")
        rows = self._held.find(request.key, request.ids)
        check_length(len(request.ids), max(map(len, request.branches)), self.capabilities.window)
        with self._turns.naming() as named:

            async def ask(path: tuple[int, ...], ids: tuple[int, ...]) -> dict[int, float]:
                body = await self._context(request.ids + path, rows, request.salt)
                answer = await self._server.ask("POST", COMPLETIONS, body | _one_token(ids, named))
                return _listed(answer["choices"][0]["logprobs"], 0)

            return await summed(request.branches, ask, MOST_NAMED if named else 1)

    async def stats(self) -> Stats:
        """The server's counters and gauges; other clients of it are counted in."""
        return stats_of(await self._server.metrics(), self._held.nbytes)

    # --- the server's words ----------------------------------------------------------------------

    async def _context(self, ids: tuple[int, ...], rows: torch.Tensor | None, salt: str) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._model,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **({"cache_salt": salt} if salt else {}),
        }
        if rows is None:
            return body | {"prompt": list(ids)}
        return body | {"prompt_embeds": await asyncio.to_thread(self._embedded, ids, rows)}

    def _embedded(self, ids: tuple[int, ...], rows: torch.Tensor) -> str:
        """A context as the server takes it: base64 of a file with ``[n, H]``."""
        text = self._files.embed([i if i < self.capabilities.vocab_size else 0 for i in ids], rows.dtype)
        file = io.BytesIO()
        torch.save(self._held.place(ids, rows, text), file)
        return base64.b64encode(file.getvalue()).decode()

    async def _read(self, request: Request, rows: torch.Tensor | None, queue: asyncio.Queue[Token | Exception]) -> None:
        """Puts what the server streams into the queue, or what went wrong."""
        d = request.decoding
        body = {
            **await self._context(request.ids, rows, request.salt),
            **words(d, self.capabilities.end_id),
            **({"logit_bias": {str(i): b for i, b in d.logit_bias.items()}} if d.logit_bias else {}),
            "logprobs": d.top_logprobs,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            async with self._turns.text(d):
                async for token in self._tokens(body, request):
                    queue.put_nowait(token)
            queue.put_nowait(EngineDown("the vLLM server's answer stopped without an end"))
        except EngineError as e:
            queue.put_nowait(e)

    async def _tokens(self, body: dict[str, Any], request: Request) -> AsyncIterator[Token]:
        """The last token waits for the count of cached ones that comes after it."""
        last: Token | None = None
        async for event in self._server.events(body):
            for choice in event["choices"]:
                for token in _tokens_of(choice, request, self.capabilities.end_id):
                    if token.finish:
                        last = token
                    else:
                        yield token
            if last and (usage := event.get("usage")):
                details = usage.get("prompt_tokens_details") or {}
                yield replace(last, cached=details.get("cached_tokens") or 0)


def _one_token(ids: tuple[int, ...], named: bool) -> dict[str, Any]:
    """Asks for log-probabilities of tokens next; not named, the only one is made to be chosen."""
    how = {"logprobs": 1, "logprob_token_ids": list(ids)} if named else {"logprobs": 0, "allowed_token_ids": list(ids)}
    return {"max_tokens": 1, "temperature": 0.0, "ignore_eos": True, **how}


def _tokens_of(choice: dict[str, Any], request: Request, end_id: int) -> list[Token]:
    """The tokens of an event, several where they came together."""
    d, found = request.decoding, []
    finish, ids = finish_of(choice["finish_reason"]), choice.get("token_ids") or []
    for at, token in enumerate(ids):
        last = finish if at == len(ids) - 1 and finish != "abort" else None
        ends = last == "stop" and closes(token, d, end_id)
        known = {} if d.top_logprobs is None else _listed(choice["logprobs"], at)
        found.append(Token(-1 if ends else token, known.get(token), likeliest(known, d.top_logprobs or 0), last))
    if finish == "abort" or (finish and not ids):
        found.append(Token(-1, finish=finish))
    return found


def _listed(logprobs: dict[str, Any], at: int) -> dict[int, float]:
    return {int(name.removeprefix(NAMED)): p for name, p in logprobs["top_logprobs"][at].items()}
