"""YAML files as dataclasses: errors name the place and the fix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest

from mlx_distill.config import (
    current_spelling,
    from_mapping,
    keyed,
    option,
    override,
    override_texts,
    packaged,
    read_yaml,
    resolve_asset,
    to_mapping,
)
from mlx_distill.errors import ConfigError
from mlx_distill.recipe import TrainConfig


@dataclass(frozen=True)
class Inner:
    rate: float = option(0.1, "the rate", low=0.0, high=1.0)
    quiet: bool = option(False, "say less", keyed=False)


@dataclass(frozen=True)
class Outer:
    name: str = option(help="what it is called")
    mode: str | None = option(None, "how", choices=["fast", "slow"])
    count: int = option(3, "how many", low=1)
    inner: Inner = option(Inner, "more")
    names: list[str] = option([], "several")
    pair: tuple[float, float] = option((0.0, 1.0), "two ends")
    many: tuple[str, ...] = option((), "any number")
    columns: Mapping[str, str] = option({}, "a to b")
    inners: list[Inner] = option([], "several of them")
    anything: Any = field(default=None)


def build(**raw: Any) -> Outer:
    return from_mapping(Outer, {"name": "x", **raw}, "file.yaml")


def test_defaults_are_those_of_the_fields_and_not_shared() -> None:
    one, two = build(), build()
    assert one == Outer(name="x") and one.inner == Inner()
    assert one.names is not two.names and one.columns is not two.columns


def test_values_are_converted_to_the_type_of_the_field() -> None:
    made = build(
        mode="fast",
        inner={"rate": "1e-3"},
        names=["a"],
        pair=[1, 2],
        many=["a", "b"],
        columns={"a": "b"},
        inners=[{"rate": 1}],
        anything={"k": [1]},
    )
    assert made.inner.rate == 1e-3  # YAML reads 1e-3 as a string
    assert (
        made.pair == (1.0, 2.0)
        and made.many == ("a", "b")
        and made.inners == [Inner(1.0)]
        and isinstance(made.inners[0].rate, float)
    )
    assert made.anything == {"k": [1]}
    assert build(mode=None).mode is None


@pytest.mark.parametrize(
    ("raw", "where", "fix"),
    [
        ({"cuont": 1}, "file.yaml: unknown key 'cuont'", "did you mean 'count'?"),
        ({"zzzzzzz": 1}, "file.yaml: unknown key 'zzzzzzz'", "known keys: name, mode"),
        ({"inner": {"rote": 1}}, "file.yaml: inner: unknown key 'rote'", "did you mean 'rate'?"),
        ({"inners": [{}, {"rote": 1}]}, "file.yaml: inners[1]: unknown key 'rote'", "did you mean 'rate'?"),
        ({"count": 1.5}, "count: a whole number is needed, not 1.5", "change"),
        ({"count": True}, "count: a whole number is needed, not True", "change"),
        ({"count": "3"}, "count: a whole number is needed, not '3'", "change"),
        ({"count": 0}, "count: 0 is below 1", "how many"),
        ({"inner": {"rate": 2}}, "inner: rate: 2.0 is above 1.0", "the rate"),
        ({"inner": {"rate": "fast"}}, "rate: a number is needed, not 'fast'", "change"),
        ({"inner": {"rate": True}}, "rate: a number is needed, not True", "change"),
        ({"inner": {"quiet": 1}}, "quiet: true or false is needed, not 1", "change"),
        ({"inner": 3}, "inner: a mapping is needed, not 3", "key: value"),
        ({"mode": "medium"}, "mode: 'medium' is not one of fast, slow", "choose"),
        ({"names": "a"}, "names: a list is needed, not 'a'", "[a, b]"),
        ({"names": [1]}, "names[0]: text is needed, not 1", "quotes"),
        ({"names": [{"body": None}]}, "names[0]: text is needed, not {'body': None}", "'KEY=\"{body}\"'"),
        ({"inner": {"rate": float("nan")}}, "rate: nan is not a finite number", "change"),
        ({"inner": {"rate": "inf"}}, "rate: inf is not a finite number", "change"),
        ({"pair": [1, 2, 3]}, "pair: 2 values are needed, not 3", "[low, high]"),
        ({"columns": ["a"]}, "columns: a mapping is needed", "key: value"),
    ],
)
def test_a_wrong_value_is_refused_with_its_place_and_a_fix(raw: dict[str, Any], where: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(**raw)
    assert where in caught.value.message and fix in (caught.value.fix or "")
    assert caught.value.exit_code == 2


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match="name is missing"):
        from_mapping(Outer, {}, "file.yaml")
    with pytest.raises(ConfigError, match="a mapping is needed, not \\['name'\\]"):
        from_mapping(Outer, ["name"], "file.yaml")


def test_unkeyed_fields_are_in_the_mapping_and_not_in_the_key() -> None:
    made = build(inner={"quiet": True}, pair=[1, 2], inners=[{"quiet": True}])
    assert to_mapping(made)["inner"] == {"rate": 0.1, "quiet": True} and to_mapping(made)["pair"] == [
        1.0,
        2.0,
    ]
    assert keyed(made)["inner"] == {"rate": 0.1} and keyed(made)["inners"] == [{"rate": 0.1}]
    assert build(**to_mapping(made)) == made


def test_every_option_of_training_has_help_with_its_meaning() -> None:
    assert all(f.metadata["help"] for f in fields(TrainConfig))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("distill.epochs=2", {"distill": {"epochs": 2, "rate": 1.0}, "task": "a"}),
        (
            "distill.new.deep=[1, 2]",
            {"distill": {"epochs": 1, "rate": 1.0, "new": {"deep": [1, 2]}}, "task": "a"},
        ),
        (
            "task.system=hello = world",
            {"distill": {"epochs": 1, "rate": 1.0}, "task": {"name": "a", "system": "hello = world"}},
        ),
        (" distill . epochs = 3", {"distill": {"epochs": 3, "rate": 1.0}, "task": "a"}),
        ("distill.rate=null", {"distill": {"epochs": 1, "rate": None}, "task": "a"}),
        ("other=", {"distill": {"epochs": 1, "rate": 1.0}, "task": "a", "other": None}),
        ("task=### Label:", {"distill": {"epochs": 1, "rate": 1.0}, "task": "### Label:"}),
    ],
)
def test_overrides_change_nested_keys(text: str, expected: dict[str, Any]) -> None:
    raw = {"distill": {"epochs": 1, "rate": 1.0}, "task": "a"}
    assert override(raw, [text]) == expected
    assert raw == {"distill": {"epochs": 1, "rate": 1.0}, "task": "a"}  # untouched


def test_overrides_reach_into_lists() -> None:
    raw = {"data": {"sources": [{"path": "a"}, {"path": "b"}], "near": [1, 2]}}
    out = override(raw, ["data.sources.1.count=50", "data.near.0=7"])
    assert out == {"data": {"sources": [{"path": "a"}, {"path": "b", "count": 50}], "near": [7, 2]}}
    assert raw["data"]["sources"][1] == {"path": "b"}


@pytest.mark.parametrize("name", ["data.sources.2.count", "data.sources.path", "data.sources.x.count"])
def test_a_position_that_a_list_does_not_have_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.sources is a list and has no position"):
        override({"data": {"sources": [{}, {}]}}, {name: 1})


def test_overrides_of_a_mapping_are_texts_on_a_command_line() -> None:
    values = {"distill.epochs": 1.5, "data.domains": ["a b", "c"], "compute_dtype": None}
    texts = override_texts(values)
    assert override({}, texts) == override({}, values)


def test_later_overrides_win() -> None:
    assert override({}, ["a.b=1", "a.c=2", "a.b=3"]) == {"a": {"b": 3, "c": 2}}


@pytest.mark.parametrize("text", ["novalue", "=1", "a..b=1", "a=[1", ".a=1"])
def test_a_malformed_override_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        override({}, [text])


def test_yaml_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    with pytest.raises(ConfigError, match="no such file"):
        read_yaml(path)
    path.write_text("a: 1\nb: [1\nc: 2\n")
    with pytest.raises(ConfigError, match=r"recipe\.yaml:\d+: not valid YAML"):
        read_yaml(path)
    path.write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match="no mapping at the top"):
        read_yaml(path)
    path.write_bytes(b"a: \xff\n")
    with pytest.raises(ConfigError, match=r"recipe\.yaml:1: not UTF-8"):
        read_yaml(path)


def test_packaged_files_are_found_by_name_but_not_outside_assets() -> None:
    assert (packaged("recipes/tiny.yaml") or Path()).is_file()
    assert packaged("recipes/nope.yaml") is packaged("") is packaged("../__init__.py") is None
    with pytest.raises(ConfigError, match="no packaged file 'asset:nope'"):
        resolve_asset("asset:nope")


def test_a_path_is_relative_to_the_recipe_first(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    assert resolve_asset("rows.jsonl", tmp_path) == str(tmp_path / "rows.jsonl")
    assert resolve_asset("org/name", tmp_path) == "org/name"
    assert resolve_asset(str(tmp_path / "rows.jsonl"), tmp_path / "else") == str(tmp_path / "rows.jsonl")


@dataclass(frozen=True)
class Renamed:
    new_key: bool = option(False, "a renamed key", old_name="old_key")
    mode: str = option("a", "a renamed value", choices=["a", "new"], old_values={"old": "new"})


@dataclass(frozen=True)
class Around:
    inner: Renamed = option(Renamed, "more")
    text: str = option("", "free text")


def test_old_names_and_values_are_read_with_a_note_that_names_the_new_one() -> None:
    raw = {"inner": {"old_key": True, "mode": "old"}, "text": "old"}
    current, notes = current_spelling(Around, raw, "file.yaml")
    assert current == {"inner": {"new_key": True, "mode": "new"}, "text": "old"}
    assert notes == [
        "file.yaml: inner: old_key is now called new_key",
        "file.yaml: inner: mode: old is now called new",
    ]
    assert current_spelling(Around, current, "file.yaml") == (current, [])
    assert from_mapping(Around, current, "file.yaml").inner == Renamed(True, "new")


def test_a_key_under_both_names_is_refused_unless_the_old_one_replaces_the_value() -> None:
    raw = {"new_key": False, "old_key": True}
    with pytest.raises(ConfigError, match="both new_key and old_key"):
        current_spelling(Renamed, raw, "file.yaml")
    assert current_spelling(Renamed, raw, replace=True)[0] == {"new_key": True}
    assert current_spelling(Renamed, dict(reversed(raw.items())), replace=True)[0] == {"new_key": True}


@dataclass(frozen=True)
class Grown:
    rate: float = option(0.1)
    added: list[str] = option([], default_keyed=False)
    counted: tuple[str, ...] = option((), keyed_as=())


def test_an_option_added_later_is_keyed_only_where_it_is_used() -> None:
    assert keyed(Grown()) == {"rate": 0.1, "counted": []}
    assert keyed(Grown(added=["a"])) == {"rate": 0.1, "added": ["a"], "counted": []}


def test_an_option_that_changes_no_result_any_more_keeps_one_value_in_the_key() -> None:
    assert keyed(Grown(counted=("a",))) == keyed(Grown())


def test_keyed_settings_keep_the_old_spelling() -> None:
    assert keyed(Renamed(True, "new")) == {"old_key": True, "mode": "old"}
    assert keyed(Renamed()) == {"old_key": False, "mode": "a"}
    assert to_mapping(Renamed(True, "new")) == {"new_key": True, "mode": "new"}
