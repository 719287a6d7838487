"""The template: from a row's columns to the context text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreword.data.template import Field, default_template, parse, require_columns
from foreword.errors import ForewordError

LITERALS = st.text(max_size=12) | st.sampled_from(["{", "}", "{{}}", "{a}", " Label : ", "|cut"])


def escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def test_the_guides_template() -> None:
    template = parse("Tweet text : {Tweet text} Label :")
    assert template.parts == ("Tweet text : ", Field("Tweet text"), " Label :")
    assert template.closing == " Label :"
    assert template.render({"Tweet text": "my parcel is late"}) == "Tweet text : my parcel is late Label :"


def test_the_default_template_is_column_and_label() -> None:
    assert parse(default_template("Tweet text")).render({"Tweet text": "hi"}) == "hi Label :"


def test_several_columns_stand_in_order_and_may_repeat() -> None:
    template = parse("{a}{b} and {a}")
    assert template.render({"a": 1, "b": "x"}) == "1x and 1"
    assert [f.column for f in template.fields] == ["a", "b", "a"]
    assert template.closing == ""


@settings(max_examples=100, deadline=None)
@given(LITERALS, st.text(max_size=12), LITERALS)
def test_literals_and_values_are_rendered_exactly_but_for_trailing_spaces(before: str, value: str, after: str) -> None:
    template = parse(escaped(before) + "{a column}" + escaped(after))
    assert template.render({"a column": value}) == before + value + after.rstrip(" ")
    assert template.closing == after.rstrip(" ")


def test_braces_in_a_value_are_plain_text() -> None:
    assert parse("{a} :").render({"a": "{b} {{c}}"}) == "{b} {{c}} :"


def test_trailing_spaces_are_dropped_and_line_ends_kept() -> None:
    assert parse("{a} Label :  ").closing == " Label :"
    assert parse("{a} ").closing == ""
    assert parse("{a}\nLabel:\n").closing == "\nLabel:\n"


@pytest.mark.parametrize(("mark", "kept"), [("cut", "abc"), ("cut-start", "efg")])
def test_the_mark_says_which_end_gives_way(mark: str, kept: str) -> None:
    template = parse(f"{{a|{mark}}} {{b}}")
    assert template.fields == (Field("a", mark), Field("b"))
    assert template.shorten({"a": "abcdefg", "b": "long enough"}, 3) == {"a": kept, "b": "long enough"}


def test_without_a_mark_the_longest_gives_way_at_its_end() -> None:
    row = {"a": "abcdefg", "b": "xy", "c": 12345}
    assert parse("{a} {b} {c}").shorten(row, 5) == {"a": "abcde", "b": "xy", "c": "12345"}
    assert row["a"] == "abcdefg", "the row itself stays"


def test_several_marked_columns_give_way_together() -> None:
    template = parse("{a|cut} {b|cut-start}")
    assert template.shorten({"a": "abcd", "b": "efgh"}, 2) == {"a": "ab", "b": "gh"}
    assert template.shorten({"a": "abcd", "b": "efgh"}, 5) == {"a": "abcd", "b": "efgh"}


def test_only_the_known_marks_are_marks() -> None:
    assert parse("{a|b} {c|}").fields == (Field("a|b"), Field("c|"))


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("{a} Label : }", "a single '}' at character 13"),
        ("{a Label :", "a single '{' at character 1"),
        ("{a {b} }", "a single '{' at character 1"),
        ("no column", "the template names no column"),
        ("{{a}}", "the template names no column"),
        ("", "the template names no column"),
        ("{} Label :", "an empty {} names no column"),
        ("{ |cut} Label :", "an empty {} names no column"),
        ("{|cut-start}", "an empty {} names no column"),
    ],
)
def test_a_bad_template_is_refused_with_its_place(source: str, what: str) -> None:
    with pytest.raises(ForewordError) as e:
        parse(source)
    assert e.value.what == what
    assert repr(source) in e.value.where


def test_a_missing_column_names_those_there_and_the_nearest() -> None:
    with pytest.raises(ForewordError) as e:
        require_columns(["ID", "tweet"], ["ID", "Tweet text"], "t.csv")
    assert e.value.what == "no column 'tweet'"
    assert "'ID', 'Tweet text'" in e.value.where
    assert e.value.fix == "did you mean 'Tweet text'?"
    require_columns(["ID"], ["ID"], "t.csv")
