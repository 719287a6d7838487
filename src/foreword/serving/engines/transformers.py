"""The embedded engine: transformers' continuous batching, fed with virtual token ids.

Scheduling, paged cache and prefix sharing are transformers'. What is ours: ids that name soft prompts
(``ids.py``), tokens chosen request by request (``choosing.py``), attention that does not compute what the
mask throws away (``attention.py``), and scores between the steps (``scoring.py``).
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from foreword.backbone.choose import choose_layout
from foreword.backbone.kv import Geometry
from foreword.backbone.load import Backbone, load_backbone
from foreword.config import ModelConfig
from foreword.errors import ForewordError
from foreword.prompts.soft import SoftPrompt
from foreword.records import Segment
from foreword.serving.engine import (
    Capabilities,
    EngineDown,
    EngineRefused,
    Finish,
    Request,
    Rows,
    ScoreRequest,
    Stats,
    Token,
    UnknownPrompt,
)
from foreword.serving.engines.attention import PagedAttention
from foreword.serving.engines.choosing import SAMPLES, Chooser, Writer
from foreword.serving.engines.ids import Aliases, NoRoom, RowTable, Slot, TableHook
from foreword.serving.engines.scoring import Job, Scorer

MEBI = 1 << 20
AGREEMENT = 0.02
"""Largest difference of a log-probability between the continuous batch and a plain forward, in float32."""
LOOSE_AGREEMENT = 0.5


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
    """Most requests of one forward pass."""
    threads: int = 0
    """CPU threads; 0: torch's own choice."""


def make(config: Mapping[str, Any]) -> TransformersEngine:
    """The engine of a worker, from its configuration as JSON."""
    return TransformersEngine(TransformersConfig(**config))


@dataclass(eq=False)
class Running:
    """A request under way: its writer, what it reads, and where its tokens go."""

    request: Request
    writer: Writer
    slot: Slot | None
    tokens: asyncio.Queue[Token | EngineDown] = field(default_factory=asyncio.Queue)
    delivered: int = 0
    finished: bool = False


class TransformersEngine:
    """Runs one backbone in this process. See ``engine.Engine``."""

    def __init__(self, config: TransformersConfig, backbone: Backbone | None = None) -> None:
        self.config = config
        self._given = backbone
        self._running: dict[str, Running] = {}
        self._writers: dict[str, Writer] = {}
        self._slots: dict[str, Slot] = {}
        self._prefixes: dict[int, Slot] = {}  # by the id of their first row
        self._serial = itertools.count()
        self._lock = threading.Lock()
        self.epoch = 0
        self._started = False

    # --- starting and ending ---------------------------------------------------------------------

    async def start(self) -> Capabilities:
        """Loads the backbone, proves that it batches, and starts the loop."""
        self._loop = asyncio.get_running_loop()
        self.capabilities = await asyncio.to_thread(self._load)
        self.epoch += 1
        self._started = True
        try:
            await self._prove()
        except BaseException:
            await self.close()
            raise
        return self.capabilities

    def _load(self) -> Capabilities:
        c = self.config
        if c.threads:
            torch.set_num_threads(c.threads)
        model = ModelConfig(c.model, c.revision, dtype=c.dtype, device=c.device, quantize=c.quantize)
        self.backbone = backbone = self._given or load_backbone(model)
        if getattr(backbone.model, "_is_stateful", False):
            raise _not_batched(backbone)
        sample = [Segment((1, 2 + i, 3), ((4 + i, 5), (6, 5))) for i in range(2)]
        no_rows = torch.zeros(0, backbone.hidden_size, device=backbone.device)
        layout = choose_layout(backbone, SoftPrompt(no_rows), sample, gradient=False).score
        self.geometry = self._geometry()
        self._attach()
        self.manager = self._start_manager()
        self.scorer = Scorer(backbone, layout, self._alone, int(c.score_memory * MEBI))
        return self._capabilities()

    def _geometry(self) -> Geometry | None:
        """Shape of a prefix; None where this engine can't put one into the cache."""
        self.attention_name = self.backbone.model.config._attn_implementation
        windows = getattr(self.backbone.config, "sliding_window", None)
        self.own_attention = self.attention_name == "sdpa" and windows is None
        with suppress(ForewordError):
            return self.backbone.geometry if self.own_attention else None
        return None

    def _attach(self) -> None:
        backbone = self.backbone
        width = backbone.hidden_size * backbone.embedding.weight.element_size()  # type: ignore[operator]
        rows = max(int(self.config.prompt_memory * MEBI) // width, 1)
        table = torch.empty(rows, backbone.hidden_size, dtype=backbone.dtype, device=backbone.device)
        self.rows, self.aliases = RowTable(backbone.vocab_size, table), Aliases()
        self.hook = TableHook(backbone.embedding, self.rows, self.aliases)
        if self.own_attention:
            self.attention = PagedAttention(self._with_prefixes)

    def _start_manager(self) -> Any:
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        c, backbone = self.config, self.backbone
        blocks = max(int(c.kv_memory * MEBI) // (self._bytes_per_token() * c.page), 4)
        batching = ContinuousBatchingConfig(
            page_size=c.page,
            num_blocks=blocks,
            max_batch_tokens=c.batch_tokens,
            max_requests_per_batch=min(c.max_running, c.batch_tokens),
            max_blocks_per_request=0,
            use_async_batching=False,
            use_cuda_graph=False,
            auto_switch_to_flash=False,
        )
        greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=backbone.end_id)
        manager = backbone.model.init_continuous_batching(greedy, batching)
        if self.own_attention:
            self.attention.install(backbone.model)
        self.chooser = Chooser(self._writers)
        manager.logit_processor = self.chooser
        manager.output_router = self
        self._cache_tokens = blocks * c.page
        manager.start()
        return manager

    def _bytes_per_token(self) -> int:
        config = self.backbone.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(2 * config.num_hidden_layers * heads * width * self.backbone.embedding.weight.element_size())  # type: ignore[operator]

    def _capabilities(self) -> Capabilities:
        backbone = self.backbone
        return Capabilities(
            engine="transformers",
            model=backbone.name,
            vocab_size=backbone.vocab_size,
            hidden_size=backbone.hidden_size,
            window=min(backbone.window, self._cache_tokens),
            end_id=backbone.end_id,
            dtype=str(backbone.dtype).removeprefix("torch."),
            kinds=("rows", "prefix") if self.geometry else ("rows",),
            samples=SAMPLES,
            fingerprint=backbone.fingerprint.as_dict(),
            prefix_width=self.geometry.width if self.geometry else 0,
        )

    async def _prove(self) -> None:
        """Two requests in one batch against plain forwards: some architectures batch wrongly without a word."""
        from foreword.serving.engine import Decoding

        decoding = Decoding(max_tokens=3, ignore_eos=True, top_logprobs=0)
        contexts = [(1, 2, 3, 4, 5), (3, 1, 2)]
        requests = [Request(f"proof-{i}", ids, decoding=decoding) for i, ids in enumerate(contexts)]
        answers = await asyncio.gather(*(_collected(self.generate(r)) for r in requests))
        plain = await asyncio.to_thread(self._plain, contexts, [[t.id for t in a] for a in answers])
        allowed = AGREEMENT if self.backbone.dtype in (torch.float32, torch.float64) else LOOSE_AGREEMENT
        found = [t.logprob for a in answers for t in a]
        if any(abs((x or 0.0) - y) > allowed for x, y in zip(found, plain, strict=True)):
            raise _not_batched(self.backbone)

    def _plain(self, contexts: list[tuple[int, ...]], answers: list[list[int]]) -> list[float]:
        """Log-probabilities of answers, each by one plain forward."""
        found: list[float] = []
        with self._alone(), torch.no_grad():
            for context, answer in zip(contexts, answers, strict=True):
                ids = torch.tensor([[*context, *answer[:-1]]], device=self.backbone.device)
                logits = self.backbone.model(input_ids=ids, use_cache=False).logits[0, len(context) - 1 :].float()
                targets = torch.tensor(answer, device=logits.device)
                found += logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].tolist()
        return found

    async def close(self) -> None:
        """Ends requests, the loop and the scorer, and leaves the model as it was."""
        if not self._started:
            return
        self._started = False
        for running in list(self._running.values()):
            self._finish(running, Token(-1, finish="abort"))
        await asyncio.to_thread(self._stop)

    def _stop(self) -> None:
        self.scorer.close()
        self.manager.stop(block=True, timeout=30, hard_stop=True)
        self.manager.destroy()
        self.hook.remove()
        if self.own_attention:
            self.backbone.model.set_attn_implementation(self.attention_name)

    @property
    def alive(self) -> bool:
        """Whether the loop runs."""
        return self._started and self.manager.is_running() and self.manager.background_thread_status.fatal_error is None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """The loop waits between two steps meanwhile, and attention reads plain inputs."""
        model = self.backbone.model
        with self.manager.pause():
            batching = model.config._attn_implementation
            if batching != "paged|eager":  # ours and transformers' SDPA read both
                yield
                return
            model.set_attn_implementation(self.attention_name)
            try:
                yield
            finally:
                model.set_attn_implementation(batching)

    # --- soft prompts ----------------------------------------------------------------------------

    async def put(self, rows: Rows) -> None:
        """Takes a soft prompt into the table."""
        if rows.key in self._slots:
            return
        self._check_rows(rows)
        values = torch.from_numpy(np.ascontiguousarray(rows.values))
        if self.rows.worn:
            await asyncio.to_thread(self._forget_blocks)
        try:
            slot = self._take(rows, values)
        except NoRoom as e:
            raise EngineRefused(f"no room for soft prompt {rows.key}: {e}; raise the memory of soft prompts") from None
        self._slots[rows.key] = slot

    def _check_rows(self, rows: Rows) -> None:
        c = self.capabilities
        if rows.kind not in c.kinds:
            raise EngineRefused(f"soft prompts of kind {rows.kind} can't be served with this backbone")
        width = c.hidden_size if rows.kind == "rows" else c.prefix_width
        if rows.values.ndim != 2 or rows.values.shape[1] != width or not len(rows.values):
            raise EngineRefused(f"soft prompt {rows.key} has shape {rows.values.shape}, not [P, {width}]")
        if not np.isfinite(rows.values).all():
            raise EngineRefused(f"soft prompt {rows.key} has values that are not finite")

    def _take(self, rows: Rows, values: torch.Tensor) -> Slot:
        if rows.kind == "rows":
            return Slot(rows.key, self.rows.take(values), rows.values.nbytes)
        assert self.geometry is not None
        held = sum(s.nbytes for s in self._slots.values() if s.layers)
        if held + rows.values.nbytes > self.config.prompt_memory * MEBI:
            raise NoRoom(f"{rows.values.nbytes} bytes beside {held} of {self.config.prompt_memory:g} MB")
        layers = self.geometry.layered(values.to(self.backbone.device, self.backbone.dtype)[None])
        ids = self.rows.take(torch.zeros(len(values), self.backbone.hidden_size))
        slot = Slot(rows.key, ids, rows.values.nbytes, tuple((k[0], v[0]) for k, v in layers))
        self._prefixes[ids[0]] = slot
        return slot

    async def drop(self, key: str) -> None:
        """Gives the rows of a soft prompt back, once nobody reads them."""
        slot = self._slots.pop(key, None)
        if slot is not None:
            slot.dropped = True
            self._free(slot)

    def _free(self, slot: Slot) -> None:
        if slot.dropped and not slot.readers:
            self.rows.give_back(slot.ids)
            self._prefixes.pop(slot.ids[0], None)

    def _forget_blocks(self) -> None:
        """Clears cached blocks, so that ids of free rows may begin anew."""
        with self._alone():
            self.manager.batch_processor.cache.evict_cached_blocks()
            self.rows.start_over()

    def _with_prefixes(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """New keys and values ``[1, heads, T, d]``, those of prefixes in place of what their ids gave."""
        if not self._prefixes or key.shape[2] == 1:
            return key, value
        if layer == 0:
            self._places = self._prefix_places(self.hook.ids[0])
        for at, row, slot in self._places:
            k, v = slot.layers[layer]
            key[0, :, at], value[0, :, at] = k[:, row], v[:, row]
        return key, value

    def _prefix_places(self, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, Slot]]:
        """Where tokens of prefixes stand in this pass: places, which rows they are, whose."""
        found = []
        present = set(ids[ids >= self.rows.base].tolist())
        for slot in list(self._prefixes.values()):
            if present.isdisjoint(slot.ids):
                continue
            own = torch.tensor(slot.ids, device=ids.device)
            at, row = (ids[:, None] == own).nonzero(as_tuple=True)
            found.append((at, row, slot))
        return found

    # --- requests --------------------------------------------------------------------------------

    async def generate(self, request: Request) -> AsyncIterator[Token]:
        """Tokens as they come; closing the iterator aborts."""
        running = self._admit(request)
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

    def _admit(self, request: Request) -> Running:
        if not self.alive:
            raise EngineDown("the engine does not run")
        if request.id in self._running:
            raise EngineRefused(f"request {request.id} runs already")
        slot, ids = self._resolve(request.key, request.ids)
        d, limit = request.decoding, self.capabilities.window
        if len(ids) + d.max_tokens > limit:
            raise EngineRefused(f"{len(ids)} tokens and {d.max_tokens} new ones do not fit {limit}")
        if d.max_tokens < 1:
            raise EngineRefused(f"max_tokens is {d.max_tokens}; at least 1")
        text = [i for i in request.ids if i < self.rows.base]
        running = Running(request, Writer(d, text, len(ids)), slot)
        self._running[request.id] = running
        self._writers[request.id] = running.writer
        if slot is not None:
            slot.readers += 1
        ends = [*d.stop_ids, *([] if d.ignore_eos else [self.capabilities.end_id])] or [-1]
        named = [self.aliases.name(request.salt, ids[0]), *ids[1:]]
        self.manager.add_request(
            named, request_id=request.id, max_new_tokens=d.max_tokens, streaming=True, eos_token_id=ends
        )
        return running

    def _resolve(self, key: str | None, local: tuple[int, ...]) -> tuple[Slot | None, tuple[int, ...]]:
        """A request's soft prompt, and its local ids as ids of the running model, a prefix's in front."""
        base = self.rows.base
        if not local or min(local) < 0:
            raise EngineRefused("a request needs at least one token id, none of them negative")
        if key is None:
            if max(local) >= base:
                raise EngineRefused("virtual ids without a soft prompt")
            return None, local
        slot = self._slots.get(key)
        if slot is None:
            raise UnknownPrompt(f"soft prompt {key} is not loaded")
        if slot.layers:
            if max(local) >= base:
                raise EngineRefused("a prefix stands in front and has no ids in the context")
            return slot, (*slot.ids, *local)
        if max(local) >= base + len(slot.ids):
            raise EngineRefused(f"soft prompt {key} has {len(slot.ids)} rows")
        return slot, tuple(slot.ids[i - base] if i >= base else i for i in local)

    def _leave(self, running: Running) -> None:
        """Forgets a request; one that still runs is cancelled."""
        if self._running.pop(running.request.id, None) is None:
            return
        self._writers.pop(running.request.id, None)
        if not running.finished and self._started:
            self.manager.cancel_request(running.request.id)
        if running.slot is not None:
            running.slot.readers -= 1
            self._free(running.slot)

    async def abort(self, request_id: str) -> None:
        """Ends a request with finish "abort"."""
        running = self._running.get(request_id)
        if running is not None and not running.finished:
            self.manager.cancel_request(request_id)
            self._finish(running, Token(-1, finish="abort"))

    def _finish(self, running: Running, last: Token | EngineDown) -> None:
        running.finished = True
        running.tokens.put_nowait(last)

    # --- what the loop delivers (it takes this engine for its router) -----------------------------

    def deliver(self, output: Any) -> None:
        """One output, from the loop's thread."""
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[Any]) -> None:
        """The outputs of a step, from the loop's thread."""
        found = []
        for output in outputs:
            writer = self._writers.get(output.request_id)
            if writer is None:
                continue
            fresh, writer.fresh = writer.fresh, []
            found.append((output.request_id, fresh, output.is_finished(), output.error))
        if found:
            with suppress(RuntimeError):  # the event loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._hand_out, found)

    def fail_and_deliver(self, state: Any, error: Exception) -> None:
        """A request that failed."""
        from transformers.generation.continuous_batching.requests import RequestStatus

        state.status, state.error = RequestStatus.FAILED, str(error)
        self.deliver_batch([state.to_generation_output()])

    def _hand_out(self, found: list[tuple[str, list[Any], bool, str | None]]) -> None:
        for request_id, fresh, finished, error in found:
            running = self._running.get(request_id)
            if running is None or running.finished:
                continue
            if error is not None:
                self._finish(running, EngineDown(f"the engine failed: {error}"))
                continue
            for i, chosen in enumerate(fresh):
                last = finished and i == len(fresh) - 1
                self._give(running, chosen, self._end(running, chosen.id) if last else None)

    def _end(self, running: Running, token: int) -> Finish:
        d = running.request.decoding
        ended = token in d.stop_ids or (token == self.capabilities.end_id and not d.ignore_eos)
        return "stop" if ended else "length"

    def _give(self, running: Running, chosen: Any, finish: Finish | None) -> None:
        d, writer = running.request.decoding, running.writer
        closes = chosen.id == self.capabilities.end_id and not d.ignore_eos and chosen.id not in d.stop_ids
        cached = 0 if running.delivered else max(writer.context - writer.computed, 0)
        running.delivered += 1
        token = Token(-1 if closes else chosen.id, chosen.logprob, chosen.top, finish, cached)
        if finish:
            self._finish(running, token)
        else:
            running.tokens.put_nowait(token)

    # --- scores and counters ---------------------------------------------------------------------

    async def score(self, request: ScoreRequest) -> list[float]:
        """Summed log-probability of each branch."""
        if not self.alive:
            raise EngineDown("the engine does not run")
        if not request.branches or not all(request.branches):
            raise EngineRefused("nothing to score: a branch without tokens")
        slot, ids = self._resolve(request.key, request.ids)
        if slot is not None and slot.layers:
            ids = request.ids
        longest = len(ids) + max(map(len, request.branches)) + (len(slot.ids) if slot and slot.layers else 0)
        if longest > self.capabilities.window:
            raise EngineRefused(f"{longest} tokens do not fit {self.capabilities.window}")
        job = Job(ids, request.branches, slot, self._leading(ids))
        if slot is not None:
            slot.readers += 1
        try:
            self.scorer.add(job)
            return await asyncio.wrap_future(job.done)
        except RuntimeError as e:
            raise EngineDown(f"the engine failed: {e}") from e
        finally:
            if slot is not None:
                slot.readers -= 1
                self._free(slot)

    def _leading(self, ids: tuple[int, ...]) -> int:
        """Virtual tokens in front, of which one text token at least stays apart."""
        count = sum(1 for _ in itertools.takewhile(lambda i: i >= self.rows.base, ids))
        return min(count, len(ids) - 1)

    async def stats(self) -> Stats:
        """Counters and gauges."""
        processor = self.manager.batch_processor
        scheduler = processor.scheduler if processor is not None else None
        waiting = self.manager.input_queue.qsize() + (len(scheduler.waiting_requests) if scheduler else 0)
        return Stats(
            running=len(scheduler.active_requests) if scheduler else 0,
            waiting=waiting + self.scorer.waiting,
            prefix_queries=self.chooser.queries,
            prefix_hits=self.chooser.hits,
            kv_usage=1.0 - float(processor.cache.compute_free_capacity()) if processor is not None else 0.0,
            prompt_bytes=sum(s.nbytes for s in self._slots.values()),
        )


def _not_batched(backbone: Backbone) -> ForewordError:
    return ForewordError(
        f"transformers does not answer {backbone.config.model_type} right in a continuous batch",
        backbone.name,
        "serve it with --engine vllm, or use foreword predict and generate",
    )


async def _collected(tokens: AsyncIterator[Token]) -> list[Token]:
    return [t async for t in tokens]


def as_json(config: TransformersConfig) -> dict[str, Any]:
    """The configuration for ``make`` in another process."""
    return asdict(config)
