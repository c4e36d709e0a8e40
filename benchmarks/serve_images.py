"""The images of docs/serve.md: the page of a real network, driven in a browser as a person would.

python benchmarks/serve_images.py --model out/ --labelled out/ --images images/ --output docs/images
"""

import argparse
import io
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from sim_m2f.commands.serve import free_port, open_review
from sim_m2f.files import atomic_write
from sim_m2f.report.labelled import MASKS
from sim_m2f.segmenter import from_pretrained
from sim_m2f.serving.review import Review
from sim_m2f.serving.server import served
from sim_m2f.serving.window import Window, around

SIZE = {"width": 960, "height": 770}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
BROWSER = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
WAIT = 60_000  # milliseconds
COLOURS = 128  # of a PNG


def save(page: Page, path: Path) -> None:
    page.mouse.move(5, 5)
    page.wait_for_timeout(1500)  # images fade in
    shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    with atomic_write(path, "wb") as file:
        shot.quantize(COLOURS, kmeans=4, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)


def changed(page: Page, line: str, act: Callable[[], None]) -> None:
    """Act, and wait until a line of the page says something else."""
    prose = f"#{line} .prose"
    before = page.locator(prose).inner_text()
    act()
    script = "([prose, old]) => document.querySelector(prose).innerText !== old"
    page.wait_for_function(script, arg=[prose, before], timeout=WAIT)
    page.wait_for_timeout(1000)


def drag(page: Page, window: Window, start: np.ndarray, end: np.ndarray) -> None:
    """With the mouse on the canvas, which shows a window of an image in its middle; (x, y) of the image."""
    frame = page.locator("canvas:visible").bounding_box()
    zoom = frame["height"] / (window.bottom - window.top)
    left = frame["x"] + (frame["width"] - zoom * (window.right - window.left)) / 2
    places = [
        (left + zoom * (x - window.left), frame["y"] + zoom * (y - window.top)) for x, y in (start, end)
    ]
    page.mouse.move(*places[0])
    page.mouse.down()
    page.mouse.move(*places[1], steps=5)
    page.mouse.up()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder of a network")
    parser.add_argument(
        "--labelled", required=True, type=Path, help="folder with masks.json, which is copied"
    )
    parser.add_argument("--images", required=True, type=Path, help="its images")
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    args = parser.parse_args()
    images, output = args.images.resolve(), args.output.resolve()
    model = from_pretrained(args.model)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        shutil.copytree(args.labelled, Path(folder) / "out", ignore=lambda _, names: set(names) - {MASKS})
        os.chdir(folder)  # the page shows a short path
        review = open_review(model, args.model, Path("out"), images)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=BROWSER)
        with served(model, review, "127.0.0.1", free_port("127.0.0.1", 0)) as address:
            page = browser.new_page(viewport=SIZE)
            page.goto(address)
            page.wait_for_selector("canvas:visible", timeout=WAIT)
            drive(page, review, output)
        browser.close()


def drive(page: Page, review: Review, output: Path) -> None:
    """The review of the worst object, and the image with most objects searched."""
    save(page, output / "serve_review.png")
    worst = review.next_open()
    box, _ = review.target(worst)
    image = review.image_of[worst]
    window = around(box, image.height, image.width)
    narrower = box[2:] - [0.2 * (box[2] - box[0]), 0]
    changed(page, "object", lambda: drag(page, window, box[2:], narrower))
    save(page, output / "serve_redrawn.png")
    changed(page, "object", lambda: page.keyboard.press("a"))
    changed(page, "object", lambda: page.keyboard.press("a"))
    changed(page, "object", lambda: page.keyboard.press("r"))
    changed(page, "written", page.get_by_role("button", name="Export masks.json").click)
    save(page, output / "serve_export.png")
    page.get_by_role("tab", name="Find objects").click()
    crowded = max(review.data.images, key=lambda image: len(image.boxes))
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Upload an image").click()
    changed(page, "found", lambda: chooser.value.set_files(review.data.image_root / crowded.file_name))
    save(page, output / "serve_found.png")
    window = Window(0, 0, crowded.width, crowded.height)
    for box in crowded.boxes[:2]:
        changed(page, "found", lambda box=box: drag(page, window, box[:2], box[2:]))
    save(page, output / "serve_drawn.png")


if __name__ == "__main__":
    main()
