"""docs/scale.md: the model's counts are those of real steps, and the page is that of the newest result."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import results  # noqa: E402
import scale_model  # noqa: E402
import scale_table  # noqa: E402

from foreword.parallel.layout import Layout, parse_layout  # noqa: E402

ROW = scale_model.Step(200, 8, 16 * 4096)
SMALL, LARGE = scale_table.MODELS[0], scale_table.MODELS[-1]


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    found = results.newest(results.FOLDER, "scale")
    return found[0]


def test_the_page_is_that_of_the_newest_result(result: dict[str, Any]) -> None:
    (large, *_) = results.newest(results.FOLDER, "large")
    assert scale_table.PAGE.read_text() == scale_table.page(result, large), "run: make bench-table"


def test_seven_billion_parameters_fit_24_gb() -> None:
    (large, *_) = results.newest(results.FOLDER, "large")
    assert large["stored_gb"] > 13
    for way in large["ways"]:
        assert way["own_gb"] < way["resident_gb"] < 24
        assert way["losses"][-1] < way["losses"][0]


def test_the_counts_are_those_of_real_steps_to_the_byte(result: dict[str, Any]) -> None:
    assert {r["layout"] for r in result["layouts"]} >= {"ddp=1", "ddp=2", "fsdp=2", "tp=2"}
    for run in result["layouts"]:
        said: Counter[tuple[str, int]] = Counter()
        for c in scale_table.predicted(result, parse_layout(run["layout"], run["processes"])):
            said[c.kind, c.size] += c.calls
        assert said == {(c["kind"], c["size"]): c["calls"] for c in run["collectives"]}, run["layout"]


def test_every_layout_ended_at_the_same_soft_prompt(result: dict[str, Any]) -> None:
    norms = [r["norm"] for r in result["layouts"]]
    assert max(norms) - min(norms) <= 1e-4 * norms[0]


def test_data_parallel_reaches_its_goal(result: dict[str, Any]) -> None:
    by_name = {r["layout"]: r["seconds"] for r in result["layouts"]}
    assert by_name["ddp=1"] / by_name["ddp=2"] >= 1.6


def test_parameters_are_those_the_models_are_named_by() -> None:
    billions = [round(s.parameters / 1e9, 1) for s in scale_table.MODELS]
    assert billions == [1.2, 8.0, 70.6, 405.9]


@pytest.mark.parametrize("layout", [Layout(4), Layout(1, 4), Layout(1, 1, 4), Layout(2, 2, 2)])
def test_more_is_sent_the_more_is_spread(layout: Layout) -> None:
    sent = sum(c.sent for c in scale_model.gradients(ROW, layout))
    assert sent == pytest.approx(2 * (layout.processes - 1) / layout.processes * 4 * ROW.trained)
    assert bool(scale_model.gathers(SMALL, ROW, layout)) == (layout.fsdp > 1)
    assert bool(scale_model.sums(SMALL, ROW, layout)) == (layout.tp > 1)


def test_a_step_is_never_faster_than_its_computing_and_more_cards_never_slow_it() -> None:
    ideal = 1024 * scale_model.flops(SMALL, ROW, Layout()) / scale_table.H100.flops
    before = float("inf")
    for n in (1, 2, 8, 64, 1024):
        found = scale_model.best(SMALL, ROW, 1024, n, scale_table.H100, 16384)
        assert found is not None
        assert ideal / n <= found[0] <= before
        assert found[1].processes == n
        before = found[0]


def test_what_does_not_fit_is_said() -> None:
    assert scale_model.best(LARGE, ROW, 1024, 1, scale_table.H100, 16384) is None
    found = scale_model.best(LARGE, ROW, 1024, 64, scale_table.H100, 16384)
    assert found is not None
    assert scale_model.memory(LARGE, found[2], found[1]) <= scale_table.H100.memory
