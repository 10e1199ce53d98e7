"""Stage I of the demo cascade: a byte-level T5 and a 64 px UNet on drawn scenes.

    if-jax train --config configs/demo_base.py --workdir runs/demo_I

The same code as IF-I-XL in every part, only narrow. It predicts v instead of ε, which learns the composition in far
fewer pictures; stock diffusers reads that from the released scheduler configuration.

As it stands, the encoder is trained together with the stage. It then knows the words early, and which words belong
together hardly at all. The weights in the package have a frozen encoder that could read before, as IF's has, and were
trained in legs: the forms of this recipe, each of which starts from what the one before has published.

    python -m if_jax.training.teach_text encoders/demo
    if-jax train --config configs/demo_base.py:small --workdir runs/small
    if-jax export runs/small cascades/small

and the last two with `large`, `pairs`, `numbers` and `last` in place of `small`.

small, large: tasks at 32 px, where a step is four times less work, then at 64 px. Both were run twice, the second time
`small` from `cascades/large/stage_I` (`--config.init_from`). This alone gives a bag of words: right colours and shapes,
paired by chance. Between a caption and the same with its two colours swapped, the true one explains a picture better in
61 of 100 (`tools/caption_binding.py`, one object each, timestep 250). Pooled text, which tells the whole picture at
once which words occur, leaves attention nothing to learn that would show.

pairs, numbers, last: without pooled text, on pictures in which the pairing is everything, attention learns to read at
each place. Then half of it comes back, at 32 px, where pictures are cheap and the numbers are learned, and at 64 px.

So far: 115,600 pictures of scenes, tasks and pairs at 32 px first, from which it learned no pairing, then 48,000 of
`pairs`, 144,000 of `numbers` and 92,000 of `last` (24,000 of them before `numbers`, with 0.4 pairs, 0.3 scenes and 0.3
tasks), in batches of 16 at 32 px and of 8 at 64. It is then 85 of 100. SynthEval's 66 known prompts go from 0.41 to
0.59 for stage I (0.47 to 0.70 by their interval), and "two red spheres and a blue cube" is right in 13 of 48 pictures
at guidance 2, where the package's stage has 1, in 16 at guidance 3. After `numbers` it was right in 21 of 48 pictures
of 32 px: the number of objects is what 64 px still lose.

A small picture shows its composition through far more noise than a large one: with the plain cosine schedule the last
few per cent of the timesteps decide it. `noise_size` gives it the noise of a picture of that size, and colours and
counts begin to follow the caption.
"""

import ml_collections

from if_jax.recipes import default_recipe, in_form

SETTINGS = {
    "stage": "base",
    "unet": "demo-I",
    "text_encoder": "demo",
    "prediction": "v",
    "batch_size": 32,
    "steps": 20_000,
    "ema_decays": (0.999,),
    "data.source": "scenes",
    "data.size": 64,
    "optimizer.learning_rate": 1e-3,
    "optimizer.final_learning_rate": 1e-5,
    "optimizer.warmup_steps": 300,
    "checkpoint_every": 500,
    "sample.every": 500,
}
AT_32 = {"text_encoder_from": "encoders/demo", "data.size": 32, "noise_size": 256}
AT_64 = {"text_encoder_from": "encoders/demo", "noise_size": 512}
MIXED = {"data.source": "0.5*pairs + 0.2*scenes + 0.3*tasks", "pooled_dropout": 0.5}
FORMS = {
    "small": {**AT_32, "data.source": "tasks"},
    "large": {**AT_64, "data.source": "tasks", "init_from": "cascades/small/stage_I"},
    "pairs": {
        **AT_32,
        "data.source": "0.85*pairs + 0.15*scenes",
        "pooled_dropout": 1.0,
        "init_from": "cascades/large/stage_I",
    },
    "numbers": {**AT_32, **MIXED, "init_from": "cascades/pairs/stage_I"},
    "last": {**AT_64, **MIXED, "init_from": "cascades/numbers/stage_I"},
}


def get_config(form: str = "") -> ml_collections.ConfigDict:
    return in_form(default_recipe(SETTINGS), form, FORMS)
