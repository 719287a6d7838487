"""The error a user reads."""

from __future__ import annotations

import pickle

import pytest

from foreword.errors import ForewordError, closest, nearest


def test_an_error_is_three_lines_what_where_and_cure() -> None:
    error = ForewordError("no column 'txt'", "train.csv", "did you mean 'text'?")
    assert str(error) == "error: no column 'txt'\nwhere: train.csv\n  fix: did you mean 'text'?"
    assert (error.what, error.where, error.fix) == ("no column 'txt'", "train.csv", "did you mean 'text'?")


def test_an_error_survives_pickling_between_processes() -> None:
    error = pickle.loads(pickle.dumps(ForewordError("a", "b", "c")))
    assert (error.what, error.where, error.fix) == ("a", "b", "c")


@pytest.mark.parametrize(
    ("word", "found"),
    [("lable", "Label"), ("LABEL", "Label"), ("Txt", "text"), ("zzz", ""), ("", "")],
)
def test_the_closest_word_is_found_whatever_its_case(word: str, found: str) -> None:
    assert closest(word, iter(["text", "Label"])) == found
    assert nearest(word, ["text", "Label"]) == (f"did you mean '{found}'?" if found else "")
