"""What can befall a release: each makes a function that damages a (copied) folder in one way.

`put`, `edit`, `gone` and the like take a file within the folder; what they make takes the folder.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import tiny
import yaml
from safetensors.numpy import load_file, save_file

from if_jax.checkpoints import release
from if_jax.checkpoints.stages import TextEncoder
from if_jax.checkpoints.tensors import Storage
from if_jax.models.t5 import T5Config
from if_jax.text.tokens import load_tokenizer

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
UNET_BIN = "unet/diffusion_pytorch_model.bin"
INDEX = f"{UNET}.index.json"
KERNEL = "conv_in.weight"  # (32, 3, 3, 3)
WIDER_TEXT = T5Config(vocab_size=384, d_model=48, d_kv=8, d_ff=48, num_layers=1, num_heads=4)


def nothing(folder):
    pass


def put(file, content):
    def damage(folder):
        (folder / file).write_bytes(content(folder) if callable(content) else content)

    return damage


def edit(file, change):
    """Change the bytes of a file."""

    def damage(folder):
        path = folder / file
        path.write_bytes(change(path.read_bytes()))

    return damage


def told(file, **values):
    """Change keys of a JSON file; `...` removes one."""

    def change(content):
        merged = json.loads(content) | values
        return json.dumps({key: value for key, value in merged.items() if value is not ...}).encode()

    return edit(file, change)


def gone(name):
    def damage(folder):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def joined(rows, content):
    """The bytes of a safetensors file: header (bytes, or what JSON says of it) and content."""
    text = rows if isinstance(rows, bytes) else json.dumps(rows).encode()
    return len(text).to_bytes(8, "little") + text + content


def header(file, change):
    """Change the header of a safetensors file, whatever comes of it."""

    def rewrite(content):
        length = int.from_bytes(content[:8], "little")
        rows = json.loads(content[8 : 8 + length])
        rows = change(rows) or rows
        return joined(rows, content[8 + length :])

    return edit(file, rewrite)


def state(file, change):
    """Change the tensors of a safetensors file, which stays a valid one."""

    def damage(folder):
        found = load_file(folder / file)
        change(found)
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in found.items()}, folder / file)

    return damage


def torch_state(file, change):
    import torch

    def damage(folder):
        found = torch.load(folder / file, weights_only=True)
        made = change(found)
        torch.save(found if made is None else made, folder / file)

    return damage


def old_format(folder):
    import torch

    found = torch.load(folder / UNET_BIN, weights_only=True)
    torch.save(found, folder / UNET_BIN, _use_new_zipfile_serialization=False)


def value(name, number):
    def change(found):
        found[name] = found[name].copy()
        found[name].flat[-1] = number

    return change


def replaced(name, make):
    return lambda found: found.update({name: make(found[name])})


def renamed(found):
    found["conv_inn.weight"] = found.pop(KERNEL)


def offsets(name, begin, end):
    return lambda rows: rows[name].update(data_offsets=[begin, end])


def overlapping(rows):
    second = sorted((row["data_offsets"], name) for name, row in rows.items() if name != "__metadata__")[1][1]
    rows[second]["data_offsets"][0] -= 4


def short_table(folder):
    """A text encoder with fewer rows than the tokenizer has ids, in itself consistent."""
    told("text_encoder/config.json", vocab_size=300)(folder)
    state(TEXT, replaced("shared.weight", lambda table: table[:300]))(folder)


def wider_text(folder):
    """A text encoder of another width, in itself consistent."""
    text = TextEncoder(WIDER_TEXT, tiny.random_params(WIDER_TEXT), load_tokenizer("bytes"), "0" * 64)
    release.write_text_encoder(folder / "text_encoder", text.config, text.params, Storage(None), {})


def shard(folder, number):
    return sorted((folder / "unet").glob("*-of-*.safetensors"))[number]


def lost_shard(folder):
    shard(folder, 1).unlink()


def unlisted_tensor(folder):
    state(shard(folder, 0), lambda found: found.update(surplus=np.zeros(3, np.float32)))(folder)


def tensor_in_two_shards(folder):
    name = next(iter(load_file(shard(folder, 0))))
    tensor = load_file(shard(folder, 0))[name]
    state(shard(folder, 1), lambda found: found.update({name: tensor}))(folder)


def index_lists(changes):
    def change(content):
        index = json.loads(content)
        index["weight_map"] |= {name: next(iter(index["weight_map"].values())) for name in changes}
        return json.dumps(index).encode()

    return edit(INDEX, change)


def cascade_json(change):
    def rewrite(content):
        values = json.loads(content)
        change(values)
        return json.dumps(values).encode()

    return edit("cascade.json", rewrite)


def weights_of_another_day(folder):
    state(f"stage_II/{UNET}", value(KERNEL, 0.5))(folder)


def params(**changes):
    """Change the settings of a config.yml; `...` removes one."""

    def change(content):
        merged = yaml.safe_load(content)["params"] | changes
        return yaml.safe_dump({"params": {key: v for key, v in merged.items() if v is not ...}}).encode()

    return edit("config.yml", change)
