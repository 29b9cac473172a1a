"""The report of a run: complete, safe to open, and no network."""

import json
from html.parser import HTMLParser

import pytest
import yaml

from movekd.errors import ConfigError
from movekd.view.plots import run_figures
from movekd.view.report import SampleAnswer, stored_answers, write_report
from movekd.view.run_log import read_run
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


class Page(HTMLParser):
    """Collects what a page loads, its scripts and its text."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.tags, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [v for n, v in attributes if n in ("src", "srcset", "data", "xlink:href")]
        self.loads += [v for n, v in attributes if n == "href" and tag in ("link", "image")]

    def handle_data(self, data):
        self.text += data


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
    with pytest.raises(ConfigError, match=r"log.json cannot be read"):
        read_run(run)


def test_answers_beside_a_run_are_shown_torn_lines_left_out(run):
    (run / "answers").mkdir()
    line = json.dumps({"question_id": 1, "prompt": "Is it?", "text": "Yes"})
    (run / "answers" / "pope.jsonl").write_text(f'{line}\n{{"question_id": 2, "pro')
    found = stored_answers(run, 8)
    assert [(a.question, a.answer, a.source) for a in found] == [("Is it?", "Yes", "pope.jsonl")]


def test_small_run_has_no_log(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no config.yaml"):
        read_run(write_run(tmp_path / "run"))
