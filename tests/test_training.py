"""The training loop: what a step computes, and that an interrupted run is the uninterrupted one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import tiny
from foreword.backbone.choose import Choice
from foreword.backbone.load import Backbone
from foreword.config import Member, TrainConfig
from foreword.errors import ForewordError
from foreword.jobs.training import train_in
from foreword.prompts.soft import SoftPrompt
from foreword.records import Example
from foreword.training.checkpoint import read_checkpoint, write_checkpoint
from foreword.training.loop import Hooks, train
from foreword.training.optim import build_optimizer, build_schedule
from foreword.training.prepare import prepared
from foreword.training.state import Population, epoch_order, make_plan, start

PACKED = Choice("packed", "packed", "test")
EXAMPLES = [Example(i, (5, 6, *range(20 + i, 22 + 2 * i)), ((10, 11, 0), (12, 0))[i % 2], i % 2) for i in range(10)]
ROWS = tiny.in_front(EXAMPLES, 4)
OPTIMIZERS = ["adamw", "adam", "sgd", "rmsprop", "nadam", "radam", "adagrad", "adadelta", "rprop", "asgd", "adamax"]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny.backbone("llama-gqa", torch.float32)


def first_rows() -> torch.Tensor:
    return torch.randn(4, tiny.HIDDEN, generator=torch.Generator().manual_seed(5)) * 0.2


def run(
    backbone: Backbone, config: TrainConfig, layout: str = "packed", **kwargs: Any
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    population = begin(config)
    hooks = Hooks(on_event=lambda e: events.append(dict(e)), **kwargs)
    go(backbone, population, config, hooks, layout)
    return population.states[0].kept().detach(), events


def begin(config: TrainConfig, rows: torch.Tensor | None = None, members: Sequence[Member] = ()) -> Population:
    members = members or [Member("text", 0, config.lr)]  # type: ignore[list-item,arg-type]
    first = [first_rows() if rows is None else rows for _ in members]
    return start(
        [tiny.soft(rows) for rows in first], members, config, make_plan(len(EXAMPLES), config), torch.device("cpu")
    )


def go(
    backbone: Backbone, population: Population, config: TrainConfig, hooks: Hooks | None = None, layout: str = "packed"
) -> Population:
    with prepared(backbone, ROWS, population, config, layout) as ready:  # type: ignore[arg-type]
        train(ready.engine, ready.segments, population, config, hooks or Hooks())
    return population


def losses(events: list[dict[str, Any]]) -> list[float]:
    return [e["loss"] for e in events if e["event"] == "step"]


def test_a_step_is_plain_torch_on_plain_rows(backbone: Backbone) -> None:
    config = TrainConfig(epochs=2, batch_size=4, warmup_steps=2, clip=0.5)
    kept, events = run(backbone, config)
    rows = torch.nn.Parameter(first_rows())
    optimizer = torch.optim.AdamW([rows], lr=config.lr)
    expected = []
    for step in range(6):
        batch = epoch_order(10, 0, step // 3)[step % 3 * 4 : step % 3 * 4 + 4]
        total, count = torch.zeros(()), 0
        for i in batch:  # row by row, unpadded, through inputs_embeds
            e = EXAMPLES[i]
            text = torch.tensor([[*e.context, *e.target]])
            embedded = torch.cat([rows[None], backbone.embedding(text)], dim=1)
            logits = backbone.model(inputs_embeds=embedded, use_cache=False).logits[0, -len(e.target) - 1 : -1]
            total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(e.target), reduction="sum")
            count += len(e.target)
        loss = total / count
        expected.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([rows], 0.5)
        for group in optimizer.param_groups:  # linear warm-up over 2 steps, then linearly to 0
            group["lr"] = config.lr * (step / 2 if step < 2 else (6 - step) / 4)
        optimizer.step()
    assert losses(events) == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(kept, rows.detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "change", [{"batch_size": 2, "accumulate": 2}, {"batch_size": 1, "accumulate": 4}, {"token_budget": 20}]
)
def test_splitting_a_step_into_passes_changes_nothing(backbone: Backbone, change: dict[str, int]) -> None:
    whole = TrainConfig(epochs=2, batch_size=4, lr=0.01)
    expected, first = run(backbone, whole)
    found, second = run(backbone, dataclasses.replace(whole, **change))
    assert losses(second) == pytest.approx(losses(first), abs=1e-4)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_packed_and_right_padded_rows_train_alike(backbone: Backbone) -> None:
    config = TrainConfig(epochs=2, batch_size=4, lr=0.01)
    assert losses(run(backbone, config, "rows")[1]) == pytest.approx(losses(run(backbone, config)[1]), abs=1e-4)


def test_training_learns_and_leaves_the_backbone_bit_identical(backbone: Backbone) -> None:
    before = {k: v.clone() for k, v in backbone.model.state_dict().items()}
    _, events = run(backbone, TrainConfig(epochs=30, batch_size=5, lr=0.1))
    assert losses(events)[-1] < 0.5 * losses(events)[0]
    assert all(torch.equal(before[k], v) for k, v in backbone.model.state_dict().items())
    assert all(p.grad is None for p in backbone.model.parameters())


def test_every_row_is_read_once_an_epoch_in_an_order_of_its_own() -> None:
    orders = [epoch_order(10, seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert all(sorted(o) == list(range(10)) for o in orders)
    assert len({tuple(o) for o in orders}) == 6
    assert epoch_order(10, 0, 2) == orders[2]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("stop_after", [1, 5])
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(
    backbone: Backbone, tmp_path: Path, name: str, stop_after: int
) -> None:
    config = TrainConfig(epochs=3, batch_size=4, optimizer=name, schedule="cosine", warmup_steps=2, lr=0.01)
    expected = go(backbone, begin(config), config).states[0].kept()
    cut = begin(config)
    save_to = Hooks(
        save=lambda p: write_checkpoint(tmp_path, p.checkpoint()), interrupted=lambda: cut.step >= stop_after
    )
    with pytest.raises(KeyboardInterrupt):
        go(backbone, cut, config, save_to)
    found = read_checkpoint(tmp_path)
    assert found is not None
    resumed = begin(config, torch.zeros(4, tiny.HIDDEN))
    resumed.restore(found)
    assert resumed.step == stop_after
    assert torch.equal(go(backbone, resumed, config).states[0].kept(), expected)


def test_best_rows_are_kept_and_patience_stops_the_run(backbone: Backbone) -> None:
    scores = iter([0.5, 0.9, 0.7, 0.8, 0.99])
    seen: list[torch.Tensor] = []

    def validate(prompt: SoftPrompt) -> dict[str, float]:
        seen.append(prompt.values.clone())
        return {"loss": 1.0, "accuracy": next(scores), "macro_f1": 0.0}

    config = TrainConfig(epochs=9, batch_size=5, select="accuracy", patience=2)
    kept, events = run(backbone, config, validate=validate)
    assert len(seen) == 4, "two validations without improvement after the second"
    assert torch.equal(kept, seen[1])
    assert [e["best"] for e in events if e["event"] == "validation"] == [True, True, False, False]


def test_selection_by_loss_keeps_the_lowest(backbone: Backbone) -> None:
    scores, seen = iter([3.0, 1.0, 2.0]), []

    def validate(prompt: SoftPrompt) -> dict[str, float]:
        seen.append(prompt.values.clone())
        return {"loss": next(scores)}

    kept, _ = run(backbone, TrainConfig(epochs=3, batch_size=5, select="loss"), validate=validate)
    assert torch.equal(kept, seen[1])


def test_metrics_of_a_resumed_run_are_those_of_one_run(backbone: Backbone, tmp_path: Path) -> None:
    config, console = TrainConfig(epochs=2, batch_size=5, lr=0.01), Console(quiet=True)

    def events_of(folder: Path) -> list[dict[str, Any]]:
        train_in(folder, backbone, [tiny.soft(first_rows())], [Member("text", 0, 0.01)], ROWS, config, PACKED, console)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        timing = ("seconds", "peak_memory_mb")
        return [{k: v for k, v in json.loads(line).items() if k not in timing} for line in lines]

    expected = events_of(tmp_path / "whole")
    cut = tmp_path / "cut"
    events_of(cut)
    # A kill after step 3's line was written and before its checkpoint: the line is of step 2.
    population = begin(config)
    with pytest.raises(KeyboardInterrupt):
        go(backbone, population, config, Hooks(interrupted=lambda: population.step == 2))
    lines = (cut / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    population.metrics_bytes = sum(map(len, lines[:2]))
    write_checkpoint(cut, population.checkpoint())
    (cut / "metrics.jsonl").write_bytes(b"".join(lines[:3]) + b'{"event": "st')
    assert events_of(cut) == expected


def test_a_loss_that_is_not_finite_stops_with_the_knob(backbone: Backbone) -> None:
    config = TrainConfig()
    with pytest.raises(ForewordError, match=r"not finite") as caught:
        go(backbone, begin(config, torch.full((4, tiny.HIDDEN), float("nan"))), config)
    assert "train.lr" in caught.value.fix


def test_bf16_autocast_stays_near_float32(backbone: Backbone) -> None:
    exact = losses(run(backbone, TrainConfig(epochs=1, batch_size=5, lr=0.001))[1])
    rough = losses(run(backbone, TrainConfig(epochs=1, batch_size=5, lr=0.001, autocast="on"))[1])
    assert rough != exact
    assert rough == pytest.approx(exact, rel=0.05)


def test_unknown_optimiser_and_schedule_suggest_the_nearest() -> None:
    rows = torch.nn.Parameter(torch.zeros(1, 1))
    with pytest.raises(ForewordError, match="unknown optimiser") as caught:
        build_optimizer([rows], TrainConfig(optimizer="adamv"), 0.1)
    assert "adam" in caught.value.fix
    with pytest.raises(ForewordError, match="unknown schedule") as caught:
        build_schedule(build_optimizer([rows], TrainConfig(), 0.1), TrainConfig(schedule="liner"), 10)
    assert "linear" in caught.value.fix


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    assert read_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint.safetensors").write_bytes(b"half of it")
    with pytest.raises(ForewordError, match="damaged checkpoint"):
        read_checkpoint(tmp_path)
