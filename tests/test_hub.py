"""Sharing through the real huggingface_hub and datasets clients, against a hub on the loopback interface.

The clients read ``HF_ENDPOINT`` when they are imported, so they run in processes of their own.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml

from conftest import ROWS, write_csv
from foreword.artifact.folder import CONFIG, LEGACY_WEIGHTS, TENSOR, WEIGHTS, read_adapter
from foreword.artifact.sidecar import SIDECAR
from foreword.errors import ForewordError
from hub_server import TOKEN, HubServer

T = TypeVar("T")
BASE = "maker/tiny-llama"
SHARED = {CONFIG, WEIGHTS, SIDECAR, "README.md", "recipe.yaml"}
TEXTS = [text for text, _ in ROWS[:4]]
NAMES = ["Unlabeled", "complaint", "no complaint"]


@dataclass(frozen=True)
class Result:
    """What the command line did."""

    code: int
    out: str
    err: str


# --- what runs in the client process ----------------------------------------------------------


def impatient() -> None:
    """The clients try again for up to a minute when a hub is down; here they do so at once."""
    wait = time.sleep
    time.sleep = lambda seconds: wait(min(float(seconds), 0.01))


def run_cli(argv: list[str], token: str, folder: str) -> Result:
    from foreword.cli.main import main

    os.environ["HF_TOKEN"] = token
    os.chdir(folder)
    sys.argv = ["foreword", *argv]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as e:
            code = int(e.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


def rows_and_predictions(path_or_id: str, revision: str | None) -> tuple[list[Any], list[Any]]:
    import foreword

    os.environ["HF_TOKEN"] = TOKEN
    loaded = foreword.load(path_or_id, revision=revision)
    return loaded.prompt.values.tolist(), [(p.label, dict(p.probabilities)) for p in loaded.predict(TEXTS)]


def predictions_of(path_or_id: str) -> list[Any]:
    import foreword

    os.environ["HF_TOKEN"] = TOKEN
    return [(p.label, dict(p.probabilities)) for p in foreword.load(path_or_id).predict(TEXTS)]


def read_split(name: str, split: str, revision: str | None) -> tuple[list[Any], dict[str, Any]]:
    from foreword.data.sources import read_table

    table = read_table(name, split, revision)
    return [dict(r) for r in table.rows], dict(table.class_names)


# --- processes and repositories ---------------------------------------------------------------


@dataclass(frozen=True)
class Client:
    """A process whose clients talk to one endpoint."""

    pool: ProcessPoolExecutor
    folder: Path

    def call(self, function: Callable[..., T], *args: Any) -> T:
        return self.pool.submit(function, *args).result(timeout=120)

    def cli(self, *argv: str | Path, token: str = TOKEN) -> Result:
        return self.call(run_cli, list(map(str, argv)), token, str(self.folder))

    def refusal(self, *argv: str | Path, token: str = TOKEN) -> tuple[str, str, str]:
        """The three lines of an expected error."""
        result = self.cli(*argv, token=token)
        assert result.code == 2, result
        lines = result.err.splitlines()
        assert len(lines) == 3, result.err
        what, where, fix = lines
        assert (what[:7], where[:7], fix[:7]) == ("error: ", "where: ", "  fix: ")
        return what[7:], where[7:], fix[7:]


def environment(endpoint: str, home: Path, **more: str) -> dict[str, str]:
    return {
        "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **more,
    }  # fmt: skip


def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), impatient)


@contextmanager
def client_with(env: Mapping[str, str], folder: Path) -> Iterator[Client]:
    with pytest.MonkeyPatch.context() as patch, _process() as pool:
        for key, value in env.items():
            patch.setenv(key, value)
        yield Client(pool, folder)


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def parquet(labels: list[int]) -> bytes:
    """A file as ``datasets`` writes it: the features lie in the schema's metadata."""
    features = {
        "Tweet text": {"dtype": "string", "_type": "Value"},
        "Label": {"names": NAMES, "_type": "ClassLabel"},
    }
    columns = {"Tweet text": [f"tweet {i}" for i in range(len(labels))], "Label": pyarrow.array(labels, "int64")}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns).replace_schema_metadata(about), buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def hub(model_folder: Path) -> Iterator[HubServer]:
    server = HubServer()
    server.add(f"models/{BASE}", files_of(model_folder))
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def broken(hub: HubServer) -> Iterator[HubServer]:
    """The hub while it answers 500 to everything."""
    hub.status = 500
    yield hub
    hub.status = None


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the client process stands, with the data beside it."""
    folder = tmp_path_factory.mktemp("place")
    write_csv(folder / "train.csv", ROWS)
    write_csv(folder / "test.csv", ROWS[4:])
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf-home")


@pytest.fixture(scope="module")
def client(hub: HubServer, place: Path, home: Path) -> Iterator[Client]:
    with client_with(environment(hub.url, home), place) as made:
        yield made


@pytest.fixture(scope="module")
def run(client: Client, place: Path) -> Path:
    """A run trained by the command line on a backbone that came from the hub."""
    result = client.cli(
        "train", "--model", BASE, "--data", "train.csv", "--eval-data", "test.csv", "--text", "Tweet text",
        "--label", "Label", "--out", "runs/x", "prompt.virtual_tokens=4", "train.epochs=2", "data.seed=3",
    )  # fmt: skip
    assert result.code == 0, result.err
    return place / "runs" / "x"


# --- there and back ---------------------------------------------------------------------------


def test_a_pushed_run_loads_by_its_hub_id_and_predicts_the_same(hub: HubServer, client: Client, run: Path) -> None:
    result = client.cli("push", run, "user/complaints")
    assert result.code == 0, result.err
    assert f"{hub.url}/user/complaints/commit/" in result.out
    here, there = (client.call(rows_and_predictions, p, None) for p in (str(run), "user/complaints"))
    assert here == there
    assert here[0] == read_adapter(run).prompt.values.tolist()


def test_only_the_files_that_make_the_adapter_are_shared(hub: HubServer, client: Client, run: Path) -> None:
    kept_back = {p.name for p in run.iterdir()} - SHARED
    assert {"metrics.jsonl", "checkpoint.safetensors", "report.html"} <= kept_back, "else the test shows nothing"
    assert client.cli("push", run, "user/files").code == 0
    pushed = hub.repos["models/user/files"]
    assert {k: v for k, v in pushed.commits[pushed.refs["main"]].items() if k != ".gitattributes"} == {
        name: (run / name).read_bytes() for name in SHARED
    }


def test_a_pushed_ensemble_comes_back_with_all_its_members(
    hub: HubServer, client: Client, run: Path, place: Path
) -> None:
    folder = place / "runs" / "both"
    assert client.cli("combine", run, run, "--how", "ensemble", "--out", folder).code == 0
    assert client.cli("push", folder, "user/both").code == 0
    pushed = hub.repos["models/user/both"]
    names = {k for k in pushed.commits[pushed.refs["main"]] if k != ".gitattributes"}
    members = {f"members/0{i}/{name}" for i in (0, 1) for name in (CONFIG, WEIGHTS, SIDECAR)}
    assert names == {"ensemble.json", *members}
    here, there = (client.call(predictions_of, p) for p in (str(folder), "user/both"))
    assert here == there
    assert "2 soft prompts" in client.cli("show", "user/both").out
    found = client.cli("evaluate", "user/both", "--data", "test.csv")
    assert (found.code, "soft prompt" in found.out) == (0, True), found.err


def test_the_module_pushes_as_a_command(hub: HubServer, run: Path, home: Path) -> None:
    """`python -m foreword`, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "foreword", "push", str(run), "user/command", "--message", "hello"],
        env={**os.environ, **environment(hub.url, home)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "models/user/command" in hub.repos
    assert "user/command" in done.stdout


def test_the_pushed_card_opens_with_yaml_that_names_the_base(hub: HubServer, client: Client, run: Path) -> None:
    hub.yaml.clear()
    assert client.cli("push", run, "user/card").code == 0
    (content,) = hub.yaml  # what the client sent to be checked
    front = yaml.safe_load(content.split("---")[1])
    assert front["base_model"] == BASE
    assert front["library_name"] == "peft"


@pytest.mark.parametrize(("flags", "private"), [([], False), (["--public"], False), (["--private"], True)])
def test_the_repository_is_as_private_as_asked(
    hub: HubServer, client: Client, run: Path, flags: list[str], private: bool
) -> None:
    hub.repos.pop("models/user/visible", None)
    assert client.cli("push", run, "user/visible", *flags).code == 0
    assert hub.repos["models/user/visible"].private is private


def test_a_private_push_to_a_public_repository_is_refused(hub: HubServer, client: Client, run: Path) -> None:
    repo = hub.add("models/user/public", {})
    assert "public" in client.refusal("push", run, "user/public", "--private")[0]
    assert list(repo.commits.values()) == [{}]


def test_a_private_adapter_needs_the_right_token(hub: HubServer, client: Client, run: Path) -> None:
    hub.add("models/user/private", files_of(run), private=True)
    what, where, fix = client.refusal("evaluate", "user/private", "--data", "test.csv", token="hf_wrong")
    assert ("401" in what, "user/private" in where, "HF_TOKEN" in fix) == (True, True, True)
    assert client.cli("evaluate", "user/private", "--data", "test.csv").code == 0


def test_a_revision_loads_as_it_was(hub: HubServer, client: Client, run: Path) -> None:
    repo = hub.add("models/user/moving", files_of(run))
    first = repo.refs["main"]
    other = {**json.loads((run / SIDECAR).read_text(encoding="utf-8"))}
    other["task"]["classes"] = ["yes", "no"]
    repo.commit({SIDECAR: json.dumps(other).encode()})
    newest, before = (client.call(rows_and_predictions, "user/moving", r)[1] for r in (None, first))
    assert set(newest[0][1]) == {"yes", "no"}
    assert set(before[0][1]) == {"complaint", "no complaint"}


def test_pushing_again_goes_on_in_the_same_repository(hub: HubServer, client: Client, run: Path) -> None:
    assert [client.cli("push", run, "user/twice").code for _ in range(2)] == [0, 0]
    assert hub.repos["models/user/twice"].commits


def test_a_pickled_adapter_is_shared_as_safetensors(hub: HubServer, client: Client, run: Path, tmp_path: Path) -> None:
    torch.save({TENSOR: read_adapter(run).prompt.values}, tmp_path / LEGACY_WEIGHTS)
    (tmp_path / CONFIG).write_bytes((run / CONFIG).read_bytes())
    assert client.cli("push", tmp_path, "user/legacy").code == 0
    repo = hub.repos["models/user/legacy"]
    pushed = repo.commits[repo.refs["main"]]
    assert pushed[WEIGHTS] == (run / WEIGHTS).read_bytes()
    assert LEGACY_WEIGHTS not in pushed


def test_what_cannot_be_loaded_is_never_pushed(hub: HubServer, client: Client, run: Path, tmp_path: Path) -> None:
    for name in (CONFIG, WEIGHTS):
        (tmp_path / name).write_bytes((run / name).read_bytes()[:-9])
    client.refusal("push", tmp_path, "user/damaged")
    assert "models/user/damaged" not in hub.repos


# --- refusals ---------------------------------------------------------------------------------


def test_a_push_with_a_wrong_token_says_401(hub: HubServer, client: Client, run: Path) -> None:
    what, where, fix = client.refusal("push", run, "user/new", token="hf_wrong")
    assert ("401" in what, "user/new" in where, "HF_TOKEN" in fix) == (True, True, True)
    assert "models/user/new" not in hub.repos


EVALUATE = ("--data", "test.csv")
TRAIN = ("--data", "train.csv", "--text", "Tweet text", "--label", "Label", "--out", "runs/never")


@pytest.mark.parametrize(
    "argv", [("evaluate", "user/missing", *EVALUATE), ("train", "--model", "user/missing", *TRAIN)]
)
def test_a_missing_repository_says_404(client: Client, place: Path, argv: tuple[str, ...]) -> None:
    what, where, _ = client.refusal(*argv)
    assert "no such repository" in what
    assert "user/missing" in where
    assert not (place / "runs/never").exists()


def test_a_missing_revision_is_named_as_such(hub: HubServer, client: Client, run: Path) -> None:
    hub.add("models/user/known", files_of(run))
    what, where, _ = client.refusal("evaluate", "user/known", *EVALUATE, "--revision", "nowhere")
    assert what == "no such revision"
    assert "user/known" in where


def test_a_repository_without_an_adapter_says_so(client: Client, run: Path) -> None:
    assert "no adapter" in client.refusal("evaluate", BASE, *EVALUATE)[0]


def test_a_backbone_behind_a_token_says_401(hub: HubServer, client: Client, model_folder: Path) -> None:
    hub.add("models/maker/private", files_of(model_folder), private=True)
    what, where, fix = client.refusal("train", "--model", "maker/private", *TRAIN, token="hf_wrong")
    assert ("401" in what, "maker/private" in where, "HF_TOKEN" in fix) == (True, True, True)


@pytest.mark.parametrize(
    "argv",
    [
        ("evaluate", "user/any", *EVALUATE),
        ("push", "runs/x", "user/any"),
        ("train", "--model", "user/any", *TRAIN),
    ],
    ids=lambda argv: argv[0],
)
@pytest.mark.usefixtures("run")
def test_a_hub_in_trouble_says_500(broken: HubServer, client: Client, argv: tuple[str, ...]) -> None:
    what, where, fix = client.refusal(*argv)
    assert ("500" in what, "user/any" in where, "later" in fix) == (True, True, True)


@pytest.mark.parametrize("repo", ["complaints", "./runs/y", "user/two words", "a/b/c", "user/x..y"])
def test_a_push_to_what_is_no_hub_id_asks_no_hub(hub: HubServer, client: Client, run: Path, repo: str) -> None:
    hub.requests.clear()
    assert client.refusal("push", run, repo)[0] == "not a hub id"
    assert not [r for r in hub.requests if "repos/create" in r or "commit" in r]


WRONG_PATHS = ["./nowhere", "runs/nowhere", "../nowhere/run", "/nowhere/run", "~/nowhere", "nowhere", "no where/run"]


@pytest.mark.parametrize("path", WRONG_PATHS)
@pytest.mark.usefixtures("run")
def test_a_wrong_path_of_an_adapter_is_never_asked_of_the_hub(hub: HubServer, client: Client, path: str) -> None:
    hub.requests.clear()
    what, where, _ = client.refusal("evaluate", path, *EVALUATE)
    assert what == "no such run or adapter folder"
    assert where == path
    assert not hub.requests


@pytest.mark.parametrize("path", ["./nowhere", "runs/nowhere", "../nowhere/model", "/nowhere", "a/b/c", "x.gguf"])
@pytest.mark.usefixtures("run")
def test_a_wrong_path_of_a_model_is_never_asked_of_the_hub(hub: HubServer, client: Client, path: str) -> None:
    hub.requests.clear()
    what, where, _ = client.refusal("train", "--model", path, *TRAIN)
    assert what == "no such model folder or .gguf file"
    assert where == path
    assert not hub.requests


# --- without the hub --------------------------------------------------------------------------


def test_no_network_is_said_in_three_lines(place: Path, run: Path, tmp_path: Path) -> None:
    closed = HubServer()  # its port is free again once it is closed
    closed.shutdown()
    closed.server_close()
    with client_with(environment(closed.url, tmp_path), place) as client:
        for argv in (
            ["push", run, "user/any"],
            ["evaluate", "user/any", *EVALUATE],
            ["train", "--model", "user/any", *TRAIN],
        ):
            what, where, fix = client.refusal(*argv)
            assert "cannot be reached" in what
            assert "user/any" in where
            assert "network" in fix


def test_offline_what_was_fetched_loads_and_the_rest_is_refused(
    hub: HubServer, client: Client, place: Path, home: Path, run: Path
) -> None:
    hub.add("models/user/cached", files_of(run))
    before = client.call(rows_and_predictions, "user/cached", None)
    hub.requests.clear()
    with client_with(environment(hub.url, home, HF_HUB_OFFLINE="1"), place) as offline:
        assert offline.call(rows_and_predictions, "user/cached", None) == before
        for argv in (["push", run, "user/any"], ["evaluate", "user/any", *EVALUATE]):
            what, where, fix = offline.refusal(*argv)
            assert "cannot be reached" in what
            assert "user/any" in where
            assert "HF_HUB_OFFLINE" in fix
    assert not hub.requests


# --- data sets --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tweets(hub: HubServer) -> str:
    """A data set as RAFT's: the test split's labels are all "Unlabeled". Gives its first commit."""
    files = {
        "data/train-00000-of-00001.parquet": parquet([1, 2, 1]),
        "data/test-00000-of-00001.parquet": parquet([0, 0]),
    }
    repo = hub.add("datasets/user/tweets", files)
    first = repo.refs["main"]
    repo.commit({"data/train-00000-of-00001.parquet": parquet([2, 2, 1, 1])})
    return first


def test_a_hub_data_set_brings_its_class_names_at_the_revision_asked(client: Client, tweets: str) -> None:
    rows, class_names = client.call(read_split, "user/tweets", "train", tweets)
    assert [r["Label"] for r in rows] == [1, 2, 1]
    assert rows[0]["Tweet text"] == "tweet 0"
    assert class_names == {"Label": tuple(NAMES)}
    assert len(client.call(read_split, "user/tweets", "train", None)[0]) == 4


@pytest.mark.usefixtures("tweets")
def test_a_split_whose_labels_are_hidden_is_refused_for_scoring(client: Client, run: Path) -> None:
    what, where, _ = client.refusal("evaluate", run, "--data", "user/tweets", "--split", "test")
    assert "no real labels" in what
    assert "user/tweets, split test" in where
    labelled = client.cli("evaluate", run, "--data", "user/tweets", "--split", "train")
    assert labelled.code == 0, labelled.err


@pytest.mark.parametrize(("name", "split"), [("user/missing", "train"), ("user/tweets", "nowhere")])
@pytest.mark.usefixtures("tweets")
def test_a_missing_data_set_or_split_is_refused_by_name(client: Client, name: str, split: str) -> None:
    with pytest.raises(ForewordError) as caught:
        client.call(read_split, name, split, None)
    assert name in caught.value.where
