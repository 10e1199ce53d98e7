"""The page in a real browser, Debian's Chromium: pytest -m "" tests/serving/test_page.py

One test is run with all others, where there is a Chromium; the marker `browser` picks the rest.

SCREENSHOTS=FOLDER keeps what it looks like.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from serving_fixtures import picture, served

from if_jax.inference.pictures import read_notes

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of `if-jax serve` in a process of its own, which draws with the tiny cascade."""
    with served(tmp_path_factory.mktemp("served")) as (address, server):
        yield address
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page, which may ask no other site, and whose console must stay free of errors."""
    context = browser.new_context(**getattr(request, "param", {"viewport": {"width": 1280, "height": 1000}}))
    opened = context.new_page()
    elsewhere: list[str] = []
    opened.on("request", lambda sent: elsewhere.append(sent.url) if _is_elsewhere(sent.url, address) else None)
    opened.goto(address)
    opened.wait_for_selector("#draw")
    yield opened
    if folder := os.environ.get("SCREENSHOTS"):
        opened.screenshot(path=f"{folder}/{request.node.name.replace('/', '-')}.png", full_page=True)
    context.close()
    assert not elsewhere


def _is_elsewhere(url: str, address: str) -> bool:
    return not url.startswith((address, "data:", "blob:", "about:"))


def _draw(page: Any, prompt: str) -> None:
    before = page.locator("#gallery img").count()
    page.fill("#prompt textarea", prompt)
    page.click("#draw")
    page.wait_for_function(f"document.querySelectorAll('#gallery img').length == {before + 1}", timeout=40_000)


def _save(page: Any, path: Path) -> Path:
    """The last stage's picture, saved as a user would."""
    with page.expect_download() as saved:
        page.locator("#pictures a").last.click()
    saved.value.save_as(path)
    return path


def test_dreams_are_drawn_saved_and_restored(page: Any, tmp_path: Path) -> None:
    page.click("#more")
    page.uncheck("#random input")
    page.fill("#seed input", "41")
    _draw(page, "two red spheres and a blue cube")
    assert page.locator("#pictures img").count() == 2 and "seed 41" in page.inner_text("#progress")
    file = _save(page, tmp_path / "a.png")
    notes = read_notes(file)
    assert notes["prompt"] == "two red spheres and a blue cube" and notes["options"]["seed"] == 41
    page.fill("#seed input", "7")
    _draw(page, "something else")
    assert page.locator("#gallery img").count() == 2
    page.set_input_files("#restore input[type=file]", str(file))
    page.wait_for_function("document.querySelector('#prompt textarea').value.startsWith('two red')")
    assert page.input_value("#seed input") == "41"
    page.click("#draw")
    page.wait_for_function("document.querySelectorAll('#gallery img').length == 3")
    again = _save(page, tmp_path / "b.png")
    assert np.array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(file)))


@pytest.mark.browser
def test_a_mask_is_painted_with_the_mouse(page: Any, tmp_path: Path) -> None:
    picture(256, 256).save(tmp_path / "room.png")
    page.get_by_role("tab", name="Inpainting").click()
    page.set_input_files("#editor input[type=file]", str(tmp_path / "room.png"))
    canvas = page.locator("#editor canvas").last
    canvas.wait_for()
    page.wait_for_timeout(1500)
    box = canvas.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(*middle)
    page.mouse.down()
    for step in range(1, 12):
        page.mouse.move(middle[0] + 6 * step, middle[1] + 3 * step)
    page.mouse.up()
    _draw(page, "a blue cube")
    notes = read_notes(_save(page, tmp_path / "painted.png"))
    assert notes["mode"] == "inpainting" and notes["prompt"] == "a blue cube"


@pytest.mark.parametrize("mode", ["style_transfer", "super_resolution"])
@pytest.mark.browser
def test_pictures_are_drawn_over_and_enlarged(page: Any, tmp_path: Path, mode: str) -> None:
    picture(40, 30).save(tmp_path / "small.png")
    page.get_by_role("tab", name=mode.replace("_", " ").capitalize().replace("Super r", "Super-r")).click()
    page.set_input_files(f"#image-{mode} input[type=file]", str(tmp_path / "small.png"))
    page.wait_for_selector(f"#image-{mode} img")
    _draw(page, "a wooden toy")
    assert read_notes(_save(page, tmp_path / "a.png"))["mode"] == mode


@pytest.mark.browser
def test_a_drawing_is_cancelled(page: Any) -> None:
    page.click("#more")
    page.get_by_label("Steps I", exact=True).fill("298")
    page.fill("#prompt textarea", "a sign")
    page.click("#draw")
    page.wait_for_selector("#progress progress")
    page.click("#cancel")
    page.wait_for_selector("#progress >> text=cancelled")


@pytest.mark.browser
def test_a_mistake_is_one_line(page: Any) -> None:
    page.click("#draw")
    page.wait_for_selector("text=prompt is empty: say what to draw")


@pytest.mark.parametrize(
    "page", [{"viewport": {"width": 390, "height": 800}, "color_scheme": "dark"}], indirect=True, ids=["phone-dark"]
)
@pytest.mark.browser
def test_on_a_phone_in_the_dark_and_by_keyboard(page: Any) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.focus("#prompt textarea")
    page.keyboard.type("a green cylinder")
    page.keyboard.press("Enter")
    page.wait_for_selector("#progress >> text=drawn in", timeout=40_000)
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", colour)[:3])) < 200


@pytest.mark.browser
def test_the_client_of_the_docs_draws(address: str) -> None:
    page = (Path(__file__).parents[2] / "docs/serve.md").read_text(encoding="utf-8")
    code = next(
        text for text in re.findall(r"^```text\n(.*?)^```", page, re.MULTILINE | re.DOTALL) if "def draw" in text
    )
    names: dict[str, Any] = {}
    exec(compile(code, "docs/serve.md", "exec"), names)
    drawn = names["draw"](address, prompt="a red cube", seed=5, pictures=2)
    again = names["draw"](address, prompt="a red cube", seed=5, pictures=2)
    assert len(drawn) == 2 and drawn == again and list(drawn[0]) == ["I", "II"]


@pytest.mark.browser
def test_gradio_client_draws(address: str) -> None:
    from gradio_client import Client

    reply = Client(address, verbose=False).predict({"prompt": "a red cube", "seed": 5}, api_name="/draw")
    assert reply["state"] == "done" and reply["seed"] == 5 and reply["pictures"][0]["stages"]["II"]["png"]
