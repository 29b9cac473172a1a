"""The tables of docs/codecs.md are those of the committed figures."""

from codecs_page import FIGURE, PAGE, codecs_page, photographs_part, read_curve, read_pilot
from movekd.cache.codecs import codec_names


def test_the_committed_page_is_that_of_the_figures() -> None:
    assert PAGE.read_text(encoding="utf-8") == codecs_page(), "run `make codecs`"
    assert FIGURE.exists()


def test_every_codec_has_a_row_for_every_teacher_of_the_curve() -> None:
    rows = read_curve()
    found = {(row["what"], row["teacher"], row["codec"]) for row in rows}
    assert len(found) == len(rows)
    teachers = {(what, teacher) for what, teacher, _ in found}
    assert {what for what, _ in teachers} == {"photographs", "handwriting"}
    assert len(teachers) == 4 + 4
    assert found >= {(*teacher, codec) for teacher in teachers for codec in codec_names()}


def test_photographs_are_compared_with_int8() -> None:
    reference, others = read_pilot()
    assert reference["arm"] == "full"
    assert len(others) == 3
    assert len(photographs_part()) == 2 + 1 + 3
