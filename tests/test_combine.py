"""Soft prompts made from soft prompts: combined, carried to another backbone, exported, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models

import foreword
import tiny
from conftest import ROWS, Cli, three_lines, write_csv
from foreword.artifact.bare import read_bare, write_bare
from foreword.artifact.folder import CONFIG, WEIGHTS, read_adapter, write_adapter
from foreword.artifact.peft_types import PLACED, TASK_COLS, TASK_ROWS, TENSOR, peft_config
from foreword.backbone.attach import compiled
from foreword.backbone.load import Backbone, load_backbone
from foreword.backbone.source import quiet_loading
from foreword.config import ModelConfig, PromptConfig
from foreword.errors import ForewordError
from foreword.jobs.combine import combine_runs
from foreword.jobs.derive import compile_run, write_derived
from foreword.jobs.export import export
from foreword.jobs.transfer import transfer_run
from foreword.prompts.combine import average, combine, concatenate, interpolate
from foreword.prompts.soft import SoftPrompt
from foreword.prompts.transfer import carried, fit, shared_ids
from foreword.records import Task

P = 4
TASK = Task(
    "{Tweet text} Label :", " ", "Label", ("complaint", "no complaint"), ("complaint", "no complaint"),
)  # fmt: skip
TEXTS = [text for text, _ in ROWS]


def rows_of(tokens: int = P, seed: int = 0, width: int = tiny.HIDDEN) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def soft(tokens: int = P, seed: int = 0, kind: Any = "rows", width: int = tiny.HIDDEN) -> SoftPrompt:
    return SoftPrompt(rows_of(tokens, seed, width), kind)


@pytest.fixture(scope="module")
def backbone(model_folder: Path) -> Backbone:
    return load_backbone(ModelConfig(str(model_folder)))


@pytest.fixture
def made(backbone: Backbone, tmp_path: Path) -> Callable[..., str]:
    """Writes a soft prompt as a folder of the tiny backbone; gives its path."""

    def make(name: str, prompt: SoftPrompt, task: Task = TASK, training: dict[str, Any] | None = None) -> str:
        facts = {"how": "drawn", "from": ["a generator"], **(training or {})}
        (tmp_path / name).mkdir()
        write_derived(tmp_path / name, prompt, backbone, task, facts, {})
        return str(tmp_path / name)

    return make


def narrow(out: str) -> bool:
    """Whether no line is wider than 80 columns, aside from those with a path in them."""
    return all(len(line) <= 80 for line in out.splitlines() if "/" not in line)


# --- arithmetic -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rows", "prefix"])
def test_average_and_interpolation_are_value_by_value(kind: Any) -> None:
    a, b, c = (soft(seed=s, kind=kind) for s in range(3))
    expected = (a.values.double() + b.values.double() + c.values.double()) / 3
    found = average([a, b, c])
    assert (found.kind, found.values.dtype) == (kind, torch.float32)
    assert torch.equal(found.values, expected.float())
    assert torch.equal(average([a, a, a]).values, a.values)
    between = interpolate([a, b], 0.25)
    torch.testing.assert_close(between.values, 0.75 * a.values + 0.25 * b.values)
    assert between.kind == kind
    assert torch.equal(interpolate([a, b], 0.0).values, a.values)
    assert torch.equal(interpolate([a, b], 1.0).values, b.values)
    torch.testing.assert_close(combine("interpolate", [a, b]).values, average([a, b]).values)


def test_rows_of_any_number_follow_one_another() -> None:
    a, b, c = soft(1), soft(3, seed=1), soft(2, seed=2)
    found = concatenate([a, b, c])
    assert found.tokens == 6
    assert torch.equal(found.values, torch.cat([a.values, b.values, c.values]))


APART: dict[str, tuple[Callable[[], object], str]] = {
    "one alone": (lambda: average([soft()]), "one soft prompt alone"),
    "sizes to average": (lambda: average([soft(4), soft(3), soft(5)]), "have 4, 3 and 5 virtual tokens"),
    "sizes to interpolate": (lambda: interpolate([soft(4), soft(3)], 0.5), "have 4 and 3 virtual tokens"),
    "widths": (lambda: concatenate([soft(), soft(width=64)]), "are 32 and 64 wide"),
    "kinds": (lambda: average([soft(), soft(kind="prefix")]), "cannot be mixed"),
    "prefixes in a row": (lambda: concatenate([soft(kind="prefix")] * 2), "rotated to the position it was made at"),
    "three to interpolate": (lambda: interpolate([soft()] * 3, 0.5), "3 soft prompts to interpolate"),
    "weight below": (lambda: interpolate([soft()] * 2, -0.1), "not between 0 and 1"),
    "weight above": (lambda: interpolate([soft()] * 2, 1.5), "not between 0 and 1"),
    "no number": (lambda: interpolate([soft()] * 2, float("nan")), "not between 0 and 1"),
    "unknown way": (lambda: combine("averag", [soft()] * 2), "no way 'averag'"),
    "weight of an average": (lambda: combine("average", [soft()] * 2, 0.3), "to average takes no weight"),
}


@pytest.mark.parametrize("case", APART)
def test_what_does_not_go_together_is_refused_with_the_reason(case: str) -> None:
    act, reason = APART[case]
    with pytest.raises(ForewordError, match=reason) as caught:
        act()
    assert all((caught.value.what, caught.value.where, caught.value.fix))
    assert case != "unknown way" or "'average'" in caught.value.fix


# --- folders combined -------------------------------------------------------------------------


def test_halves_of_a_prompt_in_a_row_predict_as_the_whole(made: Callable[..., str], tmp_path: Path) -> None:
    whole = soft(6)
    first, second = made("first", SoftPrompt(whole.values[:2])), made("second", SoftPrompt(whole.values[2:]))
    combine_runs([first, second], "concatenate", tmp_path / "out")
    found, expected = foreword.load(tmp_path / "out"), foreword.load(made("whole", whole))
    assert torch.equal(found.prompt.values, whole.values)
    assert found.predict(TEXTS) == expected.predict(TEXTS)
    assert found.task == TASK
    assert dict(found.adapter.config) == dict(expected.adapter.config)


def test_concatenated_prompts_leave_the_places_of_their_templates(made: Callable[..., str], tmp_path: Path) -> None:
    whole = soft(5)
    at = [Task(f"{{soft:{n}}}{TASK.template}", " ", "Label", TASK.classes, TASK.words) for n in (2, 3)]
    halves = [made("a", SoftPrompt(whole.values[:2]), at[0]), made("b", SoftPrompt(whole.values[2:]), at[1])]
    combine_runs(halves, "concatenate", tmp_path / "out")
    found = foreword.load(tmp_path / "out")
    assert found.task.template == TASK.template
    assert found.predict(TEXTS) == foreword.load(made("whole", whole)).predict(TEXTS)


@pytest.mark.parametrize(("weight", "same"), [(0.0, "a"), (1.0, "b")])
def test_the_ends_of_an_interpolation_are_its_sources(
    made: Callable[..., str], tmp_path: Path, weight: float, same: str
) -> None:
    a, b = made("a", soft(seed=1)), made("b", soft(seed=2))
    combine_runs([a, b], "interpolate", tmp_path / "out", weight)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / same / WEIGHTS).read_bytes()
    told = foreword.load(tmp_path / "out").adapter.sidecar
    assert told is not None
    assert dict(told.training) == {"how": "interpolated", "from": ["a", "b"], "weight": weight}


def test_prefixes_average_and_never_follow_one_another(
    made: Callable[..., str], backbone: Backbone, tmp_path: Path
) -> None:
    prefixes = [SoftPrompt(compiled(backbone, rows_of(seed=s)), "prefix") for s in (1, 2)]
    sources = [made(f"p{i}", p) for i, p in enumerate(prefixes)]
    combine_runs(sources, "average", tmp_path / "out")
    found = foreword.load(tmp_path / "out")
    assert (found.prompt.kind, found.adapter.config["peft_type"]) == ("prefix", "PREFIX_TUNING")
    assert torch.equal(found.prompt.values, average(prefixes).values)
    assert len(found.predict(TEXTS)) == len(TEXTS)
    with pytest.raises(ForewordError, match="rotated"):
        combine_runs(sources, "concatenate", tmp_path / "row")
    with pytest.raises(ForewordError, match="cannot be mixed"):
        combine_runs([sources[0], made("rows", soft())], "average", tmp_path / "row")
    assert not (tmp_path / "row").exists()


def test_scores_before_and_after_are_those_of_evaluate(
    made: Callable[..., str], train_csv: Path, tmp_path: Path
) -> None:
    sources = [made("a", soft(seed=1)), made("b", soft(seed=2))]
    scored = combine_runs(sources, "average", tmp_path / "out", data=str(train_csv))
    assert [s.name for s in scored] == [*sources, "the result"]
    for name, found in zip([*sources, tmp_path / "out"], scored, strict=True):
        assert foreword.load(name).evaluate(str(train_csv)) == found.scores
    assert foreword.load(tmp_path / "out").scores == json.loads(json.dumps(scored[-1].scores))


def test_a_score_on_training_rows_of_any_source_says_so(
    made: Callable[..., str], train_csv: Path, tmp_path: Path
) -> None:
    from foreword.data.encode import rows_hash
    from foreword.data.sources import read_table

    digest = rows_hash(read_table(str(train_csv)), ["Tweet text", "Label"])
    counts = {"label_counts": [5, 5]}
    a = made("a", soft(seed=1), TASK, {"data_sha256": "other", **counts})
    b = made("b", soft(seed=2), TASK, {"data_sha256": digest, **counts})
    *_, result = combine_runs([a, b], "average", tmp_path / "ab", data=str(train_csv))
    assert result.scores["protocol"].endswith("the rows it was trained on")
    combine_runs([b, b], "average", tmp_path / "bb")
    again = foreword.load(tmp_path / "bb").evaluate(str(train_csv))
    assert again["protocol"].endswith("the rows it was trained on")
    told = foreword.load(tmp_path / "ab").adapter.sidecar
    assert told is not None
    assert "data_sha256" not in told.training
    assert told.training["label_counts"] == [5, 5]


PLACES = {
    "end": Task(TASK.template, " ", "Label", TASK.classes, TASK.words, placement="end"),
    "template": Task("{Tweet text}{soft:4} Label :", " ", "Label", TASK.classes, TASK.words),
    "another template": Task("{Tweet text} so{soft:4} Label :", " ", "Label", TASK.classes, TASK.words),
}


@pytest.mark.parametrize("place", ["end", "template"])
def test_places_must_agree_and_are_kept(made: Callable[..., str], tmp_path: Path, place: str) -> None:
    a, b = made("a", soft(seed=1), PLACES[place]), made("b", soft(seed=2), PLACES[place])
    combine_runs([a, b], "average", tmp_path / "out")
    found = foreword.load(tmp_path / "out")
    assert (found.adapter.config["peft_type"], found.task) == (PLACED, PLACES[place])
    other = "another template" if place == "template" else "template"
    for task in (TASK, PLACES[other]):
        c = made(f"c{task.template}".replace("/", ""), soft(seed=3), task)
        with pytest.raises(ForewordError, match="stand at different places") as caught:
            combine_runs([a, c], "interpolate", tmp_path / "no")
        assert a in caught.value.where
        assert c in caught.value.where
    with pytest.raises(ForewordError, match="in front of all text"):
        combine_runs([a, b], "concatenate", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_placed_after_a_bos_that_the_tokenizer_has_not_is_in_front(made: Callable[..., str], tmp_path: Path) -> None:
    after = Task(TASK.template, " ", "Label", TASK.classes, TASK.words, placement="after-bos")
    a, b = made("a", soft(seed=1)), made("b", soft(seed=2), after)
    combine_runs([a, b], "average", tmp_path / "out")
    assert foreword.load(tmp_path / "out").task == TASK


def test_another_template_among_the_sources_is_told(
    made: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr("foreword.jobs.combine.log.info", lambda text, *args: told.append(text % args))
    other = Task("{Tweet text} is a", " ", "Label", TASK.classes, TASK.words)
    a, b, c = made("a", soft(seed=1)), made("b", soft(seed=2)), made("c", soft(seed=3), other)
    combine_runs([a, b, c], "average", tmp_path / "out")
    assert told == [f"{c} has another template or other label words; those of {a} are kept"]
    assert foreword.load(tmp_path / "out").task == TASK


def test_sources_of_another_backbone_are_refused_naming_both(
    made: Callable[..., str], model_folder: Path, tmp_path: Path
) -> None:
    other = load_backbone(ModelConfig(str(tiny.save(tmp_path / "other", seed=1))))
    (tmp_path / "theirs").mkdir()
    write_derived(tmp_path / "theirs", soft(), other, TASK, {"how": "drawn", "from": ["x"]}, {})
    with pytest.raises(ForewordError, match="its weights are others") as caught:
        combine_runs([made("a", soft()), str(tmp_path / "theirs")], "average", tmp_path / "out")
    assert other.name in caught.value.where
    assert str(model_folder) in caught.value.where
    assert "--force" not in caught.value.fix
    assert not (tmp_path / "out").exists()


# --- carried to another backbone --------------------------------------------------------------


def test_a_linear_map_between_embeddings_is_recovered() -> None:
    source, matrix = rows_of(400, seed=1), torch.randn(32, 48, generator=torch.Generator().manual_seed(2))
    found = fit(source, source @ matrix)
    assert (found.tokens, found.held_out) == (360, 40)
    assert found.r2 > 0.999999
    torch.testing.assert_close(found.matrix, matrix, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(carried(soft(), found).values, soft().values @ matrix, atol=1e-3, rtol=1e-3)


def test_embeddings_that_have_nothing_in_common_explain_nothing() -> None:
    found = fit(rows_of(400, seed=1), rows_of(400, seed=2, width=48))
    assert -0.5 < found.r2 < 0.05
    assert found.ridge == 1.0


def test_shared_tokens_are_frequent_words_or_all_where_these_are_few() -> None:
    letters = "abcdefghij"
    words = {f"Ġ{a}{b}": i for i, (a, b) in enumerate((a, b) for a in letters for b in letters)}
    marks = {f"{a}{i}": 100 + i for i, a in enumerate(letters * 10)}
    target = {token: 1000 + i for token, i in {**words, **marks, "only here": 300}.items()}
    pairs = shared_ids({**words, **marks, "only there": 301}, target, 25, "a and b")
    assert pairs == [(i, 1000 + i) for i in range(100)]
    assert len(shared_ids({**words, **marks}, target, 26, "a and b")) == 200
    with pytest.raises(ForewordError, match="share 200 tokens; a map from 101 dimensions takes 202") as caught:
        shared_ids({**words, **marks}, target, 101, "a and b")
    assert caught.value.where == "a and b"


def rotated(folder: Path) -> Path:
    """The tiny Llama with its residual stream turned by a rotation: another model that computes the same."""
    made = tiny.backbone("llama-gqa", torch.float32)
    turn = torch.linalg.qr(torch.randn(tiny.HIDDEN, tiny.HIDDEN, generator=torch.Generator().manual_seed(3)))[0]
    with torch.no_grad():
        for name, weight in made.model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):  # what writes into the stream
                weight.copy_(turn.T @ weight)
            elif weight.dim() == 2:  # what reads from it: projections, embedding and head
                weight.copy_(weight @ turn)
    with quiet_loading():
        made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return folder


def test_a_prompt_carried_to_its_own_backbone_stays_nearly_the_same(
    made: Callable[..., str], model_folder: Path, tmp_path: Path
) -> None:
    done = transfer_run(made("a", soft()), str(model_folder), tmp_path / "out")
    assert done.found.r2 > 0.9999
    assert done.scored == []
    torch.testing.assert_close(read_adapter(tmp_path / "out").prompt.values, soft().values, atol=1e-4, rtol=1e-4)


def test_a_prompt_carried_to_a_turned_backbone_predicts_the_same(
    made: Callable[..., str], train_csv: Path, tmp_path: Path
) -> None:
    source, target = made("a", soft(), TASK, {"label_counts": [5, 5]}), rotated(tmp_path / "turned")
    done = transfer_run(source, str(target), tmp_path / "out", data=str(train_csv))
    assert done.found.r2 > 0.9999
    found = foreword.load(tmp_path / "out")
    assert found.backbone.name == str(target)
    assert (found.prompt.values - soft().values).abs().max() > 1
    for mine, theirs in zip(found.predict(TEXTS), foreword.load(source).predict(TEXTS), strict=True):
        assert dict(mine.probabilities) == pytest.approx(dict(theirs.probabilities), abs=2e-3)
    before, after = done.scored
    assert after.scores["accuracy"] == before.scores["accuracy"]
    assert found.scores["baselines"].keys() == {"zero_shot", "majority"}
    told = found.adapter.sidecar
    assert told is not None
    assert told.training["from"] == [Path(source).name]
    assert told.training["label_counts"] == [5, 5]
    assert told.training["r2"] == round(done.found.r2, 4)


def test_two_models_never_lie_in_memory_together(
    made: Callable[..., str], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import weakref

    from foreword.jobs import transfer as job

    sources: list[weakref.ref[Any]] = []
    read, fetch = job.load_source, job.load_backbone

    def reading(*args: Any) -> Any:
        found = read(*args)
        sources.append(weakref.ref(found.backbone.model))
        return found

    def fetching(config: ModelConfig) -> Backbone:
        assert [s() for s in sources] == [None]
        return fetch(config)

    monkeypatch.setattr(job, "load_source", reading)
    monkeypatch.setattr(job, "load_backbone", fetching)
    transfer_run(made("a", soft()), str(model_folder), tmp_path / "out")


def test_a_prefix_is_not_carried(
    made: Callable[..., str], backbone: Backbone, model_folder: Path, tmp_path: Path
) -> None:
    source = made("p", SoftPrompt(compiled(backbone, rows_of()), "prefix"))
    with pytest.raises(ForewordError, match="mean nothing to another") as caught:
        transfer_run(source, str(model_folder), tmp_path / "out")
    assert caught.value.where == source
    assert not (tmp_path / "out").exists()


def test_a_backbone_of_other_tokens_is_refused(made: Callable[..., str], tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "foreign", seed=1)
    words = Tokenizer(models.WordLevel({"<end>": 0, **{f"word{i}": i for i in range(1, 300)}}, unk_token="<end>"))
    tf.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(folder)
    with pytest.raises(ForewordError, match="share 0 tokens; a map from 32 dimensions takes 64") as caught:
        transfer_run(made("a", soft()), str(folder), tmp_path / "out")
    assert str(folder) in caught.value.where


# --- bare files and plain folders -------------------------------------------------------------


@pytest.mark.parametrize("name", ["decoder.pt", "prompt.npy"])
def test_a_bare_file_goes_out_and_comes_back_in_use(
    made: Callable[..., str], model_folder: Path, tmp_path: Path, name: str
) -> None:
    source = made("a", soft())
    export(source, tmp_path / name)
    words = dict(zip(TASK.classes, TASK.words, strict=True))
    found = foreword.load(tmp_path / name, model=str(model_folder), template=TASK.template, label_words=words)
    assert torch.equal(found.prompt.values, soft().values)
    assert found.predict(TEXTS) == foreword.load(source).predict(TEXTS)
    with pytest.raises(ForewordError, match="does not name its backbone"):
        foreword.load(tmp_path / name)


def test_a_plain_folder_has_what_peft_reads_and_nothing_of_ours(made: Callable[..., str], tmp_path: Path) -> None:
    source = Path(made("a", soft()))
    export(str(source), tmp_path / "plain")
    assert sorted(p.name for p in (tmp_path / "plain").iterdir()) == [CONFIG, WEIGHTS]
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "plain" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_uses_the_rows_of_a_bare_file_once_it_is_a_folder(backbone: Backbone, tmp_path: Path) -> None:
    from peft import PeftModel

    write_bare(tmp_path / "decoder.pt", soft())
    export(str(tmp_path / "decoder.pt"), tmp_path / "plain")
    ids = torch.tensor([[5, 6, 7]])
    rows = torch.cat([soft().values, backbone.embedding(ids[0])])[None]
    expected = backbone.model(inputs_embeds=rows).logits
    model = PeftModel.from_pretrained(tiny.backbone("llama-gqa", torch.float32).model, tmp_path / "plain")
    torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture
def multitask(backbone: Backbone, tmp_path: Path) -> Path:
    """A multitask adapter of three tasks."""
    tensors = {
        TENSOR: rows_of(),
        TASK_COLS: rows_of(3 * P, 1, 2).view(3, P, 2),
        TASK_ROWS: rows_of(6, 2).view(3, 2, -1),
    }
    config = peft_config(
        "MULTITASK_PROMPT_TUNING", tensors, model_config=backbone.config, base=backbone.name, revision=None,
        prompt=PromptConfig(),
    )  # fmt: skip
    write_adapter(tmp_path / "several", tensors, config, None)
    return tmp_path / "several"


def test_one_task_of_several_is_exported_by_its_number(multitask: Path, tmp_path: Path) -> None:
    rows = read_adapter(multitask, 2).prompt.values
    export(str(multitask), tmp_path / "two.npy", 2)
    assert torch.equal(read_bare(tmp_path / "two.npy").values, rows)
    export(str(multitask), tmp_path / "two", 2)
    found = read_adapter(tmp_path / "two")
    assert found.config["peft_type"] == "PROMPT_TUNING"
    assert not {"num_tasks", "num_ranks"} & set(found.config)
    assert torch.equal(found.prompt.values, rows)
    export(str(multitask), tmp_path / "all")
    assert (tmp_path / "all" / WEIGHTS).read_bytes() == (multitask / WEIGHTS).read_bytes()
    with pytest.raises(ForewordError, match="it has 3 tasks, a bare file one") as caught:
        export(str(multitask), tmp_path / "which.pt")
    assert "--task, 0 to 2" in caught.value.fix
    with pytest.raises(ForewordError, match="no task 3"):
        export(str(multitask), tmp_path / "which", 3)


def test_what_a_form_cannot_hold_is_refused_and_nothing_written(
    made: Callable[..., str], backbone: Backbone, tmp_path: Path
) -> None:
    placed = made("placed", soft(), PLACES["end"])
    prefix = made("prefix", SoftPrompt(compiled(backbone, rows_of()), "prefix"))
    before = sorted(tmp_path.iterdir())
    for source, name, reason in [
        (placed, "plain", "PEFT has no field for another place"),
        (prefix, "p.pt", "pass off as rows"),
        (placed, "p.bin", "written to '.bin' files"),
        (placed, "no/p.pt", "no such folder"),
        (placed, "prefix", "there already"),
    ]:
        with pytest.raises(ForewordError, match=reason):
            export(source, tmp_path / name)
    assert sorted(tmp_path.iterdir()) == before
    export(prefix, tmp_path / "plain")
    assert read_adapter(tmp_path / "plain").prompt.kind == "prefix"


def test_a_folder_that_cannot_be_written_whole_is_taken_away(
    made: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from foreword.jobs import export as job

    def failing(folder: Path, *args: Any, **kwargs: Any) -> None:
        (folder / WEIGHTS).write_bytes(b"half")
        raise ForewordError("cannot write: no space", str(folder), "free some")

    source = made("a", soft())
    monkeypatch.setattr(job, "write_adapter", failing)
    with pytest.raises(ForewordError, match="no space"):
        export(source, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


# --- the command line -------------------------------------------------------------------------


def test_the_verbs_say_what_they_made_and_how_it_scores(
    cli: Cli, made: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = write_csv(tmp_path / "t.csv", ROWS[:6])
    made("a", soft(seed=1))
    made("b", soft(seed=2))
    code, out, err = cli(
        "combine", "a", "b", "--how", "interpolate", "--weight", 0.3, "--out", "ab", "--data", data.name
    )
    assert code == 0, err
    assert narrow(out), out
    table = [line.split()[0] for line in out.splitlines() if line.count("[") == 2]
    assert table[:3] == ["a", "b", "the"]
    assert "interpolated from a, b" in out
    assert json.loads((tmp_path / "ab" / "foreword.json").read_text())["training"]["weight"] == 0.3
    rotated(tmp_path / "turned")
    code, out, err = cli("transfer", "ab", "--model", "./turned", "--out", "c", "--data", data.name)
    assert code == 0, err
    assert "R^2 1.000" in out
    assert "transferred to ./turned" in out
    code, out, err = cli("export", "c", "c.npy")
    assert (code, out.splitlines()[0]) == (0, "written c.npy"), err
    assert TASK.template in out
    assert narrow(cli("combine", "a", "b", "a", "--how", "average", "--out", "aba")[1])


def test_mistakes_are_three_lines_and_leave_nothing(cli: Cli, made: Callable[..., str], tmp_path: Path) -> None:
    a, b, out = made("a", soft()), made("b", soft(3)), tmp_path / "out"
    assert "'average'" in three_lines(cli("combine", a, b, "--how", "avrage", "--out", out))[2]
    lines = three_lines(cli("combine", a, b, "--how", "average", "--out", out))
    assert "4 and 3 virtual tokens" in lines[0]
    assert f"{a}, {b}" in lines[1]
    three_lines(cli("combine", a, "--how", "average", "--out", out))
    three_lines(cli("combine", a, b, "--how", "concatenate", "--weight", 0.5, "--out", out))
    three_lines(cli("combine", a, a, "--how", "average", "--data", "nowhere.csv", "--out", out))
    three_lines(cli("transfer", a, "--model", "./nowhere", "--out", out))
    three_lines(cli("export", a, tmp_path / "a.json"))
    assert not out.exists()
    before = {p: p.read_bytes() for p in Path(a).iterdir()}
    assert "not empty" in three_lines(cli("combine", a, a, "--how", "average", "--out", a))[0]
    assert "not empty" in three_lines(cli("transfer", a, "--model", "./nowhere", "--out", a))[0]
    assert before == {p: p.read_bytes() for p in Path(a).iterdir()}


def test_a_source_whose_backbone_is_gone_says_how_to_name_it(
    cli: Cli, made: Callable[..., str], model_folder: Path, tmp_path: Path
) -> None:
    write_bare(tmp_path / "decoder.pt", soft())
    lines = three_lines(cli("transfer", tmp_path / "decoder.pt", "--model", model_folder, "--out", tmp_path / "out"))
    assert "--from-model" in lines[2]
    moved = ["--from-model", model_folder]
    assert cli("transfer", tmp_path / "decoder.pt", "--model", model_folder, *moved, "--out", tmp_path / "out")[0] == 0
    lines = three_lines(cli("compile", tmp_path / "decoder.pt", "--out", tmp_path / "compiled"))
    assert lines[2].endswith("--model ID")
    other = tiny.save(tmp_path / "other", seed=1)
    lines = three_lines(cli("compile", made("a", soft()), "--model", other, "--out", tmp_path / "compiled"))
    assert "--force" not in lines[2]
    compile_run(str(tmp_path / "out"), tmp_path / "compiled")
