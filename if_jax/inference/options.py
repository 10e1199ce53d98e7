"""What all four modes take, what a step callback receives, and how progress is shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import jax
import numpy as np

from if_jax.inference.guard import SafetyGuard
from if_jax.inference.inputs import Picture
from if_jax.inference.settings import StageKwargs
from if_jax.inference.stage_inputs import StageNoise

if TYPE_CHECKING:
    from tqdm import tqdm

StageProgress = Callable[[str, int, int], None]  # stage, steps done, of how many
ACCELERATOR_BATCH = 4


class StepInfo(NamedTuple):
    """What a step callback receives: arrays (b, H, W, 3) of the pictures whose numbers stand in `pictures`."""

    stage: str
    pictures: np.ndarray
    left: int  # steps still to take
    timestep: int
    x: np.ndarray  # x_{t−1}
    x0: np.ndarray  # thresholded x̂0


class Options(TypedDict, total=False):
    """What all four modes take.

    Attributes:
      seed: picture k of a seed is the same whatever stands beside it; 0…2³²−1, 0 by default. Or one for each prompt,
        whose picture `first_picture` is drawn.
      stages: draw only so many of the cascade.
      if_I_kwargs: how stage I draws, see `settings.stage_settings`.
      if_II_kwargs: the same of stage II.
      if_III_kwargs: the same of stage III.
      negative_prompt: what to draw away from, where guidance_scale is not 1.
      style_prompt: a style in IF's way: the network pools it in place of the prompt, and guidance mixes its
        prediction with that of the prompt, by the share that `positive_mixer` of each stage says.
      vary: a picture, or one for each prompt, to draw variations of: for cascades that read `clip_image`.
      prompt_embeds: (B, L, D), text states (of `Cascade.embed`) in place of prompts.
      negative_prompt_embeds: (1 or B, L, D), in place of negative prompts.
      empty_embeds: (L, D), text states of the empty caption; with them and no text, no encoder is needed.
      clean_caption: clean prompts by IF's rules first (default True); in lower case unless the cascade's captions
        were not.
      guard: hides unsafe and watermarked pictures, see `guard`; the result's `guarded` says what it made of each.
      batch_size: pictures in one program and on one device; every program has exactly so many, the last one filled
        up, so that a picture has the same bits whatever is drawn beside it. Default: 1 on a CPU, else 4.
      return_tensors: NumPy arrays (H, W, 3), float32 in about [-1, 1], unclamped, in place of pictures.
      first_picture: number of the first picture (default 0): with 3, what would be picture 3 of the seed is drawn.
        Or the number of each picture.
      noise: by stage name, in place of drawn noise.
      progress: called with the stage's name, steps done and their total.
      callback: called with a `StepInfo` after every step.
    """

    seed: int | Sequence[int]
    stages: int | None
    if_I_kwargs: StageKwargs | None
    if_II_kwargs: StageKwargs | None
    if_III_kwargs: StageKwargs | None
    negative_prompt: str | Sequence[str] | None
    style_prompt: str | Sequence[str] | None
    vary: Picture | Sequence[Picture] | None
    prompt_embeds: np.ndarray | None
    negative_prompt_embeds: np.ndarray | None
    empty_embeds: np.ndarray | None
    clean_caption: bool
    guard: SafetyGuard | None
    batch_size: int | None
    return_tensors: bool
    first_picture: int | Sequence[int]
    noise: Mapping[str, StageNoise] | None
    progress: StageProgress | None
    callback: Callable[[StepInfo], None] | None


class Bars:
    """One progress bar after the other, with the time left: `with Bars() as bars: … progress=bars.show`."""

    def __init__(self, unit: str = "step") -> None:
        """Start without a bar.

        Args:
          unit: of what is counted; "step" are the steps of a stage.
        """
        self.unit, self.name = unit, ""
        self.bar: tqdm | None = None

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def show(self, name: str, done: int, total: int) -> None:
        """`done` of `total` units of `name`; another name closes the bar and opens the next."""
        from tqdm import tqdm

        if self.bar is None or name != self.name:
            self.__exit__()
            title = f"stage {name}" if self.unit == "step" else name
            self.name, self.bar = name, tqdm(total=total, unit=self.unit, desc=title)
        self.bar.update(done - self.bar.n)


def checked_numbers(options: Options, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Seed and number of each picture.

    Args:
      options: whose seed and first_picture are read.
      count: of pictures.

    Returns:
      Two arrays (count,) uint32.

    Raises:
      ValueError: one is no whole number in 0…2³²−1, or there are not as many as pictures.
    """
    seed, first = options.get("seed", 0), options.get("first_picture", 0)
    for word, value in (("seed", seed), ("first_picture", first)):
        several = isinstance(value, list | tuple | np.ndarray)
        for each in value if several else (value,):
            if isinstance(each, bool) or not isinstance(each, int | np.integer) or not 0 <= each < 2**32:
                raise ValueError(f"{word} is {each!r}: use a whole number in 0…{2**32 - 1}")
        if several and len(value) != count:
            raise ValueError(f"{len(value)} values of {word} for {count} prompts: give one, or one for each")
    alone = np.ndim(seed) == 0 and np.ndim(first) == 0  # the pictures of one seed are counted
    numbers = np.asarray(first, np.int64) + (np.arange(count) if alone else np.zeros(count, np.int64))
    return np.broadcast_to(np.asarray(seed, np.uint32), (count,)), numbers.astype(np.uint32)


def checked_batch_size(batch_size: int | None) -> int:
    """Pictures on one device, by default what suits it; ValueError for less than 1."""
    if batch_size is None:
        return 1 if jax.default_backend() == "cpu" else ACCELERATOR_BATCH
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: use 1 or more")
    return int(batch_size)
