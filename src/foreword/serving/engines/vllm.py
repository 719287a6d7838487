"""vLLM in this process: the engine of a worker that runs in vLLM's own environment.

A soft prompt goes along with each request as a mixed prompt: rows where the local ids are virtual, token
ids elsewhere. Scheduling, paged cache, prefix sharing and sampling are vLLM's.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from foreword.serving import wire
from foreword.serving.engine import (
    SAMPLES,
    Capabilities,
    Decoding,
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
from foreword.serving.engines.one_token import Turns, summed
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
CPU_BLOCK, GPU_BLOCK = 32, 16
"""Tokens of a block of the cache, the smallest that vLLM takes: only whole blocks are shared."""


@dataclass(frozen=True)
class VllmConfig:
    """How vLLM runs. What it cannot know of a model is told by ``model_files.describe``."""

    model: str
    """Hub id or local folder."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    end_id: int | None = None
    """The end token; None: the one in the model's configuration."""
    vocab_size: int = 0
    """Rows of the embedding; 0: as in the model's configuration."""
    window: int = 0
    """Most tokens of a request; 0: the model's own. Less where the cache holds less."""
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    """Of the backbone, as in a sidecar."""
    probe: Mapping[str, Any] = field(default_factory=dict)
    """Some ids and their embeddings: {"ids": [...], "rows": as wire.pack_rows writes them}."""
    dtype: str = "auto"
    """auto (float32 on CPU, else bfloat16), float32, bfloat16 or float16."""
    prompt_memory: float = 64.0
    """MB of soft prompts held at once."""
    kv_memory: float = 0.0
    """MB of the cache of keys and values; 0: vLLM's own choice (of a GPU, 92 % of what is there)."""
    max_running: int = 256
    """Most requests of one forward pass."""
    threads: int = 0
    """CPU threads; 0: vLLM's own choice."""
    eager: bool | None = None
    """Whether nothing is compiled and no CUDA graphs are made; None: on CPU, where that gained nothing."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's engine by its own names, such as tensor_parallel_size."""


def make(config: Mapping[str, Any]) -> VllmEngine:
    """The engine of a worker, from its configuration as JSON."""
    return VllmEngine(VllmConfig(**config))


class VllmEngine:
    """Runs one model on vLLM. See ``engine.Engine``."""

    def __init__(self, config: VllmConfig) -> None:
        self.config = config
        self._llm: Any = None
        self._running: set[str] = set()
        self._serial = itertools.count()
        self._turns = Turns()
        self.epoch = 0

    # --- starting and ending ---------------------------------------------------------------------

    async def start(self) -> Capabilities:
        """Loads the model (this blocks the event loop, as vLLM's start does) and runs a first batch."""
        from vllm.v1.engine.async_llm import AsyncLLM

        self._llm = AsyncLLM.from_engine_args(_arguments(self.config))
        self.capabilities = c = self._capabilities()
        dtype = getattr(torch, c.dtype)
        self._held = HeldRows(c.vocab_size, c.hidden_size, dtype, int(self.config.prompt_memory * MEBI))
        self.epoch += 1
        try:
            await self._warm_up()
        except BaseException:
            await self.close()
            raise
        return c

    def _capabilities(self) -> Capabilities:
        config, model = self.config, self._llm.model_config
        end = model.hf_text_config.eos_token_id if config.end_id is None else config.end_id
        return Capabilities(
            engine="vllm",
            model=config.model,
            vocab_size=config.vocab_size or model.get_vocab_size(),
            hidden_size=model.get_hidden_size(),
            window=model.max_model_len,
            end_id=end[0] if isinstance(end, list) else end,
            dtype=str(model.dtype).removeprefix("torch."),
            max_top_logprobs=model.max_logprobs,
            samples=SAMPLES,
            fingerprint=config.fingerprint,
        )

    async def _warm_up(self) -> None:
        """Every kind of request once: what vLLM compiles upon the first of them no client waits for."""
        await self.score(ScoreRequest("first-score", (0, 1), ((1,), (2,))))
        sampled = Decoding(max_tokens=2, temperature=1.0, seed=0, top_logprobs=1)
        async for _ in self.generate(Request("first-text", (0, 1), decoding=sampled)):
            pass
        if probe := self.config.probe:
            rows, c = wire.unpack_rows(probe["rows"]), self.capabilities
            await check_rows(self, rows, probe["ids"], c.vocab_size, c.dtype)

    async def close(self) -> None:
        """Ends vLLM's processes."""
        if self._llm is not None:
            llm, self._llm = self._llm, None
            await llm.abort(list(self._running))
            await asyncio.to_thread(llm.shutdown, 0.0)

    @property
    def alive(self) -> bool:
        """Whether vLLM's processes run."""
        return self._llm is not None and not self._llm.errored

    # --- soft prompts ----------------------------------------------------------------------------

    async def put(self, rows: Rows) -> None:
        """Takes a soft prompt in."""
        self._held.put(rows)

    async def drop(self, key: str) -> None:
        """Forgets a soft prompt."""
        self._held.drop(key)

    # --- requests --------------------------------------------------------------------------------

    async def generate(self, request: Request) -> AsyncIterator[Token]:
        """Tokens as they come; closing the iterator aborts."""
        d = request.decoding
        prompt = self._prompt(request.ids, self._held.find(request.key, request.ids), request.salt)
        check_length(len(request.ids), d.max_tokens, self.capabilities.window)
        async with self._entered(request.id), self._turns.text(d):
            outputs = self._outputs(prompt, self._parameters(d), request.id)
            try:
                first = True
                async for output in outputs:
                    for token in self._tokens(output, d):
                        yield replace(token, cached=output.num_cached_tokens or 0) if first else token
                        first = False
            finally:
                await outputs.aclose()

    async def abort(self, request_id: str) -> None:
        """Ends a request with finish "abort"."""
        if self._llm is not None and request_id in self._running:
            await self._llm.abort(request_id)

    async def score(self, request: ScoreRequest) -> list[float]:
        """Summed log-probability of each branch."""
        if not request.branches or not all(request.branches):
            raise EngineRefused("nothing to score: a branch without tokens")
        rows = self._held.find(request.key, request.ids)
        check_length(len(request.ids), max(map(len, request.branches)), self.capabilities.window)
        with self._turns.naming() as named:

            async def ask(path: tuple[int, ...], ids: tuple[int, ...]) -> dict[int, float]:
                return await self._step(self._prompt(request.ids + path, rows, request.salt), ids, named)

            return await summed(request.branches, ask, MOST_NAMED if named else 1)

    @asynccontextmanager
    async def _entered(self, request_id: str) -> AsyncIterator[None]:
        if request_id in self._running:
            raise EngineRefused(f"request {request_id} runs already")
        self._running.add(request_id)
        try:
            yield
        finally:
            self._running.discard(request_id)

    async def _outputs(self, prompt: Any, parameters: Any, request_id: str) -> Any:
        """What vLLM says of a request, its errors in our words."""
        if self._llm is None:
            raise EngineDown("vLLM does not run")
        with _in_our_words():
            outputs = self._llm.generate(prompt, parameters, request_id)
            try:
                async for output in outputs:
                    yield output
            finally:
                await outputs.aclose()

    async def _step(self, prompt: Any, ids: tuple[int, ...], named: bool) -> dict[int, float]:
        """Log-probabilities of tokens next after a prompt; not named, the only one is made to be chosen."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        how = {"logprob_token_ids": list(ids)} if named else {"logprobs": 0, "allowed_token_ids": list(ids)}
        plain = {"max_tokens": 1, "temperature": 0.0, "detokenize": False, "ignore_eos": True}
        with _in_our_words():
            parameters = SamplingParams(**plain, **how, output_kind=RequestOutputKind.FINAL_ONLY)
        found: Any = None
        async for output in self._outputs(prompt, parameters, f"score-{next(self._serial)}"):
            found = output.outputs[0].logprobs
        if not found:
            raise EngineDown("vLLM gave this up")
        return {i: found[0][i].logprob for i in ids}

    def _prompt(self, ids: tuple[int, ...], rows: torch.Tensor | None, salt: str) -> Any:
        """A prompt as vLLM's renderer would make it."""
        from vllm.inputs.engine import embeds_input, tokens_input

        if rows is None:
            return tokens_input(list(ids), cache_salt=salt or None)
        text = [i < self.capabilities.vocab_size for i in ids]
        # Blocks of the cache are told apart by ids (0 for a row) and rows: no soft prompt has this one under a text.
        under_text = torch.full((1, rows.shape[1]), torch.finfo(rows.dtype).tiny, dtype=rows.dtype)
        # An id of the text itself stands under rows, so that penalties count no token that is not there.
        stand_in = next((i for i, t in zip(ids, text, strict=True) if t), 0)
        return embeds_input(
            self._held.place(ids, rows, under_text),
            prompt_token_ids=[i if t else stand_in for i, t in zip(ids, text, strict=True)],
            is_token_ids=text,
            cache_salt=salt or None,
        )

    def _parameters(self, decoding: Decoding) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        with _in_our_words():
            return SamplingParams(
                **words(decoding, self.capabilities.end_id),
                logit_bias=dict(decoding.logit_bias) or None,
                logprobs=decoding.top_logprobs,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )

    def _tokens(self, output: Any, decoding: Decoding) -> Iterator[Token]:
        """The tokens of a delta, several where they came faster than they were read."""
        completion = output.outputs[0]
        finish, ids = finish_of(completion.finish_reason), list(completion.token_ids)
        for at, token in enumerate(ids):
            last = finish if at == len(ids) - 1 and finish != "abort" else None
            ends = last == "stop" and closes(token, decoding, self.capabilities.end_id)
            known = {i: p.logprob for i, p in completion.logprobs[at].items()} if completion.logprobs else {}
            top = likeliest(known, decoding.top_logprobs or 0)
            yield Token(-1 if ends else token, known.get(token), top, last)
        if finish == "abort" or (finish and not ids):
            yield Token(-1, finish=finish)

    async def stats(self) -> Stats:
        """Counters and gauges, from the metrics that vLLM keeps."""
        from vllm.v1.metrics.reader import get_metrics_snapshot

        samples = ((m.name, m.value) for m in get_metrics_snapshot() if hasattr(m, "value"))
        return stats_of(samples, self._held.nbytes)


def _arguments(config: VllmConfig) -> Any:
    """Arguments of vLLM's engine, for the device that this build of it is made for."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    cpu = current_platform.is_cpu()
    eager = cpu if config.eager is None else config.eager
    _set_environment(config, eager)
    dtype = ("float32" if cpu else "bfloat16") if config.dtype == "auto" else config.dtype
    ours = {
        "model": config.model,
        "revision": config.revision,
        "dtype": dtype,
        "max_model_len": config.window or -1,
        "block_size": CPU_BLOCK if cpu else GPU_BLOCK,
        "kv_cache_memory_bytes": int(config.kv_memory * MEBI) or None,
        "max_num_seqs": config.max_running,
        "enforce_eager": eager,
        "seed": random.SystemRandom().getrandbits(31),
        "enable_prompt_embeds": True,
        "enable_prefix_caching": True,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
    }
    return AsyncEngineArgs(**{**ours, **config.options})


def _set_environment(config: VllmConfig, eager: bool) -> None:
    """What vLLM's processes read from the environment only."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    if eager:  # a sampler's small function would be compiled all the same, for half a minute
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    if config.threads:
        os.environ["OMP_NUM_THREADS"] = str(config.threads)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"


@contextmanager
def _in_our_words() -> Iterator[None]:
    """vLLM's errors as ours."""
    from vllm.exceptions import GracefulHTTPError, VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    try:
        yield
    except VLLMClientError as e:
        raise EngineRefused(str(e)) from e
    except (EngineDeadError, GracefulHTTPError) as e:
        raise EngineDown(f"vLLM does not take requests: {e}") from e
    except EngineGenerateError as e:
        raise EngineError(f"vLLM failed: {e.__cause__!r}") from e
