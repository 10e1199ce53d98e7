"""Where a run goes on: its newest sound checkpoint, and whether the recipe is still the one it was begun with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from if_jax.checkpoints import run
from if_jax.config import Recipe, differences, recipe_to_dict, resumable, to_recipe
from if_jax.parallel import hosts

# Recipe keys that name a place; what counts is the content there, which checkpoints keep under these names.
_KNOWN_BY_CONTENT = {
    "data.source": "data",
    "data.exclude": "data",
    "data.embeddings": "embeddings",
    "text_encoder_from": "text_encoder_sha256",
    "conditioning.clip_from": "text_encoder_sha256",
    "distill.teacher": "teacher_sha256",
}


def resume(workdir: str, metadata: dict[str, Any], seconds: float = 300) -> tuple[int, list[dict[str, Any]]]:
    """Finds where a run goes on. Damaged checkpoints are set aside for a sound one before them.

    Args:
      workdir: folder of the run, which belongs to one recipe: only `resumable` keys may change.
      metadata: "recipe" (plain values), "text_encoder_sha256" and (of a LoRA) "base_sha256" or (of a student)
        "teacher_sha256" of the session that begins.
      seconds: without a sign of life of process 0, which looks at the checkpoints, after which the others leave.

    Returns:
      The step to go on from (0 in a fresh folder), and the metrics of the window begun before it.

    Raises:
      ValueError: another recipe, text encoder, base of a LoRA or teacher, a run of another version, or no sound
        checkpoint among those there.
      PermissionError, NotADirectoryError: the folder cannot be used.
    """
    if jax.process_index() == 0:
        run.set_aside_damaged(workdir)
    if jax.process_count() > 1:
        hosts.exchange("checkpoints checked", {}, seconds, while_alive=True)  # reading them through takes its time
    step, before = run.read_latest(workdir)
    if not before:
        return 0, []
    check_same_recipe(workdir, before, metadata["recipe"])
    if before.get("text_encoder_sha256", "") != metadata["text_encoder_sha256"]:
        clip_from = metadata["recipe"].get("conditioning", {}).get("clip_from", "")
        named = " and ".join(repr(name) for name in (metadata["recipe"]["text_encoder_from"], clip_from) if name)
        raise ValueError(
            f"{workdir} was trained with another text encoder than {named}: name that one, or use another --workdir"
        )
    if before.get("base_sha256") != metadata.get("base_sha256"):
        raise ValueError(
            f"{workdir} holds the LoRA of another net than init_from {metadata['recipe']['init_from']!r}: name the "
            "folder it was begun with, or use another --workdir"
        )
    if before.get("teacher_sha256") != metadata.get("teacher_sha256"):
        teacher = metadata["recipe"]["distill"]["teacher"]
        raise ValueError(
            f"{workdir} holds the student of another teacher than distill.teacher {teacher!r}: name the release it was "
            "begun with, or use another --workdir"
        )
    return step, before.get("window", [])


def check_same_recipe(workdir: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Checks that a run goes on with the recipe it was begun with.

    Args:
      workdir: folder of the run.
      before: metadata of its checkpoint.
      now: the recipe to go on with, as plain values.

    Raises:
      ValueError: they differ in more than resumable keys, and the places of data whose content the checkpoint knows.
    """
    stored = recipe_to_dict(stored_recipe(workdir, before))  # keys that are newer than the run at their defaults
    moved = {key for key, content in _KNOWN_BY_CONTENT.items() if before.get(content)}
    changed = {
        key: (old, new)
        for key, (old, new) in differences(stored, now).items()
        if not (resumable(key) or (key in moved and new))
    }
    if changed:
        changes = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items())
        raise ValueError(
            f"{workdir} holds a run of another recipe ({changes}): use another --workdir or the old values"
        )


def check_same_data(workdir: str, metadata: Mapping[str, Any]) -> None:
    """Checks that a run goes on with the pictures, captions and text states it was begun with, wherever they are now.

    Args:
      workdir: folder of the run. What a checkpoint of an earlier version does not know is not compared.
      metadata: "recipe", and "data" and "embeddings" of `host_facts.data_facts`.

    Raises:
      ValueError: their content is another.
    """
    _, before = run.read_latest(workdir)
    for key, name in (("source", "data"), ("embeddings", "embeddings")):
        if before.get(name, metadata.get(name)) != metadata.get(name):
            raise ValueError(
                f"{workdir} was trained on other data: data.{key} was {before['recipe']['data'][key]!r} "
                f"({before[name]}), is {metadata['recipe']['data'][key]!r} ({metadata.get(name)}); give the old data "
                "again, or use another --workdir"
            )


def stored_recipe(workdir: str, metadata: Mapping[str, Any]) -> Recipe:
    """The recipe a checkpoint was written with.

    Raises:
      ValueError: this version does not know it.
    """
    try:
        return to_recipe(metadata["recipe"])
    except ValueError as error:
        raise ValueError(
            f"{workdir} holds a run of another version of if_jax ({error}): use that one, or another --workdir"
        ) from None
