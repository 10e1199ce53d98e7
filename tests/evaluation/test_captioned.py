"""Captions drawn and measured: whole, in shares and in two goes, by two networks; and all that cannot be measured."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from flax import linen as nn
from PIL import Image

from if_jax import cli
from if_jax.checkpoints.files import sha256_of
from if_jax.checkpoints.lora import write_lora
from if_jax.checkpoints.release import write_cascade
from if_jax.checkpoints.weights import boxed_params
from if_jax.evaluation import captioned, curve
from if_jax.evaluation.captioned import CaptionedSuite
from if_jax.evaluation.captions import choose_captions, read_captions
from if_jax.evaluation.opening import Opening
from if_jax.models.lora import init_factors

TEXTS = [f"a {colour} {shape}" for colour in ("red", "blue", "green") for shape in ("cube", "ball", "cone")]
COUNT = len(TEXTS)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny cascade, captions, true pictures and a tiny CLIP, beside one another."""
    folder = tmp_path_factory.mktemp("captioned")
    stage = tiny.on_one_level(tiny.stages()[0])
    write_cascade(folder / "cascade", [stage], tiny.DEFAULTS[:1])
    (folder / "captions.txt").write_text("\n".join(TEXTS) + "\n\n")
    (folder / "true" / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(10):
        pixels = rng.integers(0, 256, (8, 8, 3), np.uint8).repeat(2, 0).repeat(2, 1)
        Image.fromarray(pixels).save(folder / "true" / ("more" if i % 2 else ".") / f"{i}.png")
    _write_clip(folder / "clip")
    return folder


def _write_clip(folder):
    """Random weights, and a tokenizer of single bytes in the files of CLIP's."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    torch.manual_seed(0)
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    config = transformers.CLIPConfig(
        text_config={**size, **ends, "vocab_size": len(words), "max_position_embeddings": 20},
        vision_config={**size, "image_size": 16, "patch_size": 8},
        projection_dim=12,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def _suite(place, **changes):
    networks = {"reader": None, "clip": place / "clip"}
    suite = CaptionedSuite(place / "captions.txt", place / "true", networks, stages=1, seed=3)
    return replace(suite, **changes)


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """One process, one go."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captioned, "CHUNK", 4)
        return out, captioned.evaluate(place / "cascade", _suite(place, keep_pictures=True), out)


def test_a_report_says_what_was_measured_and_on_what(place, whole):
    out, report = whole
    measured = report["measures"]
    # 9 pictures are no covariance of 104 features, nor of 12: kernels and neighbours hold.
    assert set(measured["reader"]) == {"kernel_distance", "precision", "recall"}
    assert set(measured["clip"]) == {"clip_score", "kid_clip", "precision", "recall", "cmmd"}
    assert measured["clip"]["cmmd"]["interval"][0] < measured["clip"]["cmmd"]["value"] > 0
    assert report["reference"]["pictures"] == 10 and report["prompts"]["count"] == COUNT
    assert report["networks"]["clip"]["resizer"].startswith("Pillow bicubic, short side to 16 px")
    assert report == json.loads((out / "report.json").read_text())
    assert len(list((out / "pictures").glob("*-I.png"))) == COUNT
    assert any("cmmd" in line for line in captioned.summary(report))


def test_shares_and_a_second_go_give_the_same_bits(place, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(captioned, "CHUNK", 4)
    lines = []
    first = captioned.evaluate(place / "cascade", _suite(place, share=(1, 2)), tmp_path, say=lines.append)
    assert first is None and "2 of 3 chunks are still to be drawn" in lines[-1]
    captioned.evaluate(place / "cascade", _suite(place, share=(0, 2)), tmp_path)
    (tmp_path / "pictures" / "00001-features.npz").unlink()  # as a process leaves it that is killed in its chunk
    kept = whole[0] / "reference.npz"
    report = captioned.evaluate(place / "cascade", _suite(place, reference=kept), tmp_path)
    assert report is not None
    for word in ("measures", "reference", "prompts_sha256", "cascade_sha256"):
        assert report[word] == whole[1][word], word


def test_eight_devices_draw_and_measure_the_bits_of_one(place, whole, tmp_path, monkeypatch):
    """The other tests run on eight; here CLIP and the cascade see the first alone."""
    monkeypatch.setattr(captioned, "CHUNK", 4)
    cascade = Opening().cascade(place / "cascade")
    assert cascade.placement.ways == len(jax.local_devices()) == 8
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    report = captioned.evaluate(place / "cascade", _suite(place, keep_pictures=True), tmp_path)
    assert report["measures"] == whole[1]["measures"]
    for path in (tmp_path / "pictures").glob("*.png"):
        assert path.read_bytes() == (whole[0] / "pictures" / path.name).read_bytes(), path.name


def test_true_pictures_are_measured_once_and_again_when_they_change(place, whole, tmp_path, monkeypatch):
    shutil.copytree(place / "true", tmp_path / "true")
    networks = {"reader": captioned.open_network("reader")}
    suite = _suite(place, reference=tmp_path / "true", networks={"reader": None})
    before = captioned._reference(suite, networks, tmp_path, lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr(captioned, "write_reference", lambda *_: pytest.fail("measured again"))
        again = captioned._reference(suite, networks, tmp_path, lambda *_: None)
    np.testing.assert_array_equal(before.features["reader"], again.features["reader"])
    Image.new("RGB", (16, 16), "red").save(tmp_path / "true" / "0.png")
    changed = captioned._reference(suite, networks, tmp_path, lambda *_: None)
    assert changed.sha256 != before.sha256 and changed.sha256 == captioned.pictures_sha256(tmp_path / "true")


def test_what_cannot_be_compared_with_is_said_before_anything_is_drawn(place, tmp_path, monkeypatch):
    monkeypatch.setattr(captioned, "_draw_chunk", lambda *_: pytest.fail("drawn"))
    with pytest.raises(FileNotFoundError, match="holds no pictures"):
        captioned.evaluate(place / "cascade", _suite(place, reference=tmp_path / "nothing"), tmp_path / "out")


def test_what_a_lora_draws_is_another_evaluation(place, tmp_path):
    boxed = boxed_params(tiny.on_one_level(tiny.stages()[0]).unet_config)
    factors = nn.unbox(jax.jit(lambda: init_factors(boxed, "attention+conv", 2, jax.random.key(0)))())
    factors = jax.tree.map(lambda leaf: leaf + 0.2, factors)
    write_lora(tmp_path / "style.safetensors", {"unet": factors}, 2)
    arguments = ["evaluate", "--suite", "coco", "--cascade", str(place / "cascade"), "--prompts", "2", "--stages", "1"]
    arguments += ["--captions", str(place / "captions.txt"), "--out", str(tmp_path / "out"), "--keep-pictures"]
    styled = CliRunner().invoke(cli.main, [*arguments, "--lora", f"{tmp_path / 'style.safetensors'}:0.5"])
    assert styled.exit_code == 0, styled.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["lora"] == [[sha256_of(tmp_path / "style.safetensors"), 0.5]]
    first = tmp_path / "out" / "pictures" / "00000-I.png"
    picture = first.read_bytes()
    refused = CliRunner().invoke(cli.main, arguments)
    assert refused.exit_code == 1 and "holds pictures of another cascade, seed or setting" in refused.output
    assert CliRunner().invoke(cli.main, [*arguments, "--overwrite"]).exit_code == 0
    assert first.read_bytes() != picture


def test_pictures_of_other_settings_are_refused_and_replaced_if_asked(place, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(captioned, "CHUNK", 4)
    shutil.copytree(whole[0], tmp_path / "out")
    other = _suite(place, reference=None, networks={"reader": None}, count=2)
    with pytest.raises(ValueError, match="holds pictures of another cascade, seed or setting"):
        captioned.evaluate(place / "cascade", other, tmp_path / "out")
    report = captioned.evaluate(place / "cascade", other, tmp_path / "out", overwrite=True)
    assert report["measures"] == {"reader": {}} and report["prompts"]["count"] == 2
    assert len(list((tmp_path / "out" / "pictures").glob("*.npz"))) == 1


def test_true_pictures_measured_against_themselves_are_no_distance_apart(whole):
    out, _ = whole
    with np.load(out / "reference.npz") as kept:
        rows = {"reader": kept["reader"].repeat(12, 0) + np.random.default_rng(0).normal(0, 1, (120, 104)) * 0.1}
    reference = captioned.Reference(rows, "")
    lines = []
    figures = captioned.measure(rows, reference, {"reader": None}, lines.append)["reader"]
    assert figures["frechet"]["value"] == pytest.approx(0, abs=1e-6)
    assert [line.split(":")[0] for line in lines] == ["frechet grows as pictures get fewer"]
    assert figures["precision"]["value"] == figures["recall"]["value"] == 1


def test_a_sweep_draws_a_curve(place, tmp_path, monkeypatch):
    monkeypatch.setattr(captioned, "CHUNK", 4)
    arguments = ["evaluate", "--suite", "coco", "--cascade", str(place / "cascade"), "--stages", "1", "--prompts", "4"]
    arguments += ["--captions", str(place / "captions.txt"), "--reference", str(place / "true"), "--features", "reader"]
    arguments += ["--features", f"clip={place / 'clip'}", "--out", str(tmp_path), "--sweep", "guidance=1,4"]
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "curve.json").read_text())["rows"]
    assert [row["value"] for row in rows] == ["1", "4"]
    assert rows[0]["measures"] != rows[1]["measures"] and rows[0]["reference"] == rows[1]["reference"]
    with Image.open(tmp_path / "curve.png", formats=["PNG"]) as plots:
        assert plots.width > 400
    assert "kernel_distance" in (tmp_path / "curve.html").read_text()
    assert "guidance 4" in result.output


def test_a_curve_shows_fid_by_clip_score(tmp_path):
    """What Imagen and IF show; drawn from made figures."""

    def report(score, fid):
        entry = {"value": fid, "interval": [fid - 1, fid + 1]}
        return {"measures": {"clip": {"clip_score": {"value": score, "interval": None}}, "inception": {"fid": entry}}}

    curve.draw(tmp_path, "guidance", [("1", report(25, 20)), ("2", report(28, 9)), ("4", report(30, 12))])
    with Image.open(tmp_path / "curve.png", formats=["PNG"]) as plots:
        assert plots.width > 1000  # three of them


@pytest.mark.parametrize(
    ("name", "content", "want"),
    [
        ("a.txt", "one\n\n two \n", ["one", "two"]),
        ("a.jsonl", '{"caption": "one"}\n"two"\n{"text": "three"}\n', ["one", "two", "three"]),
        ("a.json", '{"annotations": [{"id": 1, "image_id": 2, "caption": "one\\n"}]}', ["one"]),
        ("a.json", '["one", {"prompt": "two"}]', ["one", "two"]),
    ],
)
def test_captions_are_read_from_the_files_people_have(tmp_path, name, content, want):
    (tmp_path / name).write_text(content)
    assert read_captions(tmp_path / name) == want


def test_the_same_captions_are_chosen_again():
    texts = [str(i) for i in range(1000)]
    chosen = choose_captions(texts, 50, 1)
    assert chosen == choose_captions(texts, 50, 1) != choose_captions(texts, 50, 2)
    assert chosen == sorted(chosen, key=int) and len(set(chosen)) == 50
    assert choose_captions(texts, 5000, 1) == texts


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.txt", "\n \n", "holds no captions"),
        ("a.json", '{"images": []}', "holds no captions"),
        ("a.json", "{", "is no JSON"),
        ("a.jsonl", '{"caption": "x"}\n{"file": 1}\n', r"line 2: holds no caption under caption, text, prompt"),
        ("a.txt", b"\xff\xfe\x00", "is not UTF-8 text"),
    ],
)
def test_files_without_captions_are_refused_in_one_line(tmp_path, name, content, match):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=match) as caught:
        read_captions(path)
    assert "\n" not in str(caught.value)


def _bad_references(place, whole, tmp_path):
    mixed = tmp_path / "mixed"
    shutil.copytree(place / "true", mixed)
    Image.new("RGB", (20, 10)).save(mixed / "z.png")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"no picture")
    plain, cut = tmp_path / "plain.npz", tmp_path / "cut.npz"
    np.savez(plain, mu=np.zeros(3), sigma=np.eye(3))
    cut.write_bytes((whole[0] / "reference.npz").read_bytes()[:500])
    return {"mixed": mixed, "broken": broken, "plain": plain, "cut": cut, "kept": whole[0] / "reference.npz"}


@pytest.mark.parametrize(
    ("which", "options", "match"),
    [
        ("nothing", [], "holds no pictures; give a folder"),
        ("mixed", [], r"z\.png is 20×10 px, .* is 16×16: give --reference-size 256"),
        ("broken", [], r"a\.png: unreadable image; take it out of the folder"),
        ("plain", [], "does not say which network, weights and resizer made it"),
        ("cut", [], "is no whole .npz of features"),
        ("kept", ["--reference-size", "8"], "was made with --reference-size None, now 8"),
        ("kept", ["--reference-size", "0"], "--reference-size is 0: give 1 or more pixels"),
        ("kept", ["--features", "inception=nothing"], "nothing: the release lacks this file"),
        (
            "kept",
            ["--features", "vgg"],
            "the network 'vgg' is unknown: use one of inception, clip, dinov2",
        ),
        ("kept", ["--features", "clip"], "clip needs weights, which no package holds: give clip=PATH"),
        ("kept", ["--share", "3/2"], "--share '3/2': write K/N"),
        ("kept", ["--share", "1/2", "--coordinator", "a:1"], "--coordinator would do nothing: --share says already"),
        ("kept", ["--processes", "2"], "coordinator None, processes 2, process None: give all three, or none"),
        ("kept", ["--rules", "two"], "--rules 'two': use one of dp"),
        ("kept", ["--lora", "nothing"], "nothing"),
        ("kept", ["--sweep", "tone=1"], "--sweep 'tone=1': write WORD=VALUE,VALUE"),
        ("kept", ["--captions", "nothing.txt"], "--captions nothing.txt does not exist"),
        ("kept", ["--suite", "synth"], "--captions would do nothing: SynthEval brings its captions"),
    ],
)
def test_what_cannot_be_measured_is_one_line(place, whole, tmp_path, which, options, match):
    paths = _bad_references(place, whole, tmp_path)
    arguments = ["evaluate", "--suite", "coco", "--cascade", str(place / "cascade"), "--stages", "1", "--prompts", "1"]
    arguments += ["--captions", str(place / "captions.txt"), "--reference", str(paths.get(which, tmp_path / which))]
    result = CliRunner().invoke(cli.main, [*arguments, "--out", str(tmp_path / "out"), *options])
    errors = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert result.exit_code != 0 and len(errors) == 1
    assert re.search(match, errors[0]), errors[0]
