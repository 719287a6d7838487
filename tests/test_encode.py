"""Token ids: the target whole and in place, the context cut where the template says."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from foreword.data.encode import Encoder, common_opening, rows_hash
from foreword.data.sources import rows_table
from foreword.errors import ForewordError
from foreword.records import Table, Task

END = 0
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60).filter(str.strip)
VOCABULARY = ["late", "parcel", "thank", "you", "fox", "é", "世界", "42", "!?", "invoice"]
WORDS = st.lists(st.sampled_from(VOCABULARY), min_size=1, max_size=40)


def encoder_of(
    template: str = "Tweet text : {text} Label :",
    limit: int = 500,
    classes: tuple[str, ...] = (),
    words: tuple[str, ...] = (),
    **task: Any,
) -> Encoder:
    made = Task(template, task.pop("separator", " "), "label", classes, words or classes, **task)
    return Encoder(made, tiny.tokenizer(), limit, END)


def table_of(*rows: dict[str, Any]) -> Table:
    return rows_table(rows, "t.csv")


def raw(text: str) -> tuple[int, ...]:
    return tuple(tiny.tokenizer()(text, add_special_tokens=False)["input_ids"])


def text_of(ids: tuple[int, ...]) -> str:
    return str(tiny.tokenizer().decode(ids))


def refused(encoder: Encoder, *rows: dict[str, Any]) -> ForewordError:
    with pytest.raises(ForewordError) as e:
        encoder.examples(table_of(*rows))
    return e.value


# In place


@settings(max_examples=100, deadline=None)
@given(TEXTS, WORDS)
def test_context_and_target_are_the_whole_text_tokenised_in_place(text: str, words: list[str]) -> None:
    target = " ".join(words)
    (example,) = encoder_of(limit=10_000).examples(table_of({"text": text, "label": target}))
    assert example.context + example.target == (*raw(f"Tweet text : {text} Label : {target}"), END)
    assert example.text == target


def test_the_target_carries_its_leading_space_and_the_end_token() -> None:
    assert tiny.tokenizer().pad_token_id == tiny.tokenizer().eos_token_id == END
    encoder = encoder_of(classes=("complaint", "no complaint"))
    assert [text_of(ids) for ids in encoder.label_ids] == [" complaint<end>", " no complaint<end>"]
    assert all(ids[-1] == END and END not in ids[:-1] for ids in encoder.label_ids)


def test_spaces_at_the_templates_end_change_nothing() -> None:
    row = table_of({"text": "late", "label": "x"})
    assert encoder_of("{text} Label :  ").examples(row) == encoder_of("{text} Label :").examples(row)


def test_a_target_after_a_line_end_has_no_space() -> None:
    (example,) = encoder_of("{text}\nLabel:\n", separator="").examples(table_of({"text": "late", "label": "fox"}))
    assert text_of(example.context + example.target) == "late\nLabel:\nfox<end>"
    assert text_of(example.target) == "fox<end>"


def test_a_target_that_would_merge_with_the_template_stands_alone() -> None:
    assert raw("com") + raw("plaint") != raw("complaint"), "the tokens span the border"
    encoder = encoder_of("{text} com", separator="")
    assert encoder.target_ids("plaint") == (*raw("plaint"), END)


def test_a_template_that_ends_with_its_column() -> None:
    (example,) = encoder_of("Say: {text}").examples(table_of({"text": "late", "label": "fox"}))
    assert example.context + example.target == (*raw("Say: late fox"), END)


def test_a_tokenizers_opening_token_is_kept_and_its_closing_token_dropped() -> None:
    class Wrapping:
        """Adds 1 before and the end token after, as a tokenizer with both settings does."""

        eos_token_id = END

        def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
            ids = list(raw(text))
            return {"input_ids": [1, *ids, END] if add_special_tokens else ids}

    encoder = Encoder(Task("{text} :", " ", "label"), Wrapping(), 100, END)
    (example,) = encoder.examples(table_of({"text": "late", "label": "fox"}))
    assert example.context == (1, *raw("late :"))
    assert example.target == (*raw(" fox"), END)

    def placed(template: str, placement: str) -> tuple[int, ...]:
        task = Task(template, " ", "label", placement=placement)
        made = Encoder(task, Wrapping(), 100, END, range(900, 904))
        assert made.at_front == (made.contexts(table_of({"text": "late"}))[0][:4] == (900, 901, 902, 903))
        return made.contexts(table_of({"text": "late"}))[0]

    soft = (900, 901, 902, 903)
    assert placed("{text} :", "front") == (*soft, 1, *raw("late :"))
    assert placed("{text} :", "after-bos") == (1, *soft, *raw("late :"))
    assert placed("{text} :", "end") == (1, *raw("late :"), *soft)
    assert placed("{soft:4}{text} :", "front") == (*soft, 1, *raw("late :"))
    assert placed("{soft:1}so {text}{soft:3} :", "front") == (900, 1, *raw("so late"), *soft[1:], *raw(" :"))


# Classes


def test_classes_get_their_label_words_index_and_row_number() -> None:
    encoder = encoder_of(classes=("a", "b"), words=("complaint", "praise"))
    examples = encoder.examples(table_of({"text": "x", "label": "b"}, {"text": "y", "label": "a"}))
    assert [(e.number, e.label, e.text) for e in examples] == [(1, 1, "praise"), (2, 0, "complaint")]
    assert [e.target for e in examples] == [encoder.label_ids[1], encoder.label_ids[0]]
    assert examples[0].segment.branches == (encoder.label_ids[1],)


def test_the_room_left_is_the_same_for_every_class_of_a_row() -> None:
    encoder = encoder_of(limit=30, classes=("a", "b"), words=("no", "a very long and winding complaint"))
    rows = [{"text": "late " * 50, "label": label} for label in ("a", "b")]
    short, long = encoder.examples(table_of(*rows))
    assert short.context == long.context, "else the context would give the class away"
    assert len(long.context) + len(long.target) <= 30


# Too long


@settings(max_examples=100, deadline=None)
@given(WORDS, WORDS, st.integers(1, 60), st.sampled_from(["{text}", "{text|cut}", "{text|cut-start}"]))
def test_a_row_fits_with_its_target_whole_or_is_refused(
    text: list[str], target: list[str], limit: int, column: str
) -> None:
    encoder = encoder_of(f"Tweet : {column} Label :", limit)
    table = table_of({"text": " ".join(text), "label": " ".join(target)})
    whole = (*raw(" " + " ".join(target)), END)
    joined = " ".join(text)
    kept = [joined[-n:] if "start" in column else joined[:n] for n in range(1, len(joined) + 1)]
    sizes = [len(raw(f"Tweet : {k} Label :")) + len(whole) for k in kept]
    if limit < min(sizes):
        with pytest.raises(ForewordError, match="row 1 does not fit"):
            encoder.examples(table)
        return
    try:
        (example,) = encoder.examples(table)
    except ForewordError:
        # A whole word can be fewer tokens than its first letters ("late" one, "l" two): bisection
        # may miss such a length, but neither the uncut text nor a single character.
        assert limit < min(sizes[0], sizes[-1])
        return
    assert example.target == whole
    assert len(example.context) + len(example.target) <= limit


@settings(max_examples=60, deadline=None)
@given(WORDS, st.integers(12, 60), st.sampled_from(["cut", "cut-start"]))
def test_the_context_is_cut_where_the_template_says_and_no_more_than_needed(
    words: list[str], limit: int, cut: str
) -> None:
    text = " ".join(words)
    encoder = encoder_of(f"Tweet : {{text|{cut}}} Label :", limit)
    (example,) = encoder.examples(table_of({"text": text, "label": "x"}))
    room = limit - len(example.target)
    kept = [text[:n] if cut == "cut" else text[len(text) - n :] for n in range(1, len(text) + 1)]
    contexts = [raw(f"Tweet : {k} Label :") for k in kept]
    fitting = [c for c in contexts if len(c) <= room]
    assert example.context in fitting
    assert len(example.context) >= room - 3 or example.context == contexts[-1], "a character is 3 tokens at most here"


def test_without_a_mark_the_longest_column_is_cut() -> None:
    encoder = encoder_of("{a} and {b} :", limit=20)
    (example,) = encoder.examples(table_of({"a": "fox", "b": "late " * 40, "label": "x"}))
    assert text_of(example.context).startswith("fox and late late")
    assert text_of(example.context).endswith(" :")


def test_two_marked_columns_are_both_cut() -> None:
    encoder = encoder_of("{a|cut} and {b|cut-start} :", limit=20)
    (example,) = encoder.examples(table_of({"a": "a" * 100, "b": "b" * 100, "label": "x"}))
    before, after = text_of(example.context).split(" and ")
    assert set(before) == {"a"}
    assert after.strip(" :") == "b" * len(before)


def test_an_unmarked_column_is_never_cut() -> None:
    encoder = encoder_of("{title|cut} {body} :", limit=20)
    error = refused(encoder, {"title": "fox", "body": "late " * 40, "label": "x"})
    assert error.what == "row 1 does not fit: even with its text cut it takes more than 20 tokens"
    assert "{body|cut}" in error.fix
    (example,) = encoder.examples(table_of({"title": "fox " * 40, "body": "late", "label": "x"}))
    assert text_of(example.context).endswith(" late :")


@pytest.mark.parametrize("classes", [(), ("late " * 40, "fox")])
def test_a_row_whose_target_cannot_fit_is_refused_by_number(classes: tuple[str, ...]) -> None:
    encoder = encoder_of(limit=40, classes=tuple(c.strip() for c in classes))
    error = refused(encoder, {"text": "fits", "label": "fox"}, {"text": "no", "label": "late " * 40})
    assert f"row {1 if classes else 2} does not fit" in error.what
    assert error.where == "t.csv"


def test_a_target_never_leaves_an_empty_context() -> None:
    encoder = encoder_of("{text}", limit=3)
    target = (*raw(" fox"), END)
    for limit in (len(target), len(target) + 1):  # no token left, then one where é takes two
        encoder = encoder_of("{text}", limit)
        assert "row 1 does not fit" in refused(encoder, {"text": "éé", "label": "fox"}).what
    (example,) = encoder_of("{text}", len(target) + 2).examples(table_of({"text": "éé", "label": "fox"}))
    assert text_of(example.context) == "é"


def test_max_length_lowers_the_limit_and_never_raises_it() -> None:
    assert encoder_of(limit=100).limit == 100
    assert encoder_of(limit=100, max_length=50).limit == 50
    assert encoder_of(limit=100, max_length=200).limit == 100


# Bad rows


def test_bad_rows_are_refused_by_number_before_training() -> None:
    classes = encoder_of(classes=("a", "b"))
    free = encoder_of()
    for encoder in (classes, free):
        assert (
            "row 2 has nothing in column 'text'"
            in refused(encoder, {"text": "x", "label": "a"}, {"text": " ", "label": "b"}).what
        )
        assert "the first is row 2" in refused(encoder, {"text": "x", "label": "a"}, {"text": "y", "label": None}).what
        assert refused(encoder, {"txt": "x", "label": "a"}).what == "no column 'text'"
        assert refused(encoder, {"text": "x", "lable": "a"}).what == "no column 'label'"
    assert refused(classes, {"text": "x", "label": "c"}).where == "t.csv, row 1"


def test_a_word_without_tokens_is_refused() -> None:
    with pytest.raises(ForewordError, match="has no tokens"):
        encoder_of(separator="", classes=("", "b"))


# What all contexts share


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=5))
def test_the_common_opening_is_shared_longest_and_leaves_a_token(contexts: list[list[int]]) -> None:
    opening = list(common_opening(contexts))
    size = len(opening)
    assert all(c[:size] == opening for c in contexts)
    assert all(len(c) > size for c in contexts)
    longer = {tuple(c[: size + 1]) for c in contexts}
    assert len(longer) > 1 or min(map(len, contexts)) == size + 1, "one more token would be too many"


def test_the_templates_opening_is_found_in_token_space() -> None:
    encoder = encoder_of()
    contexts = encoder.contexts(table_of({"text": "late"}, {"text": "fox"}))
    assert text_of(common_opening(contexts)) == "Tweet text :"


def test_the_hash_of_rows_follows_the_used_columns_only() -> None:
    rows = [{"text": "a", "label": "x", "id": 1}, {"text": "b", "label": "y", "id": 2}]
    same = [{**row, "id": 9} for row in rows]
    digest = rows_hash(table_of(*rows), ["text", "label"])
    assert digest == rows_hash(table_of(*same), ["text", "label"])
    assert digest != rows_hash(table_of(*rows[::-1]), ["text", "label"])
    assert digest != rows_hash(table_of(*rows), ["text"])
    assert digest != rows_hash(table_of({**rows[0], "text": "a\n"}, rows[1]), ["text", "label"])
