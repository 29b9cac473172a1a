"""The report of a run: complete, safe to open, and no network."""

import json
import math
import os

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from html_page import Page
from movekd.errors import ConfigError
from movekd.view.plots import run_figures
from movekd.view.report import SampleAnswer, stored_answers, write_report
from movekd.view.run_log import RunLog, TeacherRow, read_run
from small_run import write_run

STEPS = [
    {
        "step": step,
        "epoch": step / 10,
        "loss": 2 - step / 10,
        "loss_text": 1.0,
        "loss_kd": 0.5,
        "loss_balance": 1.0,
        "loss_kd_clip": 0.2,
        "loss_kd_sam": 0.8,
        "teacher_weight_clip": 0.5,
        "teacher_weight_sam": 0.5,
        "routing_share_0_0": 0.25,
        "routing_share_0_1": 0.75,
        "routing_share_3_0": 0.5,
        "routing_share_3_1": 0.5,
        "learning_rate": 1e-3,
        "grad_norm": 2.0,
        "token_std": 2.5,
        "token_rank": 40.0,
        "samples_per_second": 12.0,
        "memory_peak_gib": 1.5,
    }
    for step in range(1, 6)
]
ENDING = {"step": 5, "train_runtime": 65.4, "train_samples_per_second": 4.3}
TEACHER = {
    "teacher": "clip",
    "images": 10,
    "rows": 10,
    "sealed_shards": 1,
    "total_shards": 1,
    "skipped": 0,
    "grid": 6,
    "width": 64,
    "codec": "int8",
    "compressor": "none",
    "size_bytes": 23_000_000,
    "error_mean": 0.005,
    "error_max": None,
    "fingerprint": "abcdef0123456789",
    "random_weights": True,
}


@pytest.fixture
def run(tmp_path):
    """The folder of a run that ended."""
    folder = tmp_path / "finetune"
    folder.mkdir()
    config = {
        "stage": "finetune",
        "recipe": "revised",
        "student": {"vision_tower": "<script>alert(1)</script>"},
        "distill": {"teachers": ["clip", "sam"]},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "log.json").write_text(json.dumps([*STEPS, ENDING]))
    (folder / "targets.json").write_text(json.dumps([TEACHER]))
    return folder


def test_a_report_holds_everything_and_loads_nothing(run):
    answers = [
        SampleAnswer("Which digit?", "7 <b>", "7", True, "data:image/jpeg;base64,AAAA", "val.json")
    ]
    write_report(read_run(run), answers, run / "report.html")
    source = (run / "report.html").read_text()
    page = Page(source)
    assert all(url.startswith(("data:image/", "#")) for url in page.loads)
    assert "script" not in page.tags
    assert "@import" not in source
    for heading in ("Loss", "KD loss of each teacher", "Weight of each teacher", "Learning rate"):
        assert heading in page.text
    for heading in ("Throughput", "Memory", "Routing", "Answers", "Config, resolved"):
        assert heading in page.text
    assert page.tags.count("svg") == 9
    assert "block 3" in page.text
    assert "expert 1" in page.text
    assert "7 <b>" in page.text
    assert "<script>alert(1)</script>" in page.text  # as text
    assert "23.0 MB" in page.text
    assert "random weights: clip" in page.text
    assert "0:01:05" in page.text


def test_held_out_losses_are_drawn_beside_those_of_training(run):
    held = [
        {"step": step, "epoch": step / 10, "eval_loss": loss, "eval_loss_kd_clip": 0.3}
        for step, loss in ((2, 1.5), (4, 1.25), (5, math.nan))
    ]
    (run / "log.json").write_text(json.dumps([*STEPS, *held, ENDING]))
    log = read_run(run)
    assert log.series("loss")[0] == [1, 2, 3, 4, 5]
    assert log.series("eval_loss")[0] == [2, 4, 5]
    assert log.series("eval_loss")[1][:2] == [1.5, 1.25]
    assert log.num_not_finite == 1
    figures = dict(run_figures(log))
    for heading, label in (("Loss", "all terms"), ("KD loss of each teacher", "clip")):
        lines = {line.get_label(): line for line in figures[heading].axes[0].lines}
        assert f"{label}, held out" in lines
        assert lines[label].get_color() == lines[f"{label}, held out"].get_color()
        assert lines[f"{label}, held out"].get_linestyle() == "--"
    write_report(log, [], run / "report.html")
    text = Page((run / "report.html").read_text()).text
    assert "held-out loss" in text
    assert "1.25 at step 4, the smallest" in " ".join(text.split())


def test_the_same_run_gives_the_same_figures(run):
    for name in ("one.html", "two.html"):
        write_report(read_run(run), [], run / name)
    assert (run / "one.html").read_bytes() == (run / "two.html").read_bytes()


def test_a_run_that_has_not_ended_is_read_from_its_checkpoint(run):
    (run / "log.json").unlink()
    with pytest.raises(ConfigError, match=r"neither log.json nor a checkpoint yet"):
        read_run(run)
    checkpoint = run / "checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / "trained.safetensors").write_bytes(b"")
    state = {"log_history": STEPS[:3]}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    log = read_run(run)
    assert not log.is_ended
    assert [entry["step"] for entry in log.steps] == [1, 2, 3]
    write_report(log, [], run / "report.html")
    assert "not finished" in Page((run / "report.html").read_text()).text


def test_a_run_that_logged_no_step_has_an_empty_figure(run):
    (run / "log.json").write_text(json.dumps([ENDING]))  # shorter than logging_steps
    assert [heading for heading, _ in run_figures(read_run(run))] == ["Loss"]


def test_what_is_no_run_is_a_sentence(tmp_path, run):
    with pytest.raises(ConfigError, match=r"holds no config.yaml"):
        read_run(tmp_path)
    (run / "log.json").write_text("{")
    with pytest.raises(ConfigError, match=r"log.json is no JSON that can be read.*Restore it"):
        read_run(run)


def test_answers_beside_a_run_are_shown_torn_lines_left_out(run):
    (run / "answers").mkdir()
    line = json.dumps({"question_id": 1, "prompt": "Is it?", "text": "Yes"})
    (run / "answers" / "pope.jsonl").write_text(f'{line}\n{{"question_id": 2, "pro')
    found, left_out = stored_answers(run, 8)
    assert left_out == []
    assert [(a.question, a.answer, a.source) for a in found] == [("Is it?", "Yes", "pope.jsonl")]


def test_small_run_has_no_log(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no config.yaml"):
        read_run(write_run(tmp_path / "run"))


SCALARS = [
    *(None, True, "abc", "", -1, 0, 10**40, -(10**400), 1e308, 5e-324, math.nan, math.inf),
    *([], {}, [[1]], {"a": 1}, "<script>alert(1)</script>", "$\\frac{", "\x1b[2J\0", "\ud800"),
]
"""What a stranger may write in place of a number or a word."""


def scalars(value, path=()):
    """Yield the path of each scalar in a JSON value."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from scalars(value[key], (*path, key))
    else:
        yield path


def put(value, path, new):
    """Return a copy of a JSON value with another scalar at ``path``."""
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return copy


FILES = {
    "log.json": [*STEPS[:2], ENDING],
    "targets.json": [TEACHER],
    "config.yaml": {
        "stage": "finetune",
        "recipe": "revised",
        "student": {"vision_tower": "clip", "language_model": "llama"},
        "distill": {"teachers": ["clip"]},
    },
}
PLACES = [(name, path) for name, content in FILES.items() for path in scalars(content)]


def write_changed(folder, changes):
    """Write the files of a run with other scalars at some places; return what read_run gives."""
    for name, content in FILES.items():
        for place, new in changes:
            if place[0] == name:
                content = put(content, place[1], new)
        (folder / name).write_text(json.dumps(content))  # JSON is YAML
    return read_run(folder)


def shows(log, folder):
    """Write the report, and require that it is one page of text without scripts."""
    write_report(log, [], folder / "report.html")
    source = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(source)
    assert "script" not in page.tags
    assert not set(source) & set(map(chr, [*range(9), 11, 12, *range(14, 32), 127]))
    for text in log.left_out:
        assert text in page.text


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    changes=st.lists(
        st.tuples(st.sampled_from(PLACES), st.sampled_from(SCALARS)),
        min_size=1,
        max_size=5,
        unique_by=lambda change: change[0],
    )
)
def test_odd_values_are_left_out_and_counted(tmp_path_factory, changes):
    folder = tmp_path_factory.getbasetemp() / "odd"
    folder.mkdir(exist_ok=True)
    try:
        log = write_changed(folder, changes)
    except ConfigError as error:
        assert len(str(error)) < 2000  # noqa: PT017
        assert {name for (name, _), _ in changes} >= {"config.yaml"}
        return
    for entry in [*log.steps, log.ending]:
        assert all(type(v) is float and (math.isnan(v) or abs(v) <= 1e30) for v in entry.values())
        assert math.isfinite(entry.get("step", 0))
    odd = [
        new for (name, _), new in changes if name != "config.yaml" and type(new) not in (int, float)
    ]
    kept = sum(map(len, [*log.steps, log.ending])) + 12 * len(log.teachers)
    assert bool(log.left_out) == (kept < sum(map(len, FILES["log.json"])) + 12) or not odd
    assert len("".join(log.left_out)) < 2000
    assert all(text.isprintable() for text in log.left_out)


def test_a_report_of_odd_values_is_written(tmp_path):
    """Many places at a time, because figures take time; one at a time in the next test."""
    changes = [(p, SCALARS[at % len(SCALARS)]) for at, p in enumerate(PLACES[::5])]
    shows(write_changed(tmp_path, changes), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(SCALARS)))
def test_a_report_with_any_odd_value_is_written(tmp_path, number):
    new = SCALARS[number]
    for place in PLACES[number % 8 :: 8]:
        shows(write_changed(tmp_path, [(place, new)]), tmp_path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "content", ["", "[" * 3000, "7", "null", '"x"', "{", "\0", "9" * 5000, "[1]"]
)
def test_a_damaged_file_is_one_sentence_or_left_out(run, name, content):
    (run / name).write_text(content)
    try:
        log = read_run(run)
    except ConfigError as error:
        said = str(error)
    else:
        said = "".join(log.left_out)
    assert said.isprintable()
    assert 0 < len(said) < 2000


def test_special_files_of_a_run_are_sentences(run):
    for name in FILES:
        content = (run / name).read_bytes()
        (run / name).unlink()
        os.mkfifo(run / name)
        with pytest.raises(ConfigError, match="is no regular file"):
            read_run(run)
        (run / name).unlink()
        (run / name).write_bytes(content)
    (run / "answers").mkdir()
    os.mkfifo(run / "answers" / "pope.jsonl")
    (run / "answers" / "gqa.jsonl").write_text('{"prompt": 7, "text": []}\n')
    found, left_out = stored_answers(run, 8)
    assert found == []
    assert len(left_out) == 2


def test_a_diverged_run_is_shown_with_gaps(run):
    steps = [{"step": 1, "epoch": 0.1, "loss": 2.0, "token_std": 1.0}]
    steps.append({"step": 2, "epoch": 0.2, "loss": math.nan, "token_std": math.inf})
    (run / "log.json").write_text(json.dumps([*steps, ENDING]))
    log = read_run(run)
    assert log.left_out == []
    assert log.num_not_finite == 2
    shows(log, run)


@settings(max_examples=8, derandomize=True, deadline=None)
@given(st.text(), st.text(), st.text())
def test_no_text_becomes_a_tag(tmp_path_factory, question, text, name):
    """Answers, file names and teachers are a stranger's; with the tags that scripts need."""
    folder = tmp_path_factory.getbasetemp() / "text"
    folder.mkdir(exist_ok=True)
    bad = "<script src=x onerror='y'>"
    answers = [SampleAnswer(question + bad, bad + text, bad, None, None, name + bad)]
    teacher = TeacherRow.model_validate(TEACHER | {"teacher": bad + name[:50], "codec": bad})
    config = {"stage": bad, "student": {"vision_tower": question}}
    log = RunLog(folder / "<b>", config, [], {}, [teacher], 0, [bad])
    write_report(log, answers, folder / "report.html")
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert not {"script", "b"} & set(page.tags)
    assert page.text.count(bad) >= 7
