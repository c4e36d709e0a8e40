"""The page as a person uses it, in a real browser: upload, draw, review by key, export."""

import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from serve_set import open_set, write_labelled

from sim_m2f.commands.serve import free_port
from sim_m2f.serving.window import around

playwright = pytest.importorskip("playwright.sync_api", reason="the extra browser is not installed")
server = pytest.importorskip("sim_m2f.serving.server", reason="the extra serve is not installed")
playwright.expect.set_options(timeout=30_000)  # milliseconds; a busy machine is slow
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, headless=True, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def served(tmp_path) -> Iterator[str]:
    write_labelled(tmp_path)
    review = open_set(tmp_path)
    with server.served(review.labeller.model, review, "127.0.0.1", free_port("127.0.0.1", 0)) as address:
        yield address


def opened(browser, address: str):
    """The page in a browser that is new to it, and the hosts that it asks."""
    page, hosts = browser.new_page(viewport={"width": 1200, "height": 900}), set()
    page.on("request", lambda request: hosts.add(re.match(r"\w+:(//[^/]*)?", request.url)[0]))
    page.goto(address)
    return page, hosts


def shows(page, name: str, *texts: str) -> None:
    """Waits until the line of this name has all these texts."""
    line = page.locator(f"#{name}:visible")
    for text in texts:
        playwright.expect(line).to_contain_text(text)


def drag(page, ratio: float, start: tuple[float, float], end: tuple[float, float]) -> None:
    """With the mouse on the canvas, from and to places in shares of an image of this width to height."""
    frame = page.locator("canvas:visible").bounding_box()
    width = ratio * frame["height"]
    left = frame["x"] + (frame["width"] - width) / 2  # it stands in the middle
    points = [(left + x * width, frame["y"] + y * frame["height"]) for x, y in (start, end)]
    page.mouse.move(*points[0])
    page.mouse.down()
    page.mouse.move(*points[1], steps=4)
    page.mouse.up()


def pixels_of(page, label: str) -> np.ndarray:
    """(H, W, 3) of a picture that is seen."""
    address = page.get_by_role("img", name=label).get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(page.request.get(address).body())).convert("RGB")).astype(int)


def part_of(image: np.ndarray, left: float, top: float, right: float, bottom: float) -> np.ndarray:
    """Rows and columns between shares of an image's sides."""
    height, width = image.shape[:2]
    return image[int(top * height) : int(bottom * height), int(left * width) : int(right * width)]


def test_a_set_is_reviewed_by_key(browser, served, tmp_path):
    page, hosts = opened(browser, served)
    shows(page, "object", "disc 4", "score 0.00", "2.png", "0 accepted, 0 rejected, 12 open")
    page.keyboard.press("a")
    shows(page, "object", "ring 5", "1 accepted, 0 rejected, 11 open")
    page.keyboard.press("r")
    shows(page, "object", "star & bar 6", "1 accepted, 1 rejected, 10 open")
    page.keyboard.press("n")
    shows(page, "object", "disc 7", ": open")
    page.keyboard.press("p")
    shows(page, "object", "star & bar 6", ": open")
    page.keyboard.press("p")
    shows(page, "object", "ring 5", ": rejected")
    page.keyboard.press("a")
    shows(page, "object", "star & bar 6", "2 accepted, 0 rejected, 10 open")
    page.get_by_role("button", name="Reject (R)").click()
    shows(page, "object", "disc 7", "2 accepted, 1 rejected, 9 open")
    page.keyboard.press("p")
    shows(page, "object", "star & bar 6", ": rejected")

    page.close()  # nothing is lost with the browser
    page, more = opened(browser, served)
    shows(page, "object", "disc 7", "2 accepted, 1 rejected, 9 open")
    page.get_by_role("button", name="Export masks.json").click()
    shows(page, "written", str(tmp_path / "reviewed/masks.json"))
    coco = COCO(str(tmp_path / "reviewed/masks.json"))
    decisions = [coco.anns[number]["decision"] for number in (4, 5, 6, 7)]
    assert decisions == ["accepted", "accepted", "rejected", "open"]
    assert hosts | more <= {served.rstrip("/"), "data:", "blob:"}


def test_a_box_is_redrawn(browser, served, tmp_path):
    page, _ = opened(browser, served)
    shows(page, "object", "disc 4")
    annotation = json.loads((tmp_path / "masks.json").read_text())["annotations"][3]
    left, top, width, height = annotation["bbox"]
    window = around(np.array([left, top, left + width, top + height]), 80, 64)
    extent = window.right - window.left, window.bottom - window.top
    corner, target = (
        ((left + share * width - window.left) / extent[0], (top + share * height - window.top) / extent[1])
        for share in (1, 0.6)
    )
    before = pixels_of(page, "Its mask:")
    drag(page, extent[0] / extent[1], corner, target)
    shows(page, "object", "score 0.8")  # a new mask, of which the network is surer
    after = pixels_of(page, "Its mask:")
    changed = abs(after - before).max(-1) > 40
    assert part_of(changed, target[0] + 0.02, target[1] + 0.02, corner[0] - 0.02, corner[1] - 0.02).any()
    assert not part_of(changed, corner[0] + 0.02, 0, 1, 1).any()
    page.keyboard.press("a")
    shows(page, "object", "ring 5", "1 accepted")
    page.get_by_role("button", name="Export masks.json").click()
    shows(page, "written", "masks.json")
    coco = COCO(str(tmp_path / "reviewed/masks.json"))
    assert coco.anns[4]["decision"] == "accepted"
    assert coco.anns[4]["bbox"] == pytest.approx([left, top, 0.6 * width, 0.6 * height], abs=0.5)
    mask = coco.annToMask(coco.anns[4]).astype(bool)
    red = np.asarray(Image.open(tmp_path / "2.png"))[..., 0] == 255
    inside = np.zeros_like(red)
    inside[round(top) : round(top + 0.6 * height), round(left) : round(left + 0.6 * width)] = True
    assert (mask & red & inside).sum() / (mask | (red & inside)).sum() > 0.8


def test_an_upload_is_searched_and_a_drawn_box_gets_its_mask(browser, served, tmp_path):
    page, hosts = opened(browser, served)
    page.get_by_role("tab", name="Find objects").click()
    (tmp_path / "broken.png").write_bytes(b"no pixels")
    upload(page, tmp_path / "broken.png")
    playwright.expect(page.get_by_text("broken.png: cannot identify image file")).to_be_visible()
    upload(page, tmp_path / "9.png")
    shows(page, "found", "3 objects with a score of 0.5 or more: disc 0.85, ring 0.74, star & bar 0.64")
    disc, ring = (np.array(corners) / 128 for corners in ([10, 28, 16, 34], [92, 86, 98, 92]))
    found = pixels_of(page, "Masks:")
    assert part_of(found, *disc)[..., 2].mean() > 20  # red, and what lies on it
    assert part_of(found, *ring)[..., 2].mean() > 60  # green, and what lies on it
    drag(page, 1.0, (0.02, 0.05), (0.42, 0.4))  # around the disc
    shows(page, "found", "1 object from drawn boxes: disc")
    drawn = pixels_of(page, "Masks:")
    assert part_of(drawn, *disc)[..., 2].mean() > 20
    assert part_of(drawn, *ring)[..., [0, 2]].mean() < 10
    assert hosts <= {served.rstrip("/"), "data:", "blob:"}


def upload(page, path: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Upload an image").click()
    chooser.value.set_files(str(path))
