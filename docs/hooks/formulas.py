"""Formulas in dollars become MathML, which browsers show without a script."""

import html
import re

from latex2mathml.converter import convert

# What pymdownx.arithmatex makes of $...$ and of $$...$$.
INLINE = re.compile(r'<span class="arithmatex">\\\((.+?)\\\)</span>', re.DOTALL)
DISPLAY = re.compile(r'<div class="arithmatex">\\\[(.+?)\\\]</div>', re.DOTALL)


def on_page_content(content: str, **_: object) -> str:
    content = DISPLAY.sub(lambda match: convert(html.unescape(match[1]), display="block"), content)
    return INLINE.sub(lambda match: convert(html.unescape(match[1])), content)
