"""The tab of the review: one object at a time, the worst first, to be accepted, rejected or redrawn."""

import html
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import gradio as gr
import numpy as np
from PIL import Image

from sim_m2f.errors import UserError
from sim_m2f.report.drawing import Shape, colours, draw
from sim_m2f.serving.parts import LEAST, Canvas, Updates, canvas, picture, told
from sim_m2f.serving.review import ACCEPTED, OPEN, REJECTED, Review
from sim_m2f.serving.window import SIDE, Window, around

SAME = 2.5  # pixels of the canvas: boxes that differ less are one, since the canvas rounds them
BUTTONS = ("Previous", "secondary"), ("Accept", "primary"), ("Reject", "stop"), ("Next", "secondary")
COLOUR = 255, 90, 95  # of the box
T = TypeVar("T")


class Reviewer:
    """Every event brings the id of the object that the browser shows, and events are handled in turn.

    A key that is pressed too early never meets an object that was not seen. The id goes there and back as
    text: a browser's numbers lose digits above 2**53.
    """

    def __init__(self, review: Review) -> None:
        self.review = review

    def build(self, page: gr.Blocks) -> None:
        number = gr.Textbox(visible=False)
        with gr.Row(equal_height=True):
            with gr.Column(scale=3, min_width=200):
                text = gr.HTML(elem_id="object")
            with gr.Column(scale=2, min_width=200):
                written = gr.HTML(elem_id="written")
            export = gr.Button("Export masks.json", scale=0, min_width=230)
        with gr.Row():
            buttons = [gr.Button(f"{name} ({name[0]})", variant=look, elem_id=name) for name, look in BUTTONS]
        with gr.Row():
            drawn = canvas("The box; drag its corners where it is wrong:", single_box=True)
            mask = picture("Its mask:")
        view = [number, drawn, mask, text]
        in_turn = {"concurrency_id": "review", "concurrency_limit": 1, "show_progress": "hidden"}
        page.load(told(lambda: self.shown(self.review.next_open())), None, view, **in_turn)
        steps = partial(self.stepped, -1), partial(self.stepped, 1)
        decisions = partial(self.decided, ACCEPTED), partial(self.decided, REJECTED)
        for button, handler in zip(buttons, (steps[0], *decisions, steps[1]), strict=True):
            button.click(told(handler), number, view, **in_turn)
        waits = in_turn | {"show_progress": "minimal", "show_progress_on": mask}
        drawn.change(told(self.redrawn), [number, drawn], [mask, text], **waits)
        export.click(told(self.exported), None, written, **in_turn)

    def stepped(self, step: int, shown: str) -> Updates:
        return self.shown(self.review.neighbour(int(shown), step))

    def decided(self, decision: str, shown: str) -> Updates:
        self.review.decide(int(shown), decision)
        return self.shown(self.review.next_open(int(shown)))

    def redrawn(self, shown: str | None, drawn: Canvas | None) -> Updates:
        """A new mask where the box was changed; the canvas also tells of boxes that it was given."""
        if not shown or not drawn or not drawn["boxes"]:
            return gr.skip()
        number = int(shown)
        given, window = drawn["boxes"][0], self.window(number)
        now = window.to_canvas(self.review.box(number))
        moved = max(abs(given[key] - value) for key, value in now.items()) > SAME
        small = min(given["xmax"] - given["xmin"], given["ymax"] - given["ymin"]) < LEAST
        if small or not moved or given["label"] not in ("", self.review.title(number)):
            return gr.skip()
        self.review.redraw(number, window.to_image([given])[0])
        return self.shown(number)[2:]

    def exported(self) -> str:
        return f"Written: {html.escape(str(self.review.export()))}"

    def shown(self, number: int) -> Updates:
        """An object: its id, its box to be changed, its mask, and what is known of it."""
        record, counts, title = self.review.record(number), self.review.counts(), self.review.title(number)
        image, window = self.review.image_of[number], self.window(number)
        black = np.zeros((image.height, image.width, 3), np.uint8)
        pixels = _warned(partial(self.review.data.read_image, image), black)
        mask = _warned(partial(self.review.mask, number), None)
        shapes = [] if mask is None else [Shape(colours([0])[0], mask=window.part(mask))]
        box = window.to_canvas(self.review.box(number)) | {"label": title, "color": COLOUR}
        picture = draw(Image.fromarray(window.part(pixels)), shapes, SIDE)
        facts = html.escape(f"score {record.get('score', 1.0):.2f}, {image.file_name}")
        done = f"{counts[ACCEPTED]} accepted, {counts[REJECTED]} rejected, {counts[OPEN]} open"
        text = f"<b>{html.escape(title)}: {record['decision']}</b>, {facts}<br>{done}; worst first"
        return str(number), {"image": window.shown(pixels), "boxes": [box]}, picture, text

    def window(self, number: int) -> Window:
        """It stays where it is when the box is redrawn."""
        image = self.review.image_of[number]
        return around(self.review.target(number)[0], image.height, image.width)


def _warned(read: Callable[[], T], otherwise: T) -> T:
    """What is read of an object; where it cannot be, a warning: it can be rejected or passed over still."""
    try:
        return read()
    except UserError as error:
        gr.Warning(html.escape(str(error)))
        return otherwise
