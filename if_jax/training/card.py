"""The model card of a release: its README.md, made from the recipes that trained it and the scores it was given."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from if_jax.checkpoints.stages import STAGE_NAMES, StageDefaults, StageRelease
from if_jax.checkpoints.weights import abstract_params
from if_jax.diffusion.schedule import parse_steps
from if_jax.text.tokens import TEXT_LENGTH

_HEAD = """---
library_name: diffusers
pipeline_tag: text-to-image
tags: [if_jax, deepfloyd-if, pixel-diffusion, cascade]
---

# {title}

Text-to-image in pixel space: {stages}. Trained with if_jax; stock PyTorch `diffusers` opens every stage folder.
"""
_USE = """
## Use

```python
from if_jax import Cascade

Cascade.load("PATH").dream(["a prompt"], seed=0)["{last}"][0].save("picture.png")
```

```python
import torch
from diffusers import DiffusionPipeline

stage_I = DiffusionPipeline.from_pretrained("PATH/stage_I", torch_dtype=torch.float32)
image = stage_I("a prompt", output_type="pt", {words}).images
"""
_USE_NEXT = """stage_{name} = DiffusionPipeline.from_pretrained(
    "PATH/stage_{name}",
    text_encoder=stage_I.text_encoder,
    tokenizer=stage_I.tokenizer,
    torch_dtype=torch.float32,
)
image = stage_{name}("a prompt", image=image, output_type="pt", {words}).images
"""
_TAUGHT = """Stage {name} is a student. It was taught by `{teacher}` (SHA-256 of its weights {sha256}) to draw
in {steps} calls of its network what that draws at guidance {guidance:g} ({method}). `diffusers` needs the arguments
above, steps and guidance: a release cannot change the defaults of a pipeline.

"""


_OWN_HEAD = """---
pipeline_tag: text-to-image
tags: [if_jax, deepfloyd-if, pixel-diffusion, cascade]
---

# {title}

Text-to-image in pixel space: {stages}. Trained with if_jax, which opens it. It reads {read}, which no pipeline of
`diffusers` does.
"""
_OWN_USE = """
## Use

```python
from if_jax import Cascade

Cascade.load("PATH").dream(["a prompt"], seed=0)["{last}"][0].save("picture.png")
"""
_CASE_KEPT = """Prompts keep their case, as the captions of training did. `diffusers` lower-cases every prompt: give it
`prompt_embeds` (of `Cascade.embed`) where case matters.

"""


def model_card(
    title: str,
    stages: Sequence[StageRelease],
    defaults: Sequence[StageDefaults],
    recipes: Sequence[Mapping[str, Any]],
    steps: Sequence[int],
    scores: Mapping[str, Any] | None = None,
) -> str:
    """The card as Markdown.

    Args:
      title: name of the release.
      stages: what is released.
      defaults: how each stage draws by default.
      recipes: of each stage, as plain values.
      steps: how many each was trained for.
      scores: measured figures by name, numbers or one level of groups of numbers, as `if-jax evaluate --json` writes
        them.
    """
    sizes = " → ".join(str(stage.unet_config.sample_size) for stage in stages)
    own = _read_beside_diffusers(stages, defaults)
    text = (_OWN_HEAD if own else _HEAD).format(title=title, stages=f"{sizes} pixels", read=own)
    text += "\n## Stages\n\n" + _stage_table(stages, defaults, recipes, steps)
    use = _OWN_USE if own else _USE
    text += use.format(last=STAGE_NAMES[len(stages) - 1], words=_words(defaults[0]))
    for name, default in zip(STAGE_NAMES[1 : len(stages)], defaults[1:], strict=True) if not own else ():
        text += _USE_NEXT.format(name=name, words=_words(default))
    text += "```\n\n" + (_CASE_KEPT if defaults[0].preserve_case else "")
    for name, stage, default, recipe in zip(STAGE_NAMES, stages, defaults, recipes, strict=False):
        text += _taught(name, stage, default, recipe)
    text += "## Scores\n\n" + _score_table(scores or {})
    for name, recipe in zip(STAGE_NAMES, recipes, strict=False):
        text += f"\n## Recipe of stage {name}\n\n```json\n{json.dumps(recipe, indent=2, sort_keys=True)}\n```\n"
    return text


def _words(default: StageDefaults) -> str:
    """What a pipeline of diffusers must be told to draw as the stage does by default."""
    words = {"guidance_scale": default.guidance_scale}
    if default.sample_timestep_respacing.startswith("trailing"):
        words["num_inference_steps"] = len(parse_steps(default.sample_timestep_respacing))
    if default.noise_level is not None:
        words["noise_level"] = default.noise_level
    return ", ".join(f"{name}={value}" for name, value in words.items())


def _taught(name: str, stage: StageRelease, default: StageDefaults, recipe: Mapping[str, Any]) -> str:
    """What is to know of a student; "" of any other stage."""
    if "teacher_sha256" not in stage.notes:
        return ""
    return _TAUGHT.format(
        name=name,
        teacher=stage.notes["teacher"],
        sha256=stage.notes["teacher_sha256"],
        steps=len(parse_steps(default.sample_timestep_respacing)),
        guidance=recipe["distill"]["guidance_scale"],
        method=recipe["distill"]["method"],
    )


def _read_beside_diffusers(stages: Sequence[StageRelease], defaults: Sequence[StageDefaults]) -> str:
    """What stages are told that no pipeline of diffusers tells them, in words; "" where it is T5 and 77 tokens."""
    read = dict.fromkeys(part.encoder for stage in stages for part in stage.unet_config.text_parts)
    words = [" + ".join(read)] if read else []
    if (length := defaults[0].text_length) != TEXT_LENGTH:
        words.append(f"captions of {length} tokens")
    return " and ".join(words)


def _stage_table(
    stages: Sequence[StageRelease],
    defaults: Sequence[StageDefaults],
    recipes: Sequence[Mapping[str, Any]],
    steps: Sequence[int],
) -> str:
    rows = [
        "| stage | draws | UNet | trained on | predicts | draws by default |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, stage, default, recipe, step in zip(STAGE_NAMES, stages, defaults, recipes, steps, strict=False):
        size = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(abstract_params(stage.unet_config)))
        seen = f"{step:,} steps of {recipe['batch_size']} from `{recipe['data']['source']}`"
        level = "" if default.noise_level is None else f", noise level {default.noise_level}"
        sampling = f"steps {default.sample_timestep_respacing}, guidance {default.guidance_scale:g}{level}"
        rows.append(
            f"| {name} ({stage.kind}) | {stage.unet_config.sample_size} px | {recipe['unet']}, {size / 1e6:,.1f} M "
            f"| {seen} | {stage.scheduler.prediction} | {sampling} |"
        )
    return "\n".join(rows) + "\n"


def _score_table(scores: Mapping[str, Any]) -> str:
    if not scores:
        return "None measured yet.\n"
    rows = ["| measure | value |", "| --- | --- |", *_score_rows(scores, "")]
    for name, group in scores.items():
        if isinstance(group, Mapping):
            rows += _score_rows(group, f"{name}: ")
    return "\n".join(rows) + "\n"


def _score_rows(group: Mapping[str, Any], prefix: str) -> list[str]:
    """The numbers of a group, each with the interval that stands beside it; hashes and deeper groups are left out."""
    rows = []
    for name, value in group.items():
        if isinstance(value, int | float):
            low_high = group.get(f"{name}_ci")
            interval = " ({:.3f} … {:.3f})".format(*low_high) if low_high else ""
            rows.append(f"| {prefix}{name} | {f'{value:.4g}' if isinstance(value, float) else value}{interval} |")
    return rows
