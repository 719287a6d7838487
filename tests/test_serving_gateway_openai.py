"""OpenAI's own client against the gateway, many streams at once, and soft prompts exchanged under load."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

import serving_gateway as sg
import serving_parts as parts

STREAMS = 200


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sg.make_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def served(model_folder: Path, store: Path) -> Iterator[sg.Served]:
    keys = {"api_keys": ("user-key",), "admin_keys": ("admin-key",)}
    with sg.tiny_world(model_folder, store) as world, world.server(**keys) as running:
        yield running


@pytest.fixture
def client(served: sg.Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.address}/v1", api_key="user-key", max_retries=0, timeout=sg.SOON) as made:
        yield made


def test_models(client: openai.OpenAI) -> None:
    listed = {m.id: m for m in client.models.list()}
    assert {sg.BASE, "tweets", "both"} <= set(listed)
    assert client.models.retrieve("tweets").owned_by == "foreword"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


def test_completions(client: openai.OpenAI) -> None:
    found = client.completions.create(model="tweets", prompt=["a", "b"], n=2, max_tokens=5, logprobs=1, seed=1)
    assert [c.index for c in found.choices] == [0, 1, 2, 3]
    assert all(c.finish_reason in ("stop", "length") for c in found.choices)
    assert found.choices[0].logprobs and found.choices[0].logprobs.tokens
    assert found.usage and found.usage.prompt_tokens == 2 * (4 + 1)


def test_a_streamed_chat_with_its_usage(client: openai.OpenAI) -> None:
    said = [{"role": "user", "content": "my parcel"}]
    whole = client.chat.completions.create(model="tweets", messages=said, max_tokens=8, temperature=0)  # type: ignore[call-overload]
    stream = client.chat.completions.create(  # type: ignore[call-overload]
        model="tweets", messages=said, max_tokens=8, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    again = [*said, whole.choices[0].message.model_dump(), *said]
    with pytest.raises(openai.BadRequestError, match="chat template"):  # the tiny model has none: all was read
        client.chat.completions.create(model="tweets", messages=again)


def test_errors_are_the_clients_own_classes(client: openai.OpenAI, served: sg.Served) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nothing", prompt="x")
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="tweets", prompt="x", best_of=3)
    assert bad.value.param == "best_of" and bad.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="512"):
        client.completions.create(model="tweets", prompt="x", max_tokens=512)
    stranger = client.with_options(api_key="not-a-key")
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    with pytest.raises(openai.PermissionDeniedError):
        client.post("/load_soft_prompt", body={"name": "tweets"}, cast_to=object)
    assert served.gateway.running == set()


def test_many_streams_at_once_are_each_as_alone(served: sg.Served) -> None:
    async def text(client: openai.AsyncOpenAI, i: int, name: str) -> str:
        stream = await client.completions.create(
            model=name, prompt=f"my parcel {i % 20} is late", max_tokens=4, temperature=0, stream=True
        )
        return "".join([c.choices[0].text async for c in stream])

    async def all_of() -> tuple[list[str], list[str]]:
        names = [sg.BASE, "tweets", "other", "prefix"]
        async with openai.AsyncOpenAI(
            base_url=f"{served.address}/v1", api_key="user-key", max_retries=0, timeout=2 * sg.SOON,
            http_client=httpx.AsyncClient(limits=httpx.Limits(max_connections=STREAMS)),
        ) as client:  # fmt: skip
            alone = [await text(client, i, names[i % 4]) for i in range(20)]
            together = await asyncio.gather(*(text(client, i, names[i % 4]) for i in range(STREAMS)))
        return alone, list(together)

    alone, together = asyncio.run(all_of())
    assert together == alone * (STREAMS // 20)


def test_a_reload_under_load_switches_at_once(served: sg.Served, store: Path, tmp_path: Path) -> None:
    """Every answer is the old or the new one; whoever asks after the switch gets the new one."""
    parts.soft_prompt(store / "changing", seed=21)
    body = {"model": "changing", "prompt": "my parcel", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    admin = {"Authorization": "Bearer admin-key"}

    async def ask(client: httpx.AsyncClient) -> str:
        answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        found: str = answer.json()["choices"][0]["text"]
        return found

    async def work() -> tuple[str, list[str], list[str]]:
        async with httpx.AsyncClient(base_url=served.address, headers=admin, timeout=sg.SOON) as client:
            old = await ask(client)
            running = [asyncio.create_task(ask(client)) for _ in range(30)]
            shutil.rmtree(store / "changing")
            parts.soft_prompt(store / "changing", seed=22)
            switch = {"name": "changing", "load_inplace": True}
            switched = asyncio.create_task(client.post("/v1/load_soft_prompt", json=switch))
            during = [await ask(client) for _ in range(3)]
            assert (await switched).status_code == 200
            after = await asyncio.gather(*(ask(client) for _ in range(10)))
            return old, [*during, *await asyncio.gather(*running)], after

    old, during, after = asyncio.run(work())
    assert len(set(after)) == 1 and after[0] != old
    assert set(during) <= {old, after[0]} and old in during
