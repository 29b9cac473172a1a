"""Read a page that was written, without a browser."""

from html.parser import HTMLParser
from typing import Any


class Page(HTMLParser):
    """Collects what a page loads, its tags and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append(tag)
        self.loads += [v for n, v in attributes if n in ("src", "srcset", "data", "xlink:href")]
        self.loads += [v for n, v in attributes if n == "href" and tag in ("link", "image")]

    def handle_data(self, data: str) -> None:
        self.text += data
