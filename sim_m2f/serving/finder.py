"""The tab that shows what a network finds in an image, and the masks of boxes that are drawn on it."""

import html
from pathlib import Path

import gradio as gr
import numpy as np
from PIL import Image

from sim_m2f.data.coco import CocoData
from sim_m2f.errors import UserError
from sim_m2f.report.drawing import Shape, colours, draw
from sim_m2f.segmenter import Instances, Segmenter
from sim_m2f.serving.parts import LEAST, Canvas, Updates, canvas, picture, told
from sim_m2f.serving.uploads import MOST_MEGABYTES, MOST_MEGAPIXELS, read_upload
from sim_m2f.serving.window import SIDE, whole

LISTED = 1000  # names that are offered; others are typed
LARGEST = 1280  # pixels of the longer side that a larger image is reduced to before it is looked at


class Finder:
    """Images come from an upload, or from a labelled set where there is one."""

    def __init__(self, model: Segmenter, data: CocoData | None) -> None:
        self.model, self.data = model, data
        self.images = {image.file_name: image for image in data.images} if data else {}

    def build(self) -> None:
        known = self.model.class_names
        with gr.Row(equal_height=True):
            upload = gr.UploadButton("Upload an image", file_types=["image"])
            with gr.Column(visible=bool(self.images)):
                listed = list(self.images)[:LISTED]
                names = gr.Dropdown(
                    listed, value=None, label="or take one of the set", allow_custom_value=True
                )
            least = gr.Slider(0, 1, 0.5, step=0.05, label="Least score")
            kind = gr.Dropdown(known, value=known[0], label="Class of drawn boxes", visible=len(known) > 1)
        limits = f"No image yet. Uploads hold up to {MOST_MEGABYTES} MB and {MOST_MEGAPIXELS} megapixels."
        text = gr.HTML(limits, elem_id="found")
        with gr.Row():
            drawn, found = canvas("The image; draw a box to get its mask:"), picture("Masks:")
        pixels = gr.State()
        opened, shown = [drawn, pixels, found, text], [found, text]
        seen = {"show_progress_on": found}
        upload.upload(told(self.uploaded), [upload, least], opened, **seen)
        names.input(told(self.chosen), [names, least], opened, **seen)
        least.release(told(self.found), [pixels, least], shown, **seen)
        drawn.change(told(self.drawn), [pixels, drawn, kind], shown, **seen)

    def uploaded(self, path: str, least: float) -> Updates:
        return self.opened(read_upload(Path(path)), least)

    def chosen(self, name: str, least: float) -> Updates:
        if self.data is None or name not in self.images:
            raise UserError(f"{name}: no such image in the set; choose one from the list")
        image = self.images[name]
        return self.opened(self.data.read_image(image), least)

    def opened(self, pixels: np.ndarray, least: float) -> Updates:
        image = Image.fromarray(pixels)
        image.thumbnail((LARGEST, LARGEST))
        pixels = np.asarray(image)
        return {"image": whole(pixels).shown(pixels), "boxes": []}, pixels, *self.found(pixels, least)

    def found(self, pixels: np.ndarray | None, least: float) -> Updates:
        if pixels is None:
            return gr.skip()
        found = self.model.predict(pixels, least)
        return self.shown(pixels, found, colours(range(len(found))), f"with a score of {least:g} or more")

    def drawn(self, pixels: np.ndarray | None, drawn: Canvas | None, kind: str) -> Updates:
        boxes = drawn["boxes"][::-1] if drawn else []
        boxes = [box for box in boxes if min(box["xmax"] - box["xmin"], box["ymax"] - box["ymin"]) >= LEAST]
        if pixels is None or not boxes:
            return gr.skip()
        labels = [self.model.class_names.index(kind)] * len(boxes)
        given, colors = whole(pixels).to_image(boxes), self.model.colors_by_default
        masks = self.model.predict(pixels, boxes=given, labels=labels, colors=colors)
        worn = ["#{:02x}{:02x}{:02x}".format(*box["color"]) for box in boxes]
        return self.shown(pixels, masks, worn, "from drawn boxes")

    def shown(self, pixels: np.ndarray, found: Instances, worn: list[str], origin: str) -> Updates:
        """The masks drawn on the image, each in its colour, and a line that lists them."""
        names = found.names if len(self.model.class_names) > 1 else [""] * len(found)
        texts = [f"{name} {score:.2f}".strip() for name, score in zip(names, found.scores, strict=True)]
        rows = zip(worn, texts, found.masks.cpu().numpy(), strict=True)
        image = draw(Image.fromarray(pixels), [Shape(*row[:2], mask=row[2]) for row in rows], SIDE)
        number = f"{len(found)} object{'s' if len(found) != 1 else ''} {origin}"
        return image, html.escape(": ".join([number, *([", ".join(texts)] if texts else [])]))
