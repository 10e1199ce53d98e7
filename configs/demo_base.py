"""Stage I of the demo cascade: a byte-level T5 and a 64 px UNet on drawn scenes.

    if-jax train --config configs/demo_base.py --workdir runs/demo_I

The same code as IF-I-XL in every part, only narrow. It predicts v instead of ε, which learns the composition in far
fewer pictures; stock diffusers reads that from the released scheduler configuration.

As it stands, the encoder is trained together with the stage. It then knows the words early, and which words belong
together hardly at all. The weights in the package have a frozen encoder that could read before, as IF's has, and were
trained in two legs, the forms of this recipe. `launch/demo.sh WORKDIR` runs them and those of `demo_sr.py`:

    python -m if_jax.training.teach_text encoders/demo
    if-jax train --config configs/demo_base.py:small --workdir runs/small
    if-jax export runs/small cascades/small
    if-jax train --config configs/demo_base.py:large --workdir runs/large

`small` learns number and pairing from pictures of 32 px, where a step is four times less work; `large` starts from what
`small` has published and adds detail at 64 px. In both, part of the pictures hide the pooled text from the step
embedding. It tells the whole picture at once which words occur, and leaves attention nothing to learn that would show:
a net that always sees it knows a bag of words, right colours and right shapes, paired by chance
(`tools/caption_binding.py`). Neither shows a combination that SynthEval holds out.

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
LEG = {"text_encoder_from": "encoders/demo", "data.source": "0.5*pairs + 0.5*tasks"}
FORMS = {
    "small": {**LEG, "data.size": 32, "noise_size": 256, "pooled_dropout": 0.5, "optimizer.final_learning_rate": 2e-4},
    "large": {
        **LEG,
        "noise_size": 512,
        "pooled_dropout": 0.3,
        "batch_size": 16,
        "steps": 8_000,
        "optimizer.learning_rate": 8e-4,
        "optimizer.final_learning_rate": 5e-6,
        "init_from": "cascades/small/stage_I",
    },
}


def get_config(form: str = "") -> ml_collections.ConfigDict:
    return in_form(default_recipe(SETTINGS), form, FORMS)
