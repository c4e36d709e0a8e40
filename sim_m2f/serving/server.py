"""Serves the page, and lets no browser that shows it ask another host for anything."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sim_m2f.segmenter import Segmenter
from sim_m2f.serving.finder import Finder
from sim_m2f.serving.review import Review
from sim_m2f.serving.reviewer import Reviewer
from sim_m2f.serving.uploads import MOST_MEGABYTES

POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'"
CSS = '[aria-label^="Rotate"] {display: none} .html-container {padding: 0 !important}'


class OnlyFromHere:
    """Adds a Content-Security-Policy to every answer: scripts, fonts and requests of this server alone."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = POLICY
            await send(message)

        await self.app(scope, receive, with_policy)


def build_page(model: Segmenter, review: Review | None) -> gr.Blocks:
    """The page of a network, and of a labelled set where there is one."""
    with gr.Blocks(
        title="SIM-M2F", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True
    ) as page:
        if review:
            with gr.Tab("Review"):
                Reviewer(review).build(page)
        with gr.Tab("Find objects"):
            Finder(model, review.data if review else None).build()
    return page


@contextlib.contextmanager
def served(model: Segmenter, review: Review | None, host: str, port: int) -> Iterator[str]:
    """Serve the page within the block, and give its address.

    What is uploaded and drawn lies in a temporary folder, for an hour at most. gradio's own reports to its
    makers are off.
    """
    keys = Path(__file__).with_name("keys.js").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="sim_m2f.") as folder:
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        page = build_page(model, review)
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size=f"{MOST_MEGABYTES}mb",
            app_kwargs={"middleware": [Middleware(OnlyFromHere)]},
            theme=gr.themes.Default(primary_hue="teal", font=["sans-serif"], font_mono=["monospace"]),
            css=CSS,
            head=f"<script>{keys}</script>",
            footer_links=[],
            ssr_mode=False,
        )
        try:
            yield address
        finally:
            page.close(verbose=False)
            del os.environ["GRADIO_TEMP_DIR"]
