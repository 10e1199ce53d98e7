"""The notebooks of launch/colab: run from top to bottom by a kernel of their own, the forms filled with few steps.

The networks are those of tests/tiny.py in the place of the demo's; the slow tests take the demo's own.
"""

from __future__ import annotations

import ast
import base64
import io
import os
import re
import sys
from pathlib import Path

import jax
import nbformat
import pytest
import record_stores
from nbclient import NotebookClient
from PIL import Image

pytestmark = pytest.mark.documents

ROOT = Path(__file__).parents[2]
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "launch/colab").glob("*.ipynb"))}
FIELD = re.compile(r"^(\w+) = (.+?)  # @param .*$", re.MULTILINE)

# What is filled into the forms; PICTURES is a folder of captioned pictures, DEMO the release in the demo's place.
TRAINING = {  # the same program in both
    "batch_size": 4,
    "learning_rate": 1e-3,
    "ema_decay": 0.9,
    "checkpoint_every": 2,
    "prompts": "a red cube | a blue cube",
}
FORMS = {
    "dream": {
        "prompts": "two red spheres | a blue cube",
        "steps_I": "2",
        "steps_II": "1",
        "networks": "IF-I-M",
        "open_page": True,
        "folder_I": "DEMO/stage_I",
        "folder_II": "DEMO/stage_II",
        "published_steps_I": "3",
        "published_steps_II": "2",
    },
    "train_a_small_cascade": {"pictures": "PICTURES", "folder": "runs/small", "steps_I": 3, "steps_II": 3} | TRAINING,
    "fine_tune_and_take_to_pytorch": {"folder": "runs/tuned", "steps": 3, "drawing_steps": 5, "rank": 2} | TRAINING,
}
SHRINK = """
import sys
from pathlib import Path

import pytest

sys.path.insert(0, {tests!r})
import tiny

tiny.shrink_demo(Path("demo").absolute(), pytest.MonkeyPatch())
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder to work in, with pictures; the environment of the kernels."""
    folder = tmp_path_factory.mktemp("notebooks")
    record_stores.write_folder(folder / "pictures", 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]))
        patch.setenv("JAX_PLATFORMS", "cpu")
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # of machine code: a fifth less time to compile
        patch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        patch.setenv("JUPYTER_PLATFORM_DIRS", "1")
        for name in ("IPYTHONDIR", "MPLCONFIGDIR", "JUPYTER_RUNTIME_DIR"):  # nothing of the user's
            patch.setenv(name, str(folder / name.lower()))
        yield folder


def fill(notebook: nbformat.NotebookNode, values: dict) -> None:
    """Fills the form: `name = value  # @param`, as a hand in Colab does. Every value needs its field."""
    left = dict(values)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = FIELD.sub(lambda m: f"{m[1]} = {left.pop(m[1])!r}" if m[1] in left else m[0], cell.source)
    assert not left, f"no form has {sorted(left)}"


def run(name: str, place: Path, devices: int, shrunk: bool = True, **values) -> dict[str, nbformat.NotebookNode]:
    """Runs a notebook in the folder `place`: its code cells by id, with their outputs. Raises where a cell does."""
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    demo = place / "demo" if shrunk else ROOT / "if_jax/demo"
    places = {"DEMO": str(demo), "PICTURES": str(place / "pictures")}
    filled = {
        field: re.sub("DEMO|PICTURES", lambda match: places[match[0]], value) if isinstance(value, str) else value
        for field, value in (FORMS[name] | values).items()
    }
    fill(notebook, filled)
    start = f"import os\nos.environ['JAX_NUM_CPU_DEVICES'] = '{devices}'\n"
    if shrunk:
        start += SHRINK.format(tests=str(ROOT / "tests"))
    else:  # machine code as it comes is many times slower where there is much to compute
        start += "os.environ.pop('JAX_DISABLE_MOST_OPTIMIZATIONS', None)\n"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(start, id="before"))
    client = NotebookClient(notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": place}})
    client.execute()
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def text(cell: nbformat.NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


def pictures(cell: nbformat.NotebookNode) -> list[Image.Image]:
    encoded = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in encoded]


@pytest.fixture(autouse=True)
def own_python(monkeypatch):
    """The kernel is started by the interpreter of the tests, whatever kernels the user has."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def test_there_is_a_form_for_every_notebook():
    assert set(FORMS) == set(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_committed_clean(name):
    """Valid, without outputs and counts, with ids that are words; fields of forms hold plain values."""
    notebook = nbformat.read(NOTEBOOKS[name], as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-zI]+(-[a-zI]+)*", each) for each in ids), ids
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, cell.id
            for match in FIELD.finditer(cell.source):
                ast.literal_eval(match[2])
    sources = [cell.source for cell in notebook.cells]
    assert any('find_spec("if_jax") is None' in source for source in sources[:3]), "installs first, where it has to"
    assert "show_devices()" in sources[3]


def test_dream(work):
    """On two devices, as on any number."""
    cells = run("dream", work, devices=2)
    assert "2 × cpu (2 here)" in text(cells["device"]) and "no accelerator" in text(cells["device"])
    first, second = pictures(cells["demo"])
    assert first.size == (8 + 2 + 8, 8) and second.size == (16 + 2 + 16, 16)
    assert re.search(r"http://127\.0\.0\.1:\d+", text(cells["page"]))
    table = dict(line.rsplit(" ", 1)[0].split("  ", 1) for line in text(cells["fits"]).splitlines()[1:])
    assert table["T5-XXL, bfloat16"].split()[:2] == ["9.5", "fits"]
    assert table["IF-I-M, bfloat16"].split()[:2] == ["0.7", "fits"]
    assert (work / "prompts.safetensors").is_file()
    assert [picture.size for picture in pictures(cells["published"])] == [first.size, second.size]


def test_train_a_small_cascade(work):
    cells = run("train_a_small_cascade", work, devices=1)
    assert "picture number 0" in text(cells["data"]).lower()
    for stage in ("stage-I", "stage-II"):
        (curve,) = pictures(cells[stage])  # one, renewed in place
        assert curve.size == (1000, 400)
        assert len(curve.convert("RGB").getcolors(1 << 20)) > 100  # more than empty axes
    assert [picture.size for picture in pictures(cells["draw"])] == [(18, 8), (34, 16)]
    assert (work / "runs/small/cascade/stage_II/unet/diffusion_pytorch_model.safetensors").is_file()


def test_fine_tune_and_take_to_pytorch(work):
    cells = run("fine_tune_and_take_to_pytorch", work, devices=1)
    assert text(cells["data"]).count(" sks ") == 8
    assert (work / "runs/tuned/lora/pytorch_lora_weights.safetensors").is_file()
    far = int(re.search(r"differ by at most (\d+) of 255", text(cells["compare"]))[1])
    assert far <= 1
    assert len(pictures(cells["compare"])) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
@pytest.mark.usefixtures("work")
def test_with_the_demos_own_networks(name, tmp_path):
    own = {"folder": "runs/real", "pictures": ""}  # the pictures of the other tests are too small
    run(name, tmp_path, devices=1, shrunk=False, **{field: own[field] for field in own.keys() & FORMS[name].keys()})
