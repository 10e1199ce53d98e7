"""The page: four modes in tabs, pictures as their stages are finished, and the settings of a picture from its PNG."""

from __future__ import annotations

import base64
import html
import io
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import gradio as gr
import numpy as np
from fastapi import Request
from gradio.events import api
from PIL import Image
from pydantic import ValidationError

from if_jax.checkpoints.stages import STAGE_NAMES
from if_jax.diffusion.samplers import SAMPLERS
from if_jax.inference.pictures import png_bytes, read_notes, to_pil
from if_jax.serving.api import described, in_one_line
from if_jax.serving.engine import Engine
from if_jax.serving.files import PictureFiles
from if_jax.serving.guard import client_of
from if_jax.serving.jobs import Job
from if_jax.serving.requests import DrawRequest, Mode, Refused

_PAUSE = 0.4  # seconds between two looks at a job
_KEPT = 60  # pictures of the gallery
_MODES: dict[str, Mode] = {
    "Dream": "dream",
    "Style transfer": "style_transfer",
    "Super-resolution": "super_resolution",
    "Inpainting": "inpainting",
}
_SAMPLER_DEFAULT = "default"
_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
_RATIOS = ["1:1", "3:2", "2:3", "16:9", "9:16"]
CSS = """
.if-pictures{display:flex;flex-wrap:wrap;gap:12px}
.if-pictures figure{margin:0;flex:0 1 auto;max-width:100%}
.if-pictures img{display:block;max-width:100%;min-width:128px;border-radius:6px;image-rendering:auto}
.if-pictures figcaption{font-size:.8rem;opacity:.8;max-width:256px;overflow-wrap:anywhere}
.if-gallery img{width:128px;height:auto}
.if-progress progress{width:100%}
"""


class _Fields:
    """The components whose values make a request, in the order in which events receive them."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.components: list[Any] = []

    def add(self, name: str, component: Any) -> Any:
        self.names.append(name)
        self.components.append(component)
        return component


def make_page(engine: Engine, files: PictureFiles, examples: list[str]) -> gr.Blocks:
    """The page of an engine.

    Args:
      engine: that draws.
      files: that makes the PNGs.
      examples: prompts that the cascade draws well.
    """
    names = STAGE_NAMES[: len(engine.cascade.stages)]
    fields, running = _Fields(), dict[str, Job]()
    with gr.Blocks(title="if_jax", analytics_enabled=False, delete_cache=(300, 1800)) as page:
        mode, gallery = gr.State("Dream"), gr.State([])
        gr.Markdown(f"# if_jax\nThe cascade `{files.notes['cascade']}` draws from text, stage by stage.")
        with gr.Row():
            with gr.Column(min_width=320):
                prompt = fields.add("prompt", gr.Textbox(label="Prompt", max_lines=4, elem_id="prompt"))
                _mode_tabs(fields, mode, len(names))
                with gr.Row():
                    draw = gr.Button("Draw", variant="primary", elem_id="draw")
                    cancel = gr.Button("Cancel", elem_id="cancel")
                gr.Examples([[text] for text in examples], inputs=prompt, label="Examples")
                with gr.Accordion("More", open=False, elem_id="more"):
                    _settings(fields, engine, names)
                restore = gr.File(
                    label="Drop a PNG drawn here to restore its settings",
                    file_types=[".png"],
                    type="binary",
                    height=130,
                    elem_id="restore",
                )
            with gr.Column(min_width=320):
                progress = gr.HTML(elem_id="progress")
                pictures = gr.HTML(elem_id="pictures", label="Pictures")
                gr.Markdown("### Drawn in this sitting")
                shown = gr.HTML(elem_id="gallery")
        outputs = [progress, pictures, gallery, shown]

        def on_draw(request: gr.Request, mode: str, rows: list[dict[str, Any]], *values: Any) -> Iterator[tuple]:
            yield from _follow(engine, running, mode, rows, dict(zip(fields.names, values, strict=True)), request)

        def on_api(request: gr.Request, body: dict) -> dict:
            job = engine.submit(_read_body(body), client_of(cast(Request, request.request)))
            job.done.result()
            if job.state != "done":
                raise gr.Error(job.error or job.state, print_exception=False)
            return described(job, files)

        def on_cancel(request: gr.Request) -> None:
            if job := running.get(str(request.session_hash)):
                engine.cancel(job)

        drawing: dict[str, Any] = {"fn": on_draw, "inputs": [mode, gallery, *fields.components], "outputs": outputs}
        gr.on(
            [draw.click, prompt.submit],
            **drawing,
            show_progress="hidden",
            concurrency_limit=None,
            api_visibility="private",
        )
        cancel.click(on_cancel, None, None, queue=False, **_QUIET)
        restore.upload(
            _restorer(fields, names),
            restore,
            fields.components,
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )
        api(on_api, api_name="draw", concurrency_limit=None)
    return page


def _mode_tabs(fields: _Fields, mode: gr.State, stages: int) -> None:
    """A tab for each mode, with what it alone takes."""
    with gr.Tabs(elem_id="modes"):
        for label in _MODES:
            if label == "Super-resolution" and stages < 2:
                continue
            with gr.Tab(label, elem_id=f"tab-{_MODES[label]}") as tab:
                if label == "Dream":
                    fields.add("aspect_ratio", gr.Radio(_RATIOS, value="1:1", label="Aspect ratio"))
                elif label == "Inpainting":
                    fields.add(
                        "inpainting",
                        gr.ImageEditor(
                            label="Paint over what is to be drawn anew",
                            type="pil",
                            image_mode="RGBA",
                            brush=gr.Brush(colors=["#ffffff"], color_mode="fixed", default_size=24),
                            eraser=gr.Eraser(default_size=24),
                            layers=False,
                            transforms=[],
                            sources=["upload"],
                            elem_id="editor",
                        ),
                    )
                else:
                    name = _MODES[label]
                    fields.add(name, gr.Image(label="Picture", type="pil", sources=["upload"], elem_id=f"image-{name}"))
                if label in ("Style transfer", "Inpainting"):
                    about = "1 draws it wholly anew" if label == "Inpainting" else "how much is drawn anew"
                    default = 1.0 if label == "Inpainting" else 0.7
                    fields.add(
                        f"strength_{_MODES[label]}",
                        gr.Slider(0.05, 1, value=default, step=0.05, label=f"Strength of stage I ({about})"),
                    )
                tab.select(lambda label=label: label, None, mode, queue=False, **_QUIET)


def _settings(fields: _Fields, engine: Engine, names: tuple[str, ...]) -> None:
    fields.add("negative_prompt", gr.Textbox(label="Negative prompt"))
    fields.add("style_prompt", gr.Textbox(label="Style prompt", info="pooled in place of the prompt, as in IF"))
    with gr.Row():
        fields.add("seed", gr.Number(label="Seed", value=0, precision=0, minimum=0, maximum=2**32 - 1, elem_id="seed"))
        fields.add("random", gr.Checkbox(label="A new seed each time", value=True, elem_id="random"))
        most = engine.limits.pictures
        fields.add("pictures", gr.Slider(1, most, value=1, step=1, label="Pictures"))
    fields.add("stages", gr.Radio(list(range(1, len(names) + 1)), value=len(names), label="Stages"))
    for name, defaults in zip(names, engine.cascade.defaults, strict=True):
        steps = defaults.sample_timestep_respacing
        with gr.Row():
            fields.add(f"guidance_{name}", gr.Number(label=f"Guidance {name}", value=defaults.guidance_scale))
            fields.add(f"steps_{name}", gr.Textbox(label=f"Steps {name}", value=str(steps)))
            samplers = [_SAMPLER_DEFAULT, *SAMPLERS]
            fields.add(f"sampler_{name}", gr.Dropdown(samplers, value=_SAMPLER_DEFAULT, label=f"Sampler {name}"))
            if defaults.noise_level is not None:
                level = gr.Slider(
                    0, defaults.max_noise_level, value=defaults.noise_level, step=1, label=f"Noise level {name}"
                )
                fields.add(f"level_{name}", level)


def _follow(
    engine: Engine,
    running: dict[str, Job],
    mode: str,
    rows: list[dict[str, Any]],
    values: dict[str, Any],
    request: gr.Request,
) -> Iterator[tuple]:
    """What the page shows of a request, from the first moment to the last picture."""
    try:
        job = engine.submit(_request_of(engine, mode, values), client_of(cast(Request, request.request)))
    except Refused as refused:
        raise gr.Error(refused.message, print_exception=False) from None
    running[str(request.session_hash)] = job
    began = time.monotonic()
    while True:
        ended = job.ended
        if not ended:
            yield _progress(engine, job, began), _pictures(job), rows, gr.skip()
            time.sleep(_PAUSE)
            continue
        break
    if job.state == "failed":
        raise gr.Error(job.error, print_exception=False)
    finished = [
        {"job": job.id, "number": number, "stage": list(stages)[-1], "prompt": job.plan.prompt, "seed": job.plan.seed}
        for number, stages in enumerate(job.pictures)
        if len(stages) == len(job.plan.stages)
    ]
    rows = [*finished, *rows][:_KEPT]
    yield _progress(engine, job, began), _pictures(job), rows, _gallery(rows)


def _request_of(engine: Engine, mode: str, values: dict[str, Any]) -> DrawRequest:
    """The values of the components as a request.

    Raises:
      Refused: one of them cannot be read.
    """
    kind = _MODES[mode]
    fields: dict[str, Any] = {word: values[word] or "" for word in ("prompt", "negative_prompt", "style_prompt")}
    fields |= {"mode": kind, "pictures": int(values["pictures"] or 1)}
    first = 1 if kind == "super_resolution" else 0
    names = STAGE_NAMES[first : int(values["stages"] or len(engine.cascade.stages))]
    settings = {name: _words(engine, name, values) for name in names}
    if kind in ("style_transfer", "inpainting"):
        settings["I"]["strength"] = values[f"strength_{kind}"]
    fields |= {"settings": settings, "stages": int(values["stages"] or len(engine.cascade.stages))}
    if not values["random"]:
        fields["seed"] = int(values["seed"] or 0)
    if kind == "dream":
        fields["aspect_ratio"] = values["aspect_ratio"]
    elif kind == "inpainting":
        fields["image"], fields["mask"] = _painted(values["inpainting"])
    else:
        fields["image"] = _encoded(values[kind])
    return _read_body(fields)


def _read_body(fields: dict[str, Any]) -> DrawRequest:
    try:
        return DrawRequest.model_validate(fields)
    except ValidationError as error:
        raise Refused(422, in_one_line(error.errors()[0])) from None


def _words(engine: Engine, name: str, values: dict[str, Any]) -> dict[str, Any]:
    """What differs from the cascade's own defaults in the settings of a stage."""
    defaults = engine.cascade.defaults[STAGE_NAMES.index(name)]
    words: dict[str, Any] = {}
    guidance, steps, level = (values.get(f"{word}_{name}") for word in ("guidance", "steps", "level"))
    if guidance is not None and float(guidance) != defaults.guidance_scale:
        words["guidance_scale"] = float(guidance)
    if steps and str(steps).strip() != str(defaults.sample_timestep_respacing):
        words["sample_timestep_respacing"] = str(steps).strip()
    if values[f"sampler_{name}"] != _SAMPLER_DEFAULT:
        words["sample_loop"] = values[f"sampler_{name}"]
    if level is not None and int(level) != defaults.noise_level:
        words["noise_level"] = int(level)
    return words


def _painted(value: dict[str, Any] | None) -> tuple[str, str]:
    """Picture and mask of the editor: what was painted is in a layer over the background."""
    if not value or value.get("background") is None:
        raise Refused(422, "image is missing: upload a picture, and paint over what is to be drawn anew")
    background, layers = value["background"].convert("RGB"), value.get("layers") or []
    painted = np.zeros((background.height, background.width), bool)
    for layer in layers:
        painted |= np.asarray(layer.convert("RGBA").resize(background.size))[..., 3] > 127
    if not painted.any():
        raise Refused(422, "mask is missing: paint over what is to be drawn anew")
    return _encoded(background), _encoded(Image.fromarray((painted * 255).astype(np.uint8)))


def _encoded(picture: Image.Image | None) -> str:
    if picture is None:
        return ""
    return base64.b64encode(png_bytes(picture)).decode()


def _restorer(fields: _Fields, names: tuple[str, ...]) -> Callable[[bytes | None], list[Any]]:
    """From a PNG to the values of all components; what it does not tell stays."""

    def restore(content: bytes | None) -> list[Any]:
        if not content:
            return [gr.skip()] * len(fields.names)
        try:
            notes = read_notes(io.BytesIO(content))
        except ValueError:
            gr.Warning("this PNG holds no settings of if-jax: give it as it was written, not a copy")
            return [gr.skip()] * len(fields.names)
        options = notes.get("options", {})
        values: dict[str, Any] = {"prompt": notes.get("prompt", ""), "seed": options.get("seed", 0), "random": False}
        values |= {word: options.get(word) or "" for word in ("negative_prompt", "style_prompt")}
        values |= {"aspect_ratio": options.get("aspect_ratio") or "1:1", "stages": options.get("stages") or len(names)}
        for name in names:
            words = options.get(f"if_{name}_kwargs") or {}
            of = {"guidance_scale": "guidance", "sample_timestep_respacing": "steps", "noise_level": "level"}
            values |= {f"{of[word]}_{name}": value for word, value in words.items() if word in of}
            values[f"sampler_{name}"] = words.get("sample_loop", _SAMPLER_DEFAULT)
        return [values.get(name, gr.skip()) for name in fields.names]

    return restore


def _progress(engine: Engine, job: Job, began: float) -> str:
    """Where a job is, as text with a bar."""
    stage, done, total = job.progress
    seconds = time.monotonic() - began
    if job.state == "queued":
        return f"<div class=if-progress role=status>waiting: {engine.waiting()} pictures before and with it</div>"
    if job.state == "cancelled":
        return "<div class=if-progress role=status>cancelled</div>"
    if job.ended:
        return f"<div class=if-progress role=status>seed {job.plan.seed}, drawn in {seconds:.1f} s</div>"
    left = f", about {seconds / done * (total - done):.0f} s left in it" if stage and done else ""
    bar = f"<progress max={total or 1} value={done} aria-label='steps'></progress>"
    return f"<div class=if-progress role=status>stage {stage or 'I'}: step {done} of {total}{left}{bar}</div>"


def _pictures(job: Job) -> str:
    """All finished stages of a job's pictures, and x̂0 of what is being drawn."""
    figures = []
    for number, stages in enumerate(job.pictures):
        for stage in list(stages):
            about = f"stage {stage}, seed {job.plan.seed}, number {number}"
            figures.append(
                _figure(f"/v1/jobs/{job.id}/{number}-{stage}.png", about, f"{job.plan.seed}-{number}-{stage}")
            )
        preview = job.previews.get(number)
        if preview is not None:
            stage, x0 = preview
            source = "data:image/png;base64," + base64.b64encode(png_bytes(to_pil(x0))).decode()
            figures.append(_figure(source, f"stage {stage}, being drawn", ""))
    return f"<div class=if-pictures>{''.join(figures)}</div>"


def _gallery(rows: list[dict[str, Any]]) -> str:
    figures = [
        _figure(
            f"/v1/jobs/{row['job']}/{row['number']}-{row['stage']}.png",
            f"{row['prompt']} · seed {row['seed']}",
            f"{row['seed']}-{row['number']}-{row['stage']}",
        )
        for row in rows
    ]
    return f"<div class='if-pictures if-gallery'>{''.join(figures)}</div>"


def _figure(source: str, about: str, name: str) -> str:
    """A picture with its caption; a finished one is a link that saves it with its settings."""
    text = html.escape(about, quote=True)
    picture = f'<img src="{source}" alt="{text}">'
    if name:
        picture = f'<a href="{source}" download="{name}.png" title="save with its settings">{picture}</a>'
    return f"<figure>{picture}<figcaption>{text}</figcaption></figure>"
