"""Stage I of the demo cascade: a byte-level T5 and a 64 px UNet, trained together on drawn scenes.

    if-jax train --config configs/demo_base.py --workdir runs/demo_I

The same code as IF-I-XL in every part, only narrow. It predicts v instead of ε, which learns the composition in far
fewer pictures; stock diffusers reads that from the released scheduler configuration.

As it stands, the encoder learns from the loss of the pictures alone. It then knows the words early, and which words
belong together hardly at all (its noun in "a red cube and a blue sphere" tells its own colour no better than the
other's). The weights in the package were trained with an encoder that could read before, frozen as IF's is, and in
legs, at first at 32 px, which is four times less work per step:

    python -m if_jax.training.teach_text encoders/demo
    if-jax train --config configs/demo_base.py --workdir runs/32 --config.text_encoder_from=encoders/demo \\
        --config.data.source=tasks --config.data.size=32 --config.noise_size=256
    if-jax export runs/32 cascades/32
    if-jax train --config configs/demo_base.py --workdir runs/64 --config.text_encoder_from=encoders/demo \\
        --config.data.source=tasks --config.noise_size=512 --config.init_from=cascades/32/stage_I

and the last two once more, each from what the one before has published.

What is in the package so far knows a bag of words: right colours and right shapes, paired by chance. Between a
caption and the same with its two colours swapped, the true one explains a picture better in 61 of 100
(`tools/caption_binding.py`, one object each, timestep 250). Pooled text, which tells the whole picture at once which
words occur, leaves attention nothing to learn that would show. Without it, on pictures in which the pairing is
everything, attention learns to read at each place (48,000 pictures at 32 px); then half of it comes back, first at 32
px, where pictures are cheap and the numbers are learned, then at 64 px:

    if-jax train --config configs/demo_base.py --workdir runs/pairs --config.text_encoder_from=encoders/demo \\
        --config.data.source="0.85*pairs + 0.15*scenes" --config.pooled_dropout=1.0 --config.data.size=32 \\
        --config.noise_size=256 --config.init_from=cascades/64/stage_I
    if-jax export runs/pairs cascades/pairs
    if-jax train --config configs/demo_base.py --workdir runs/numbers --config.text_encoder_from=encoders/demo \\
        --config.data.source="0.5*pairs + 0.2*scenes + 0.3*tasks" --config.pooled_dropout=0.5 --config.data.size=32 \\
        --config.noise_size=256 --config.init_from=cascades/pairs/stage_I
    if-jax export runs/numbers cascades/numbers
    if-jax train --config configs/demo_base.py --workdir runs/last --config.text_encoder_from=encoders/demo \\
        --config.data.source="0.5*pairs + 0.2*scenes + 0.3*tasks" --config.pooled_dropout=0.5 \\
        --config.noise_size=512 --config.init_from=cascades/numbers/stage_I

So far: 115,600 pictures of scenes, tasks and pairs at 32 px first, from which it learned no pairing, then 48,000 of the
first leg, 144,000 of the second and 92,000 of the third (24,000 of them before the second, with 0.4 pairs, 0.3 scenes
and 0.3 tasks), in batches of 16 at 32 px and of 8 at 64. It is then 85 of 100. SynthEval's 66 known prompts go from
0.41 to 0.59 for stage I (0.47 to 0.70 by their interval), and "two red spheres and a blue cube" is right in 13 of 48
pictures at guidance 2, where the package's stage has 1, in 16 at guidance 3. After the second leg it was right in 21 of
48 pictures of 32 px: the number of objects is what 64 px still lose.

A small picture shows its composition through far more noise than a large one: with the plain cosine schedule the last
few per cent of the timesteps decide it. `noise_size` gives it the noise of a picture of that size, and colours and
counts begin to follow the caption.
"""

import ml_collections

from if_jax.recipes import default_recipe, in_form


def get_config(form: str = "") -> ml_collections.ConfigDict:
    config = default_recipe()
    config.stage = "base"
    config.unet = "demo-I"
    config.text_encoder = "demo"
    config.prediction = "v"
    config.batch_size = 32
    config.steps = 20_000
    config.ema_decays = (0.999,)
    config.data.source = "scenes"
    config.data.size = 64
    config.optimizer.learning_rate = 1e-3
    config.optimizer.final_learning_rate = 1e-5
    config.optimizer.warmup_steps = 300
    config.checkpoint_every = 500
    config.sample.every = 500
    return in_form(config, form)
