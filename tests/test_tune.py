"""``foreword tune``: the plan, the choice of members, the whole search on a tiny model, and the ensemble it leaves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.utils.class_weight import compute_sample_weight

import foreword
from conftest import ROWS, Cli
from foreword.config import TuneConfig
from foreword.data.splits import k_folds
from foreword.errors import ForewordError
from foreword.tuning.ensemble import log_loss, row_weights, select, shares
from foreword.tuning.halving import Budget, Rung, plan
from foreword.tuning.space import Known, Listed, Optuna, candidates, survivors

DATA = [{"text": text, "label": label} for text, label in ROWS]
KNOWN = {"prefix-tuning": Known(0.03), "prompt-tuning": Known(0.03), "residual": Known(0.01)}
KNOWN["context-tuning"] = Known(0.003, "examples", 256)
SMALL: Mapping[str, Any] = {
    "minutes": 0, "trainings": 9, "members": 3, "folds": 2, "virtual_tokens": (4,), "untrained": "never",
}  # fmt: skip


def tuned(model: Path, out: Path, data: list[dict[str, str]] = DATA, **tune: Any) -> Any:
    return foreword.tune(
        model=str(model), data=data, text="text", label="label", out=out, quiet=True,
        tune={**SMALL, **tune}, train={"epochs": 3, "batch_size": 4},
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "run"
    tuned(model_folder, out)
    return out


# --- what is decided without a model ----------------------------------------------------------


@given(st.floats(0.5, 200), st.integers(1, 40), st.integers(2, 6), st.integers(1, 12), st.floats(0.01, 1))
def test_a_plan_is_whole_and_keeps_to_its_budget_where_it_can(
    units: float, space: int, folds: int, members: int, share: float
) -> None:
    """The rows of the search may be some of all."""
    found = plan(units, space, folds, members, share)
    assert 1 <= found.members <= members
    assert all(1 <= r.candidates <= space for r in found.rungs)
    first, second = found.rungs
    assert first.candidates >= second.candidates >= min(2, first.candidates)
    assert first.folds + second.folds == folds
    least = plan(0, space, folds, members, share).units(folds)
    assert found.units(folds) <= max(least, units) + 1e-9


def test_a_larger_budget_searches_no_less() -> None:
    plans = [plan(units, 12, 3, 8) for units in range(1, 80)]
    counts = [p.rungs[0].candidates for p in plans]
    assert counts == sorted(counts)
    assert counts[-1] == 12
    assert plans[-1].members == 8


def test_three_rates_three_folds_and_three_members_cost_eight_trainings() -> None:
    assert plan(8, 12, 3, 3) == Budget((Rung(3, 1), Rung(2, 2)), 3)


def test_the_list_tries_all_rates_of_two_methods_in_turn_then_the_next() -> None:
    config = TuneConfig(methods=("prefix-tuning", "prompt-tuning", "residual"), lr_factors=(1.0, 0.3))
    asked = Listed(config, KNOWN).ask(100)
    assert [(c.method, c.lr) for c in asked[:6]] == [
        ("prefix-tuning", 0.03), ("prompt-tuning", 0.03), ("prefix-tuning", 0.009), ("prompt-tuning", 0.009),
        ("residual", 0.01), ("residual", 0.003),
    ]  # fmt: skip
    assert {c.init for c in asked[:6]} == {"text"}
    assert sorted(map(str, asked)) == sorted(map(str, candidates(config, KNOWN)))


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 9)), min_size=1, max_size=8, unique=True))
def test_the_best_of_every_method_goes_on_then_the_best_of_the_others(found: list[tuple[str, float]]) -> None:
    loss, method = (lambda t: t[1]), (lambda t: t[0])
    for count in range(1, len(found) + 1):
        kept = survivors(found, count, loss, method)
        assert len(set(kept)) == count
        assert min(found, key=loss)[1] == kept[0][1]
        assert len({m for m, _ in kept}) == min(count, len({m for m, _ in found}))
        if count >= len({m for m, _ in found}):
            assert {min((t for t in found if t[0] == m), key=loss)[1] for m, _ in found} <= {x for _, x in kept}


def test_what_starts_from_rows_has_its_own_start_and_length() -> None:
    config = TuneConfig(methods=("context-tuning", "prefix-tuning"), virtual_tokens=(8, 16), lr_factors=(1.0, 0.3))
    for found in (candidates(config, KNOWN), Optuna(config, KNOWN, seed=0).ask(12)):
        own = [c for c in found if c.method == "context-tuning"]
        assert own and {(c.init, c.virtual_tokens) for c in own} == {("examples", 256)}
        assert all(c.init != "examples" and c.virtual_tokens in (8, 16) for c in found if c not in own)
    assert [c.lr for c in candidates(config, KNOWN)][:2] == [0.003, 0.0009]


def test_optuna_stays_in_the_space_and_goes_where_the_loss_is_low() -> None:
    config = TuneConfig(methods=("prefix-tuning", "prompt-tuning"), virtual_tokens=(8, 16))
    sampler = Optuna(config, KNOWN, seed=0)
    asked = sampler.ask(12)
    for candidate in asked:
        sampler.tell(candidate, 0.1 if candidate.method == "prompt-tuning" else 2.0)
    later = sampler.ask(12)
    assert len(set(asked + later)) == len(asked + later)
    assert all(0.0089 <= c.lr <= 0.0901 for c in asked + later)
    assert sum(c.method == "prompt-tuning" for c in later) > len(later) / 2


def random_tables(seed: int, count: int, rows: int = 12, classes: int = 3) -> tuple[list[int], list[Any]]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, classes, rows).tolist(), [rng.dirichlet(np.ones(classes), rows) for _ in range(count)]


def penalised(weights: Any, truth: list[int], tables: list[Any], prior_rows: Any, rows: Any) -> float:
    """What the shares have least of: loss of the rows and of the prior's rows for each, in nats."""
    likelihoods = np.array([[table[i][own] for i, own in enumerate(truth)] for table in tables])
    return float(-np.log(weights @ likelihoods) @ rows - prior_rows @ np.log(weights))


@pytest.mark.parametrize(
    ("kinds", "prior"),
    [
        ((), [1 / 2, 1 / 2]),
        ("aaa", [1 / 3] * 3),
        ("aba", [1 / 4, 1 / 2, 1 / 4]),
        ((), [1 / 4] * 4),
        ("abcb", [1 / 3, 1 / 6, 1 / 3, 1 / 6]),
    ],
)
@given(st.integers(0, 10_000), st.sampled_from([3.0, 12.0, 100.0]), st.sampled_from([0.0, 0.7, 1.0]))
def test_shares_are_what_a_general_optimiser_finds(
    kinds: Sequence[str], prior: list[float], seed: int, prior_rows: float, balance: float
) -> None:
    truth, tables = random_tables(seed, len(prior))
    given_rows, rows = prior_rows * np.array(prior), row_weights(truth, balance)

    def loss(logits: Any) -> float:
        return penalised(scipy.special.softmax(logits), truth, tables, given_rows, rows)

    wanted = scipy.special.softmax(scipy.optimize.minimize(loss, np.zeros(len(prior)), tol=1e-10).x)
    found = shares(truth, tables, prior_rows, balance, kinds)
    lost, least = (penalised(w, truth, tables, given_rows, rows) for w in (found, wanted))
    assert found.sum() == pytest.approx(1)
    assert lost <= least + 1e-6
    assert found == pytest.approx(wanted, abs=1e-3)


def test_more_rows_that_say_the_same_outweigh_the_prior() -> None:
    sure, unsure = np.array([[0.9, 0.1]]), np.array([[0.5, 0.5]])
    of_best = [shares([0] * n, [np.repeat(t, n, 0) for t in (sure, unsure)])[0] for n in (1, 30, 1000)]
    assert 0.5 < of_best[0] < of_best[1] < of_best[2] < 1
    assert of_best[2] > 0.9


@given(st.integers(0, 10_000), st.integers(1, 8))
def test_the_first_member_is_the_best_alone_and_all_have_places_by_their_shares(seed: int, count: int) -> None:
    truth, tables = random_tables(seed, 3)
    chosen = select(truth, tables, count)
    losses = [log_loss(truth, t) for t in tables]
    assert losses[chosen[0]] == min(losses)
    assert chosen == select(truth, tables, 9)[:count]
    places, wanted = np.bincount(chosen, minlength=3), count * shares(truth, tables)
    assert np.abs(places - wanted).max() <= 1.5


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_balanced_rows_weigh_what_scikit_learn_says_and_unbalanced_ones_the_same(truth: list[int]) -> None:
    assert row_weights(truth, 1) == pytest.approx(compute_sample_weight("balanced", truth))
    assert row_weights(truth, 0.0).tolist() == [1.0] * len(truth)
    half = row_weights(truth, 0.5)
    assert half.mean() == pytest.approx(1)
    assert half / half[0] == pytest.approx((row_weights(truth, 1.0) / row_weights(truth, 1.0)[0]) ** 0.5)


def test_the_weighted_loss_is_scikit_learns() -> None:
    truth, tables = random_tables(2, 1)
    weights = compute_sample_weight("balanced", truth)
    expected = sklearn_log_loss(truth, tables[0], labels=[0, 1, 2], sample_weight=weights)
    assert log_loss(truth, tables[0], 1.0) == pytest.approx(expected)


def test_the_loss_is_scikit_learns() -> None:
    truth, tables = random_tables(2, 1)
    assert log_loss(truth, tables[0]) == pytest.approx(sklearn_log_loss(truth, tables[0], labels=[0, 1, 2]))


# --- the whole search ---------------------------------------------------------------------------


def test_the_run_is_an_ensemble_of_adapters_each_valid_by_itself(run: Path) -> None:
    ensemble = foreword.load(run)
    assert isinstance(ensemble, foreword.Ensemble)
    folders = sorted((run / "members").iterdir())
    assert [m.adapter.folder.resolve() for m in ensemble.members] == [f.resolve() for f in folders]
    assert 2 <= len(folders) <= 3
    texts = [row["text"] for row in DATA[:4]]
    alone = [foreword.load(folder).predict(texts) for folder in folders]
    for i, p in enumerate(ensemble.predict(texts)):
        for name, probability in p.probabilities.items():
            assert probability == pytest.approx(np.mean([a[i].probabilities[name] for a in alone]), abs=1e-6)
        assert p.label == max(p.probabilities, key=lambda c: p.probabilities[c])


def test_the_report_tells_of_all_members_and_the_search(run: Path) -> None:
    page = (run / "report.html").read_text()
    count = len(list((run / "members").iterdir()))
    assert f"ensemble of {count}, label probabilities averaged" in page
    assert "loss on rows left out" in page
    assert "None" not in page.split("<h2", 1)[0]


def test_members_differ_in_their_seeds(run: Path) -> None:
    sidecars = [json.loads((f / "foreword.json").read_text())["training"] for f in sorted((run / "members").iterdir())]
    assert len({s["seed"] for s in sidecars}) == len(sidecars)
    assert all(s["rows"] == len(DATA) for s in sidecars)


def test_every_trial_is_told_with_scores_of_rows_it_was_not_trained_on(run: Path) -> None:
    trials = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    said = json.loads((run / "tune.json").read_text())
    assert trials == said["trials"]
    assert {t["rung"] for t in trials} == {0, 1}
    assert {(t["rung"], t["folds"], t["epochs"]) for t in trials} == {(0, 1, 3), (1, 2, 3)}
    best = min((t for t in trials if t["rung"] == 1), key=lambda t: t["loss"])
    assert said["expected_single"]["accuracy"] == pytest.approx(best["accuracy"])
    assert said["expected"]["n"] == len(DATA)
    low, high = said["expected"]["intervals"]["accuracy"]
    assert low <= said["expected"]["accuracy"] <= high
    assert set(said["expected"]["baselines"]) >= {"majority", "zero_shot"}


def test_out_of_fold_scores_are_those_of_a_training_without_the_fold(
    run: Path, model_folder: Path, tmp_path: Path
) -> None:
    """The first fold of the first candidate, trained again through the public interface."""
    (group,) = [f for f in (run / "search" / "rung-0" / "0" / "fold-1").iterdir() if f.name.startswith("prompt-tuning")]
    stored = json.loads((group / "done.json").read_text())["outcomes"]
    trials = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    mine = [t for t in trials if t["rung"] == 0 and t["method"] == "prompt-tuning"]
    keep, out = k_folds([r["label"] for r in DATA], 2, 0)[0]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(DATA[i]) + "\n" for i in keep))
    wording = json.loads((run / "search" / "wording.json").read_text())["wordings"][0]
    words = dict(zip(("complaint", "no complaint"), wording["fold_words"][0], strict=True))
    again = foreword.train(
        model=str(model_folder), out=tmp_path / "again",
        data={"path": str(rows), "template": wording["template"], "label": "label", "label_words": words},
        quiet=True, prompt={"virtual_tokens": 4, "init": mine[0]["init"]},
        train={"epochs": mine[0]["epochs"], "batch_size": 4, "lr": mine[0]["lr"], "seed": 0},
    )  # fmt: skip
    found = again.predict([DATA[i]["text"] for i in out])
    classes = list(found[0].probabilities)
    order = sorted(classes, key=["complaint", "no complaint"].index)
    table = [[p.probabilities[c] for c in order] for p in found]
    np.testing.assert_allclose(table, stored[0]["probabilities"], atol=1e-5)


def test_who_did_better_on_the_first_fold_goes_on_to_the_others(run: Path) -> None:
    trials = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, second = ([t for t in trials if t["rung"] == r] for r in (0, 1))
    assert len(second) < len(first)

    def known(of: list[dict[str, Any]]) -> set[tuple[str, float]]:
        return {(t["method"], t["lr"]) for t in of}

    best = {m: min((t for t in first if t["method"] == m), key=lambda t: t["loss"]) for m, _ in known(first)}
    assert known(second) <= known(first)
    assert known(list(best.values())) <= known(second) or known(second) <= known(list(best.values()))
    assert known([min(first, key=lambda t: t["loss"])]) <= known(second)


def test_a_resumed_search_ends_in_the_same_bytes(run: Path, model_folder: Path, tmp_path: Path) -> None:
    """As it was after the first rung: later results are gone, one training is half done."""
    broken = tmp_path / "run"
    shutil.copytree(run, broken)
    for name in ("members", "ensemble.json", "foreword.json", "tune.json", "README.md", "report.html"):
        path = broken / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in ("members", "rung-1"):
        shutil.rmtree(broken / "search" / name)
    foreword.tune(
        model=str(model_folder), data=DATA, text="text", label="label", out=broken, quiet=True, resume=True,
        tune=SMALL, train={"epochs": 3, "batch_size": 4},
    )  # fmt: skip
    for folder in sorted((run / "members").iterdir()):
        mine, theirs = (d / "adapter_model.safetensors" for d in (broken / "members" / folder.name, folder))
        assert mine.read_bytes() == theirs.read_bytes()


def test_other_choices_are_refused_when_resumed(run: Path, model_folder: Path) -> None:
    with pytest.raises(ForewordError, match=r"keys changed: tune\.members"):
        foreword.tune(
            model=str(model_folder), data=DATA, text="text", label="label", out=run, quiet=True, resume=True,
            tune={**SMALL, "members": 2}, train={"epochs": 3, "batch_size": 4},
        )  # fmt: skip


def test_held_out_rows_are_scored_and_choose_nothing(run: Path, model_folder: Path, tmp_path: Path) -> None:
    upside_down = [{**r, "label": DATA[(i + 1) % len(DATA)]["label"]} for i, r in enumerate(DATA)]
    with_rows = foreword.tune(
        model=str(model_folder), data=DATA, eval_data=upside_down, text="text", label="label", out=tmp_path / "run",
        quiet=True, tune=SMALL, train={"epochs": 3, "batch_size": 4},
    )  # fmt: skip
    name = "members/00/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (run / name).read_bytes()
    assert with_rows.scores["n"] == len(upside_down)
    assert with_rows.scores["accuracy"] == with_rows.evaluate(upside_down)["accuracy"]


def test_a_single_member_is_a_plain_run(model_folder: Path, tmp_path: Path) -> None:
    made = tuned(model_folder, tmp_path / "one", members=1, methods=("prompt-tuning",), lr_factors=(1.0,))
    assert isinstance(made, foreword.Foreword)
    assert (tmp_path / "one" / "adapter_config.json").is_file()
    assert made.scores["protocol"].startswith("expected: 2-fold")


def test_a_search_reads_some_of_many_rows_and_its_members_all(model_folder: Path, tmp_path: Path) -> None:
    """Every class has its share of them; a training on fewer rows costs less of the budget."""
    rows = [{"text": f"{r['text']} {word}", "label": r["label"]} for word in ("fox", "dog", "you") for r in DATA]
    tuned(model_folder, tmp_path / "run", rows, rows=10, trainings=4)
    said = json.loads((tmp_path / "run" / "tune.json").read_text())
    assert said["expected"]["n"] == 10
    assert said["expected"]["per_class"]["complaint"]["n"] == 5
    assert "2-fold cross-validation on 10 of the 30 training rows" in said["expected"]["protocol"]
    assert len([t for t in said["trials"] if t["rung"] == 0]) > plan(4, 12, 2, 3).rungs[0].candidates
    sidecar = json.loads((tmp_path / "run" / "foreword.json").read_text())
    assert sidecar["training"]["rows"] == 30
    members = [json.loads(f.read_text())["training"] for f in tmp_path.glob("run/members/*/foreword.json")]
    assert {m["steps"] for m in members} <= {24, 12}  # 3 epochs of 30 rows in fours; context-tuning shows half


def test_free_text_is_tuned_to_one_soft_prompt(model_folder: Path, tmp_path: Path) -> None:
    rows = [{"text": text, "label": f"{text.split()[0]} {i}"} for i, (text, _) in enumerate(ROWS)]
    made = tuned(model_folder, tmp_path / "text", rows, trainings=5)
    assert isinstance(made, foreword.Foreword)
    expected = json.loads((tmp_path / "text" / "tune.json").read_text())["expected"]
    assert expected["loss"] > 0
    assert made.generate(["my parcel is late"])


def test_optuna_searches_too(model_folder: Path, tmp_path: Path) -> None:
    """The second half of its first rung learns from the first; each is trained."""
    made = tuned(
        model_folder, tmp_path / "optuna", sampler="optuna", trainings=8, methods=("prompt-tuning",), members=1,
        inits=("text",), lr_factors=(0.01, 10.0),
    )  # fmt: skip
    assert made.predict(["my parcel is late"])
    trials = [t for t in json.loads((tmp_path / "optuna" / "tune.json").read_text())["trials"] if t["rung"] == 0]
    assert len({t["lr"] for t in trials}) == len({t["loss"] for t in trials}) == len(trials) >= 3


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (("prompt.method=residual",), "tune chooses prompt.method itself"),
        (("train.lr=0.1",), "tune chooses train.lr itself"),
        (("data.folds=3",), "tune cross-validates by itself"),
        (("tune.minutes=0",), "the budget is minutes or trainings"),
        (("tune.folds=1",), "1 folds leave nothing out"),
        (("tune.rows=2",), "2 rows cannot be parted in 3"),
        (("tune.folds=11",), "10 rows cannot be parted in 11"),
        (("tune.methods=[cpt]",), "cpt has a start of its own"),
        (("tune.virtual_tokens=[8, 8]",), "tune.virtual_tokens is [8, 8]"),
        (("tune.sampler=grid",), "tune.sampler is 'grid'"),
        (("tune.wording=mine",), "tune.wording is 'mine'"),
        (("tune.lr_factors=[0]",), "factors are more than 0"),
        (("tune.ray=local", "train.parallel=ddp=1"), "on Ray or spread, not both"),
        (("tune.ray=local", "tune.ray_workers=-1"), "-1 workers"),
        (("train.collective_minutes=0",), "processes cannot wait 0.0 minutes for each other"),
        (("tune.membres=3",), "did you mean 'tune.members'?"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_in_three_lines(
    cli: Cli, model_folder: Path, train_csv: Path, tmp_path: Path, keys: tuple[str, ...], said: str
) -> None:
    out = tmp_path / "run"
    code, _, err = cli(
        "tune", "--model", str(model_folder), "--data", str(train_csv), "--text", "Tweet text", "--label", "Label",
        "--out", str(out), *keys,
    )  # fmt: skip
    assert code == 2
    assert said in err
    assert len(err.strip().splitlines()) == 3
    assert not out.exists()


def test_train_refuses_the_keys_of_tune(cli: Cli, model_folder: Path, train_csv: Path, tmp_path: Path) -> None:
    code, _, err = cli(
        "train", "--model", str(model_folder), "--data", str(train_csv), "--text", "Tweet text", "--label", "Label",
        "--out", str(tmp_path / "run"), "tune.members=2",
    )  # fmt: skip
    assert code == 2
    assert "tune keys mean nothing here" in err


def test_the_command_line_tunes_shows_scores_and_predicts(
    cli: Cli, model_folder: Path, train_csv: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    code, said, err = cli(
        "tune", "--model", str(model_folder), "--data", str(train_csv), "--text", "Tweet text", "--label", "Label",
        "--out", str(out), "--members", "2", "tune.minutes=0", "tune.trainings=6", "tune.folds=2", "train.epochs=2",
        "tune.untrained=never",
    )  # fmt: skip
    assert code == 0, err
    assert "to expect on new rows: accuracy" in said
    code, said, err = cli("evaluate", str(out), "--data", str(train_csv), "--json", str(tmp_path / "scores.json"))
    assert code == 0, err
    assert "the rows it was trained on" in json.loads((tmp_path / "scores.json").read_text())["protocol"]
    code, said, err = cli("predict", str(out), str(train_csv), "--out", str(tmp_path / "labels.csv"))
    assert code == 0, err
    assert len((tmp_path / "labels.csv").read_text().splitlines()) == len(ROWS) + 1
