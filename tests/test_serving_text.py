"""Texts to local ids as the library encodes them, and ids back to text as they come."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

import tiny
from foreword.backbone.load import Backbone
from foreword.data.sources import rows_table
from foreword.errors import ForewordError
from foreword.jobs.prepare import make_encoder
from foreword.prompts.soft import Kind
from foreword.records import Task
from foreword.serving.engine import Capabilities
from foreword.serving.text import HELD, Base, open_base

WINDOW = 64
END = 0
V = tiny.VOCAB
CHAT = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)
STRICT = "{{ raise_exception('roles must alternate') }}"
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
IDS = st.lists(st.integers(0, V + 40), max_size=60)
TASK = Task("Tweet text : {text} Label :", " ", "label", ("complaint", "praise"), ("complaint", "thank you"))


def capabilities(window: int = WINDOW, vocab_size: int = V) -> Capabilities:
    return Capabilities("test", "tiny", vocab_size, tiny.HIDDEN, window, END, "float32", ("rows", "prefix"))


def with_settings(bos: bool = False, chat: str | None = None) -> Any:
    """The tiny tokenizer, with BOS and an end token around every text (as some have both) or a chat template."""
    core = Tokenizer.from_str(tiny.tokenizer().backend_tokenizer.to_str())
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<start> $A <end>", special_tokens=[("<start>", V - 4), ("<end>", END)]
        )
        core.add_special_tokens([AddedToken("<start>", special=True)])
        assert core.token_to_id("<start>") == V - 4
    made = tf.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", bos_token="<start>" if bos else None)
    made.chat_template = chat
    return made


def base_of(tokenizer: Any = None, **known: Any) -> Base:
    return Base("tiny", tokenizer or tiny.tokenizer(), capabilities(**known))


def raw(text: str) -> tuple[int, ...]:
    return tuple(tiny.tokenizer()(text, add_special_tokens=False)["input_ids"])


def soft(tokens: int) -> tuple[int, ...]:
    return tuple(range(V, V + tokens))


def refusal(call: Any, *args: Any) -> str:
    with pytest.raises(ForewordError) as caught:
        call(*args)
    assert all((caught.value.what, caught.value.where, caught.value.fix))
    return caught.value.what


# --- ids to text -------------------------------------------------------------------------------


@cache
def byte_fallback() -> Any:
    """A tokenizer that falls back to bytes and marks spaces, as Llama 2's does."""
    words = ["▁", "a", "b", "c", "▁a", "▁the", "ab", "é", "!", "世"]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words]
    core = Tokenizer(models.BPE({t: i for i, t in enumerate(vocabulary)}, [], byte_fallback=True, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tf.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", bos_token="<s>")


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    stream = base_of(tokenizer).decoder()
    return [*map(stream.step, ids), stream.finish()]


@settings(max_examples=200, deadline=None)
@given(IDS)
@example([END, END])
@example([160] * 100)
@example([*([160] * 40), 66, 67, *([200, 160] * 30)])
def test_pieces_of_any_ids_are_together_what_the_tokenizer_decodes(ids: list[int]) -> None:
    assert "".join(pieces(tiny.tokenizer(), ids)) == tiny.tokenizer().decode(ids, skip_special_tokens=True)


@settings(max_examples=100, deadline=None)
@given(TEXTS)
@pytest.mark.parametrize("tokenizer", [tiny.tokenizer, byte_fallback])
def test_pieces_of_a_text_are_that_text_and_no_character_is_cut(tokenizer: Any, text: str) -> None:
    ids = tokenizer()(text)["input_ids"]
    found = pieces(tokenizer(), ids)
    assert "".join(found) == tokenizer().decode(ids, skip_special_tokens=True)
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in found)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 268), max_size=60))
def test_bytes_that_are_no_text_never_break_a_stream(ids: list[int]) -> None:
    """Here ``tokenizers.decoders.DecodeStream`` raises 'Invalid prefix encountered'."""
    found = pieces(byte_fallback(), [*ids, byte_fallback().convert_tokens_to_ids("!")])
    assert "".join(found).endswith("!")


def test_characters_of_several_tokens_come_whole_and_at_once() -> None:
    ids = raw("a🙂é世")
    assert len(ids) == 1 + 4 + 2 + 3
    assert [p for p in pieces(tiny.tokenizer(), ids) if p] == ["a", "🙂", "é", "世"]
    assert pieces(tiny.tokenizer(), ids[:3]) == ["a", "", "", "\ufffd"], "what never became a character"


def test_special_tokens_bring_no_text_and_change_none() -> None:
    a, b = raw("a"), raw("b")
    assert pieces(tiny.tokenizer(), [*a, END, END, *b]) == ["a", "", "", "b", ""]


def test_bytes_without_end_are_not_held_back_for_ever() -> None:
    """A client can force such tokens with a logit bias; re-reading all of them at each would take minutes."""
    (continuation,) = raw("é")[1:]
    stream = base_of().decoder()
    told = [stream.step(continuation) for _ in range(400)]
    assert len("".join(told)) >= 400 - HELD - 2
    assert "".join(told) + stream.finish() == tiny.tokenizer().decode([continuation] * 400)


# --- texts and rows to ids ---------------------------------------------------------------------


class Tiny(Backbone):
    """The tiny backbone's facts without its model."""

    window, vocab_size, end_id = WINDOW, V, END  # type: ignore[assignment]


@pytest.mark.parametrize("kind", ["rows", "prefix"])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("placement", ["front", "after-bos", "end"])
@pytest.mark.parametrize("template", [TASK.template, "{text}", "{soft:3}Tweet {text}{soft:2} Label :"])
def test_a_row_is_encoded_as_the_library_encodes_it(template: str, placement: str, bos: bool, kind: Kind) -> None:
    task = Task(template, " ", "label", TASK.classes, TASK.words, placement=placement)
    tokenizer = with_settings(bos)
    encoder = make_encoder(task, Tiny(None, tokenizer, "tiny"), 5, kind)
    reader = base_of(tokenizer).reader(task, 5, kind)
    for text in ("my parcel is late", "late " * 60):
        assert [reader.row(text)] == encoder.contexts(rows_table([{"text": text}]))
        assert reader.row({"text": text, "other": 1}) == reader.row(text)
    assert (reader.label_ids, reader.classes) == (encoder.label_ids, task.classes)
    assert sum(i >= V for i in reader.row("late")) == (5 if kind == "rows" else 0)


@pytest.mark.parametrize("kind", ["rows", "prefix"])
@pytest.mark.parametrize("placement", ["front", "after-bos", "end"])
def test_a_text_as_it_is_gets_the_virtual_tokens_at_their_place(placement: str, kind: Kind) -> None:
    task = Task("So {text} :", " ", "label", placement=placement)
    virtual = soft(4) if kind == "rows" else ()
    start = (V - 4,)
    expected = {
        "front": (*virtual, *start, *raw("late {x}")),
        "after-bos": (*start, *virtual, *raw("late {x}")),
        "end": (*start, *raw("late {x}"), *virtual),
    }
    assert base_of(with_settings(bos=True)).reader(task, 4, kind).raw("late {x}") == expected[placement]


def test_a_text_is_never_cut_nor_closed_where_it_is_given_as_it_is() -> None:
    base = base_of(with_settings(bos=True))
    long = "late " * 500
    assert base.raw_ids(long) == (V - 4, *raw(long))
    assert base.reader(TASK, 4).raw(long) == (*soft(4), V - 4, *raw(long))
    assert len(base.reader(TASK, 4).row(long)) <= WINDOW


def test_several_threads_read_at_once_with_a_tokenizer_that_came_with_truncation() -> None:
    tokenizer = with_settings()
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    base = base_of(tokenizer)
    assert tokenizer.backend_tokenizer.truncation is tokenizer.backend_tokenizer.padding is None
    texts = [f"parcel {i} " * 50 for i in range(60)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(base.raw_ids, texts)) == [raw(t) for t in texts]


def test_an_adapter_without_a_sidecar_reads_a_text_as_it_is() -> None:
    reader = base_of().reader(None, 3)
    assert reader.row("late") == reader.raw("late") == (*soft(3), *raw("late"))
    assert (reader.task, reader.classes, reader.label_ids, reader.columns) == (None, (), (), ("text",))


def test_the_plain_reader_has_the_template_and_words_without_virtual_tokens() -> None:
    task = Task("{soft:3}Tweet {text}{soft:2} Label :", " ", "label", TASK.classes, TASK.words)
    reader = base_of().reader(task, 5)
    assert reader.plain().row("late") == raw("Tweet late Label :")
    assert reader.plain().label_ids == reader.label_ids
    assert reader.plain() is reader.plain()


def test_readers_of_equal_tasks_are_one_object() -> None:
    base = base_of()
    twin = Task(*[getattr(TASK, f) for f in ("template", "separator", "label_column", "classes", "words")])
    assert twin is not TASK
    assert base.reader(TASK, 4) is base.reader(twin, 4)
    assert len({base.reader(TASK, 4), base.reader(TASK, 5), base.reader(TASK, 4, "prefix"), base.reader(None, 4)}) == 4


def test_what_cannot_be_read_is_refused() -> None:
    base = base_of()
    two = base.reader(Task("{a} and {b} :", " ", "label"), 2)
    placed = base.reader(Task("{soft:2}{text} :", " ", "label"), 2)
    assert "has 2 columns" in refusal(two.row, "late")
    assert "no column 'b'" in refusal(two.row, {"a": "late"})
    assert "nothing in column 'b'" in refusal(two.row, {"a": "late", "b": " "})
    assert "no column" in refusal(two.row, {})
    assert "within its template" in refusal(placed.raw, "late")
    assert "within its template" in refusal(placed.chat, [{"role": "user", "content": "a"}] * 2)
    assert "nothing to read" in refusal(base.raw_ids, "")
    assert "nothing to read" in refusal(base.reader(None, 4, "prefix").raw, "")
    assert base.reader(None, 4).raw("") == soft(4), "a soft prompt is something to read"
    assert "does not fit" in refusal(base.reader(Task("{text}" + " tail" * 80, " ", "label"), 4).row, "late")
    assert "places 2 virtual tokens" in refusal(base.reader, Task("{soft:2}{text} :", " ", "label"), 3)


def test_a_token_that_only_the_tokenizer_knows_never_passes_for_a_virtual_one() -> None:
    tokenizer = with_settings(bos=True)
    base = base_of(tokenizer, vocab_size=V - 4)  # so <start> is the id of the first virtual token
    assert "the model does not" in refusal(base.raw_ids, "late")
    assert "the model does not" in refusal(base.reader(TASK, 2).row, "late")
    assert "the model does not" in refusal(base.reader(None, 2).raw, "late")


# --- chats -------------------------------------------------------------------------------------


def turn(text: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": text}


def test_one_user_turn_goes_through_a_one_column_template() -> None:
    reader = base_of(with_settings(chat=CHAT)).reader(TASK, 3)
    assert reader.chat([turn("late")]) == reader.row("late")


@pytest.mark.parametrize("placement", ["front", "after-bos", "end"])
@pytest.mark.parametrize("opened", [False, True])
def test_other_chats_go_through_the_models_template_with_the_virtual_tokens_placed(
    placement: str, opened: bool
) -> None:
    base = base_of(with_settings(bos=True, chat=("<start>" if opened else "") + CHAT))
    reader = base.reader(Task("{text} :", " ", "label", placement=placement), 3)
    start = (V - 4,) if opened else ()
    body = raw("[system] be kind\n[user] late\n>")
    assert base.chat_ids([turn("be kind", "system"), turn("late")]) == (*start, *body)
    expected = {
        "front": (*soft(3), *start, *body),
        "after-bos": (*start, *soft(3), *body),
        "end": (*start, *body, *soft(3)),
    }
    assert reader.chat([turn("be kind", "system"), turn("late")]) == expected[placement]


def test_a_chat_of_an_adapter_without_a_template_is_the_models() -> None:
    base = base_of(with_settings(chat=CHAT))
    assert base.reader(None, 2).chat([turn("late")]) == (*soft(2), *base.chat_ids([turn("late")]))


def test_chats_that_no_template_takes_are_refused() -> None:
    assert refusal(base_of().chat_ids, [turn("late")]) == "the model has no chat template"
    assert "roles must alternate" in refusal(base_of(with_settings(chat=STRICT)).chat_ids, [turn("late")])
    assert "no chat template" in refusal(base_of().reader(TASK, 2).chat, [turn("a"), turn("b", "assistant"), turn("c")])
    assert "no chat template" in refusal(base_of().reader(TASK, 2).chat, [turn([{"type": "text", "text": "late"}])])


def test_the_base_is_opened_from_a_model_folder_without_its_weights(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "base-model")
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    base = asyncio.run(open_base(str(folder), capabilities()))
    assert base.name == "base-model", "clients do not see the server's folders"
    assert base.raw_ids("late") == raw("late")
    assert asyncio.run(open_base(str(folder), capabilities(), name="given")).name == "given"
