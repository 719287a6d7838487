"""Recipes: precedence, types, unknown keys, contradictions, and the way to YAML and back."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreword import checks, config
from foreword.checks import check
from foreword.config import Recipe
from foreword.config import keys as known_keys
from foreword.data.sources import READERS
from foreword.errors import ForewordError
from foreword.recipe import as_dict, load_recipe, merge, parse_overrides, to_yaml

RECIPES = sorted((Path(config.__file__).parent / "recipes").glob("*.yaml"))
GOOD = {
    "model": {"id": "m"},
    "data": {"path": "rows.csv", "text": "text", "label": "label"},
}


def recipe_of(*pairs: str, base: Mapping[str, Any] = GOOD) -> Recipe:
    return merge(merge(Recipe(), base, "recipe"), parse_overrides(pairs), "command line")


def refused(*pairs: str, base: Mapping[str, Any] = GOOD) -> ForewordError:
    with pytest.raises(ForewordError) as e:
        check(recipe_of(*pairs, base=base))
    return e.value


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# Precedence and types


def test_command_line_beats_recipe_beats_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path / "r.yaml", "train: {lr: 0.1, epochs: 7}"))
    recipe = merge(recipe, parse_overrides(["train.lr=0.5"]), "command line")
    assert (recipe.train.lr, recipe.train.epochs) == (0.5, 7)
    assert recipe.train.batch_size == Recipe().train.batch_size


def test_an_empty_recipe_or_section_changes_nothing(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path / "empty.yaml", "# nothing yet\n")) == Recipe()
    assert load_recipe(write(tmp_path / "section.yaml", "train:\n")) == Recipe()


@pytest.mark.parametrize("text", ["1e-5", "0.00001", "1.0e-5"])
def test_every_way_to_write_a_small_number_is_a_float(tmp_path: Path, text: str) -> None:
    assert load_recipe(write(tmp_path / "r.yaml", f"train: {{lr: {text}}}")).train.lr == 1e-5
    assert recipe_of(f"train.lr={text}").train.lr == 1e-5


@pytest.mark.parametrize(
    "text", ["{text} Label : # 1", "a=b", "null", "[not a list]", "'quoted'", "{a: b}", "- x", "5", "", "no", "é\n"]
)
def test_text_on_the_command_line_stays_as_it_is(text: str) -> None:
    assert recipe_of(f"prompt.init_text={text}").prompt.init_text == text
    assert recipe_of(f"data.template={text}").data.template == (text or None)


def test_lists_and_mappings_on_the_command_line() -> None:
    recipe = recipe_of("data.classes=[complaint, no complaint, 3]", "data.label_words={a: b, 1: 2}")
    assert recipe.data.classes == ("complaint", "no complaint", "3")
    assert recipe.data.label_words == {"a": "b", "1": "2"}


@pytest.mark.parametrize(
    ("pair", "wanted"),
    [
        ("train.epochs=8.5", "a whole number"),
        ("train.epochs=true", "a whole number"),
        ("train.epochs=", "a whole number"),
        ("train.lr=fast", "a number"),
        ("train.lr=true", "a number"),
        ("train.lr=.nan", "a number"),
        ("train.lr=.inf", "a number"),
        (f"train.lr={10**400}", "a number"),
        ("data.drop_incomplete=1", "true or false"),
        ("data.classes=a", "a list of texts"),
        ("data.classes=[yes, no]", "in quotes"),  # YAML reads true and false
        ("data.classes=[a, ~]", "a list of texts"),
        ("data.label_words=[a]", "a mapping of texts"),
        ("data.label_words={no: nope}", "in quotes"),
    ],
)
def test_a_value_of_the_wrong_type_names_the_key_and_what_it_takes(pair: str, wanted: str) -> None:
    with pytest.raises(ForewordError) as e:
        recipe_of(pair)
    assert pair.split("=")[0] in e.value.what
    assert wanted in e.value.fix


def test_a_text_key_takes_numbers_but_no_list_or_bool(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path / "a.yaml", "data: {label: 3}")).data.label == "3"
    for value in ("true", "[a]", "null", "2020-01-01"):
        with pytest.raises(ForewordError, match="not text"):
            load_recipe(write(tmp_path / "b.yaml", f"data: {{label: {value}}}"))


@pytest.mark.parametrize("pair", ["data.classes=[a", "train.lr={", "train.lr=2001-13-45", "train.lr=a: b: c"])
def test_an_unreadable_value_names_its_key(pair: str) -> None:
    with pytest.raises(ForewordError, match="cannot read the value") as e:
        parse_overrides([pair])
    assert e.value.where == f"key {pair.split('=')[0]}"


# Unknown keys and files


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.lrr", "train.lr"),
        ("trian.lr", "train.lr"),
        ("lr", "train.lr"),
        ("epoch", "train.epochs"),
        ("prompt.virtual_token", "prompt.virtual_tokens"),
        ("Train.LR", "train.lr"),
    ],
)
def test_an_unknown_key_on_the_command_line_suggests_the_nearest(key: str, meant: str) -> None:
    with pytest.raises(ForewordError, match=f"unknown key '{key}'") as e:
        parse_overrides([f"{key}=1"])
    assert e.value.fix == f"did you mean '{meant}'?"


@pytest.mark.parametrize(
    ("text", "key", "meant"),
    [
        ("train: {lrr: 1}", "train.lrr", "train.lr"),
        ("trian: {lr: 1}", "trian", "train"),
        ("epochs: 3", "epochs", "train.epochs"),
        ("train: {1: 1}", "train.1", "train."),
        ("zebra: {}", "zebra", "all keys"),
    ],
)
def test_an_unknown_key_in_a_recipe_suggests_the_nearest(tmp_path: Path, text: str, key: str, meant: str) -> None:
    path = write(tmp_path / "r.yaml", text)
    with pytest.raises(ForewordError, match=f"unknown key '{key}'") as e:
        load_recipe(path)
    assert e.value.where == str(path)
    assert meant in e.value.fix


def test_a_key_without_a_value_is_told_how_to_give_one() -> None:
    with pytest.raises(ForewordError) as e:
        parse_overrides(["train.lr"])
    assert e.value.fix == "write train.lr=VALUE"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("train: [", "not a YAML recipe"),
        ("train: {lr: 2001-13-45}", "not a YAML recipe"),
        ("- a\n- b", "a recipe is a mapping"),
        ("train: fast", "section 'train' is not a mapping"),
    ],
)
def test_a_broken_recipe_names_its_file(tmp_path: Path, text: str, what: str) -> None:
    path = write(tmp_path / "r.yaml", text)
    with pytest.raises(ForewordError, match=what) as e:
        load_recipe(path)
    assert e.value.where == str(path)


def test_a_recipe_that_is_missing_a_folder_or_not_utf8(tmp_path: Path) -> None:
    with pytest.raises(ForewordError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(ForewordError, match="cannot read the recipe"):
        load_recipe(tmp_path)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("data: {label: Größe}".encode("latin-1"))
    with pytest.raises(ForewordError, match="not a YAML recipe"):
        load_recipe(latin)


# To YAML and back

TEXTS = st.text(max_size=20) | st.sampled_from(
    ["1e5", "no", "12:30", "~", " a", "a\n\n b ", "# x", "0x1F", "a: b", "=", "\x85", "a\u2028b\n"]
)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
KINDS: dict[Any, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.integers(),
    float: NUMBERS,
    str: TEXTS,
    str | None: st.none() | TEXTS.filter(bool),  # an empty optional text is none
    # Several values make a population; one in a list is that value.
    str | tuple[str, ...]: TEXTS | st.lists(TEXTS, min_size=2, max_size=3, unique=True).map(tuple),
    int | tuple[int, ...]: st.integers() | st.lists(st.integers(), min_size=2, max_size=3, unique=True).map(tuple),
    float | tuple[float, ...]: NUMBERS | st.lists(NUMBERS, min_size=2, max_size=3, unique=True).map(tuple),
    tuple[str, ...]: st.lists(TEXTS, max_size=3).map(tuple),
    tuple[int, ...]: st.lists(st.integers(), max_size=3).map(tuple),
    tuple[float, ...]: st.lists(NUMBERS, max_size=3).map(tuple),
    Mapping[str, str]: st.dictionaries(TEXTS, TEXTS, max_size=3),
}


def section(cls: type) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(cls)
    return st.builds(cls, **{f.name: KINDS[hints[f.name]] for f in dataclasses.fields(cls)})


@settings(max_examples=50, deadline=None)
@given(st.builds(Recipe, **{name: section(cls) for name, cls in config.SECTIONS.items()}), st.booleans())
def test_any_recipe_comes_back_from_its_yaml(
    tmp_path_factory: pytest.TempPathFactory, recipe: Recipe, comments: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    path.write_bytes(to_yaml(recipe, comments).encode())
    assert load_recipe(path) == recipe


def test_every_key_is_documented_and_the_yaml_shows_it() -> None:
    text = to_yaml(Recipe())
    for key in known_keys():
        name, field = key.split(".")
        doc = config.field_docs(config.SECTIONS[name])[field]
        assert doc.endswith("."), key
        assert f"  # {doc}\n  {field}:" in text


def test_a_recipe_as_a_dictionary_merges_back() -> None:
    recipe = recipe_of("data.classes=[a, b]", "train.lr=0.5", "data.label_words={a: x}")
    assert merge(Recipe(), as_dict(recipe), "dict") == recipe


# What cannot work


def test_a_sound_recipe_passes() -> None:
    check(recipe_of())
    check(recipe_of("data.eval_path=test.csv", "data.eval_split=test"))
    check(recipe_of("train.select=macro_f1", "data.validation_fraction=0.2", "train.patience=3"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_packaged_recipe_loads_and_passes(path: Path) -> None:
    check(load_recipe(path))


def test_the_demo_is_among_the_packaged_recipes() -> None:
    assert {"demo", "twitter-complaints"} <= {p.stem for p in RECIPES}


@pytest.mark.parametrize("key", ["model.id", "data.path", "data.label", "data.text"])
def test_what_must_be_given(key: str) -> None:
    section_name, name = key.split(".")
    base = {s: {k: v for k, v in values.items() if (s, k) != (section_name, name)} for s, values in GOOD.items()}
    assert refused(base=base).where == f"key {key}"


@pytest.mark.parametrize("key", checks.COUNTS)
@pytest.mark.parametrize("value", [0, -1])
def test_counts_must_be_at_least_one(key: str, value: int) -> None:
    error = refused(f"{key}={value}")
    assert (error.where, error.what) == (f"key {key}", f"{key} must be more than 0, not {value}")


@pytest.mark.parametrize("value", ["-1", "-0.1"])
def test_the_learning_rate_must_not_be_negative(value: str) -> None:
    assert refused(f"train.lr={value}").where == "key train.lr"


@pytest.mark.parametrize("key", checks.NOT_NEGATIVE)
def test_sizes_must_not_be_negative(key: str) -> None:
    assert refused(f"{key}=-1").where == f"key {key}"


@pytest.mark.parametrize("key", checks.FRACTIONS)
@pytest.mark.parametrize("value", ["-0.1", "1.0", "20"])
def test_fractions_lie_below_one(key: str, value: str) -> None:
    assert refused(f"{key}={value}").where == f"key {key}"


@pytest.mark.parametrize("value", [1, -5])
def test_one_fold_is_none(value: int) -> None:
    assert refused(f"data.folds={value}").where == "key data.folds"


@pytest.mark.parametrize("key", checks.CHOICES)
def test_a_choice_names_the_others(key: str) -> None:
    error = refused(f"{key}=nonsense")
    assert error.where == f"key {key}"
    assert all(choice in error.fix for choice in checks.CHOICES[key])


@pytest.mark.parametrize(
    ("pairs", "both"),
    [
        (["data.eval_path=t.csv", "data.folds=5"], ["data.eval_path", "data.folds"]),
        (["data.eval_split=test", "data.eval_fraction=0.2"], ["data.eval_split", "data.eval_fraction"]),
        (["data.eval_fraction=0.2", "data.folds=5"], ["data.eval_fraction", "data.folds"]),
    ],
)
def test_two_ways_to_hold_rows_out_exclude_each_other(pairs: list[str], both: list[str]) -> None:
    error = refused(*pairs)
    assert all(key in error.what for key in both)
    assert both[0] in error.where


def test_a_split_of_a_plain_file_is_refused_as_it_would_score_the_training_rows() -> None:
    assert refused("data.eval_split=test").where == "key data.eval_split"
    check(recipe_of("data.path=ought/raft", "data.eval_split=test"))


def test_files_are_those_that_can_be_read() -> None:
    assert tuple(READERS) == checks.FILES


@pytest.mark.parametrize("select", ["loss", "accuracy", "macro_f1"])
def test_choosing_the_best_needs_validation_rows(select: str) -> None:
    error = refused(f"train.select={select}", "data.eval_fraction=0.2")
    assert error.where == "key train.select"
    assert "data.validation_fraction" in error.fix


def test_patience_needs_a_score_to_watch() -> None:
    assert refused("train.patience=3").where == "key train.patience"
