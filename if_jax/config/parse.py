"""From a ConfigDict, or a plain dict out of a checkpoint, to a checked recipe and back."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

import ml_collections

from if_jax.config.checks import check
from if_jax.config.keys import Recipe
from if_jax.data.patterns import expand_home

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Section = TypeVar("Section", bound="DataclassInstance")
_WORDS_FOR_NOTHING = ("none", "null", "false", "true")  # what is written for "not used", and would be taken for a name


def to_recipe(config: Mapping[str, Any] | ml_collections.ConfigDict) -> Recipe:
    """Turns a ConfigDict (or plain dict) into a checked `Recipe`.

    Args:
      config: values by key, sections as dicts of their own; keys left out have their defaults.

    Returns:
      The recipe.

    Raises:
      ValueError: an unknown key, a wrong type or a value that cannot work; names the key, the value and what would do.
    """
    raw = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    recipe = _build(Recipe, raw, "")
    check(recipe)
    return recipe


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON-ready values, for checkpoints and releases."""
    return _plain(dataclasses.asdict(recipe))


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Compares two recipes.

    Args:
      old: a recipe as a dict.
      new: another one.
      prefix: of the section they are, with its dot.

    Returns:
      Both values of every key in which they differ, by dotted key.
    """
    pairs: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            pairs |= differences(a, b, f"{prefix}{key}.")
        elif a != b:
            pairs[prefix + key] = (a, b)
    return pairs


def resumable(name: str, section: Any = Recipe) -> bool:
    """Whether a run may go on with another value of a key.

    Args:
      name: the key with its sections: "data.threads".
      section: where the name begins.
    """
    head, _, rest = name.partition(".")
    field = next(field for field in dataclasses.fields(section) if field.name == head)
    return field.metadata.get("resumable", False) or (bool(rest) and resumable(rest, field.default))


def for_compiling(section: Section) -> Section:
    """The recipe with the defaults of all that the training step does not depend on: what that step is known by."""
    values = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if not field.metadata.get("compiled", True):
            values[field.name] = field.default
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            values[field.name] = for_compiling(value)
    return dataclasses.replace(section, **values)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def check_override(key: str, text: str | None) -> None:
    """Refuses a key and the text of its value, as a command line gives them, where no recipe could take them.

    Args:
      key: with its sections: "optimizer.learning_rate".
      text: the value as it was written; None where it is not known.

    Raises:
      ValueError: names the key, the value and what would do.
    """
    section, prefix = Recipe, ""
    *sections, last = re.sub(r"\[.*", "", key).split(".")
    for name in sections:
        hint = _hint_of(section, name, prefix, text)
        if not dataclasses.is_dataclass(hint):
            raise ValueError(f"recipe has no key {key} (value {text!r}): {prefix}{name} is a key, not a section")
        section, prefix = cast(type, hint), f"{prefix}{name}."
    hint = _hint_of(section, last, prefix, text)
    if dataclasses.is_dataclass(hint):
        raise ValueError(_not_a_section(prefix + last, text, hint))
    if text is None or hint not in (int, float) or "[" in key:
        return
    try:
        hint(text)
    except ValueError:
        raise ValueError(f"recipe key {key} is {text!r}: {_wanted(text, hint)}") from None


def _build(section: type, raw: Mapping[str, Any], prefix: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(section)}
    values = {}
    for name, value in raw.items():
        hint = _hint_of(section, name, prefix, value)
        if not dataclasses.is_dataclass(hint):
            values[name] = _checked(value, hint, fields[name], prefix + name)
        elif isinstance(value, Mapping):
            values[name] = _build(cast(type, hint), value, f"{prefix}{name}.")
        else:
            raise ValueError(_not_a_section(prefix + name, value, hint))
    return section(**values)


def _hint_of(section: type, name: str, prefix: str, value: Any) -> Any:
    """The annotation of a key of a section; ValueError where there is none, with the nearest."""
    hints = typing.get_type_hints(section)
    if name not in hints:
        near = difflib.get_close_matches(name, hints, n=1, cutoff=0.4)
        near = [full for full in hints if "".join(word[0] for word in full.split("_")) == name] or near  # lr
        hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(hints)}"
        raise ValueError(f"recipe has no key {prefix}{name} (value {value!r}): {hint}")
    return hints[name]


def _not_a_section(key: str, value: Any, section: Any) -> str:
    names = [field.name for field in dataclasses.fields(section)]
    return (
        f"recipe key {key} is {value!r}: it must hold the keys of a section; set one of them, such as "
        f"{key}.{names[0]} (known: {', '.join(names)})"
    )


def _checked(value: Any, hint: Any, field: dataclasses.Field, key: str) -> Any:
    """A key's value in the type it is annotated with, within what is known of it."""
    known = field.metadata
    choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else known.get("choices")
    if choices is None:
        value = _converted(value, hint, key)
    elif value not in list(choices):
        raise ValueError(f"recipe key {key} is {value!r}: it must be one of {', '.join(choices)}")
    if field.default == "" and str(value).strip().lower() in _WORDS_FOR_NOTHING:
        raise ValueError(f"recipe key {key} is {value!r}, which would be its name: leave it empty ({key}=) for none")
    if isinstance(value, tuple):
        for i, entry in enumerate(value):
            _check_limits(entry, known, f"{key}[{i}]")
    else:
        _check_limits(value, known, key)
    if parser := known.get("parser"):
        try:
            parser(value)
        except ValueError as error:
            raise ValueError(f"recipe key {key} is {value!r}: {error}") from None
    return expand_home(str(value)) if known.get("path") else value


def _check_limits(value: Any, known: Mapping[str, Any], key: str) -> None:
    minimum, maximum, above, below = (known.get(name) for name in ("minimum", "maximum", "above", "below"))
    lower = f"at least {minimum}" if minimum is not None else f"above {above}" if above is not None else ""
    upper = f"at most {maximum}" if maximum is not None else f"below {below}" if below is not None else ""
    outside = (
        (isinstance(value, float) and not math.isfinite(value))
        or (minimum is not None and value < minimum)
        or (maximum is not None and value > maximum)
        or (above is not None and value <= above)
        or (below is not None and value >= below)
    )
    if outside:
        wanted = " and ".join(filter(None, (lower, upper))) or "a finite number"
        raise ValueError(f"recipe key {key} is {value!r}: it must be {wanted}")


def _converted(value: Any, hint: Any, key: str) -> Any:
    if typing.get_origin(hint) is tuple:  # tuple[str, ...]
        wanted = f"it must be a list of {typing.get_args(hint)[0].__name__}"
        if isinstance(value, list | tuple):
            return tuple(_converted(v, typing.get_args(hint)[0], f"{key}[{i}]") for i, v in enumerate(value))
    else:
        wanted = _wanted(value, hint)
        if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
            return value
    raise ValueError(f"recipe key {key} is {value!r} ({type(value).__name__}): {wanted}")


def _wanted(value: Any, hint: type) -> str:
    """What would do in place of a value of another type: 1e5 and "100_000.0" are whole numbers that can be written."""
    if hint is int and not isinstance(value, bool):
        try:
            if float(value).is_integer():
                return f"it must be an int, write {int(float(value))}"
        except (TypeError, ValueError, OverflowError):
            pass
    return f"it must be {'an' if hint is int else 'a'} {hint.__name__}"
