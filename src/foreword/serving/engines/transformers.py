"""The embedded engine: transformers in this process, fed with virtual token ids.

Scheduling, paged cache and prefix sharing are transformers'. What is ours: ids that name soft prompts
(``ids.py``, ``slots.py``), tokens chosen request by request (``choosing.py``), attention that does not
compute what the mask throws away (``attention.py``), and scores between the steps (``scoring.py``).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from foreword.backbone.choose import choose_layout
from foreword.backbone.load import Backbone, load_backbone
from foreword.config import ModelConfig
from foreword.errors import ForewordError
from foreword.prompts.soft import SoftPrompt
from foreword.records import Segment
from foreword.serving.engine import (
    SAMPLES,
    Capabilities,
    Decoding,
    EngineDown,
    EngineRefused,
    Finish,
    Request,
    Rows,
    ScoreRequest,
    Stats,
    Token,
)
from foreword.serving.engines.choosing import Chooser, Chosen, Writer
from foreword.serving.engines.continuous import Continuous, bytes_per_token
from foreword.serving.engines.ids import Slot
from foreword.serving.engines.packing import PackedHead
from foreword.serving.engines.rounds import Rounds
from foreword.serving.engines.scoring import Job, Scorer
from foreword.serving.engines.slots import Slots

log = logging.getLogger("foreword")
MEBI = 1 << 20
AGREEMENT = 0.02
"""Largest difference of a log-probability between a batch and a plain forward, in float32."""
LOOSE_AGREEMENT = 0.5
ROUND = 16
"""Most requests of a round."""
PROOF = ((1, 2, 3, 4, 5), (3, 1, 2))
"""Contexts that a batch is proved on."""


@dataclass(frozen=True)
class TransformersConfig:
    """How the embedded engine runs."""

    model: str
    """Hub id, local folder, .gguf file, or smollm2-135m."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: str = "auto"
    """auto (float32 on CPU, else bfloat16), float32, bfloat16 or float16."""
    device: str = "auto"
    """auto (cuda, then mps, then cpu), cuda, cuda:N, mps or cpu."""
    quantize: str = "none"
    """As model.quantize of a recipe."""
    prompt_memory: float = 64.0
    """MB of soft prompts held at once."""
    kv_memory: float = 1024.0
    """MB of the cache of keys and values."""
    score_memory: float = 32.0
    """MB of keys and values kept of soft prompts that score."""
    page: int = 16
    """Tokens of a block of the cache: only whole blocks are shared, so at most the virtual tokens of a prompt."""
    batch_tokens: int = 512
    """Most tokens of one forward pass."""
    max_running: int = 256
    """Most requests of one forward pass (16 where requests run in rounds)."""
    threads: int = 0
    """CPU threads; 0: torch's own choice."""


def make(config: Mapping[str, Any]) -> TransformersEngine:
    """The engine of a worker, from its configuration as JSON."""
    return TransformersEngine(TransformersConfig(**config))


def as_json(config: TransformersConfig) -> dict[str, Any]:
    """The configuration for ``make`` in another process."""
    return asdict(config)


@dataclass(eq=False)
class Running:
    """A request under way: its writer, the soft prompt it reads, and where its tokens go."""

    writer: Writer
    slot: Slot | None
    tokens: asyncio.Queue[Token | EngineDown] = field(default_factory=asyncio.Queue)
    delivered: int = 0
    finished: bool = False

    def finish(self, last: Token | EngineDown) -> None:
        """Nothing comes after this."""
        self.finished = True
        self.tokens.put_nowait(last)


class TransformersEngine:
    """Runs one backbone in this process. See ``engine.Engine``."""

    def __init__(self, config: TransformersConfig, backbone: Backbone | None = None) -> None:
        self.config, self.epoch = config, 0
        self._given = backbone
        self._running: dict[str, Running] = {}
        self._writers: dict[str, Writer] = {}
        self._started = False

    # --- starting and ending ---------------------------------------------------------------------

    async def start(self) -> Capabilities:
        """Loads the backbone, proves how it batches, and starts the loop."""
        self._events = asyncio.get_running_loop()
        await asyncio.to_thread(self._load)
        self.epoch += 1
        self._started = True
        try:
            await self._choose_loop()
        except BaseException:
            await self.close()
            raise
        self.capabilities = self._found_capabilities()
        return self.capabilities

    def _load(self) -> None:
        c = self.config
        if c.threads:
            torch.set_num_threads(c.threads)
        model = ModelConfig(c.model, c.revision, dtype=c.dtype, device=c.device, quantize=c.quantize)
        self.backbone = self._given or load_backbone(model)
        if getattr(self.backbone.model, "_is_stateful", False):
            raise _not_served(self.backbone)
        sample = [Segment((1, 2 + i, 3), ((4 + i, 5), (6, 5))) for i in range(2)]
        no_rows = torch.zeros(0, self.backbone.hidden_size, device=self.backbone.device)
        layout = choose_layout(self.backbone, SoftPrompt(no_rows), sample, gradient=False).score
        self.head = PackedHead(self.backbone.model)
        self.slots = Slots(self.backbone, int(c.prompt_memory * MEBI))
        self.chooser = Chooser(self._writers)
        self.scorer = Scorer(self.backbone, layout, lambda: self.loop.pause(), int(c.score_memory * MEBI))

    async def _choose_loop(self) -> None:
        """Continuous batching where it answers right, else rounds."""
        for begin in (self._continuous, self._rounds):
            self.loop: Continuous | Rounds = begin()
            if await self._proved():
                self.slots.prefixes = self.loop.takes_prefixes
                return
            await asyncio.to_thread(self.loop.stop)
        raise _not_served(self.backbone)

    def _continuous(self) -> Continuous:
        c = self.config
        return Continuous(
            self.backbone, self.chooser, self._writers, self._deliver, self.slots.with_prefixes,
            kv_bytes=int(c.kv_memory * MEBI), page=c.page, batch_tokens=c.batch_tokens, most=c.max_running,
        )  # fmt: skip

    def _rounds(self) -> Rounds:
        c = self.config
        tokens = int(c.kv_memory * MEBI) // (bytes_per_token(self.backbone) * ROUND)
        return Rounds(self.backbone, self.chooser, self._deliver, min(c.max_running, ROUND), tokens)

    async def _proved(self) -> bool:
        """Two requests in one batch against plain forwards: some architectures batch wrongly without a word."""
        decoding = Decoding(max_tokens=3, ignore_eos=True, top_logprobs=0)
        name = type(self.loop).__name__
        requests = [Request(f"{name}-{i}", ids, decoding=decoding) for i, ids in enumerate(PROOF)]
        answers = await asyncio.gather(*(_collected(self._tokens(r)) for r in requests), return_exceptions=True)
        texts = [a for a in answers if not isinstance(a, BaseException)]
        if len(texts) < len(answers):
            return False
        plain = await asyncio.to_thread(self._plain, [[t.id for t in a] for a in texts])
        exact = self.backbone.dtype in (torch.float32, torch.float64)
        found = [t.logprob or 0.0 for a in texts for t in a]
        apart = max(abs(x - y) for x, y in zip(found, plain, strict=True))
        log.debug("%s answers with log-probabilities %.2g apart from plain forwards", name, apart)
        return apart <= (AGREEMENT if exact else LOOSE_AGREEMENT)

    def _plain(self, answers: list[list[int]]) -> list[float]:
        """Log-probabilities of answers to the proof's contexts, each by one plain forward."""
        found: list[float] = []
        with self.loop.pause(), torch.no_grad():
            for context, answer in zip(PROOF, answers, strict=True):
                ids = torch.tensor([[*context, *answer[:-1]]], device=self.backbone.device)
                logits = self.backbone.model(input_ids=ids, use_cache=False).logits[0, len(context) - 1 :].float()
                targets = torch.tensor(answer, device=logits.device)
                found += logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].tolist()
        return found

    def _found_capabilities(self) -> Capabilities:
        backbone, prefixes = self.backbone, self.loop.takes_prefixes
        return Capabilities(
            engine="transformers",
            model=backbone.name,
            vocab_size=backbone.vocab_size,
            hidden_size=backbone.hidden_size,
            window=self._window,
            end_id=backbone.end_id,
            dtype=str(backbone.dtype).removeprefix("torch."),
            kinds=("rows", "prefix") if prefixes else ("rows",),
            samples=SAMPLES,
            fingerprint=backbone.fingerprint.as_dict(),
            prefix_width=backbone.geometry.width if prefixes else 0,
            quantize=backbone.rounding,
        )

    @property
    def _window(self) -> int:
        return min(self.backbone.window, self.loop.tokens)

    async def close(self) -> None:
        """Ends requests, the loop and the scorer, and leaves the model as it was."""
        if not self._started:
            return
        self._started = False
        for running in list(self._running.values()):
            running.finish(Token(-1, finish="abort"))
        await asyncio.to_thread(self.scorer.close)
        await asyncio.to_thread(self.loop.stop)
        self.slots.close()
        self.head.remove()

    @property
    def alive(self) -> bool:
        """Whether the loop runs."""
        return self._started and self.loop.is_running()

    # --- soft prompts ----------------------------------------------------------------------------

    async def put(self, rows: Rows) -> None:
        """Takes a soft prompt into the table."""
        if self.slots.holds(rows.key):
            return
        if self.slots.rows.worn:
            await asyncio.to_thread(self.loop.forget_blocks)
            self.slots.rows.start_over()
        self.slots.put(rows)

    async def drop(self, key: str) -> None:
        """Gives the rows of a soft prompt back, once nobody reads them."""
        self.slots.drop(key)

    # --- requests --------------------------------------------------------------------------------

    def generate(self, request: Request) -> AsyncIterator[Token]:
        """Tokens as they come; closing the iterator aborts."""
        return self._tokens(request)

    async def _tokens(self, request: Request) -> AsyncIterator[Token]:
        running = self._admitted(request)
        try:
            while True:
                token = await running.tokens.get()
                if isinstance(token, EngineDown):
                    raise token
                yield token
                if token.finish:
                    return
        finally:
            self._leave(running)

    def _admitted(self, request: Request) -> Running:
        self._check_alive()
        if request.id in self._running:
            raise EngineRefused(f"request {request.id} runs already")
        slot, ids = self.slots.resolve(request.key, request.ids)
        d, prefix = request.decoding, slot if slot and slot.layers else None
        if d.max_tokens < 1:
            raise EngineRefused(f"max_tokens is {d.max_tokens}; at least 1")
        named = (self.slots.aliases.name(request.salt, ids[0]), *ids[1:])
        if prefix is not None:  # its own first id takes the tenant's name
            named = (self.slots.aliases.name(request.salt, prefix.ids[0]), *prefix.ids[1:], *ids)
        self._check_room(len(named), d.max_tokens)
        text = [i for i in request.ids if i < self.slots.rows.base]
        running = Running(Writer(request.id, named, text, d, self.backbone.end_id, prefix), slot)
        self._running[request.id], self._writers[request.id] = running, running.writer
        self.slots.read(slot)
        self.loop.add(running.writer)
        return running

    def _check_alive(self) -> None:
        if not self.alive:
            raise EngineDown("the engine does not run")

    def _check_room(self, context: int, more: int) -> None:
        if context + more > self._window:
            raise EngineRefused(f"{context} tokens and {more} new ones do not fit {self._window}")

    def _leave(self, running: Running) -> None:
        """Forgets a request; one that still runs is cancelled."""
        writer = running.writer
        if self._running.pop(writer.id, None) is None:
            return
        self._writers.pop(writer.id, None)
        if not running.finished and self._started:
            self.loop.cancel(writer.id)
        self.slots.leave(running.slot)

    async def abort(self, request_id: str) -> None:
        """Ends a request with finish "abort"."""
        running = self._running.get(request_id)
        if running is not None and not running.finished:
            self.loop.cancel(request_id)
            running.finish(Token(-1, finish="abort"))

    def _deliver(self, found: list[tuple[Writer, bool, str | None]]) -> None:
        """From the loop's thread: what a step brought."""
        taken = []
        for writer, over, error in found:
            fresh, writer.fresh = writer.fresh, []
            taken.append((writer.id, fresh, over, error))
        with suppress(RuntimeError):  # the event loop is closed: nobody waits any more
            self._events.call_soon_threadsafe(self._hand_out, taken)

    def _hand_out(self, taken: list[tuple[str, list[Chosen], bool, str | None]]) -> None:
        for request_id, fresh, over, error in taken:
            running = self._running.get(request_id)
            if running is None or running.finished:
                continue
            if error is not None:
                running.finish(EngineDown(f"the engine failed: {error}"))
                continue
            for i, chosen in enumerate(fresh):
                self._give(running, chosen, last=over and i == len(fresh) - 1)

    def _give(self, running: Running, chosen: Chosen, last: bool) -> None:
        writer = running.writer
        ends = chosen.id in writer.ends
        hidden = ends and chosen.id not in writer.decoding.stop_ids  # the end token itself
        finish: Finish | None = ("stop" if ends else "length") if last else None
        cached = 0 if running.delivered else writer.cached
        running.delivered += 1
        token = Token(-1 if hidden else chosen.id, chosen.logprob, chosen.top, finish, cached)
        if last:
            running.finish(token)
        else:
            running.tokens.put_nowait(token)

    # --- scores and counters ---------------------------------------------------------------------

    async def score(self, request: ScoreRequest) -> list[float]:
        """Summed log-probability of each branch."""
        self._check_alive()
        if not request.branches or not all(request.branches):
            raise EngineRefused("nothing to score: a branch without tokens")
        slot, ids = self.slots.resolve(request.key, request.ids)
        before = len(slot.ids) if slot and slot.layers else 0
        self._check_room(before + len(ids), max(map(len, request.branches)))
        job = Job(ids, request.branches, slot, self.slots.leading(ids))
        self.slots.read(slot)
        try:
            self.scorer.add(job)
            return await asyncio.wrap_future(job.done)
        except RuntimeError as e:
            raise EngineDown(f"the engine failed: {e}") from e
        finally:
            self.slots.leave(slot)

    async def stats(self) -> Stats:
        """Counters and gauges."""
        return Stats(
            running=self.loop.running,
            waiting=self.loop.waiting + self.scorer.waiting,
            prefix_queries=self.chooser.queries,
            prefix_hits=self.chooser.hits,
            kv_usage=self.loop.kv_usage,
            prompt_bytes=self.slots.nbytes,
        )


def _not_served(backbone: Backbone) -> ForewordError:
    return ForewordError(
        f"transformers does not answer {backbone.config.model_type} right in a batch",
        backbone.name,
        "serve it with --engine vllm, or use foreword predict and generate",
    )


async def _collected(tokens: AsyncIterator[Token]) -> list[Token]:
    return [t async for t in tokens]
