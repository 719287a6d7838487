"""A soft prompt in use: load, predict, generate, evaluate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from foreword.artifact.folder import Adapter, read_adapter
from foreword.artifact.hub import locate, push
from foreword.artifact.peft_types import PLACED
from foreword.backbone.choose import Layout, choose_layout
from foreword.backbone.generate import BATCH, Sampling, generate, stream
from foreword.backbone.load import Backbone, load_backbone
from foreword.backbone.quantise import KINDS
from foreword.config import ModelConfig
from foreword.data.encode import Encoder, rows_hash
from foreword.data.sources import file_name, rows_table
from foreword.data.template import parse
from foreword.errors import ForewordError
from foreword.evaluation.evaluate import Outcome, run_plain, run_rows, with_baselines
from foreword.evaluation.scoring import Floats, classify, rebalanced, silent
from foreword.evaluation.together import classify_together
from foreword.jobs.data import Source, read_labelled
from foreword.jobs.match import check_backbone, refuse_several_tasks
from foreword.jobs.prepare import make_encoder, memory_explained
from foreword.records import Example, Row, Segment, Table, Task

MEMORY_KNOB = "give fewer or shorter rows at a time, or model.dtype=bfloat16"
RAW = "{text}"
"""The template of an adapter that brings none: the text as it is."""


@dataclass(frozen=True)
class Prediction:
    """The likeliest class of a row and the probability of every class."""

    label: str
    probabilities: Mapping[str, float]


class Foreword:
    """A soft prompt with its backbone, ready to use. Made by ``foreword.load``."""

    def __init__(self, adapter: Adapter, backbone: Backbone, task: Task) -> None:
        self.adapter, self.backbone, self.task = adapter, backbone, task
        self.prompt = adapter.prompt.to(backbone.device)
        self.encoder: Encoder = make_encoder(task, backbone, self.prompt.tokens, self.prompt.kind)
        self._layout: Layout | None = None

    @property
    def scores(self) -> Mapping[str, Any]:
        """The scores stored with the adapter; empty when it was not scored."""
        return self.adapter.sidecar.scores if self.adapter.sidecar else {}

    def predict(self, rows: Sequence[Row | str], progress: Any = silent) -> list[Prediction]:
        """Label and probabilities of each row, in order.

        Args:
            rows: dictionaries of columns, or texts for a template with one column.
            progress: told the number of rows done since the last call.
        """
        return predictions(self.task.classes, self.probabilities(rows, progress))

    def probabilities(self, rows: Sequence[Row | str], progress: Any = silent) -> Floats:
        """Probabilities of the classes ``[n, C]``; arguments as ``predict``."""
        if not self.task.classifies:
            raise ForewordError(
                "this soft prompt writes text and has no classes", str(self.adapter.folder), "use generate"
            )
        contexts = self.contexts(rows)
        if not contexts:
            return np.zeros((0, len(self.task.classes)))
        with memory_explained(MEMORY_KNOB):
            label_ids = self.encoder.label_ids
            layout = self.layout([Segment(c, label_ids) for c in contexts])
            table = classify(self.backbone, self.prompt, contexts, label_ids, layout, progress)
        return rebalanced(table, self.task.biases)

    def generate(self, rows: Sequence[Row | str], sampling: Sampling | None = None) -> list[str]:
        """The text the model writes after each row, in order."""
        contexts = self.contexts(rows)
        sampling = sampling or Sampling()
        texts: list[str] = []
        with memory_explained(MEMORY_KNOB):
            for at in range(0, len(contexts), BATCH):
                ids = generate(self.backbone, self.prompt, contexts[at : at + BATCH], sampling)
                texts += self.backbone.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [t.removeprefix(self.task.separator) for t in texts]

    def stream(self, row: Row | str, sampling: Sampling | None = None) -> Iterator[str]:
        """The same for one row, piece by piece as it is written."""
        (context,) = self.contexts([row])
        with memory_explained(MEMORY_KNOB):
            yield from stream(self.backbone, self.prompt, context, sampling or Sampling())

    def evaluate(
        self, data: Source, split: str = "test", incomplete: bool = False, progress: Any = silent
    ) -> dict[str, Any]:
        """Scores on labelled rows beside the baselines, as ``foreword evaluate --json`` writes them.

        Args:
            data: a file, a hub id, ``bundled:complaints`` or rows in memory.
            split: of a hub data set.
            incomplete: leave out rows with an empty text or label.
            progress: told the number of rows done since the last call; rows count twice, for
                the soft prompt and the plain backbone.
        """
        table = read_labelled(data, split, self.task, incomplete)
        return beside_baselines(self, self.outcome(table, progress), table, progress)

    def outcome(self, table: Table, progress: Any = silent) -> Outcome:
        """What it does on the labelled rows of a table."""
        with memory_explained(MEMORY_KNOB):
            examples, layout = self._laid_out(table)
            found = run_rows(self.backbone, self.prompt, examples, self.encoder.label_ids, layout, progress)
        return found.rebalanced(self.task.biases)

    def plain_outcome(self, table: Table, progress: Any = silent) -> Outcome:
        """What the backbone does on them zero-shot, by the template alone."""
        with memory_explained(MEMORY_KNOB):
            examples, layout = self._laid_out(table)
            return run_plain(self.backbone, examples, self.encoder.label_ids, layout, progress)

    def _laid_out(self, table: Table) -> tuple[list[Example], Layout]:
        """Labelled rows encoded, and how they share a pass."""
        examples, label_ids = self.encoder.examples(table), self.encoder.label_ids
        return examples, self.layout([Segment(e.context, label_ids or (e.target,)) for e in examples])

    def trained_on(self, table: Table) -> bool:
        """Whether these are the very rows the soft prompt was trained on."""
        digest = rows_hash(table, [*self.encoder.columns, self.task.label_column])
        sidecar = self.adapter.sidecar
        return sidecar is not None and digest == sidecar.training.get("data_sha256")

    @property
    def training_counts(self) -> list[int]:
        """Training rows of each class; empty when the adapter does not say."""
        counts = self.adapter.sidecar.training.get("label_counts", []) if self.adapter.sidecar else []
        return list(counts) if len(counts) == len(self.task.classes) else []

    def push(self, repo: str, private: bool = False) -> str:
        """Uploads the adapter folder to the hub; returns the commit's address."""
        return push(self.adapter.folder, repo, private)

    def contexts(self, rows: Sequence[Row | str]) -> list[tuple[int, ...]]:
        """Ids of each row's context."""
        if isinstance(rows, (str, Mapping)):
            raise ForewordError("one row where a list of rows is expected", repr(rows)[:80], "write [row]")
        columns = self.encoder.columns
        if any(isinstance(r, str) for r in rows) and len(columns) != 1:
            raise ForewordError(
                f"the template has {len(columns)} columns", self.task.template, f"give dictionaries of {list(columns)}"
            )
        if not rows:
            return []
        full = [{columns[0]: r} if isinstance(r, str) else r for r in rows]
        return self.encoder.contexts(rows_table(full))

    def layout(self, rows: Sequence[Segment]) -> Layout:
        """The layout, proved once on the first rows this object sees."""
        if self._layout is None:
            self._layout = choose_layout(self.backbone, self.prompt, rows, gradient=False).score
        return self._layout


def predictions(classes: Sequence[str], table: Floats) -> list[Prediction]:
    """The likeliest class of each row of probabilities ``[n, C]``, with all of them."""
    return [Prediction(classes[int(p.argmax())], dict(zip(classes, map(float, p), strict=True))) for p in table]


def together(alike: Sequence[Foreword], rows: Sequence[Row | str]) -> list[Floats]:
    """Probabilities ``[n, C]`` by soft prompts of one backbone, kind and size, in passes that they share.

    Their tasks differ in nothing but the biases of the classes.
    """
    first = alike[0]
    contexts, label_ids = first.contexts(rows), first.encoder.label_ids
    with memory_explained(MEMORY_KNOB):
        layout = first.layout([Segment(c, label_ids) for c in contexts])
        tables = classify_together(first.backbone, [m.prompt for m in alike], contexts, label_ids, layout)
    return [rebalanced(table, m.task.biases) for table, m in zip(tables, alike, strict=True)]


def beside_baselines(used: Foreword, outcome: Outcome, table: Table, progress: Any = silent) -> dict[str, Any]:
    """Scores of an outcome on a table's rows beside the baselines.

    Args:
        used: whose template and training rows the baselines are of.
        outcome: on the table's rows.
        table: the rows.
        progress: told the number of rows done since the last call.
    """
    plain, classes = used.plain_outcome(table, progress), used.task.classes
    counts = used.training_counts or [outcome.truth.count(c) for c in range(len(classes))]
    again = ", the rows it was trained on" if used.trained_on(table) else ""
    protocol = f"all {len(table)} rows of {file_name(table.origin)}{again}"
    return with_baselines(outcome, plain, counts, classes, protocol)


def load(
    path_or_id: str | Path,
    *,
    model: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    template: str | None = None,
    label_words: Mapping[str, str] | None = None,
    separator: str = " ",
    force: bool = False,
    quantize: str | None = None,
    device_map: str = "",
    max_memory: Mapping[str, str] | None = None,
) -> Foreword:
    """Loads a run, an adapter folder (ours or PEFT's) or a hub adapter, with its backbone.

    Args:
        path_or_id: folder or hub id.
        model: backbone, where the adapter's own name for it does not lead to it.
        device: auto, cuda, cuda:N, mps or cpu.
        dtype: auto, float32, bfloat16 or float16.
        revision: branch, tag or commit of a hub adapter.
        template: context template, for adapters without a sidecar (else the text as it is).
        label_words: ``{class: words}``, for adapters without a sidecar.
        separator: between context and target, for adapters without a sidecar.
        force: use a backbone that is not the one the soft prompt was trained for.
        quantize: as ``model.quantize``; None: as it was trained.
        device_map, max_memory: as in the ``model`` section, for a backbone larger than a card.

    Raises:
        ForewordError: no adapter there, a damaged one, or a backbone that does not match.
    """
    adapter = read_adapter(locate(str(path_or_id), revision))
    refuse_several_tasks(adapter)
    known = dict(adapter.sidecar.backbone) if adapter.sidecar else {}
    name = model or known.get("name") or adapter.config.get("base_model_name_or_path")
    if not name:
        raise ForewordError("the adapter does not name its backbone", str(adapter.folder), "add --model ID")
    trained = str(adapter.sidecar.training.get("quantize", "none")) if adapter.sidecar else "none"
    rounded = quantize or (trained if trained in KINDS else "none")  # else its checkpoint brings it
    config_revision = None if model else known.get("revision") or adapter.config.get("revision")
    try:
        config = ModelConfig(
            str(name), config_revision, dtype=dtype, device=device, quantize=rounded, device_map=device_map,
            max_memory=max_memory or {},
        )  # fmt: skip
        backbone = load_backbone(config)
    except ForewordError as e:
        if model:
            raise
        where = f"{e.where} (the backbone that adapter {adapter.folder} names)"
        raise ForewordError(e.what, where, f"{e.fix}; or say where it is: --model") from None
    check_backbone(adapter, backbone, force)
    return Foreword(adapter, backbone, _task(adapter, template, label_words, separator))


def open_run(folder: Path, backbone: Backbone) -> Foreword:
    """A finished run with the backbone it was just trained on."""
    adapter = read_adapter(folder)
    return Foreword(adapter, backbone, _task(adapter, None, None, " "))


def _task(adapter: Adapter, template: str | None, label_words: Mapping[str, str] | None, separator: str) -> Task:
    words = dict(label_words or {})
    if adapter.sidecar is None:
        source = template if template is not None else RAW
        if parse(source).soft_tokens == 0 and adapter.config.get("peft_type") == PLACED:
            raise ForewordError(
                "its virtual tokens do not stand in front, and without its sidecar nothing says where",
                str(adapter.folder),
                "give a template with {soft:N} in it, or the folder with foreword.json",
            )
        return Task(source, separator, "label", tuple(words), tuple(words.values()))
    task = adapter.sidecar.task
    if template is not None:
        parse(template)
        task = replace(task, template=template, biases=())  # those are of the other question
    if words:
        task = replace(task, classes=tuple(words), words=tuple(words.values()), biases=())
    return task
