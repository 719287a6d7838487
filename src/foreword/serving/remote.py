"""An engine in a process of its own, as the gateway sees it: started, watched, and started again."""

from __future__ import annotations

import asyncio
import codecs
import itertools
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from foreword.errors import ForewordError
from foreword.serving import wire
from foreword.serving.engine import (
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
from foreword.serving.worker import CLOSING, unpack_error

LOG = logging.getLogger(__name__)
ABORTED = Token(-1, finish="abort")
FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0
"""Seconds before a dead worker is started again; doubles while it does not stay up for the longer one."""
TAIL = 4000
"""Characters of a worker's output that an error may quote."""
_BORROWED = (
    "import importlib.util as u, sys; s = u.spec_from_file_location('foreword', sys.argv[1]); "
    "sys.modules['foreword'] = m = u.module_from_spec(s); s.loader.exec_module(m); "
    "from foreword.serving.worker import main; main(*sys.argv[2:])"
)


@dataclass(frozen=True)
class Limits:
    """How long, in seconds, and how much is waited for.

    ``start``: until the model is loaded. ``beat``: between two pings. ``answer``: until a ping is answered (a
    step of a large model may take seconds). ``grace``: for running requests on closing. ``backlog``: tokens
    that wait for a slow reader before its request is aborted.
    """

    start: float = 900.0
    beat: float = 2.0
    answer: float = 60.0
    grace: float = 30.0
    backlog: int = 4096


def worker_command(engine: str, python: str | None = None) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a worker; ``python``: the interpreter of the engine's own environment.

    That one is given this package alone and not the folder it lies in, where an installed Foreword has
    another torch for a neighbour.
    """
    if python is None:
        return [sys.executable, "-m", "foreword.serving.worker", engine], dict(os.environ)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    return [python, "-c", _BORROWED, str(Path(__file__).parents[1] / "__init__.py"), engine], env


@dataclass
class _Exchange:
    """A call under way: the text's request, where it is one, and what came back so far."""

    request_id: str | None
    items: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)


class _Life:
    """One worker process, from its start to its death."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        backlog: int,
    ) -> None:
        self._process, self._reader, self._writer, self._backlog = process, reader, writer, backlog
        self._numbers = itertools.count()
        self._open: dict[int, _Exchange] = {}
        self._idle = asyncio.Event()
        self.gone = asyncio.Event()
        self.why = self._said = ""
        self._pumping = asyncio.create_task(self._pump())
        self._watching = [asyncio.create_task(self._listen()), asyncio.create_task(self._wait())]

    @classmethod
    async def begin(cls, command: Sequence[str], env: Mapping[str, str] | None, backlog: int) -> _Life:
        """Starts the process, in a group of its own so that all it starts can be ended with it."""
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=wire.LINE_LIMIT)
        fd = theirs.fileno()
        try:
            process = await asyncio.create_subprocess_exec(
                *command, str(fd), pass_fds=(fd,), env=env, start_new_session=True,
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
            )  # fmt: skip
        except BaseException:
            writer.close()
            raise
        finally:
            theirs.close()
        return cls(process, reader, writer, backlog)

    @contextmanager
    def exchange(self, op: str, body: Any = None, request_id: str | None = None) -> Iterator[asyncio.Queue[Any]]:
        """Sends a call and gives what comes back; leaving before its end aborts it on the worker."""
        if self.gone.is_set():
            raise EngineDown(self.why)
        number = next(self._numbers)
        content = wire.line({"call": number, "op": op, "body": body})
        if len(content) > wire.LINE_LIMIT:
            raise EngineRefused(f"{len(content)} bytes are more than an engine takes at once")
        exchange = self._open[number] = _Exchange(request_id)
        self._idle.clear()
        self._writer.write(content)
        try:
            yield exchange.items
        finally:
            self._abort(number, None)

    async def call(self, op: str, body: Any = None) -> Any:
        """The one answer to a call."""
        with self.exchange(op, body) as items:
            return _checked(await items.get())

    def abort(self, request_id: str) -> None:
        """Ends the requests of this id."""
        for number in [n for n, e in self._open.items() if e.request_id == request_id]:
            self._abort(number, ABORTED)

    def watch(self, every: float, patience: float) -> None:
        """From now on a worker that does not answer a ping is as good as dead."""
        self._watching.append(asyncio.create_task(self._beat(every, patience)))

    async def finish(self, grace: float) -> None:
        """Lets running requests end, then aborts them and ends the process."""
        with suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self._idle.wait()
        for number, exchange in list(self._open.items()):
            self._abort(number, ABORTED if exchange.request_id is not None else EngineDown("the engine is closing"))
        await self.end(CLOSING + 1)

    async def end(self, patience: float) -> None:
        """Closes the connection, upon which the worker ends itself; when patience is over it is killed."""
        self._die("the engine is closing")
        self._writer.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self._process.wait()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # and whatever the engine has left behind
        await self._process.wait()
        tasks = [self._pumping, *self._watching]
        await asyncio.wait(tasks[:1], timeout=1.0)  # its last words
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    @property
    def last_words(self) -> str:
        """The last lines that the process printed, less the inside of a traceback."""
        lines = [line for line in self._said.splitlines() if line.strip() and not line[0].isspace()]
        return " | ".join(lines[-5:]) or "nothing"

    def _abort(self, number: int, last: Any) -> None:
        if self._close(number, last):
            self._writer.write(wire.line({"call": number, "op": "abort"}))

    def _close(self, number: int, last: Any) -> bool:
        """Ends an exchange with a last item; False where it has ended before."""
        exchange = self._open.pop(number, None)
        if not self._open:
            self._idle.set()
        if exchange is None:
            return False
        exchange.items.put_nowait(last)
        return True

    def _deliver(self, number: int, kind: str, what: Any) -> None:
        if kind == "error":
            self._close(number, unpack_error(what))
        elif kind == "value":
            self._close(number, what)
        elif exchange := self._open.get(number):
            token = wire.unpack_token(what)
            if token.finish:
                self._close(number, token)
            elif exchange.items.qsize() < self._backlog:
                exchange.items.put_nowait(token)
            else:
                self._abort(number, ABORTED)

    def _die(self, why: str) -> None:
        if not self.gone.is_set():
            self.why = why
            self.gone.set()
            for number in list(self._open):
                self._close(number, EngineDown(why))

    async def _beat(self, every: float, patience: float) -> None:
        while not self.gone.is_set():
            await asyncio.sleep(every)
            try:
                async with asyncio.timeout(patience):
                    await self.call("ping")
            except TimeoutError:
                self._die(f"the engine has not answered for {patience:g} s")
            except EngineError as e:
                self._die(str(e))

    async def _listen(self) -> None:
        try:
            async for content in self._reader:
                for event in wire.parse(content)["events"]:
                    self._deliver(*event)
        except Exception as e:
            self._die(f"the connection to the engine broke: {e!r}")

    async def _wait(self) -> None:
        self._die(f"the engine's process ended with status {await self._process.wait()}")

    async def _pump(self) -> None:
        """Passes on what the process prints, and remembers the end of it."""
        assert self._process.stdout
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while chunk := await self._process.stdout.read(1 << 16):
            text = decoder.decode(chunk)
            self._said = (self._said + text)[-TAIL:]
            with suppress(OSError, ValueError):  # a closed stderr must not stop the worker
                sys.stderr.write(text)


def _checked(item: Any) -> Any:
    """An item of an exchange, raised where it is an exception."""
    if isinstance(item, Exception):
        raise item
    return item


class RemoteEngine:
    """An Engine whose model lives in a worker process; started again when that dies or stops answering."""

    def __init__(
        self,
        command: Sequence[str],
        config: Mapping[str, Any],
        env: Mapping[str, str] | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._command, self._config, self._env, self._limits = command, config, env, limits or Limits()
        self._closing = False
        self._life: _Life | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._epoch = 0

    @property
    def alive(self) -> bool:
        """Whether requests can be taken now."""
        return self._life is not None and not self._life.gone.is_set() and not self._closing

    @property
    def epoch(self) -> int:
        """Grows with every start."""
        return self._epoch

    async def start(self) -> Capabilities:
        """Starts the worker and waits until it has loaded. Raises ForewordError where it does not."""
        found = await self._begin()
        self._keeper = asyncio.create_task(self._keep())
        return found

    async def close(self) -> None:
        """Lets running requests end for a while, aborts the others, and ends the worker."""
        self._closing = True
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        if self._life is not None:
            await self._life.finish(self._limits.grace)
            self._life = None

    async def put(self, rows: Rows) -> None:
        """Takes a soft prompt in."""
        await self._up().call("put", wire.pack_rows(rows))

    async def drop(self, key: str) -> None:
        """Forgets a soft prompt; a worker that is down has forgotten all."""
        with suppress(EngineDown):
            await self._up().call("drop", key)

    async def generate(self, request: Request) -> AsyncIterator[Token]:
        """Tokens as they come; EngineDown as soon as the worker is."""
        with self._up().exchange("generate", wire.pack_request(request), request.id) as items:
            while True:
                token: Token = _checked(await items.get())
                yield token
                if token.finish:
                    return

    async def abort(self, request_id: str) -> None:
        """Ends a request."""
        if self._life is not None:
            self._life.abort(request_id)

    async def score(self, request: ScoreRequest) -> list[float]:
        """Summed log-probability of each branch."""
        found: list[float] = await self._up().call("score", wire.pack_score(request))
        return found

    async def stats(self) -> Stats:
        """The worker's counters (zeros while it is down), and how often it was started again."""
        found = Stats()
        with suppress(EngineDown):
            found = wire.unpack_stats(await self._up().call("stats"))
        return replace(found, restarts=max(0, self._epoch - 1))

    def _up(self) -> _Life:
        if self._life is None or self._closing:
            raise EngineDown("the engine is starting again or closing")
        return self._life

    async def _begin(self) -> Capabilities:
        try:
            life = await _Life.begin(self._command, self._env, self._limits.backlog)
        except OSError as e:
            raise ForewordError(
                f"the engine cannot be started: {e}", self._command[0], "check that it can be run"
            ) from e
        try:
            async with asyncio.timeout(self._limits.start):
                found = await life.call("start", dict(self._config))
        except (TimeoutError, EngineError) as e:
            await life.end(0.0)
            why = str(e) or f"not ready within {self._limits.start:g} s"
            raise ForewordError(
                f"the engine did not start: {why}",
                f"its process, which said last: {life.last_words}",
                "mend what it says; all of its output stands above",
            ) from e
        except BaseException:
            await life.end(0.0)
            raise
        life.watch(self._limits.beat, self._limits.answer)
        self._life = life
        self._epoch += 1
        return wire.unpack_capabilities(found)

    async def _keep(self) -> None:
        """Starts the worker again whenever it is gone."""
        delay = FIRST_DELAY
        while True:
            born = time.monotonic()
            if self._life is not None:
                await self._life.gone.wait()
                LOG.error("engine down: %s", self._life.why)
                await self._life.end(0.0)
                self._life = None
            if time.monotonic() - born > LONGEST_DELAY:
                delay = FIRST_DELAY
            await asyncio.sleep(delay)
            delay = min(2 * delay, LONGEST_DELAY)
            try:
                await self._begin()
                LOG.warning("engine started again")
            except ForewordError as e:
                LOG.error("engine not started again; next try in %g s\n%s", delay, e)
