"""The page as a person uses it, in a real browser: upload, draw, review by key, export."""

import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from serve_set import open_set, write_labelled

from sim_m2f.commands.serve import free_port
from sim_m2f.serving.window import Window, around

playwright = pytest.importorskip("playwright.sync_api", reason="the extra browser is not installed")
server = pytest.importorskip("sim_m2f.serving.server", reason="the extra serve is not installed")
from benchmarks.serve_images import BROWSER, CHROMIUM, drag  # noqa: E402  # it needs both

playwright.expect.set_options(timeout=30_000)  # milliseconds; a busy machine is slow
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, headless=True, args=BROWSER)
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


def pixels_of(page, label: str) -> np.ndarray:
    """(H, W, 3) of a picture that is seen."""
    address = page.get_by_role("img", name=label).get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(page.request.get(address).body())).convert("RGB")).astype(int)


def part_of(picture: np.ndarray, window: Window, corners: Sequence[float]) -> np.ndarray:
    """What a picture of a window shows of a box xyxy in pixels of the image."""
    scale = picture.shape[1] / (window.right - window.left)
    left, top, right, bottom = (
        round(scale * place) for place in corners - np.array([window.left, window.top] * 2)
    )
    return picture[top:bottom, left:right]


def test_a_set_is_reviewed_by_key(browser, served, tmp_path):
    (tmp_path / "9.png").write_bytes(b"")
    page, hosts = opened(browser, served)
    shows(page, "object", "disc 4", "score 0.00", "2.png", "0 accepted, 0 rejected, 12 open")
    page.keyboard.press("a")
    shows(page, "object", "ring 5", "1 accepted, 0 rejected, 11 open")
    page.keyboard.press("r")
    shows(page, "object", "star & bar 6", "1 accepted, 1 rejected, 10 open")
    page.keyboard.press("n")
    shows(page, "object", "disc 7", ": open")
    playwright.expect(page.get_by_text("9.png: cannot be decoded")).to_be_visible()
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
    corner, target = (np.array([left + share * width, top + share * height]) for share in (1, 0.6))
    before = pixels_of(page, "Its mask:")
    drag(page, window, corner, target)
    shows(page, "object", "score 0.8")  # a new mask, of which the network is surer
    after = pixels_of(page, "Its mask:")
    changed = abs(after - before).max(-1) > 40
    assert part_of(changed, window, [*target, *corner]).any()  # is not in the mask any more
    assert not part_of(changed, window, [corner[0] + 1, window.top, window.right, window.bottom]).any()
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
    window, disc, ring = Window(0, 0, 128, 128), [10, 28, 16, 34], [92, 86, 98, 92]
    found = pixels_of(page, "Masks:")
    assert part_of(found, window, disc)[..., 2].mean() > 20  # red, and what lies on it
    assert part_of(found, window, ring)[..., 2].mean() > 60  # green, and what lies on it
    drag(page, window, np.array([3, 6]), np.array([54, 51]))  # around the disc
    shows(page, "found", "1 object from drawn boxes: disc")
    drawn = pixels_of(page, "Masks:")
    assert part_of(drawn, window, disc)[..., [1, 2]].mean() > 20
    assert part_of(drawn, window, ring)[..., [0, 2]].mean() < 10
    assert hosts <= {served.rstrip("/"), "data:", "blob:"}


def upload(page, path: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Upload an image").click()
    chooser.value.set_files(str(path))
