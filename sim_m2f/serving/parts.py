"""What the tabs of the page share: a canvas for boxes, a picture of masks, faults as messages."""

import functools
import html
from collections.abc import Callable
from typing import Any

import gradio as gr
from gradio_image_annotation import image_annotator

from sim_m2f.errors import UserError

PANEL = 320  # least width of a column, pixels of the screen
LEAST = 4  # pixels of the canvas that a box is wide and high
Updates = Any  # what gradio takes from a handler: a value for each output
Canvas = dict[str, Any]  # "image", and "boxes" with their corners in pixels of the canvas, the latest first


def told(handler: Callable[..., Updates]) -> Callable[..., Updates]:
    """The handler, whose UserError becomes a message on the page."""

    @functools.wraps(handler)
    def run(*values: Any) -> Updates:
        try:
            return handler(*values)
        except UserError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error

    return run


def canvas(title: str, single_box: bool = False) -> image_annotator:
    """A column with an image to draw boxes on; it takes no uploads."""
    with gr.Column(min_width=PANEL):
        gr.HTML(title)
        return image_annotator(
            show_label=False,
            sources=[],
            single_box=single_box,
            box_min_size=LEAST,
            boxes_alpha=0.0,
            disable_edit_boxes=True,
            show_download_button=False,
            show_clear_button=False,
        )


def picture(title: str) -> gr.Image:
    """A column with an image to look at."""
    with gr.Column(min_width=PANEL):
        gr.HTML(title)
        return gr.Image(show_label=False, interactive=False, buttons=["fullscreen"], alt_text=title)
