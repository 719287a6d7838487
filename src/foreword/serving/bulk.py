"""Files of rows in, files of results out: one soft prompt or many over one model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from foreword.backbone.generate import Sampling
from foreword.backbone.load import load_backbone
from foreword.config import ModelConfig
from foreword.data.encode import rows_hash
from foreword.data.raft import RaftTask
from foreword.data.sources import parse_csv
from foreword.errors import ForewordError
from foreword.jobs.ensemble import Ensemble, load_any, open_members
from foreword.jobs.load import Foreword, Prediction, load
from foreword.records import Row, Table
from foreword.serving.batch import Batch, NamedRows, in_order, named_by_column
from foreword.serving.engine import Capabilities, Decoding, Engine, EngineError, Rows
from foreword.serving.engines.transformers import TransformersConfig, TransformersEngine, make
from foreword.serving.gateway.launch import engine_config, engine_of
from foreword.serving.predictions import UNIT, Members, Predictor, revision
from foreword.serving.registry import Loaded, Member, Registry
from foreword.serving.results import Results, open_results
from foreword.serving.settings import ServeSettings
from foreword.serving.store import Store
from foreword.serving.text import Base, open_base
from foreword.training.progress import counting

DIGITS = 6
"""Of probabilities."""
MEGA = 1 << 20


@dataclass(frozen=True)
class Files:
    """Rows read, and where their results go.

    ``resume``: go on with what a stopped run left there. ``in_flight``: rows in an engine at once.
    ``kept``: columns of the rows that results begin with; None: all.
    """

    table: Table
    out: Path
    resume: bool
    console: Console
    in_flight: int
    kept: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Loading:
    """How a run is loaded: as the arguments of ``jobs.load.load``."""

    model: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None
    force: bool = False

    def load(self, run: str) -> Foreword:
        """A run or adapter with its backbone."""
        return load(run, **asdict(self))


@dataclass(frozen=True)
class Shape:
    """The columns of a result and their values."""

    columns: tuple[str, ...]
    values: Callable[[Any], Sequence[Any]]


def single_shape(classes: Sequence[str]) -> Shape:
    """Label, and a column of probabilities for each class."""

    def values(p: Prediction) -> list[Any]:
        return [p.label, *(round(x, DIGITS) for x in p.probabilities.values())]

    return Shape(("label", *(f"p({c})" for c in classes)), values)


def mixed_values(p: Prediction) -> list[Any]:
    """Label, its probability, and those of all classes, which differ from row to row."""
    return [p.label, round(p.probabilities[p.label], DIGITS), {c: round(x, DIGITS) for c, x in p.probabilities.items()}]


MIXED = Shape(("label", "p", "probabilities"), mixed_values)
TEXT = Shape(("generated",), lambda text: [text])


# --- one soft prompt: a run on its own backbone ---------------------------------------------------


def predict_run(run: str, loading: Loading, files: Files) -> None:
    """Classifies rows with a run, adapter folder, ensemble or hub adapter."""
    members = _members(run, loading)
    shape = single_shape(members[0].task.classes)
    _predict(_all_of(run, files.table), lambda name: members, members[0], shape, files)


def predict_raft(run: str, loading: Loading, task: RaftTask, files: Files) -> None:
    """Writes RAFT's ``ID,Label`` of a task's test rows, with class names as the task spells them.

    Raises:
        ForewordError: the run has other classes than the task.
    """
    members = _members(run, loading)
    names = task.spelling(members[0].task.classes, run)
    shape = Shape((task.label,), lambda p: [names[p.label]])
    _predict(_all_of(run, files.table), lambda name: members, members[0], shape, files)
    _, answers = parse_csv(files.out.read_bytes(), str(files.out))
    task.check_answers(answers, files.table.rows, str(files.out))


def _members(run: str, loading: Loading) -> Members:
    found = load_any(run, **asdict(loading))
    return found.members if isinstance(found, Ensemble) else (found,)


def generate_run(run: str, loading: Loading, settings: ServeSettings, sampling: Sampling, files: Files) -> None:
    """Writes text after rows with a run or adapter, through the embedded engine on the run's backbone."""
    loaded = loading.load(run)
    room = max(settings.prompt_memory, loaded.prompt.values.numel() * 4 / MEGA + 1)
    config = TransformersConfig(**(engine_config(settings) | {"prompt_memory": room}))
    engine = TransformersEngine(config, loaded.backbone)

    async def work() -> None:
        async with _started(engine) as capabilities:
            base = Base(run, loaded.backbone.tokenizer, capabilities)
            only = _Only(base, run, loaded)
            await only.put(engine)
            await _generate(Batch(engine, base, only, _all_of(run, files.table)), sampling, files)

    asyncio.run(work())


# --- many: named in a column ----------------------------------------------------------------------


def predict_named(settings: ServeSettings, column: str | None, force: bool, files: Files) -> None:
    """Classifies every row with the soft prompt that a column names; of ``settings.prompts``.

    Args:
        settings: model, soft prompts and engine; what says how to listen is not looked at.
        column: names a row's soft prompt; None where there is only one.
        force: also use soft prompts that were trained for another model.
        files: the rows.
    """
    store = Store(settings.prompts)
    rows = named(files.table, column, store)
    if settings.engine != "transformers":
        asyncio.run(_on_engine(settings, force, store, rows, lambda batch: _classify(batch, files)))
        return
    backbone = load_backbone(ModelConfig(settings.model, dtype=settings.dtype, device=settings.device))

    def open_(name: str) -> Members:
        return open_members(store.find(name), backbone, force)

    _predict(rows, open_, open_(rows.names[0])[0], MIXED, files)


def generate_named(settings: ServeSettings, column: str | None, force: bool, sampling: Sampling, files: Files) -> None:
    """Writes text after every row with the soft prompt it names; arguments as ``predict_named``."""
    store = Store(settings.prompts)
    rows = named(files.table, column, store)
    asyncio.run(_on_engine(settings, force, store, rows, lambda batch: _generate(batch, sampling, files)))


def named(table: Table, column: str | None, store: Store) -> NamedRows:
    """Rows with the soft prompts that a column names, or all with the only one there is."""
    if column is not None:
        return named_by_column(table, column, store)
    names = store.names()
    if len(names) != 1:
        raise ForewordError(
            f"{len(names)} soft prompts, and nothing says which row is for which",
            ", ".join(names[:20]) or "--prompts",
            "add --prompt-column: the column that names a row's soft prompt",
        )
    return _all_of(names[0], table)


async def _on_engine(
    settings: ServeSettings, force: bool, store: Store, rows: NamedRows, work: Callable[[Batch], Awaitable[None]]
) -> None:
    engine = _engine(settings)
    async with _started(engine) as capabilities:
        known = replace(capabilities, fingerprint={}) if force else capabilities
        base = await open_base(settings.model, known)
        registry = Registry(engine, base, store, settings.prompt_memory * MEGA)
        try:
            await work(Batch(engine, base, registry, rows))
        finally:
            await registry.close()


def _engine(settings: ServeSettings) -> Engine:
    """The embedded engine in this process: there is no server to go on when it dies."""
    if settings.engine != "transformers":
        return engine_of(settings)
    return make(engine_config(settings))


# --- what all have in common ----------------------------------------------------------------------


def _all_of(name: str, table: Table) -> NamedRows:
    return NamedRows(table, (name,) * len(table), table.origin)


def _predict(rows: NamedRows, open_: Callable[[str], Members], first: Foreword, shape: Shape, files: Files) -> None:
    predictor = Predictor(rows, open_)
    backbone = first.backbone
    facts = {"dtype": str(backbone.dtype).removeprefix("torch."), "backbone": backbone.fingerprint.as_dict()}
    job = {"job": "predict", "soft prompts": predictor.check(), **facts}
    with _results(files, job, shape, "predicting", UNIT) as (results, progress):
        for unit in predictor.units(results.done, progress):
            for prediction in unit:
                results.add(prediction)


async def _classify(batch: Batch, files: Files) -> None:
    job = {"job": "predict", "soft prompts": await batch.check(), **_engine_facts(batch)}
    with _results(files, job, MIXED, "predicting") as (results, progress):
        await _each(batch, files.in_flight, results, progress, batch.predict)


async def _generate(batch: Batch, sampling: Sampling, files: Files) -> None:
    decoding = _decoding(sampling, batch.base.capabilities)
    job = {"job": "generate", "soft prompts": await batch.check(sampling.max_new_tokens), **_engine_facts(batch)}
    with _results(files, {**job, "sampling": asdict(sampling)}, TEXT, "generating") as (results, progress):
        await _each(batch, files.in_flight, results, progress, lambda i: batch.write(i, decoding))


def _decoding(s: Sampling, capabilities: Capabilities) -> Decoding:
    decoding = Decoding(s.max_new_tokens, s.temperature, s.top_p, s.top_k, 0.0, s.repetition_penalty, seed=s.seed)
    usual = Decoding(s.max_new_tokens, seed=s.seed)
    for name in (f.name for f in fields(Decoding)):
        if getattr(decoding, name) != getattr(usual, name) and name not in capabilities.samples:
            raise ForewordError(f"the engine {capabilities.engine} knows no {name}", "command line", "leave it out")
    return decoding


async def _each(batch: Batch, in_flight: int, results: Growing, progress: Any, work: Callable[[int], Any]) -> None:
    try:
        async with aclosing(in_order(work, range(results.done, len(batch.rows.table)), in_flight)) as found:
            async for result in found:
                results.add(result)
                progress(1)
    except EngineError as e:
        raise ForewordError(f"the engine failed: {e}", str(results.path), "go on with --resume") from e


def _engine_facts(batch: Batch) -> dict[str, Any]:
    c = batch.base.capabilities
    return {"engine": c.engine, "dtype": c.dtype, "backbone": dict(c.fingerprint) or c.model}


@asynccontextmanager
async def _started(engine: Engine) -> AsyncIterator[Capabilities]:
    try:
        try:
            capabilities = await engine.start()
        except EngineError as e:
            raise ForewordError(f"the engine does not start: {e}", "--engine", "mend what it says") from e
        yield capabilities
    finally:
        await engine.close()


@dataclass(frozen=True)
class Growing:
    """The results of a table's rows, from row ``done`` on."""

    results: Results
    rows: Iterator[Row]
    kept: Sequence[str]
    shape: Shape
    done: int

    @property
    def path(self) -> Path:
        """Where they are so far."""
        return self.results.path

    def add(self, result: Any) -> None:
        """The next row's result."""
        row = next(self.rows)
        self.results.add([*(row[c] for c in self.kept), *self.shape.values(result)])


@contextmanager
def _results(
    files: Files, job: Mapping[str, Any], shape: Shape, title: str, unit: int = 1
) -> Iterator[tuple[Growing, Any]]:
    """The file and a progress bar, for the rows that are still to do; the file is whole when the block ends."""
    table = files.table
    kept = table.columns if files.kept is None else files.kept
    columns = (*kept, *_fresh(shape.columns, kept, table.origin))
    job = {**job, "rows": rows_hash(table, table.columns), "columns": columns}
    with open_results(files.out, columns, job, files.resume, unit) as results:
        if results.done:
            _say(files.console, f"going on after row {results.done} of {len(table)}")
        rows = islice(table.rows, results.done, None)
        with counting(files.console, title, len(table)) as progress:
            progress(results.done)
            yield Growing(results, rows, kept, shape, results.done), progress
        results.finish()
    _say(files.console, f"{len(table)} rows written to {files.out}")


def _fresh(columns: Sequence[str], there: Sequence[str], origin: str) -> list[str]:
    """Names for new columns beside those of the rows."""
    found = [f"predicted_{c}" if c in there else c for c in columns]
    taken = next((c for c in found if c in there), None)
    if taken is not None:
        raise ForewordError(f"the rows have a column '{taken}' already", origin, "rename it")
    return found


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True)


class _Only:
    """Leases of the one soft prompt of a run."""

    def __init__(self, base: Base, name: str, run: Foreword) -> None:
        prompt, key = run.prompt, f"{name}@{revision((run,))}"
        self._rows = Rows(key, prompt.values.float().cpu().numpy(), prompt.kind)
        reader = base.reader(run.task, prompt.tokens, prompt.kind)
        member = Member(key, reader, prompt.tokens, prompt.kind, self._rows.values.nbytes)
        self._loaded = Loaded(name, key.rpartition("@")[2], (member,), 0)

    async def put(self, engine: Engine) -> None:
        """Puts it into an engine, which keeps it for as long as it runs."""
        await engine.put(self._rows)

    @asynccontextmanager
    async def lease(self, name: str) -> AsyncIterator[Loaded]:
        """The soft prompt, whatever the name."""
        yield self._loaded
