"""Show a cache and a trained student in the browser: `movekd view`.

``browser`` reads the cache, ``evaluate.chat`` asks the student, Gradio draws. The browser sends
names, keys, numbers and the bytes of a picture, as text; ``gate`` refuses everything else.
"""

import base64
import binascii
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import numpy.typing as npt
from PIL import Image
from starlette.middleware import Middleware

from movekd.corpus.conversations import IMAGE_PLACEHOLDER, Role
from movekd.corpus.decode import decode_image
from movekd.corpus.index import find_rows
from movekd.errors import MovekdError, shorten
from movekd.evaluate.chat import Answer, answer
from movekd.student.checkpoint import TrainedStudent
from movekd.view.browser import Browser
from movekd.view.gate import MAX_IMAGE_BYTES, Gate
from movekd.view.html import (
    GRID_CHOICE,
    GRID_SCRIPT,
    IMAGE_SCRIPT,
    IMAGE_TEMPLATE,
    SCRIPT,
    STYLE,
    experts_html,
    grid_html,
    message_html,
    teachers_html,
)
from movekd.view.plots import run_figures, to_svg
from movekd.view.run_log import read_run

_MOST_HEADS = 64
_REFRESH_S = 30
_MOST_SESSIONS = 64
_MOST_WAITING = 32
_PICTURE_SIDE = 1024  # of the picture under the experts
_FONT = ["system-ui", "sans-serif"]  # Gradio's fonts lack bold letters


def build_page(
    browser: Browser, run: Path | None = None, student: TrainedStudent | None = None
) -> gr.Blocks:
    """Return the page.

    Args:
        browser: the cache.
        run: folder of a run; adds its curves.
        student: its model; adds a chat.
    """
    with gr.Blocks(title="movekd", analytics_enabled=False, fill_width=True) as page:
        title = f"<h2>movekd</h2>{escape(browser.cache.url)}"
        gr.HTML(title, elem_id="title", padding=False)
        chosen, teachers = _cache_tab(browser, page)
        if run is not None:
            _run_tab(run)
        if student is not None:
            _ask_tab(browser, student, chosen)

        def reopen() -> Any:
            try:
                browser.reopen()
            except MovekdError as error:
                raise gr.Error(str(error), print_exception=False) from None
            names = list(browser.cache.teachers)
            return gr.CheckboxGroup(choices=names, value=names)

        page.load(reopen, None, teachers)  # a build may have added some
    return page


def serve(page: gr.Blocks, host: str, port: int, on_start: Callable[[], None]) -> None:
    """Serve the page until it is interrupted; call ``on_start`` when it is ready."""
    page.queue(default_concurrency_limit=1, max_size=_MOST_WAITING).launch(
        server_name=host,
        server_port=port,
        share=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        state_session_capacity=_MOST_SESSIONS,
        footer_links=[],
        theme=gr.themes.Default(font=_FONT, font_mono=["monospace"]),
        css=STYLE,
        quiet=True,
        prevent_thread_lock=True,
        app_kwargs={"middleware": [Middleware(Gate, host=host)]},
    )
    on_start()
    page.block_thread()


def _cache_tab(browser: Browser, page: gr.Blocks) -> tuple[gr.Textbox, gr.CheckboxGroup]:
    """Add the tab of the cache: choices on the left, thumbnails and teachers on the right.

    Returns:
        The text box of the image's key, and the choice of teachers.
    """
    teachers = list(browser.cache.teachers)
    with gr.Tab("Cache"), gr.Row():
        with gr.Column(scale=1, min_width=280):
            key = gr.Textbox(browser.first_name(), label="Key or name of an image", elem_id="key")
            with gr.Row():
                show = gr.Button("Show", variant="primary", min_width=100)
                draw = gr.Button("Random image", min_width=100)
            text = gr.Textbox(label="Search names and keys", elem_id="search")
            found = gr.Radio(label="Found", choices=[], elem_id="found")
            shown = gr.CheckboxGroup(teachers, value=teachers, label="Teachers", elem_id="teachers")
            view = gr.Number(0, label="View: 0 whole, then tiles", precision=0)
            head = gr.Dropdown(
                ["mean", *map(str, range(_MOST_HEADS))], value="mean", label="Head of attention"
            )
        with gr.Column(scale=4):
            with gr.Row():
                previous = gr.Button("Previous page", min_width=100)
                number = gr.Number(1, label="Page", precision=0, elem_id="page")
                following = gr.Button("Next page", min_width=100)
            grid = gr.HTML(js_on_load=GRID_SCRIPT, elem_id="grid")
            panels = gr.HTML(js_on_load=SCRIPT, elem_id="panels")

    def show_image(name: str, wanted: list[str], view: float | None, head: str) -> str:
        if not name or not name.strip():
            return message_html(
                "Type the key or name of an image, search for one, or take a random one."
            )
        if not wanted:
            return message_html("Choose a teacher.")
        number = None if head == "mean" else int(head)
        ordered = [teacher for teacher in browser.cache.teachers if teacher in wanted]
        try:
            found = browser.panels(name, ordered, int(view or 0), number)
        except MovekdError as error:
            return message_html(str(error))
        return teachers_html(found, name)

    def draw_key() -> str:
        try:
            return browser.draw()
        except MovekdError as error:
            raise gr.Error(str(error), print_exception=False) from None

    def search(wanted: str) -> Any:
        names = browser.search(wanted) if wanted.strip() else []
        label = f"Found ({len(names)})" if wanted.strip() else "Found"
        return gr.Radio(choices=names, value=None, label=label)

    def turn(number: float | None, step: int = 0) -> tuple[int, str]:
        try:
            found = browser.thumbnails(int(number or 1) + step)
        except MovekdError as error:
            return int(number or 1), message_html(str(error))
        return found.page, grid_html(found)

    inputs = [key, shown, view, head]
    page.load(turn, number, [number, grid])
    page.load(show_image, inputs, panels)
    number.submit(turn, number, [number, grid])
    previous.click(lambda at: turn(at, -1), number, [number, grid])
    following.click(lambda at: turn(at, 1), number, [number, grid])
    grid.select(None, None, key, js=GRID_CHOICE).then(show_image, inputs, panels)
    show.click(show_image, inputs, panels)
    key.submit(show_image, inputs, panels)
    for changed in (shown, view, head):
        changed.input(show_image, inputs, panels, trigger_mode="always_last")
    draw.click(draw_key, None, key).success(show_image, inputs, panels)
    text.submit(search, text, found)
    found.select(lambda name: name, found, key).then(show_image, inputs, panels)
    return key, shown


def _run_tab(run: Path) -> None:
    """Add the tab of a run: its curves so far."""

    def curves() -> str:
        try:
            log = read_run(run)
        except MovekdError as error:
            return message_html(str(error))
        parts = [
            f"<figure><figcaption>{heading}</figcaption>{to_svg(figure)}</figure>"
            for heading, figure in run_figures(log)
        ]
        said = message_html(f"Left out: {'. '.join(log.left_out)}.") if log.left_out else ""
        return f'{said}<div class="movekd-curves">{"".join(parts)}</div>'

    with gr.Tab("Run"):
        shown = gr.HTML(curves, every=_REFRESH_S, elem_id="curves")
        gr.Button("Read again").click(curves, None, shown)


def _ask_tab(browser: Browser, student: TrainedStudent, key: gr.Textbox) -> None:
    """Add the tab of a chat about the shown image of the cache, or one that the browser sends."""
    with gr.Tab("Ask"), gr.Row():
        with gr.Column(scale=3):
            image = gr.HTML(
                "", html_template=IMAGE_TEMPLATE, js_on_load=IMAGE_SCRIPT, elem_id="image"
            )
            # leaves out the button that sends the chat to a hub
            chat = gr.Chatbot(label="Chat", elem_id="chat", buttons=["copy"], render_markdown=False)
            question = gr.Textbox(label="Question", elem_id="question")
            with gr.Row():
                ask, anew = gr.Button("Ask", variant="primary"), gr.Button("New chat")
        with gr.Column(scale=2):
            block = gr.Slider(0, 1, step=1, value=0, label="Block", interactive=True)
            experts = gr.HTML(elem_id="experts")
    said = gr.State(
        ()
    )  # the turns of the chat; the server keeps them, so no browser can invent any
    last = gr.State(None)

    def reply(
        asked: str, turns: tuple[tuple[Role, str], ...], given: str | None, name: str, block: float
    ) -> tuple[Any, ...]:
        if not asked or not asked.strip():
            return gr.skip(), asked, turns, None, message_html("Type a question."), gr.skip()
        turns = (*turns, ("human", asked))
        try:
            pixels = _sent_image(given) if given else _cached_image(browser, name)
            found = answer(student, pixels, _with_placeholder(turns))
        except MovekdError as error:
            return gr.skip(), asked, turns[:-1], None, message_html(str(error)), gr.skip()
        turns = (*turns, ("gpt", found.text))
        blocks = 0 if found.experts_LGG is None else len(found.experts_LGG)
        number = min(int(block), max(blocks - 1, 0))
        slider = gr.Slider(maximum=max(blocks - 1, 1), value=number)
        shown = found, _picture(pixels)
        return _messages(turns), "", turns, shown, _draw_experts(shown, number), slider

    outputs = [chat, question, said, last, experts, block]
    inputs = [question, said, image, key, block]
    ask.click(reply, inputs, outputs)
    question.submit(reply, inputs, outputs)
    block.input(_draw_experts, [last, block], experts, trigger_mode="always_last")
    gr.on([anew.click, chat.clear], lambda: ([], (), None, ""), None, [chat, said, last, experts])


def _draw_experts(last: tuple[Answer, npt.NDArray[np.uint8]] | None, block: float) -> str:
    if last is None:
        return ""
    said, pixels = last
    if said.experts_LGG is None:
        return message_html("This student has no experts.")
    number = min(max(int(block), 0), len(said.experts_LGG) - 1)
    return experts_html(said.experts_LGG[number], said.num_experts, pixels)


def _sent_image(text: str) -> bytes:
    """Return the bytes of an image that the browser sent in base64.

    Raises:
        MovekdError: it is no base64 or too large; ``answer`` checks that it is an image.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise MovekdError("The image did not arrive whole; choose it again.") from None
    if len(data) > MAX_IMAGE_BYTES:
        raise MovekdError(
            f"The image has {len(data):,} bytes; expected at most {MAX_IMAGE_BYTES:,}. Choose a "
            "smaller one."
        )
    return data


def _cached_image(browser: Browser, name: str) -> bytes:
    """Return the bytes of an image of the corpus."""
    if browser.corpus is None:
        raise MovekdError("The cache holds no pictures; choose an image, or start with --shards.")
    if not name or not name.strip():
        raise MovekdError("Show an image of the cache first, or choose one.")
    corpus = browser.corpus
    row = int(find_rows([name.strip()], corpus.index, corpus.names)[0])
    if row < 0:
        raise MovekdError(f"{corpus.data_dir} holds no image '{shorten(name.strip())}'.")
    return corpus.read_image(row)


def _picture(data: bytes) -> npt.NDArray[np.uint8]:
    """Return the pixels that the page shows, at most ``_PICTURE_SIDE`` wide and high."""
    image = decode_image(data)
    image.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _with_placeholder(turns: Sequence[tuple[Role, str]]) -> list[tuple[Role, str]]:
    """Return the turns of a chat in LLaVA's form; the first question holds the image."""
    return [("human", f"{IMAGE_PLACEHOLDER}\n{turns[0][1]}"), *turns[1:]]


def _messages(turns: Sequence[tuple[Role, str]]) -> list[dict[str, str]]:
    """Return the turns of a chat as Gradio shows them: as HTML."""
    roles = {"human": "user", "gpt": "assistant"}
    return [{"role": roles[role], "content": escape(text)} for role, text in turns]
