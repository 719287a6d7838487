"""The gateway's API over a real engine: answers equal the library's, and errors say what to mend."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import serving_gateway as sg
import serving_parts as parts
import tiny
from foreword.artifact.folder import read_adapter
from foreword.backbone.generate import Sampling, generate
from foreword.data.encode import Encoder
from foreword.evaluation.scoring import classify
from foreword.prompts.soft import SoftPrompt
from foreword.records import Task

COMPLETIONS, CHAT, CLASSIFY = "/v1/completions", "/v1/chat/completions", "/v1/classify"
GREEDY = {"temperature": 0, "max_tokens": 12}
NO_ROWS = SoftPrompt(torch.zeros(0, tiny.HIDDEN))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sg.make_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def served(model_folder: Path, store: Path) -> Iterator[sg.Served]:
    with sg.tiny_world(model_folder, store) as world, world.server() as running:
        yield running


class Library:
    """The same answers, one at a time and without any engine."""

    def __init__(self, store: Path) -> None:
        self.backbone, self.store = parts.backbone(), store

    def prompt(self, name: str) -> SoftPrompt:
        return read_adapter(self.store / name).prompt if name else NO_ROWS

    def encoder(self, prompt: SoftPrompt, task: Task) -> Encoder:
        virtual = range(tiny.VOCAB, tiny.VOCAB + prompt.tokens) if prompt.kind == "rows" else ()
        return Encoder(task, self.backbone.tokenizer, 500, 0, virtual)

    def text(self, name: str, text: str, tokens: int = 12, task: Task | None = None) -> str:
        prompt = self.prompt(name)
        encoder = self.encoder(prompt, task or Task("{text}", " ", "label"))
        context = encoder.context_ids({"text": text}, 400, 1, "")
        (ids,) = generate(self.backbone, prompt, [context], Sampling(max_new_tokens=tokens))
        found: str = self.backbone.tokenizer.decode(ids, skip_special_tokens=True)
        return found

    def probabilities(self, name: str, rows: list[dict[str, str]], task: Task) -> np.ndarray[Any, Any]:
        prompt = self.prompt(name)
        encoder = self.encoder(prompt, task)
        contexts = [encoder.context_ids(row, 400, 1, "") for row in rows]
        odds = classify(self.backbone, prompt, contexts, encoder.label_ids, "rows")
        if name and task.biases:
            odds = odds * np.exp(task.biases)
        return odds / odds.sum(1, keepdims=True)


@pytest.fixture(scope="module")
def library(store: Path) -> Library:
    return Library(store)


def token_ids(text: str) -> list[int]:
    ids: list[int] = tiny.tokenizer()(text)["input_ids"]
    return ids


def events(answer: Any) -> list[dict[str, Any]]:
    """The events of a stream, which ends as it should."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def refusal(answer: Any, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


# --- completions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "tweets", "other", "bare", "prefix"])
def test_texts_equal_the_librarys(served: sg.Served, library: Library, name: str) -> None:
    texts = ["my parcel is late", "thank you"]
    answer = served.post(COMPLETIONS, model=name or sg.BASE, prompt=texts, **GREEDY).json()
    assert [c["text"] for c in answer["choices"]] == [library.text(name, t) for t in texts]
    assert [c["index"] for c in answer["choices"]] == [0, 1]


def test_a_row_goes_through_the_soft_prompts_own_template(served: sg.Served, library: Library) -> None:
    answer = served.post(COMPLETIONS, model="writes", columns={"text": "the fox"}, **GREEDY).json()
    assert answer["choices"][0]["text"] == library.text("writes", "the fox", task=sg.FREE_TEXT)


def test_token_ids_equal_their_text(served: sg.Served) -> None:
    ids = token_ids("my parcel is late")
    by_text = served.post(COMPLETIONS, model="tweets", prompt="my parcel is late", **GREEDY).json()
    by_ids = served.post(COMPLETIONS, model="tweets", prompt=ids, **GREEDY).json()
    several = served.post(COMPLETIONS, model="tweets", prompt=[ids, ids], **GREEDY).json()
    assert by_ids["choices"] == by_text["choices"]
    assert [c["text"] for c in several["choices"]] == [by_text["choices"][0]["text"]] * 2
    assert "below 320" in refusal(served.post(COMPLETIONS, model="tweets", prompt=[320]))["message"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_stream_brings_the_same_text(served: sg.Served, path: str) -> None:
    said: dict[str, Any] = {"prompt": "my parcel"} if path == COMPLETIONS else {"messages": turns("my parcel")}
    body = {"model": "tweets", "n": 2, "seed": 7, "max_tokens": 12, **said}
    whole = served.post(path, **body).json()
    parted = events(served.post(path, stream=True, stream_options={"include_usage": True}, **body))
    assert parted[-1]["choices"] == []
    assert parted[-1]["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    for i in range(2):
        pieces = [c for e in parted for c in e["choices"] if c["index"] == i]
        assert [p["finish_reason"] for p in pieces][-1] == whole["choices"][i]["finish_reason"]
        texts = [p["text"] if path == COMPLETIONS else p["delta"]["content"] for p in pieces]
        choice = whole["choices"][i]
        assert "".join(texts) == (choice["text"] if path == COMPLETIONS else choice["message"]["content"])
    assert whole["choices"][0] != {**whole["choices"][1], "index": 0}


def test_usage_counts_virtual_tokens(served: sg.Served) -> None:
    text = len(token_ids("my parcel"))
    for name, virtual in [(sg.BASE, 0), ("tweets", 4), ("other", 7), ("prefix", 4)]:
        usage = served.post(COMPLETIONS, model=name, prompt="my parcel", max_tokens=3, ignore_eos=True).json()["usage"]
        assert usage["prompt_tokens"] == text + virtual
        assert usage["prompt_tokens_details"]["virtual_tokens"] == virtual
        assert usage["completion_tokens"] == 3
        assert usage["total_tokens"] == text + virtual + 3


def test_what_was_read_before_is_counted_as_cached(served: sg.Served) -> None:
    body = {"model": "tweets", "prompt": "the quick brown fox jumps over the lazy dog " * 3, "max_tokens": 5}
    served.post(COMPLETIONS, **body)
    details = served.post(COMPLETIONS, **body).json()["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] >= 16


def test_seeds_and_logit_bias_decide_what_is_drawn(served: sg.Served) -> None:
    body = {"model": "tweets", "prompt": "a", "max_tokens": 8}
    drawn = [served.post(COMPLETIONS, seed=s, **body).json()["choices"][0]["text"] for s in (1, 1, 2, -5, 2**63 - 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    biased = served.post(COMPLETIONS, logit_bias={"70": 100}, **body).json()["choices"][0]["text"]
    assert biased == tiny.tokenizer().decode([70] * 8)


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-6])
def test_a_temperature_too_low_to_divide_by_is_greedy(served: sg.Served, temperature: float) -> None:
    body = {"model": "tweets", "prompt": "a", "max_tokens": 8, "top_k": 15}
    texts = [served.post(COMPLETIONS, temperature=t, **body).json()["choices"][0]["text"] for t in (0, temperature)]
    assert texts[0] == texts[1]


def test_logprobs_are_those_of_the_tokens(served: sg.Served) -> None:
    body = {"model": "tweets", "temperature": 0, "max_tokens": 6}
    (choice,) = served.post(COMPLETIONS, prompt="my parcel", logprobs=3, **body).json()["choices"]
    found = choice["logprobs"]
    assert len({len(v) for v in found.values()}) == 1
    for token, logprob, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert top[token] == logprob == max(top.values())  # greedy
    assert found["text_offset"] == [sum(map(len, found["tokens"][:i])) for i in range(len(found["tokens"]))]
    streamed = events(served.post(COMPLETIONS, prompt="my parcel", logprobs=3, stream=True, **body))
    pieces = [e["choices"][0]["logprobs"] for e in streamed]
    assert {k: [x for p in pieces for x in p[k]] for k in found} == found


def test_chat_logprobs(served: sg.Served) -> None:
    body = {"model": "tweets", "messages": turns("hi"), "max_tokens": 4, "logprobs": True}
    (choice,) = served.post(CHAT, top_logprobs=2, **body).json()["choices"]
    assert all(len(t["top_logprobs"]) == 2 for t in choice["logprobs"]["content"])
    for token in choice["logprobs"]["content"]:
        assert token["bytes"] is None or bytes(token["bytes"]).decode() == token["token"]
    (choice,) = served.post(CHAT, **body).json()["choices"]
    assert all(t["top_logprobs"] == [] for t in choice["logprobs"]["content"])
    assert refusal(served.post(CHAT, model="tweets", messages=turns("hi"), top_logprobs=2))["param"] == "top_logprobs"


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_are_never_shown(served: sg.Served, stream: bool) -> None:
    body = {"model": "tweets", "prompt": "my parcel", "temperature": 0, "max_tokens": 30, "ignore_eos": True}
    text = served.post(COMPLETIONS, **body).json()["choices"][0]["text"]
    for at in range(4, len(text) - 3, 5):
        stop = text[at : at + 3]
        answer = served.post(COMPLETIONS, stop=[stop, "never there"], logprobs=0, stream=stream, **body)
        choices = [c for e in (events(answer) if stream else [answer.json()]) for c in e["choices"]]
        assert "".join(c["text"] for c in choices) == text[: text.index(stop)]
        assert choices[-1]["finish_reason"] == "stop"
        tokens = [t for c in choices for t in c["logprobs"]["tokens"]]
        assert "".join(tokens) in text[: text.index(stop)] or "\ufffd" in "".join(tokens)


def test_a_stop_token_ends_the_text_unseen(served: sg.Served) -> None:
    body = {"model": "tweets", "prompt": "my parcel", "temperature": 0, "max_tokens": 10, "logprobs": 0}
    whole = served.post(COMPLETIONS, **body).json()["choices"][0]
    at, token = next((i, ids[0]) for i, t in enumerate(whole["logprobs"]["tokens"]) if len(ids := token_ids(t)) == 1)
    cut = served.post(COMPLETIONS, stop_token_ids=[token], **body).json()["choices"][0]
    assert cut["finish_reason"] == "stop"
    assert cut["logprobs"]["tokens"] == whole["logprobs"]["tokens"][:at]


def test_the_window_is_held_with_its_numbers_told(served: sg.Served) -> None:
    error = refusal(served.post(COMPLETIONS, model="tweets", prompt="a", max_tokens=508))
    assert "512" in error["message"] and "5 (virtual" in error["message"] and "508" in error["message"]
    assert error["code"] == "context_length_exceeded"
    assert served.post(COMPLETIONS, model="tweets", prompt="a", max_tokens=507, stop="\ufffd").status_code == 200
    full = refusal(served.post(COMPLETIONS, model="tweets", prompt="a b" * 400))
    assert full["code"] == "context_length_exceeded"
    refusal(served.post(COMPLETIONS, model="tweets", prompt="a" * 512 * 33))


# --- chat -----------------------------------------------------------------------------------------


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]


def test_a_single_turn_goes_through_the_template(served: sg.Served, library: Library) -> None:
    body = {"model": "writes", "messages": turns("the fox"), **GREEDY}
    (choice,) = served.post(CHAT, **body).json()["choices"]
    assert choice["message"]["content"] == library.text("writes", "the fox", task=sg.FREE_TEXT)
    in_parts = [{"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "fox"}]}]
    assert served.post(CHAT, **{**body, "messages": in_parts}).json()["choices"] == [choice]


def test_without_a_chat_template_more_turns_are_refused(served: sg.Served) -> None:
    messages = [{"role": "developer", "content": "be brief"}, *turns("a", "b", "c")]
    assert "chat template" in refusal(served.post(CHAT, model="tweets", messages=messages))["message"]


# --- classification -------------------------------------------------------------------------------


def test_probabilities_equal_the_librarys(served: sg.Served, library: Library) -> None:
    rows = [{"text": t} for t in ("my parcel is late", "thank you for it", "x")]
    for name in ("tweets", "other", "prefix"):
        answer = served.post(CLASSIFY, model=name, input=rows).json()
        expected = library.probabilities(name, rows, parts.TASK)
        np.testing.assert_allclose([d["probs"] for d in answer["data"]], expected, atol=1e-5)
        assert [d["label"] for d in answer["data"]] == [parts.TASK.classes[i] for i in expected.argmax(1)]
        assert answer["data"][0]["probabilities"].keys() == set(parts.TASK.classes)
    by_text = served.post(CLASSIFY, model="tweets", input=[r["text"] for r in rows]).json()
    assert by_text["data"] == served.post(CLASSIFY, model="tweets", input=rows).json()["data"]


def test_an_ensemble_answers_with_the_mean(served: sg.Served, library: Library) -> None:
    rows = [{"text": "my parcel is late"}]
    (found,) = served.post(CLASSIFY, model="both", input=rows, members=True).json()["data"]
    each = [library.probabilities(name, rows, parts.TASK)[0] for name in ("tweets", "other")]
    np.testing.assert_allclose(found["probs"], np.mean(each, axis=0), atol=1e-5)
    np.testing.assert_allclose([m["probs"] for m in found["members"]], each, atol=1e-5)
    assert "members" not in served.post(CLASSIFY, model="both", input=rows).json()["data"][0]
    assert "ensemble" in refusal(served.post(COMPLETIONS, model="both", prompt="x"))["message"]


def test_the_plain_model_does_a_soft_prompts_task(served: sg.Served, library: Library) -> None:
    rows = [{"title": "late", "body": "my parcel"}]
    (found,) = served.post(CLASSIFY, model=sg.BASE, task_of="pairs", input=rows, logprobs=True).json()["data"]
    expected = library.probabilities("", rows, sg.PAIRS)[0]
    np.testing.assert_allclose(found["probs"], expected, atol=1e-5)
    logprobs = np.array([found["logprobs"][c] for c in sg.PAIRS.classes])
    np.testing.assert_allclose(np.exp(logprobs) / np.exp(logprobs).sum(), expected, atol=1e-5)


def test_what_cannot_be_classified_is_refused(served: sg.Served) -> None:
    def why(**body: Any) -> str:
        message: str = refusal(served.post(CLASSIFY, **body))["message"]
        return message

    assert "no classes" in why(model="writes", input="x")
    assert "task_of" in why(model=sg.BASE, input="x")
    assert "plain model" in why(model="tweets", task_of="tweets", input="x")
    assert "'text'" in why(model="tweets", input={"txt": "x"})
    assert "2 columns" in why(model="pairs", input="x")
    assert "text" in why(model="tweets", input=["x", " "])


# --- models, loading and unloading ----------------------------------------------------------------


def test_models_are_listed_and_described(served: sg.Served) -> None:
    listed = served.client.get("/v1/models").json()
    names = [m["id"] for m in listed["data"]]
    assert names == [sg.BASE, "bare", "both", "other", "pairs", "prefix", "tweets", "writes"]
    assert listed["data"][0]["parent"] is None and listed["data"][1]["parent"] == sg.BASE
    one = served.client.get("/v1/models/pairs").json()
    assert one["max_model_len"] == 512 - 4
    assert one["soft_prompt"]["columns"] == ["title", "body"]
    assert one["soft_prompt"]["classes"] == ["complaint", "praise"]
    assert one["soft_prompt"]["template"] == sg.PAIRS.template
    assert len(served.client.get("/v1/models/both").json()["soft_prompt"]["members"]) == 2
    revision = one["soft_prompt"]["revision"]
    assert served.client.get(f"/v1/models/pairs@{revision}").json()["id"] == "pairs"
    assert served.post(CLASSIFY, model=f"{sg.BASE}:tweets", input="x").status_code == 200
    assert refusal(served.client.get("/v1/models/nothing"), 404)["code"] == "model_not_found"


def test_models_are_listed_page_by_page(served: sg.Served) -> None:
    whole = [m["id"] for m in served.client.get("/v1/models").json()["data"]]
    found: list[str] = []
    more = True
    while more:
        page = served.client.get("/v1/models", params={"limit": 3, **({"after": found[-1]} if found else {})}).json()
        found += [m["id"] for m in page["data"]]
        more = page["has_more"]
    assert found == whole
    assert served.client.get("/v1/models", params={"after": "c"}).json()["data"][0]["id"] == "other"
    for limit in ("0", "x", "-1", "1" * 10):
        assert refusal(served.client.get("/v1/models", params={"limit": limit}))["param"] == "limit"


def test_soft_prompts_come_and_go(served: sg.Served, store: Path) -> None:
    parts.soft_prompt(store / "late", seed=9)
    loaded = served.post("/v1/load_soft_prompt", name="late").json()
    assert (loaded["tokens"], loaded["nbytes"]) == (4, 512)
    assert served.post(COMPLETIONS, model="late", prompt="x", max_tokens=2).status_code == 200
    assert served.post("/v1/load_soft_prompt", name="alias", path="late").json()["revision"] == loaded["revision"]
    for name in ("late", "alias"):
        assert served.post("/v1/unload_soft_prompt", name=name).json() == {"name": name, "unloaded": True}
        refusal(served.post(COMPLETIONS, model=name, prompt="x"), 404)
        refusal(served.post("/v1/unload_soft_prompt", name=name), 404)
    for path in ("../late", "/etc", "nothing"):
        assert str(store) not in refusal(served.post("/v1/load_soft_prompt", name="away", path=path))["message"]


# --- what is refused ------------------------------------------------------------------------------


def test_a_misspelt_field_is_named_with_the_nearest(served: sg.Served) -> None:
    error = refusal(served.post(COMPLETIONS, model="tweets", prompt="x", max_token=5))
    assert "max_token" in error["message"] and "'max_tokens'" in error["message"]
    assert (error["param"], error["code"]) == ("max_token", "unknown_parameter")


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        (COMPLETIONS, "best_of", 2), (COMPLETIONS, "echo", True), (COMPLETIONS, "suffix", "x"),
        (COMPLETIONS, "prompt_embeds", "AAAA"), (CHAT, "prompt_embeds", "AAAA"), (CHAT, "tools", [{}]),
        (CHAT, "tool_choice", "required"), (CHAT, "functions", [{}]), (CHAT, "audio", {}),
        (CHAT, "response_format", {"type": "json_object"}), (CHAT, "modalities", ["audio"]), (CHAT, "prediction", {}),
        (CHAT, "web_search_options", {}), (CHAT, "reasoning_effort", "high"), (CHAT, "chat_template", "{{ x }}"),
    ],
)  # fmt: skip
def test_what_nothing_here_can_do_is_refused_by_name(served: sg.Served, path: str, field: str, value: Any) -> None:
    said: dict[str, Any] = {"prompt": "x"} if path == COMPLETIONS else {"messages": turns("x")}
    error = refusal(served.post(path, model="tweets", **said, **{field: value}))
    assert error["param"] == field and error["code"] == "unsupported_parameter" and field in error["message"]


def test_harmless_fields_of_openais_are_taken(served: sg.Served) -> None:
    harmless = {
        "user": "u", "store": False, "metadata": {"a": "b"}, "service_tier": "auto", "tools": [], "tool_choice": "none",
        "response_format": {"type": "text"}, "modalities": ["text"], "audio": None, "parallel_tool_calls": True,
    }  # fmt: skip
    answer = served.post(CHAT, model="tweets", messages=turns("x"), max_completion_tokens=2, **harmless)
    assert answer.status_code == 200, answer.text
    old = {"best_of": 1, "echo": False, "suffix": "", "logit_bias": {}, "stop": None, "stream": None, "n": None}
    assert served.post(COMPLETIONS, model="tweets", prompt="x", **old).status_code == 200


BAD = [b"", b"[", b"null", b"[]", b"\xff\xfe", b"{" * 9999, b"[" * 99999, b'{"seed":1e400}',
       b'{"model":"tweets","prompt":NaN}', b'{"model":"tweets","prompt":"\\ud800"}']  # fmt: skip


@pytest.mark.parametrize("content", BAD)
def test_bad_json_is_refused(served: sg.Served, content: bytes) -> None:
    refusal(served.client.post(COMPLETIONS, content=content, headers={"Content-Type": "application/json"}))


def test_other_methods_paths_and_types(served: sg.Served) -> None:
    assert refusal(served.client.get(COMPLETIONS), 405)["type"] == "invalid_request_error"
    assert served.client.get(COMPLETIONS).headers["allow"] == "POST"
    refusal(served.client.get("/v1/nothing"), 404)
    refusal(served.client.get("/v1/models/../../etc/passwd"), 404)
    form = served.client.post(COMPLETIONS, data={"model": "tweets"})
    assert refusal(form, 415)["code"] == "not_json"
    assert refusal(served.post(COMPLETIONS, prompt="x"))["message"] == "model: Field required"
    assert "either" in refusal(served.post(COMPLETIONS, model="tweets"))["message"]
