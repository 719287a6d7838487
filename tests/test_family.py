"""Every method, placement and start through the whole job: train, write, load, predict, resume, PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import foreword
import tiny
from conftest import ROWS
from foreword.artifact.folder import CONFIG, WEIGHTS, read_adapter
from foreword.artifact.peft_types import PLACED
from foreword.backbone.generate import Sampling
from foreword.checks import check
from foreword.config import Recipe
from foreword.errors import ForewordError
from foreword.evaluation.scoring import score_branches
from foreword.jobs import training
from foreword.jobs.derive import compile_run
from foreword.prompts.methods.registry import METHODS
from foreword.recipe import merge

TEXTS = [t for t, _ in ROWS]
DATA = [{"text": t, "label": y} for t, y in ROWS]
TEMPLATE = "Tweet : {text} Label :"
PROMPTS: dict[str, dict[str, Any]] = {
    "prompt-tuning": {},
    "p-tuning": {"encoder_size": 16},
    "p-tuning-lstm": {"method": "p-tuning", "encoder": "lstm", "encoder_size": 16},
    "residual": {"encoder_size": 8},
    "low-rank": {"rank": 2},
    "prefix-tuning": {},
    "prefix-projection": {"method": "prefix-tuning", "projection": True, "encoder_size": 16},
    "context-tuning": {},
    "multitask": {"rank": 2},
    "cpt": {"virtual_tokens": 60},
    "cartridge": {},
}
TYPES = {
    "prompt-tuning": "PROMPT_TUNING", "p-tuning": "P_TUNING", "p-tuning-lstm": "P_TUNING", "residual": "PROMPT_TUNING",
    "low-rank": "PROMPT_TUNING", "prefix-tuning": "PREFIX_TUNING", "prefix-projection": "PREFIX_TUNING",
    "context-tuning": "PREFIX_TUNING",
    "multitask": "MULTITASK_PROMPT_TUNING", "cpt": "CPT", "cartridge": "CARTRIDGE",
}  # fmt: skip
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),  # PEFT's, at its generate
]


def settings(name: str) -> dict[str, Any]:
    return {"method": name, "virtual_tokens": 4, **PROMPTS[name]}


def train(model: Path, out: Path, prompt: dict[str, Any], **more: Any) -> foreword.Foreword:
    steps = {"epochs": 2, "lr": 0.01, "batch_size": 4, **more.pop("train", {})}
    return foreword.train(
        model=str(model), data=more.pop("data", DATA), label="label", template=more.pop("template", TEMPLATE),
        out=out, prompt=prompt, train=steps, **more,
    )  # fmt: skip


def weights(folder: Path) -> bytes:
    return (folder / WEIGHTS).read_bytes()


# --- every method -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROMPTS)
def test_a_method_trains_writes_and_predicts(model_folder: Path, tmp_path: Path, name: str) -> None:
    task = train(model_folder, tmp_path / "run", settings(name), eval_data=DATA[:4])
    adapter = read_adapter(tmp_path / "run")
    assert adapter.config["peft_type"] == TYPES[name]
    assert {"accuracy", "baselines"} <= set(task.scores)
    losses = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    epochs = [[e["loss"] for e in losses if e.get("epoch") == n] for n in (1, 2)]
    assert sum(epochs[1]) < sum(epochs[0]), "it learns"
    loaded = foreword.load(tmp_path / "run")
    together = loaded.predict(TEXTS)
    assert together == task.predict(TEXTS)
    for text, found in zip(TEXTS[:3], together, strict=False):
        (alone,) = loaded.predict([text])
        assert alone.probabilities == pytest.approx(found.probabilities, abs=1e-5)
    written = loaded.generate(TEXTS[:3])
    assert written == [loaded.generate([t])[0] for t in TEXTS[:3]]


@pytest.mark.parametrize("name", PROMPTS)
def test_stock_peft_says_the_same_of_a_trained_method(model_folder: Path, tmp_path: Path, name: str) -> None:
    task = train(model_folder, tmp_path / "run", settings(name))
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "run").eval()
    bare = foreword.load(tmp_path / "run").encoder.contexts(_table(TEXTS[0]))[0]
    ids = torch.tensor([[i for i in bare if i < tiny.VOCAB]])
    mask = torch.ones_like(ids)
    if name == "multitask":  # whose generate wants the task's number, and its forward too
        with torch.no_grad():
            top = int(theirs(input_ids=ids, attention_mask=mask, task_ids=torch.tensor([0])).logits[0, -1].argmax())
        assert task.generate([TEXTS[0]], Sampling(max_new_tokens=1))[0] == said([top])
        return
    generated = theirs.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert task.generate([TEXTS[0]], Sampling(max_new_tokens=4))[0] == said(generated[0, ids.shape[1] :])


@pytest.mark.parametrize("name", PROMPTS)
def test_a_method_resumed_is_uninterrupted_bit_for_bit(
    model_folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(model_folder, tmp_path / "whole", settings(name))
    with monkeypatch.context() as patch:
        patch.setattr(training, "interruptible", _after(2))
        with pytest.raises(KeyboardInterrupt):
            train(model_folder, tmp_path / "cut", settings(name))
    assert not (tmp_path / "cut" / WEIGHTS).exists()
    train(model_folder, tmp_path / "cut", settings(name), resume=True)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


@pytest.mark.parametrize("name", [n for n in PROMPTS if n != "cpt"])
def test_a_population_of_a_method_trains_as_its_members_alone(model_folder: Path, tmp_path: Path, name: str) -> None:
    train(model_folder, tmp_path / "both", settings(name), train={"lr": [0.01, 0.003], "recompute": True})
    for k, lr in enumerate((0.01, 0.003)):
        train(model_folder, tmp_path / str(k), settings(name), train={"lr": lr})
        alone, member = (read_adapter(f) for f in (tmp_path / str(k), tmp_path / "both" / "members" / f"0{k}"))
        torch.testing.assert_close(member.prompt.values, alone.prompt.values, atol=2e-5, rtol=1e-3)


def test_every_method_is_tried() -> None:
    assert {settings(n)["method"] for n in PROMPTS} == set(METHODS)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "gemma3", "mistral-window", "qwen3", "gptj"])
@pytest.mark.parametrize("name", ["prefix-tuning", "cpt", "p-tuning"])
def test_methods_train_on_other_families(tmp_path: Path, family: str, name: str) -> None:
    """MHA, GQA, sliding windows, position biases, head_dim that is not H / heads."""
    task = train(tiny.save(tmp_path / "model", family), tmp_path / "run", settings(name))
    one, other = task.predict(TEXTS[:2]), task.predict(TEXTS[1:2])
    assert one[1].probabilities == pytest.approx(other[0].probabilities, abs=1e-5)


def test_a_prefix_for_a_recurrent_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ForewordError, match="recurrent"):
        train(tiny.save(tmp_path / "model", "mamba"), tmp_path / "run", settings("prefix-tuning"))
    assert not (tmp_path / "run").exists()


# --- where the tokens stand -------------------------------------------------------------------


def test_a_template_that_begins_with_its_tokens_is_the_front(model_folder: Path, tmp_path: Path) -> None:
    train(model_folder, tmp_path / "front", {"virtual_tokens": 4})
    train(model_folder, tmp_path / "named", {"virtual_tokens": 0}, template="{soft:4}" + TEMPLATE)
    assert weights(tmp_path / "named") == weights(tmp_path / "front")
    assert read_adapter(tmp_path / "named").config["peft_type"] == "PROMPT_TUNING"


@pytest.mark.parametrize(
    ("prompt", "template", "places"),
    [
        ({"placement": "end"}, TEMPLATE, "TTTTTvvvv"),
        ({}, "{soft:3}Tweet : {text}{soft:1} Label :", "vvvTTTvTT"),
        ({}, "Tweet{soft:4} : {text} Label :", "TvvvvTTTT"),
    ],
)
def test_tokens_stand_where_they_are_asked_to(
    model_folder: Path, tmp_path: Path, prompt: dict[str, Any], template: str, places: str
) -> None:
    task = train(model_folder, tmp_path / "run", {"virtual_tokens": 4, **prompt}, template=template)
    context = task.encoder.contexts(_table(TEXTS[0]))[0]
    kinds = ["v" if i >= tiny.VOCAB else "T" for i in context]
    runs = "".join(k for i, k in enumerate(kinds) if k == "v" or i == 0 or kinds[i - 1] == "v")
    assert runs == "".join(k for i, k in enumerate(places) if k == "v" or i == 0 or places[i - 1] == "v")
    # against hand-made embeddings, one row at a time
    model, rows = task.backbone.model, task.prompt.values
    embedded = [rows[i - tiny.VOCAB] if i >= tiny.VOCAB else task.backbone.embedding(torch.tensor(i)) for i in context]
    with torch.no_grad():
        logits = model(inputs_embeds=torch.stack(embedded)[None], use_cache=False).logits[0, -1]
    found = score_branches(task.backbone, task.prompt, [context], [[(10,), (11,)]], "packed").full
    assert found[0].tolist() == pytest.approx(logits.log_softmax(-1)[[10, 11]].tolist(), abs=1e-4)
    loaded = foreword.load(tmp_path / "run")
    assert loaded.task.placement == prompt.get("placement", "front")
    assert loaded.predict(TEXTS) == task.predict(TEXTS)
    assert task.generate([TEXTS[0]], Sampling(max_new_tokens=1)) == [said([int(logits.argmax())])]


def test_stock_peft_refuses_tokens_it_would_put_elsewhere(model_folder: Path, tmp_path: Path) -> None:
    train(model_folder, tmp_path / "run", {"virtual_tokens": 4, "placement": "end"})
    assert json.loads((tmp_path / "run" / CONFIG).read_text())["peft_type"] == PLACED
    assert "PeftModel" not in (tmp_path / "run" / "README.md").read_text()
    (tmp_path / "run" / "foreword.json").unlink()
    with pytest.raises(ForewordError, match="nothing says where"):
        foreword.load(tmp_path / "run")
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    with pytest.raises(KeyError, match=PLACED):
        peft.PeftModel.from_pretrained(base, tmp_path / "run")


def test_the_zero_shot_baseline_reads_no_virtual_token(model_folder: Path, tmp_path: Path) -> None:
    def zero_shot(out: str, **prompt: Any) -> Any:
        task = train(model_folder, tmp_path / out, {"virtual_tokens": 4, **prompt}, eval_data=DATA[:6])
        return task.scores["baselines"]["zero_shot"]["loss"]

    assert zero_shot("front") == pytest.approx(zero_shot("end", placement="end"), abs=1e-5)
    assert zero_shot("prefix", method="prefix-tuning") == pytest.approx(zero_shot("front2"), abs=1e-5)


# --- what a soft prompt starts from -----------------------------------------------------------


@pytest.mark.parametrize("name", ["prompt-tuning", "prefix-tuning", "multitask", "cartridge"])
def test_training_goes_on_from_any_adapter(model_folder: Path, tmp_path: Path, name: str) -> None:
    first = train(model_folder, tmp_path / "first", settings(name))
    prompt = {**settings(name), "virtual_tokens": 0, "init": "adapter", "init_adapter": str(tmp_path / "first")}
    more = train(model_folder, tmp_path / "more", prompt, train={"lr": 1e-12, "epochs": 1}, eval_data=DATA[:5])
    assert more.scores["baselines"]["start"]["loss"] == pytest.approx(more.scores["loss"], abs=1e-5)
    again = more.adapter.prompt
    torch.testing.assert_close(again.values, first.adapter.prompt.values, atol=1e-5, rtol=1e-4)


def test_training_goes_on_from_what_peft_wrote(model_folder: Path, tmp_path: Path) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    theirs = peft.get_peft_model(base, config)
    theirs.save_pretrained(tmp_path / "theirs")
    prompt = {
        "method": "prefix-tuning",
        "virtual_tokens": 0,
        "init": "adapter",
        "init_adapter": str(tmp_path / "theirs"),
    }
    task = train(model_folder, tmp_path / "ours", prompt)
    assert task.prompt.tokens == 3
    assert not torch.equal(task.adapter.prompt.values, read_adapter(tmp_path / "theirs").prompt.values)


def test_starts_that_would_silently_be_something_else_are_refused(model_folder: Path, tmp_path: Path) -> None:
    train(model_folder, tmp_path / "mine", settings("multitask"))
    start = {"init": "adapter", "init_adapter": str(tmp_path / "mine")}
    with pytest.raises(ForewordError, match="has 4 virtual tokens, not 5"):
        train(model_folder, tmp_path / "more", {**settings("multitask"), **start, "virtual_tokens": 5})
    with pytest.raises(ForewordError, match="another backbone"):
        train(tiny.save(tmp_path / "other", seed=3), tmp_path / "more", {**settings("prompt-tuning"), **start})
    folded = {"model": {"id": "m"}, "data": {"path": "d.csv", "label": "y", "text": "x", "folds": 2}}
    with pytest.raises(ForewordError, match="would be read as cpt's examples"):
        check(merge(Recipe(), {**folded, "prompt": {"method": "cpt"}}, "test"))
    with pytest.raises(ForewordError, match="places 3 virtual tokens, the soft prompt has 4"):
        foreword.load(tmp_path / "mine", template="{soft:3}{text} :")
    assert not (tmp_path / "more").exists()


def test_a_prefix_from_a_text_is_that_text_read(model_folder: Path, tmp_path: Path) -> None:
    text = {"init_text": "Classify if the tweet is a complaint", "virtual_tokens": 0}
    rows = train(model_folder, tmp_path / "rows", text, train={"lr": 1e-12, "epochs": 1})
    prefix = train(model_folder, tmp_path / "kv", {**text, "method": "prefix-tuning"}, train={"lr": 1e-12, "epochs": 1})
    for a, b in zip(rows.predict(TEXTS), prefix.predict(TEXTS), strict=True):
        assert a.probabilities == pytest.approx(b.probabilities, abs=1e-5)


def test_cpt_starts_from_rows_it_reads(model_folder: Path, tmp_path: Path) -> None:
    task = train(model_folder, tmp_path / "run", settings("cpt"), train={"lr": 1e-12, "epochs": 1})
    config = task.adapter.config
    text = tiny.tokenizer().decode(config["cpt_token_ids"])
    assert text.count("Label :") == len([t for t in set(config["cpt_tokens_type_mask"]) if t % 4 == 0]) > 0
    assert " complaint" in text
    labels = [i for i, t in zip(config["cpt_token_ids"], config["cpt_tokens_type_mask"], strict=True) if t % 4 == 0]
    assert "complaint" in tiny.tokenizer().decode(labels)
    assert "Tweet" not in tiny.tokenizer().decode(labels)
    assert max(config["cpt_tokens_type_mask"]) % 4 == 0, "PEFT counts on from the last label"


# --- compiled ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "bloom", "gemma3", "mistral-window", "gemma2"])
def test_a_compiled_soft_prompt_is_the_same_and_stock_peft_can_pad_it(tmp_path: Path, family: str) -> None:
    model = tiny.save(tmp_path / "model", family)
    task = train(model, tmp_path / "run", {"virtual_tokens": 4})
    compile_run(str(tmp_path / "run"), tmp_path / "kv")
    compiled = foreword.load(tmp_path / "kv")
    assert compiled.adapter.config["peft_type"] == "PREFIX_TUNING"
    for a, b in zip(task.predict(TEXTS), compiled.predict(TEXTS), strict=True):
        assert a.probabilities == pytest.approx(b.probabilities, abs=1e-4)
    assert task.generate(TEXTS) == compiled.generate(TEXTS)
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "kv").eval()
    context = torch.tensor([compiled.encoder.contexts(_table(TEXTS[0]))[0]])
    with torch.no_grad():
        found = theirs(input_ids=context, attention_mask=torch.ones_like(context)).logits[0, -1]
        embedded = torch.cat([task.prompt.values, task.backbone.embedding(context[0])])
        expected = task.backbone.model(inputs_embeds=embedded[None], use_cache=False).logits[0, -1]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_compiled_is_refused(model_folder: Path, tmp_path: Path) -> None:
    train(model_folder, tmp_path / "kv", settings("prefix-tuning"))
    with pytest.raises(ForewordError, match="already"):
        compile_run(str(tmp_path / "kv"), tmp_path / "out")
    train(model_folder, tmp_path / "end", {"virtual_tokens": 4, "placement": "end"})
    with pytest.raises(ForewordError, match="in front of all text"):
        compile_run(str(tmp_path / "end"), tmp_path / "out")
    train(tiny.save(tmp_path / "model", "mamba"), tmp_path / "run", {"virtual_tokens": 4})
    with pytest.raises(ForewordError, match="recurrent"):
        compile_run(str(tmp_path / "run"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def said(ids: Any) -> str:
    text: str = tiny.tokenizer().decode(ids, skip_special_tokens=True)
    return text.removeprefix(" ")


def _table(text: str) -> Any:
    from foreword.data.sources import rows_table

    return rows_table([{"text": text}])


def _after(steps: int) -> Callable[[], Any]:
    """Ctrl-C after so many steps."""

    @contextmanager
    def interruptible() -> Iterator[Callable[[], bool]]:
        calls = iter(range(10**6))
        yield lambda: next(calls) >= steps - 1

    return interruptible
