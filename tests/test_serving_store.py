"""Where soft prompts come from: every name finds its folder, nothing leads outside, nothing wrong is let in."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from foreword.artifact import hub
from foreword.artifact.bare import load_safetensors
from foreword.artifact.confined import TEXT_LIMIT
from foreword.artifact.ensemble import ENSEMBLE, is_ensemble, read_ensemble, write_ensemble
from foreword.artifact.folder import CONFIG, LEGACY_WEIGHTS, WEIGHTS, read_adapter
from foreword.artifact.peft_types import PLACED, TASK_COLS, TASK_ROWS, TENSOR
from foreword.artifact.sidecar import SIDECAR
from foreword.errors import ForewordError
from foreword.records import Task
from foreword.serving.reading import Content, read_content
from foreword.serving.store import NAME_LIMIT, Store, UnknownName
from serving_parts import NBYTES, TASK, TOKENS, capabilities, soft_prompt, values_of

MOST = 1 << 20


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """A folder with two soft prompts, and things that are none."""
    parent = tmp_path / "shelf"
    soft_prompt(parent / "a", 1)
    soft_prompt(parent / "b", 2)
    soft_prompt(parent / ".hidden", 3)
    (parent / "unfinished").mkdir()
    (parent / "notes.txt").write_text("mine")
    return parent


def refusal(call: Callable[..., object], *args: Any) -> ForewordError:
    with pytest.raises(ForewordError) as caught:
        call(*args)
    assert all((caught.value.what, caught.value.where, caught.value.fix))
    return caught.value


# --- names ---------------------------------------------------------------------------------------


def test_a_folder_serves_what_it_holds_and_what_appears_later(shelf: Path) -> None:
    store = Store([shelf])
    assert store.names() == ["a", "b"]
    assert store.find("a") == shelf / "a"
    soft_prompt(shelf / "new", 4)
    assert store.names() == ["a", "b", "new"]
    assert store.find("new") == shelf / "new"
    shutil.rmtree(shelf / "new")
    assert refusal(store.find, "new").what == "there is no soft prompt 'new'"
    shutil.rmtree(shelf)
    assert store.names() == []


def test_soft_prompts_ensembles_and_folders_of_them_are_served_side_by_side(shelf: Path, tmp_path: Path) -> None:
    single = soft_prompt(tmp_path / "single", 5)
    write_ensemble(tmp_path / "both", [shelf / "a", shelf / "b"])
    store = Store([shelf, single, tmp_path / "both", "user/on-the-hub"])
    assert store.names() == ["a", "b", "both", "single", "user/on-the-hub"]
    assert [store.find(n) for n in ("a", "both", "single")] == [shelf / "a", tmp_path / "both", single]
    assert store.knows("user/on-the-hub")
    assert not store.knows("members"), "an ensemble's members are no soft prompts of their own"


def test_a_folder_is_known_by_the_name_it_was_given_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = soft_prompt(tmp_path / "run-17", 1)
    (tmp_path / "complaints").symlink_to(real)  # the operator's own link, not a client's
    monkeypatch.chdir(real)
    assert Store([tmp_path / "complaints"]).find("complaints") == real
    assert Store(["."]).names() == ["run-17"]


def test_two_things_of_one_name_are_refused_naming_both(shelf: Path, tmp_path: Path) -> None:
    other = soft_prompt(tmp_path / "other" / "a", 9)
    for sources in ([shelf, other], [shelf, tmp_path / "other"], [other, shelf]):
        error = refusal(Store, sources)
        assert "two soft prompts are called 'a'" in error.what
        assert str(shelf / "a") in error.where
        assert str(other) in error.where
    assert Store([shelf, shelf, shelf / "a"]).names() == ["a", "b"], "the same folder twice is one thing"
    (tmp_path / "later").mkdir()
    store = Store([shelf, tmp_path / "later"])
    soft_prompt(tmp_path / "later" / "b", 7)
    assert "two soft prompts are called 'b'" in refusal(store.find, "b").what
    assert store.find("a") == shelf / "a"


def test_sources_that_are_nothing_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.pt").write_text("")
    assert "no such folder" in refusal(Store, ["runs/mistyped"]).what
    assert "no such folder" in refusal(Store, ["./user/name"]).what
    assert "bare file" in refusal(Store, ["rows.pt"]).what


def test_thousands_are_listed_without_reading_and_found_without_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(2_000):
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}" / CONFIG).touch()  # to read it would fail
    store = Store([tmp_path])
    assert len(store.names()) == 2_000
    monkeypatch.delattr(os, "scandir")
    assert store.find("1777") == tmp_path / "1777"
    assert refusal(store.find, "2000")


# --- nothing leads outside -----------------------------------------------------------------------

ODD = [
    "", ".", "..", "../outside", "a/..", "a/../../outside", "/etc", "//", "a/", "/a", "./a", "a//b", "..\\outside",
    "a\\b", "a\0", "\0", "a\n", "\ud800", "x" * (NAME_LIMIT + 1), "é" * NAME_LIMIT, "~", "~root", "%2e%2e", ".hidden",
    "linked", "linked/deep", "loop", "pipe", "notes.txt", "C:\\", "a:b", "members/00", "\u202e", " a", "a ",
]  # fmt: skip


@pytest.fixture
def trap(shelf: Path) -> Path:
    """The shelf with an adapter beside it, and links to that."""
    outside = soft_prompt(shelf.parent / "outside", 6)
    soft_prompt(outside / "deep", 6)
    (shelf / "linked").symlink_to(outside)
    (shelf / "loop").symlink_to(shelf / "loop")
    os.mkfifo(shelf / "pipe")
    return shelf


@pytest.mark.parametrize("name", ODD)
def test_an_odd_name_is_unknown_and_an_odd_path_refused(trap: Path, name: str) -> None:
    store = Store([trap])
    assert isinstance(refusal(store.find, name), UnknownName)
    assert not store.knows(name)
    assert "no adapter or ensemble folder" in refusal(store.inside, name).what
    assert store.names() == ["a", "b"]


@given(st.text(st.sampled_from([*"./\\~ab\0 "]), max_size=24))
def test_whatever_path_is_asked_for_the_answer_lies_below_the_folder(
    tmp_path_factory: pytest.TempPathFactory, path: str
) -> None:
    root = tmp_path_factory.getbasetemp() / "confined"
    if not root.exists():
        soft_prompt(root / "store" / "a" / "b", 1)
        soft_prompt(root / "a", 1)
    store = Store([root / "store"])
    found = [f for call in (store.find, store.inside) if (f := attempt(call, path)) is not None]
    assert all(f.resolve().is_relative_to(root.resolve() / "store") for f in found)


def attempt(call: Callable[[str], Path], path: str) -> Path | None:
    try:
        return call(path)
    except ForewordError:
        return None


def test_a_path_may_lead_deeper_but_a_name_may_not(shelf: Path) -> None:
    soft_prompt(shelf / "team" / "mine", 8)
    store = Store([shelf])
    assert store.inside("team/mine") == shelf / "team" / "mine"
    assert refusal(store.find, "team/mine")
    (shelf / "team-link").symlink_to(shelf / "team")
    assert refusal(store.inside, "team-link/mine"), "not even a link to what may be read"


def link_out(file: str) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        elsewhere = (folder / file).rename(folder.parent / f"elsewhere-{file}")
        (folder / file).symlink_to(elsewhere)

    return damage


def as_pipe(file: str) -> Callable[[Path], object]:
    return lambda folder: ((folder / file).unlink(), os.mkfifo(folder / file))


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS, SIDECAR])
@pytest.mark.parametrize("damage", [link_out, as_pipe])
def test_a_file_that_is_a_link_or_a_pipe_is_refused(
    tmp_path: Path, damage: Callable[[str], Callable[[Path], object]], file: str
) -> None:
    folder = soft_prompt(tmp_path / "a", 1)
    damage(file)(folder)
    assert "is a link or no plain file" in refusal(read, folder).what


# --- what is let in ------------------------------------------------------------------------------


def read(folder: Path, most: int = MOST, **changed: Any) -> Content:
    return read_content(folder, None, capabilities(**changed), most)


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    content = read(soft_prompt(tmp_path / "a", 1))
    (part,) = content.parts
    assert torch.equal(torch.from_numpy(part.values), values_of(1))
    assert (part.kind, part.task, content.nbytes) == ("rows", TASK, NBYTES)
    prefix = read(soft_prompt(tmp_path / "p", 1, kind="prefix")).parts[0]
    assert (prefix.kind, prefix.values.shape) == ("prefix", (TOKENS, 64))
    assert read(soft_prompt(tmp_path / "n", 1, task=None)).parts[0].task is None


def test_a_revision_is_of_the_content_alone(tmp_path: Path) -> None:
    first = read(soft_prompt(tmp_path / "a", 1)).revision
    assert len(first) == 12
    assert read(soft_prompt(tmp_path / "b", 1)).revision == first
    others = [
        soft_prompt(tmp_path / "weights", 2),
        soft_prompt(tmp_path / "config", 1, added="by another tool"),
        soft_prompt(tmp_path / "sidecar", 1, task=Task("{text}", " ", "label")),
        soft_prompt(tmp_path / "no sidecar", 1, task=None),
    ]
    assert len({first, *(read(f).revision for f in others)}) == 5


def pickled(folder: Path) -> None:
    torch.save(load_safetensors(folder / WEIGHTS), folder / LEGACY_WEIGHTS)
    (folder / WEIGHTS).unlink()


def with_value(value: float) -> Callable[[Path], object]:
    rows = values_of(1)
    rows[1, 2] = value
    return lambda folder: (folder / WEIGHTS).write_bytes(save({TENSOR: rows}))


def several_tasks(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    config |= {"peft_type": "MULTITASK_PROMPT_TUNING", "num_tasks": 2, "num_ranks": 1}
    (folder / CONFIG).write_text(json.dumps(config))
    factors = {TASK_COLS: torch.ones(2, TOKENS, 1), TASK_ROWS: torch.ones(2, 1, 32)}
    (folder / WEIGHTS).write_bytes(save({TENSOR: values_of(1), **factors}))


def print_with(**changed: Any) -> dict[str, Any]:
    return {**capabilities().fingerprint, **changed}


WRONG: dict[str, tuple[dict[str, Any], Callable[[Path], object] | None, str]] = {
    "NaN": ({}, with_value(float("nan")), "NaN, infinite"),
    "infinite": ({}, with_value(float("inf")), "NaN, infinite"),
    "a pickle": ({}, pickled, "pickles are not served"),
    "no weights": ({}, lambda f: (f / WEIGHTS).unlink(), "there is no adapter_model.safetensors"),
    "a cut file": ({}, lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:50]), "truncated"),
    "a damaged sidecar": ({}, lambda f: (f / SIDECAR).write_text("{}"), "damaged sidecar"),
    "a huge sidecar": ({}, lambda f: os.truncate(f / SIDECAR, TEXT_LIMIT + 1), "foreword.json has"),
    "several tasks": ({}, several_tasks, "holds 2 tasks"),
    "another width": ({"width": 31}, None, "31 wide, the model tiny-model 32"),
    "another width of a prefix": (
        {"kind": "prefix", "width": 32, "num_layers": 1},
        None,
        "32 wide, the model tiny-model 64",
    ),
    "too many tokens": ({"tokens": 63}, None, "63 virtual tokens leave no room"),
    "another shape": ({"trained_for": print_with(num_layers=3)}, None, "num_layers is 2, not 3"),
    "another checkpoint": ({"trained_for": print_with(probe=[0.5] * 64)}, None, "its weights are others"),
    "a damaged fingerprint": ({"trained_for": {"probe": 1}}, None, "KeyError in its fingerprint"),
    "a fingerprint that is a list": ({"trained_for": [1]}, None, "TypeError in its fingerprint"),
    "other layers without a sidecar": ({"task": None, "num_layers": 3}, None, "num_layers is 2, not 3"),
    "a place nobody knows": ({"task": None, "peft_type": PLACED}, None, "nothing says where"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_refused_with_the_reason(tmp_path: Path, kind: str) -> None:
    facts, damage, reason = WRONG[kind]
    folder = soft_prompt(tmp_path / "a", 1, **facts)
    if damage is not None:
        damage(folder)
    assert reason in refusal(read, folder).what


def test_what_an_engine_does_not_know_of_itself_is_not_held_against_a_soft_prompt(tmp_path: Path) -> None:
    folder = soft_prompt(tmp_path / "a", 1, trained_for=print_with(num_layers=3))
    assert read(folder, fingerprint={}).parts
    assert (
        "takes no keys and values"
        in refusal(lambda: read(soft_prompt(tmp_path / "p", 1, kind="prefix"), kinds=("rows",), prefix_width=0)).what
    )


def test_a_soft_prompt_beyond_the_budget_is_refused_with_the_numbers(tmp_path: Path) -> None:
    folder = soft_prompt(tmp_path / "a", 1)
    assert read(folder, NBYTES).nbytes == NBYTES
    assert (
        refusal(read, folder, NBYTES - 1).what
        == f"the soft prompt has {NBYTES} bytes, all together may have {NBYTES - 1}"
    )
    os.truncate(folder / WEIGHTS, 1 << 30)  # sparse: a file of a GB, refused by its size before it is read
    assert "bytes, all together" in refusal(read, folder, 1 << 20).what


class Malice:
    """Unpickling it writes a file: the proof that code ran."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.proof),)


def test_a_pickle_is_not_even_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = soft_prompt(tmp_path / "a", 1)
    (folder / LEGACY_WEIGHTS).write_bytes(pickle.dumps(Malice(tmp_path / "proof")))
    monkeypatch.delattr(torch, "load")
    assert read(folder).parts, "the safetensors beside it are read"
    (folder / WEIGHTS).unlink()
    assert "pickles are not served" in refusal(read, folder).what
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("writes", [1, 2, 3])
def test_a_folder_that_changes_while_it_is_read_is_read_again_and_at_last_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """Weights of one training and the sidecar of another would answer wrongly without a word."""
    from foreword.artifact import confined

    folder = soft_prompt(tmp_path / "a", 0)
    seeds = iter(range(1, writes + 1))

    def read_slowly(path: Path) -> Any:
        found = read_adapter(path)
        for seed in itertools.islice(seeds, 1):
            soft_prompt(folder, seed)
        return found

    monkeypatch.setattr(confined, "read_adapter", read_slowly)
    if writes == len(confined.PAUSES):
        assert "written to while it was read" in refusal(read, folder).what
    else:
        assert read(folder).revision == read(soft_prompt(tmp_path / "b", writes)).revision


def test_a_folder_that_is_half_written_is_read_when_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from foreword.artifact import confined

    folder = soft_prompt(tmp_path / "a", 0)
    refusals = iter([ForewordError("half", "of it", "wait")])

    def read_early(path: Path) -> Any:
        for error in refusals:
            soft_prompt(folder, 1)
            raise error
        return read_adapter(path)

    monkeypatch.setattr(confined, "read_adapter", read_early)
    assert read(folder).parts


# --- ensembles -----------------------------------------------------------------------------------


def test_an_ensemble_is_written_whole_and_read_back(tmp_path: Path) -> None:
    sources = [soft_prompt(tmp_path / f"run {i}", i, tokens=i + 2) for i in range(3)]
    pickled(sources[1])
    folder = tmp_path / "made" / "all three"
    write_ensemble(folder, sources)
    members = read_ensemble(folder)
    assert is_ensemble(folder)
    assert not is_ensemble(sources[0])
    assert [read_adapter(m).prompt.tokens for m in members] == [2, 3, 4]
    assert all((m / WEIGHTS).exists() for m in members), "pickles become safetensors"
    assert [p.name for p in folder.parent.iterdir()] == ["all three"], "nothing half-made is left"
    content = read(folder)
    assert [p.values.shape[0] for p in content.parts] == [2, 3, 4]
    write_ensemble(tmp_path / "other order", sources[::-1])
    assert read(tmp_path / "other order").revision != content.revision
    soft_prompt(members[1], 9, tokens=3)
    assert read(folder).revision != content.revision


OTHER_CLASSES = Task(TASK.template, " ", "label", ("praise", "complaint"), ("thank you", "complaint"))
OTHER_COLUMNS = Task("{title} :", " ", "label", TASK.classes, TASK.words)
OTHER_WORDING = Task("So: {text} =", " ", "label", TASK.classes, TASK.words)


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        (OTHER_CLASSES, "other classes"),
        (OTHER_COLUMNS, "other columns"),
        (Task("{text}", " ", "label"), "no classes to average"),
        (None, "no classes to average"),
    ],
)
def test_members_that_do_not_belong_together_are_refused(tmp_path: Path, task: Task | None, reason: str) -> None:
    first, second = soft_prompt(tmp_path / "a", 1), soft_prompt(tmp_path / "b", 2, task=task)
    assert reason in refusal(write_ensemble, tmp_path / "both", [first, second]).what
    write_ensemble(tmp_path / "both", [first, soft_prompt(tmp_path / "c", 3, task=OTHER_WORDING)])
    shutil.rmtree(tmp_path / "both" / "members" / "01")
    shutil.copytree(second, tmp_path / "both" / "members" / "01")
    assert reason in refusal(read_ensemble, tmp_path / "both").what


def test_an_ensemble_of_nothing_or_over_something_is_not_written(tmp_path: Path) -> None:
    one = soft_prompt(tmp_path / "a", 1)
    assert "an ensemble of 1" in refusal(write_ensemble, tmp_path / "x", [one]).what
    assert "no adapter" in refusal(write_ensemble, tmp_path / "x", [one, tmp_path]).what
    assert "already" in refusal(write_ensemble, one, [one, one]).what
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "{}", '{"format": 1}', '{"format": 2, "members": ["members/00", "members/01"]}', "[" * 10_000,
        '{"format": 1, "members": "members/00"}', '{"format": 1, "members": [0, 1]}',
        '{"format": 1, "members": ["members/00"]}', '{"format": 1, "members": ["members/00", "members/00"]}',
        '{"format": 1, "members": ["members/00", "../a"]}', '{"format": 1, "members": ["members/00", "ABSOLUTE"]}',
        '{"format": 1, "members": ["members/00", "linked"]}', '{"format": 1, "members": ["members/00", "."]}',
        '{"format": 1, "members": ["members/00", "members/linked-file"]}',
        '{"format": 1, "members": ["members/00", "members/9"]}',
    ],
)  # fmt: skip
def test_a_damaged_or_leading_ensemble_is_refused(tmp_path: Path, content: str) -> None:
    sources = [soft_prompt(tmp_path / name, 1) for name in "ab"]
    write_ensemble(tmp_path / "both", sources)
    (tmp_path / "both" / "linked").symlink_to(sources[0])
    link_out(WEIGHTS)(soft_prompt(tmp_path / "both" / "members" / "linked-file", 1))
    (tmp_path / "both" / ENSEMBLE).write_text(content.replace("ABSOLUTE", str(sources[0])))
    refusal(read_ensemble, tmp_path / "both")


def test_an_ensemble_file_that_is_a_link_is_refused(tmp_path: Path) -> None:
    write_ensemble(tmp_path / "both", [soft_prompt(tmp_path / name, 1) for name in "ab"])
    link_out(ENSEMBLE)(tmp_path / "both")
    assert "is a link" in refusal(read, tmp_path / "both").what


# --- the hub -------------------------------------------------------------------------------------


def cached(cache: Path, commit: str, source: Path) -> Path:
    """Puts an adapter into the hub's cache as its client does: links to blobs, and main at this commit."""
    repo = cache / "models--user--complaints"
    snapshot = repo / "snapshots" / commit
    for folder in (repo / "refs", repo / "blobs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (repo / "refs" / "main").write_text(commit)
    for file in source.iterdir():
        blob = repo / "blobs" / f"{commit[:8]}-{file.name}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def test_a_hub_adapter_is_read_through_the_links_of_the_hubs_cache_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert hub.fetch  # the real client, offline as all tests are
    first = cached(tmp_path / "cache", "1" * 40, soft_prompt(tmp_path / "a", 1))
    store = Store(["user/complaints"])
    folder = store.find("user/complaints")
    assert folder == first
    content = read_content(folder, store.home(folder), capabilities(), MOST)
    assert torch.equal(torch.from_numpy(content.parts[0].values), values_of(1))
    assert "is a link" in refusal(read, folder).what, "the same folder, were it a local one"
    second = cached(tmp_path / "cache", "2" * 40, soft_prompt(tmp_path / "b", 2))
    assert store.find("user/complaints") == first
    store.renew("user/complaints")
    assert store.find("user/complaints") == second
    (second / WEIGHTS).unlink()
    (second / WEIGHTS).symlink_to(tmp_path / "a" / WEIGHTS)
    assert "is a link" in refusal(read_content, second, store.home(second), capabilities(), MOST).what


def test_a_hub_id_that_is_nowhere_is_an_error_about_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    error = refusal(Store(["user/nowhere"]).find, "user/nowhere")
    assert "user/nowhere" in error.where
