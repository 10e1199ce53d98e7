"""From a ConfigDict, or a plain dict out of a checkpoint, to a checked recipe and back."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections

from if_jax.config.checks import check
from if_jax.config.keys import Recipe


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
    """The dotted keys in which two recipes (as dicts) differ, with both values."""
    pairs: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            pairs |= differences(a, b, f"{prefix}{key}.")
        elif a != b:
            pairs[prefix + key] = (a, b)
    return pairs


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def _build(section: type, raw: Mapping[str, Any], prefix: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(section)}
    hints = typing.get_type_hints(section)
    values = {}
    for name, value in raw.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0.4)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(fields)}"
            raise ValueError(f"recipe has no key {prefix}{name} (value {value!r}): {hint}")
        if not dataclasses.is_dataclass(hints[name]):
            values[name] = _checked(value, hints[name], fields[name].metadata, prefix + name)
        elif isinstance(value, Mapping):
            values[name] = _build(hints[name], value, f"{prefix}{name}.")
        else:
            raise ValueError(f"recipe key {prefix}{name} is {value!r}: it must hold the keys of a section")
    return section(**values)


def _checked(value: Any, hint: Any, known: Mapping[str, Any], key: str) -> Any:
    """A key's value in the type it is annotated with, within what is `known` of it."""
    choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else known.get("choices")
    if choices is None:
        value = _converted(value, hint, key)
    elif value not in list(choices):
        raise ValueError(f"recipe key {key} is {value!r}: it must be one of {', '.join(choices)}")
    minimum = known.get("minimum")
    if minimum is not None and value < minimum:
        raise ValueError(f"recipe key {key} is {value!r}: it must be at least {minimum}")
    return value


def _converted(value: Any, hint: Any, key: str) -> Any:
    if typing.get_origin(hint) is tuple:  # tuple[str, ...]
        wanted = f"list of {typing.get_args(hint)[0].__name__}"
        if isinstance(value, list | tuple):
            return tuple(_converted(v, typing.get_args(hint)[0], f"{key}[{i}]") for i, v in enumerate(value))
    else:
        wanted = hint.__name__
        if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
            return value
    raise ValueError(f"recipe key {key} is {value!r} ({type(value).__name__}): it must be a {wanted}")
