"""The gateway as a subprocess, the soft prompts it serves, the texts it is asked, and the right answers.

The only file of the serving benchmark that reaches into Foreword's internals.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch

from foreword.artifact.folder import CONFIG, WEIGHTS, weights_bytes, write_adapter
from foreword.artifact.peft_types import TENSOR, peft_config
from foreword.artifact.sidecar import SIDECAR, Sidecar
from foreword.backbone.attach import attached, no_prompt
from foreword.backbone.load import Backbone, load_backbone
from foreword.config import DataConfig, ModelConfig, PromptConfig
from foreword.data.encode import Encoder
from foreword.data.sources import rows_table
from foreword.data.template import parse
from foreword.evaluation.scoring import classify
from foreword.jobs.data import read_splits
from foreword.jobs.derive import backbone_facts
from foreword.jobs.prepare import embedded, make_encoder
from foreword.prompts.soft import SoftPrompt
from foreword.records import Task

SERVE = (sys.executable, "-m", "foreword", "serve")
START_SECONDS = 600.0
"""Most that a gateway may take until it answers (vLLM compiles first)."""
STOP_SECONDS = 60.0
NOISE = 0.02
"""Of a soft prompt's rows around real embeddings, so that no two are alike."""
TIE = 1e-3
"""Two logits so close may change places when a batch is added up in another order (float32)."""
HANDLES = 10**6


@dataclass(frozen=True)
class Ask:
    """One request: a text for a soft prompt, or for the plain model (None)."""

    prompt: str | None
    text: str


@dataclass(frozen=True)
class Right:
    """What one-at-a-time generation writes, and how far each token was ahead of the second likeliest."""

    ids: tuple[int, ...]
    gaps: tuple[float, ...]


@dataclass
class Setting:
    """What every contender is made from: a backbone, a task with its texts, soft prompts by name."""

    backbone: Backbone
    task: Task
    messages: tuple[str, ...]
    virtual_tokens: int
    seed: int = 0
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def column(self) -> str:
        """The template's only column."""
        return parse(self.task.template).fields[0].column

    def asks(self, count: int, prompts: Sequence[str | None]) -> list[Ask]:
        """So many requests, the prompts in turn.

        The messages are the same at every call, but each begins with a handle that never comes again, as tweets do:
        no cache of keys and values may know a text from an earlier round, and lengths stay comparable.
        """
        chosen = itertools.islice(itertools.cycle(self._shuffled), count)
        named = zip(itertools.cycle(prompts), chosen, strict=False)
        return [Ask(p, f"@{(next(self._numbers) * 7919) % HANDLES:06d} {m}") for p, m in named]

    @cached_property
    def _shuffled(self) -> list[str]:
        return random.Random(self.seed).sample(self.messages, len(self.messages))

    def rendered(self, text: str) -> str:
        """The text through the template."""
        return parse(self.task.template).render({self.column: text})

    def rows(self, name: str) -> torch.Tensor:
        """The soft prompt of this name ``[P, H]``: embeddings of random tokens with a little noise."""
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed} {name}").getrandbits(62))
        ids = torch.randint(self.backbone.vocab_size, (self.virtual_tokens,), generator=generator).tolist()
        rows = embedded(self.backbone, ids)
        return rows + NOISE * rows.std() * torch.randn(rows.shape, generator=generator)

    def encoder(self, prompt: str | None) -> Encoder:
        """Of the task's rows, behind the soft prompt or without one."""
        return make_encoder(self.task, self.backbone, self.virtual_tokens if prompt else 0)

    def context(self, ask: Ask) -> tuple[int, ...]:
        """Its token ids, virtual ones in front."""
        (ids,) = self.encoder(ask.prompt).contexts(rows_table([{self.column: ask.text}]))
        return ids

    def soft(self, prompt: str | None) -> SoftPrompt:
        """The soft prompt as a value; an empty one for the plain model."""
        return SoftPrompt(self.rows(prompt)) if prompt else no_prompt(self.backbone)


def prepare(model: str, data: str, text: str, label: str, virtual_tokens: int, split: str = "test") -> Setting:
    """Loads the backbone in float32 on the CPU and reads the rows with the guide's template."""
    backbone = load_backbone(ModelConfig(model, device="cpu", dtype="float32"))
    # An answer has as many tokens as were asked for; whoever may end earlier is told the end token.
    backbone.model.generation_config.eos_token_id = None
    splits = read_splits(DataConfig(path=data, split=split, template=f"Tweet text : {{{text}}} Label :", label=label))
    return Setting(backbone, splits.task, tuple(str(r[text]) for r in splits.train.rows), virtual_tokens)


def names(count: int) -> list[str]:
    """Names of the soft prompts."""
    return [f"p{i:05d}" for i in range(count)]


def write_prompts(setting: Setting, folder: Path, wanted: Mapping[str, str] | Sequence[str]) -> None:
    """Adapter folders that both Foreword and PEFT load: ``{folder's name: soft prompt}``, or names of both.

    The first is written by Foreword; the others are copies with weights of their own, which is quick for thousands.
    """
    content = wanted if isinstance(wanted, Mapping) else {name: name for name in wanted}
    backbone = setting.backbone
    copies: dict[str, bytes] = {}
    for name, prompt in content.items():
        tensors = {TENSOR: setting.rows(prompt)}
        target = folder / name
        if copies:
            target.mkdir(parents=True)
            for file, data in {WEIGHTS: weights_bytes(tensors), **copies}.items():
                (target / file).write_bytes(data)
            continue
        config = peft_config(
            "PROMPT_TUNING", tensors, model_config=backbone.config, base=backbone.name, revision=None,
            prompt=PromptConfig(virtual_tokens=setting.virtual_tokens),
        )  # fmt: skip
        write_adapter(target, tensors, config, Sidecar(setting.task, backbone_facts(backbone)))
        copies = {file: (target / file).read_bytes() for file in (SIDECAR, CONFIG)}


def right_text(setting: Setting, ask: Ask, tokens: int) -> Right:
    """Greedy tokens of one request by itself through transformers' generate; end tokens end nothing."""
    model = setting.backbone.model
    ids = torch.tensor([setting.context(ask)])
    with torch.no_grad(), attached(setting.backbone, setting.soft(ask.prompt)):
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
            pad_token_id=setting.backbone.end_id, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    best = [logits[0].topk(2).values.tolist() for logits in out.logits]
    return Right(tuple(out.sequences[0, ids.shape[1] :].tolist()), tuple(a - b for a, b in best))


def right_probabilities(setting: Setting, ask: Ask) -> list[float]:
    """Label probabilities of one request by itself, as the library computes them."""
    label_ids = setting.encoder(ask.prompt).label_ids
    found = classify(setting.backbone, setting.soft(ask.prompt), [setting.context(ask)], label_ids, "rows")
    return [float(p) for p in found[0]]


def verdict(setting: Setting, right: Right, text: str) -> str:
    """``equal``, ``tie`` (they part where two tokens are as good as equally likely) or ``wrong``."""
    decode = setting.backbone.tokenizer.decode
    if text == decode(right.ids, skip_special_tokens=True):
        return "equal"
    for end, gap in enumerate(right.gaps, 1):
        begun = decode(right.ids[:end], skip_special_tokens=True).rstrip("\ufffd")
        if not text.startswith(begun):
            return "tie" if gap < TIE else "wrong"
    return "wrong"  # it goes on, or its last characters differ


class Gateway:
    """``foreword serve`` on a port of its own, used inside a ``with`` block.

    Args:
        model: backbone.
        prompts: folder of adapter folders.
        threads: of each process.
        options: more of its command line.
    """

    def __init__(self, model: str, prompts: Path, threads: int, options: Sequence[str] = ()) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [
            *SERVE, "--model", model, "--prompts", str(prompts), "--port", str(self.port),
            "--threads", str(threads), *options,
        ]  # fmt: skip
        self.threads = threads

    def __enter__(self) -> Gateway:
        self._output = tempfile.TemporaryFile()
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            self.command, stdout=self._output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            self.start_s = self._wait()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def memory(self) -> dict[str, int]:
        """Bytes of the gateway and all its workers, as ``held`` counts them."""
        whole = psutil.Process(self.process.pid)
        return held([whole, *whole.children(recursive=True)])

    def idle_cpu(self, seconds: float) -> float:
        """Processors that its processes use while nobody asks for anything."""
        whole = psutil.Process(self.process.pid)
        found = [whole, *whole.children(recursive=True)]
        before = sum(sum(p.cpu_times()[:2]) for p in found)
        time.sleep(seconds)
        return (sum(sum(p.cpu_times()[:2]) for p in found) - before) / seconds

    def rss_by_process(self) -> dict[str, int]:
        """Bytes resident: of the gateway, and of its workers together."""
        whole = psutil.Process(self.process.pid)
        workers = sum(p.memory_info().rss for p in whole.children(recursive=True))
        return {"gateway": whole.memory_info().rss, "workers": workers}

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """One call that must succeed."""
        response = httpx.post(f"{self.url}{path}", json=dict(body), timeout=STOP_SECONDS, trust_env=False)
        if response.status_code != httpx.codes.OK:
            raise RuntimeError(f"{path} answered {response.status_code}: {response.text[:500]}")
        return response.json()

    def get(self, path: str) -> httpx.Response:
        """One call, whatever it answers."""
        return httpx.get(f"{self.url}{path}", timeout=STOP_SECONDS, trust_env=False)

    def said(self, count: int = 4000) -> str:
        """The last characters of its output."""
        self._output.seek(0)
        return self._output.read().decode(errors="replace")[-count:]

    def _wait(self) -> float:
        """Seconds until it is healthy."""
        began = time.perf_counter()
        while (waited := time.perf_counter() - began) < START_SECONDS:
            if self.process.poll() is not None:
                raise RuntimeError(f"the gateway ended with {self.process.returncode}: {self.said()}")
            try:
                if self.get("/health").status_code == httpx.codes.OK:
                    return waited
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise RuntimeError(f"the gateway was not ready in {START_SECONDS:.0f} s: {self.said()}")

    def _end(self) -> None:
        """Ends it kindly, then with what it left."""
        self.process.terminate()
        try:
            self.process.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._output.close()


def end_kindly() -> None:
    """Lets a script that is told to end (``kill``, ``timeout``) end its gateways first."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def free_port() -> int:
    """A port of the loopback that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def held(processes: Sequence[psutil.Process]) -> dict[str, int]:
    """Bytes of processes: resident, with shared pages divided (pss), their own alone (uss)."""
    found = [p.memory_full_info() for p in processes]
    return {key: sum(getattr(info, key) for info in found) for key in ("rss", "pss", "uss")}
