"""What somebody does on the page, and what they see then."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from builds import build
from movekd.corpus.decode import decode_image
from movekd.corpus.index import open_corpus
from movekd.evaluate.chat import Answer, answer
from movekd.student.checkpoint import TrainedStudent, load_student
from movekd.view.browser import Browser
from movekd.view.gate import MAX_IMAGE_BYTES
from movekd.view.html import experts_html, grid_html, teachers_html
from web_page import picture, serve, watched

pytestmark = pytest.mark.web

NAME = "pretrain_00002.png"
TEACHERS = ["clip", "convnext", "eva", "sam"]


def teachers(page: Page) -> Locator:
    """Return the shown teachers."""
    return page.locator("#panels [data-teacher]")


def show(page: Page, name: str) -> None:
    """Type the name of an image."""
    page.get_by_label("Key or name of an image").fill(name)
    page.get_by_role("button", name="Show").click()
    if name.strip():  # until then the page shows the image before
        expect(page.locator("#panels")).to_contain_text(name)


def choose_head(page: Page, head: str) -> None:
    """Choose a head of attention."""
    page.get_by_label("Head of attention").click()
    page.get_by_role("option", name=head, exact=True).click()


def ask(page: Page, question: str) -> None:
    """Ask the student."""
    page.get_by_role("tab", name="Ask").click()
    page.get_by_label("Question").fill(question)
    page.get_by_role("button", name="Ask", exact=True).click()


def sources(html: str) -> list[str]:
    """Return what the images of some HTML show."""
    return re.findall(r'src="([^"]+)"', html)


def shown(part: Locator) -> list[str]:
    """Return what the images of a part of the page show."""
    return [str(image.get_attribute("src")) for image in part.locator("img").all()]


def test_the_page_names_its_cache_and_teachers(page: Page) -> None:
    expect(page.get_by_role("heading", name="movekd")).to_be_visible()
    expect(page.locator("#title")).to_contain_text("cache")
    for teacher in TEACHERS:
        expect(page.get_by_role("checkbox", name=teacher)).to_be_checked()
    for tab in ("Cache", "Run", "Ask"):
        expect(page.get_by_role("tab", name=tab)).to_be_visible()


def test_it_opens_with_thumbnails_and_the_first_image(page: Page, world: Path) -> None:
    browser = Browser(str(world / "cache"), open_corpus(world / "data"))
    grid, caption = page.locator("#grid"), page.locator("#panels .movekd > div").first
    for number in (1, 2, 3):
        found = browser.thumbnails(number)
        names = [each.name for each in found.shown]
        expect(grid.locator("button .name")).to_have_text(names)
        assert shown(grid) == sources(grid_html(found))
        if number == 1:
            expect(caption).to_have_text(names[0])
        if number < found.num_pages:
            page.get_by_role("button", name="Next page").click()
    assert found.num_pages == 3
    grid.locator("button").nth(2).click()
    expect(caption).to_have_text(names[2])
    expect(page.get_by_label("Key or name of an image")).to_have_value(names[2])
    page.get_by_role("button", name="Previous page").click()
    expect(grid).to_contain_text("Images 25 to 48 of 64")
    for asked, number in (("999", "3"), ("-4", "1")):
        page.get_by_label("Page", exact=True).fill(asked)
        page.get_by_label("Page", exact=True).press("Enter")
        expect(page.get_by_label("Page", exact=True)).to_have_value(number)


def test_a_search_finds_names_and_keys(page: Page, world: Path) -> None:
    search, found = page.get_by_label("Search names and keys"), page.locator("#found")
    search.fill("pretrain_0000")
    search.press("Enter")
    expect(found).to_contain_text("Found (10)")
    found.get_by_label(NAME).click()
    expect(teachers(page)).to_have_count(4)
    expect(page.get_by_label("Key or name of an image")).to_have_value(NAME)
    expect(page.locator("#panels .movekd > div").first).to_have_text(NAME)
    browser = Browser(str(world / "cache"), open_corpus(world / "data"))
    expected = teachers_html(browser.panels(NAME, TEACHERS), NAME)
    assert shown(page.locator("#panels")) == sources(expected)
    page.locator("[data-teacher=clip] .movekd-pane").first.hover(position={"x": 90, "y": 90})
    picture(page, "view-cache.png")
    key = browser.draw()
    search.fill(key[:10])
    search.press("Enter")
    found.get_by_label(key).click()
    expect(page.locator("#panels")).to_contain_text(key)
    search.fill("nowhere")
    search.press("Enter")
    expect(found).to_contain_text("Found (0)")


def test_teachers_come_and_go(page: Page) -> None:
    page.get_by_role("button", name="Random image").click()
    expect(teachers(page)).to_have_count(4)
    page.get_by_role("checkbox", name="convnext").uncheck()
    expect(teachers(page)).to_have_count(3)
    expect(page.locator("#panels [data-teacher=convnext]")).to_have_count(0)
    for teacher in ("clip", "eva", "sam"):
        page.get_by_role("checkbox", name=teacher).uncheck()
    expect(page.get_by_role("alert")).to_have_text("Choose a teacher.")
    page.get_by_role("checkbox", name="sam").check()
    expect(teachers(page)).to_have_count(1)


def test_a_place_is_marked_in_every_teacher(page: Page, world: Path) -> None:
    show(page, NAME)
    expect(teachers(page)).to_have_count(4)
    pane = page.locator("[data-teacher=eva] .movekd-pane").last
    box = pane.bounding_box()
    assert box is not None
    row, column = 4, 1
    pane.hover(position={"x": box["width"] * 1.5 / 6, "y": box["height"] * 4.5 / 6})
    for panel in Browser(str(world / "cache")).panels(NAME, TEACHERS):
        teacher = page.locator(f"[data-teacher={panel.features.teacher}]")
        expect(teacher.locator(".movekd-said")).to_contain_text(f"token {6 * row + column}:")
        assert panel.nearest_NK is not None
        near = panel.nearest_NK[6 * row + column]
        for svg in teacher.locator("svg").all():
            here = svg.locator("rect.here")
            expect(here).to_have_count(1)
            assert (here.get_attribute("x"), here.get_attribute("y")) == ("1", "4")
            marks = svg.locator("rect.near").all()
            places = [(m.get_attribute("x"), m.get_attribute("y")) for m in marks]
            assert places == [(str(at % 6), str(at // 6)) for at in near]


def test_a_head_of_attention_is_shown_and_named(page: Page, world: Path) -> None:
    show(page, NAME)
    clip = page.locator("[data-teacher=clip]")
    expect(clip).to_contain_text("mean of 4 heads")
    mean = shown(clip)
    choose_head(page, "2")
    expect(clip).to_contain_text("head 2 of 0-3")
    browser = Browser(str(world / "cache"), open_corpus(world / "data"))
    (panel,) = browser.panels(NAME, ["clip"], head=2)
    assert shown(clip) == sources(teachers_html([panel], NAME)) != mean
    choose_head(page, "9")  # there is none
    expect(clip).to_contain_text("mean of 4 heads")
    assert shown(clip) == mean


@pytest.mark.parametrize("name", ["nowhere.png", "/etc/passwd", "../data/index.parquet"])
def test_a_missing_image_is_a_sentence(page: Page, name: str) -> None:
    show(page, name)
    expect(page.get_by_role("alert")).to_contain_text(f"holds no image named '{name}'")
    show(page, " ")
    expect(page.get_by_role("alert")).to_contain_text("Type the key or name of an image")


@pytest.mark.parametrize("view", ["1", "-1", "99999", "9" * 25])
def test_a_missing_view_is_a_sentence(page: Page, view: str) -> None:
    show(page, NAME)
    expect(teachers(page)).to_have_count(4)
    page.get_by_label("View").fill(view)
    expect(page.get_by_role("alert")).to_contain_text("holds no view")
    page.get_by_label("View").fill("0")
    expect(teachers(page)).to_have_count(4)


def test_the_curves_of_the_run_are_drawn(page: Page) -> None:
    page.get_by_role("tab", name="Run").click()
    expect(page.locator("#curves figcaption").first).to_have_text("Loss")
    expect(page.locator("#curves figcaption").last).to_contain_text("Routing")
    before = page.locator("#curves svg").count()
    page.get_by_role("button", name="Read again").click()
    expect(page.locator("#curves svg")).to_have_count(before)


@pytest.fixture(scope="module")
def student(world: Path) -> TrainedStudent:
    return load_student(world / "finetune", "cpu")


def expected_answer(student: TrainedStudent, image: Image.Image, *said: str) -> Answer:
    """Return what the student answers to the last question."""
    file = io.BytesIO()
    image.save(file, "PNG")
    turns = [("gpt" if number % 2 else "human", text) for number, text in enumerate(said)]
    return answer(student, file.getvalue(), [("human", f"<image>\n{said[0]}"), *turns[1:]])


def test_the_student_answers_and_shows_its_experts(
    page: Page, world: Path, student: TrainedStudent
) -> None:
    corpus = open_corpus(world / "data")
    image = decode_image(corpus.read_image(int(corpus.rows([NAME])[0])))
    show(page, NAME)
    expect(teachers(page)).to_have_count(4)
    first, second = "Which digit is at the top left?", "What is the sum of the digits?"
    ask(page, first)
    experts, chat = page.locator("#experts"), page.locator("#chat")
    expect(experts.locator("img")).to_have_count(2)
    said = expected_answer(student, image, first)
    assert said.experts_LGG is not None
    expect(chat.get_by_test_id("user")).to_have_text([first])
    expect(chat.get_by_test_id("bot")).to_have_text([said.text])
    maps = [sources(experts_html(e, 3, np.asarray(image))) for e in said.experts_LGG]
    assert shown(experts) == maps[0]
    picture(page, "view-ask.png")
    block = page.get_by_role("spinbutton", name="Block")
    block.fill("3")
    expect(experts.locator("img").last).to_have_attribute("src", maps[3][1])
    page.get_by_role("slider", name="Block").press("ArrowRight")
    expect(experts.locator("img").last).to_have_attribute("src", maps[4][1])
    ask(page, second)
    expect(chat.get_by_test_id("bot")).to_have_count(2)
    again = expected_answer(student, image, first, said.text, second)
    expect(chat.get_by_test_id("bot").last).to_have_text(again.text)
    page.get_by_role("button", name="New chat").click()
    expect(chat.get_by_test_id("bot")).to_have_count(0)
    expect(experts.locator("img")).to_have_count(0)


def test_the_student_looks_at_an_image_that_is_given(
    page: Page, student: TrainedStudent, tmp_path: Path
) -> None:
    image = Image.effect_noise((70, 50), 80).convert("RGB")
    image.save(tmp_path / "given.png")
    page.get_by_role("tab", name="Ask").click()
    page.locator("input[type=file]").set_input_files(tmp_path / "given.png")
    expect(page.get_by_role("button", name="Remove Image")).to_be_visible()
    ask(page, "Is there a 3?")
    experts = page.locator("#experts")
    expect(experts.locator("img")).to_have_count(2)
    said = expected_answer(student, image, "Is there a 3?")
    assert said.experts_LGG is not None
    assert shown(experts) == sources(experts_html(said.experts_LGG[0], 3, np.asarray(image)))


def test_a_large_or_damaged_image_is_a_sentence(page: Page, tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(bytes(MAX_IMAGE_BYTES + 1))
    (tmp_path / "damaged.png").write_bytes(b"no image")
    page.get_by_role("tab", name="Ask").click()
    page.locator("input[type=file]").set_input_files(tmp_path / "large.png")
    expect(page.locator("#image").get_by_role("status")).to_contain_text("more than 16 MiB")
    page.locator("input[type=file]").set_input_files(tmp_path / "damaged.png")
    expect(page.get_by_role("button", name="Remove Image")).to_be_visible()
    ask(page, "Is there a 3?")
    alert = page.locator("#experts").get_by_role("alert")
    expect(alert).to_contain_text("are no image that can be read")
    page.get_by_role("button", name="Remove Image").click()
    expect(page.locator("input[type=file]")).to_be_visible()


def test_questions_that_cannot_be_asked_are_sentences(page: Page) -> None:
    page.get_by_label("Key or name of an image").fill("")
    ask(page, "Is there a 3?")
    alert = page.locator("#experts").get_by_role("alert")
    expect(alert).to_have_text("Show an image of the cache first, or choose one.")
    ask(page, " ")
    expect(alert).to_have_text("Type a question.")
    page.get_by_role("tab", name="Cache").click()
    show(page, NAME)
    ask(page, "Is there a 3? " * 200)
    expect(alert).to_contain_text("the language model holds 256")
    expect(page.get_by_label("Question")).to_have_value("Is there a 3? " * 200)


def test_what_is_said_is_shown_as_text(page: Page) -> None:
    """As Markdown, a picture in it would be asked for, and a tag would be one."""
    show(page, NAME)
    asked = "![a](http://198.51.100.1/a.png) <img src='http://198.51.100.1/b.png'> **7**"
    ask(page, asked)
    expect(page.locator("#experts img")).to_have_count(2)
    expect(page.locator("#chat").get_by_test_id("user")).to_have_text(asked)


def test_no_button_sends_the_chat_away(page: Page) -> None:
    show(page, NAME)
    ask(page, "Is there a 3?")
    expect(page.locator("#experts img")).to_have_count(2)
    buttons = page.locator("#chat button").all()
    names = [button.get_attribute("aria-label") for button in buttons]
    assert set(names) == {"Clear", "Copy message"}  # Gradio's default is one without a name, too
    page.get_by_role("button", name="Clear", exact=True).click()
    expect(page.locator("#experts img")).to_have_count(0)


def test_a_cache_is_looked_at_while_it_grows(chromium, tmp_path, corpus_dir, tiny_specs) -> None:
    """A teacher that was interrupted; then the rest of it; then a second one, of another grid."""
    cache, (clip, conv), name = tmp_path / "my *new* cache", tiny_specs, "photos/05.png"
    build(cache, corpus_dir, [clip])
    (cache / "clip.seals" / "00000.json").unlink()
    with serve(tmp_path, "--cache", cache.name) as served, watched(chromium, served) as page:
        expect(page.locator("#title")).to_contain_text("my *new* cache")
        show(page, name)
        expect(teachers(page).get_by_role("alert")).to_have_text("not built yet")
        build(cache, corpus_dir, [clip])
        page.get_by_role("button", name="Show").click()
        expect(teachers(page).locator("img")).to_have_count(2)  # tokens and attention
        build(cache, corpus_dir, [conv])
        page.reload()
        expect(page.get_by_role("checkbox", name="conv")).to_be_checked()
        show(page, name)
        expect(teachers(page)).to_have_count(2)
        expect(page.locator("#panels")).to_contain_text("random weights")
        pane = page.locator("[data-teacher=conv] .movekd-pane")
        box = pane.bounding_box()
        pane.hover(position={"x": box["width"] * 0.6, "y": box["height"] * 0.4})
        expect(page.locator("[data-teacher=conv]")).to_contain_text("token 1:")  # of 2x2
        expect(page.locator("[data-teacher=clip]")).to_contain_text("token 6:")  # of 4x4
        expect(page.get_by_role("tab", name="Ask")).to_have_count(0)
