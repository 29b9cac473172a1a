"""Tests of `movekd evaluate`: every benchmark by a real small model, interrupted and in parts."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import llava_eval
import scenes
from movekd.cli.main import app
from movekd.errors import ConfigError, CorpusError
from movekd.evaluate.benchmarks.answers import AnswerProvenance
from movekd.evaluate.benchmarks.registry import BENCHMARKS
from small_run import write_run

SHORT = ("--max-new-tokens", 4, "--device", "cpu")


def run(*words):
    """Run a command in this process; return what it printed."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def evaluate(model, name, options, *words):
    """Run one benchmark with --json; return what it says."""
    given = [word for key, value in options.items() for word in (f"--{key}", value)]
    return json.loads(run("evaluate", model, "--benchmark", name, *given, *words, *SHORT, "--json"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "run"
    scenes.write_corpus(folder, num_pretrain=1, num_finetune=1, num_val=1, num_test=3)
    return write_run(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory, crops):
    return llava_eval.write_benchmarks(tmp_path_factory.mktemp("eval"), crops)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_is_answered_scored_and_not_asked_twice(
    model, files, tmp_path, name, monkeypatch
):
    benchmark = BENCHMARKS[name]
    assert name in files, f"write small files of {name} in tests/helpers/llava_eval.py"
    path = tmp_path / "a.jsonl"
    said = evaluate(model, name, files[name], "--answers", path, "--batch-size", 3)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    questions = benchmark.load(Path(files[name]["questions"]))
    assert [line["question_id"] for line in lines] == [question.id for question in questions]
    assert said["asked"] == said["questions"] == len(questions) == len(lines)
    place = {"mme": "images", "mmbench": "questions"}.get(name, "annotations")
    texts = [line["text"] for line in lines]
    report = benchmark.score(questions, texts, Path(files[name][place]))
    assert said["figure"] == {"name": report.figure, "value": pytest.approx(report.value)}
    assert said["rows"] == report.rows
    monkeypatch.setattr("movekd.student.checkpoint.load_student", None)  # calling it would fail
    again = evaluate(model, name, files[name], "--answers", path)
    assert again == said | {"asked": 0}


def test_right_answers_score_full_marks_through_the_command(model, files, tmp_path):
    options = files["pope"]
    path = tmp_path / "a.jsonl"
    origin = AnswerProvenance.of(model, Path(options["questions"]), 4)
    questions = BENCHMARKS["pope"].load(Path(options["questions"]))
    lines = [origin.entry(q, "Yes" if "3" in q.prompt else "No, none.") for q in questions]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = evaluate(model, "pope", options, "--answers", path)
    assert said["figure"] == {"name": "mean f1", "value": 100}
    given = [word for key, value in options.items() for word in (f"--{key}", value)]
    words = ["evaluate", model, "--benchmark", "pope", *given, "--answers", path, *SHORT]
    table = run(*words)
    assert "pope, mean f1 100.00" in table
    assert "adversarial" in table
    assert f"6 answers in {path}" in table


def write_answers(path, model, name, options, say, origin=None):
    """Write the answers of a made model: question -> text."""
    questions = BENCHMARKS[name].load(Path(options["questions"]))
    origin = origin or AnswerProvenance.of(model, Path(options["questions"]), 4)
    lines = [origin.entry(question, say(question)) for question in questions]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_figures_have_intervals_and_a_paired_test_against_a_baseline(model, files, tmp_path):
    options, right = files["pope"], lambda q: "Yes" if "3" in q.prompt else "No, none."
    ours = write_answers(tmp_path / "a.jsonl", model, "pope", options, right)
    origin = AnswerProvenance.of(model, Path(options["questions"]), 4)
    other = replace(origin, model_id="base", model="other")
    theirs = write_answers(tmp_path / "b.jsonl", model, "pope", options, lambda _: "Yes", other)
    words = ("--answers", ours, "--baseline", theirs)
    said = evaluate(model, "pope", options, *words)
    about = said["intervals"]
    assert about["images"] == 2
    assert about["about"].startswith("95%, over 2 test images, not over training seeds")
    assert "2,000 resamples, seed 0" in about["about"]
    # a draw of only the image without a right yes has F1 0, by POPE's rule
    assert about["rows"]["mean"]["f1"] == about["figure"] == [0, 100]
    assert about["rows"]["mean"]["accuracy"] == [100, 100]
    assert about["rows"].keys() == said["rows"].keys()
    found = said["comparison"]
    assert found["baseline"]["model"] == "base"
    assert found["baseline"]["value"] == pytest.approx(200 / 3)
    assert found["difference"] == pytest.approx(100 / 3)
    assert found["interval"][0] <= found["difference"] <= found["interval"][1]
    assert found["p"] == 1  # one image differs: exchanged or not, the difference is as large
    given = [word for key, value in options.items() for word in (f"--{key}", value)]
    table = run("evaluate", model, "--benchmark", "pope", *given, *words, *SHORT)
    assert "95% interval of f1" in " ".join(table.split())
    assert "minus the baseline 'base' (66.67): +33.33, 95% interval" in table
    assert "(permutation of whole images, 9,999 draws, seed 0)" in table
    assert "2 images are few: the intervals are too narrow" in table


def test_a_baseline_is_refused_before_a_question_is_asked(model, files, tmp_path, monkeypatch):
    monkeypatch.setattr("movekd.student.checkpoint.load_student", None)  # calling it would fail
    options, path = files["vqav2"], tmp_path / "other.jsonl"
    write_answers(path, model, "vqav2", options, lambda _: "3")
    text = path.read_text().splitlines(keepends=True)
    path.write_text("".join(text[:-1]))
    words = ("--answers", tmp_path / "a.jsonl", "--baseline", path)
    with pytest.raises(ConfigError, match="answers 3 of the 4 questions, lacks 1 and has 0"):
        evaluate(model, "vqav2", options, *words)
    unscored = {key: value for key, value in options.items() if key != "annotations"}
    with pytest.raises(ConfigError, match="vqav2 is not scored here without right answers"):
        evaluate(model, "vqav2", unscored, *words)
    with pytest.raises(ConfigError, match="--partition gives some; run without --partition"):
        evaluate(model, "vqav2", options, *words, "--partition", "0/2")
    assert not (tmp_path / "a.jsonl").exists()


def test_interrupted_or_in_parts_the_answers_are_those_of_one_run(model, files, tmp_path):
    whole, torn, parts = (tmp_path / f"{name}.jsonl" for name in ("whole", "torn", "parts"))
    said = evaluate(model, "vqav2", files["vqav2"], "--answers", whole)
    torn.write_bytes(whole.read_bytes()[:-20])
    texts = {json.loads(line)["text"] for line in whole.read_text().splitlines()}
    assert len(texts) > 1, "equal answers would not show whose they are"
    again = evaluate(model, "vqav2", files["vqav2"], "--answers", torn)
    assert again["asked"] == 1
    assert torn.read_bytes() == whole.read_bytes()
    for number in (0, 1, 2):
        words = ("--part", "3/3") if number == 2 else ("--partition", f"{number}/3")
        part = evaluate(model, "vqav2", files["vqav2"], "--answers", parts, *words)
        assert part["figure"] is None
        assert part["asked"] == (2 if number == 0 else 1)
    assert not parts.exists()
    together = evaluate(model, "vqav2", files["vqav2"], "--answers", parts)
    assert together["asked"] == 0
    assert together["rows"] == said["rows"]
    assert sorted(parts.read_text().splitlines()) == sorted(whole.read_text().splitlines())


def test_a_split_without_answers_is_submitted(model, files, tmp_path):
    options = {key: value for key, value in files["vqav2"].items() if key != "annotations"}
    split = Path(options["questions"]).with_name("llava_vqav2_mscoco_test2015.jsonl")
    given = [word for key, value in options.items() for word in (f"--{key}", value)]
    words = ["evaluate", model, "--benchmark", "vqav2", *given, *SHORT]
    submission = tmp_path / "up.json"
    printed = run(*words, "--submission", submission, "--submission-split", split)
    answers = model / "answers" / "llava_vqav2_mscoco_test-dev2015.jsonl"
    assert f"4 answers in {answers}" in printed
    assert "not scored; give --annotations: v2_mscoco_val2014_annotations.json" in printed
    entries = json.loads(submission.read_text())
    assert [entry["question_id"] for entry in entries] == [0, 1, 2, 3, 9]
    assert entries[-1]["answer"] == ""
    rows = Path(files["mmbench"]["questions"]).read_text().splitlines()
    test_split = tmp_path / "test.tsv"
    test_split.write_text("".join(row.replace("\tA\tlogic", "\t\tlogic") + "\n" for row in rows))
    words = ["--questions", test_split, "--submission", tmp_path / "up.xlsx", *SHORT]
    printed = run("evaluate", model, "--benchmark", "mmbench", *words)
    assert "not scored; the question file has no answers: --submission is for the server" in printed
    assert (tmp_path / "up.xlsx").read_bytes()[:2] == b"PK"


def test_exact_match_is_what_comes_without_a_benchmark(model):
    words = ["--questions", model / "test.json", "--images", model / "images", "--device", "cpu"]
    figures = json.loads(run("evaluate", model, *words, "--json", "--max-new-tokens", 4))
    assert figures["all"]["total"] == 3
    assert figures["all"]["images"] == 3
    assert figures["all"]["intervals"].endswith("not over training seeds: Wilson's")
    assert "exact match" in run("evaluate", model, *words, "--max-new-tokens", 4)


@pytest.fixture
def asked(model, tmp_path):
    """Seven questions to the model about two images: one without an id, two alike, one of text."""
    names = sorted(path.name for path in (model / "images").glob("test_*"))[:2]
    (tmp_path / "images").mkdir()
    for name in names:
        shutil.copy(model / "images" / name, tmp_path / "images")
    entries = []
    for number in range(6):
        turns = [{"from": "human", "value": f"<image>\nIs there a {number % 5}?"}]
        turns.append({"from": "gpt", "value": "yes"})
        entry = {"id": "x", "image": names[number % 2], "conversations": turns}
        entries.append(entry)
    del entries[1]["id"]
    entries[2]["sample_id"] = entries[2].pop("id")
    text = [{"from": "human", "value": "Name a colour."}, {"from": "gpt", "value": "Blue."}]
    entries.append({"id": "text", "conversations": text})
    (tmp_path / "q.json").write_text(json.dumps(entries))
    return tmp_path


def exact(model, folder, *words):
    given = ("--questions", folder / "q.json", "--images", folder / "images", *SHORT)
    return run("evaluate", model, *given, *words)


def test_exact_match_draws_images_and_compares_with_a_baseline(model, asked):
    ours, theirs = asked / "a.jsonl", asked / "b.jsonl"
    exact(model, asked, "--answers", ours)
    lines = [json.loads(line) for line in ours.read_text().splitlines()]
    right = [line | {"text": "Yes." if line["question_id"] != "text" else "blue"} for line in lines]
    ours.write_text("".join(json.dumps(line) + "\n" for line in right))
    theirs.write_text("".join(json.dumps(line | {"text": "?"}) + "\n" for line in right))
    words = ("--answers", ours, "--baseline", theirs)
    found = json.loads(exact(model, asked, *words, "--json"))["all"]
    assert (found["accuracy"], found["images"]) == (1, 3)  # two images, and a question of text
    assert "percentile bootstrap of whole images, 2,000 resamples, seed 0" in found["intervals"]
    assert found["comparison"]["difference"] == 100
    assert found["comparison"]["p"] == pytest.approx(2 / 2**3, abs=0.02)
    table = exact(model, asked, *words)
    assert "minus the baseline" in table
    assert "95% intervals over 3 test images" in table


def test_exact_match_resumes_and_gives_what_one_run_gives(model, asked, monkeypatch):
    whole, path = asked / "whole.jsonl", asked / "a.jsonl"
    figures = exact(model, asked, "--answers", whole, "--json", "--batch-size", 3)
    assert figures == exact(model, asked, "--json")
    content = whole.read_bytes()
    lines = [json.loads(line) for line in content.splitlines()]
    assert [line["question_id"] for line in lines] == ["x", "1", "x", "x", "x", "x#2", "text"]
    assert lines[0]["prompt"] == "<image>\nIs there a 0?"
    for length in (5, len(content) // 2):
        path.write_bytes(content[:length])
        said = exact(model, asked, "--answers", path)
        assert path.read_bytes() == content
        before = content[:length].count(b"\n")
        assert f"7 answers in {path}" + f", {before} of them given before" * bool(before) in said
    monkeypatch.setattr("movekd.student.checkpoint.load_student", None)  # calling it would fail
    assert exact(model, asked, "--answers", path, "--json") == figures
    with pytest.raises(ConfigError, match="was given with --max-new-tokens 4; this is 5"):
        exact(model, asked, "--answers", path, "--max-new-tokens", 5)


def test_bad_images_are_all_named_before_a_model_loads(model, asked, monkeypatch):
    monkeypatch.setattr("movekd.student.checkpoint.load_student", None)  # calling it would fail
    first, second = sorted((asked / "images").iterdir())
    first.write_bytes(first.read_bytes()[:200])
    second.unlink()
    with pytest.raises(CorpusError, match="2 of 2 images cannot be used") as caught:
        exact(model, asked)
    assert first.name in str(caught.value)
    assert second.name in str(caught.value)


def test_entries_that_cannot_be_asked_are_all_named(model, asked):
    entries = json.loads((asked / "q.json").read_text())
    entries[0]["conversations"] = entries[0]["conversations"][:1]
    entries[2]["conversations"][0]["value"] = "No place for an image"
    entries[3] = 7
    (asked / "q.json").write_text(json.dumps(entries))
    with pytest.raises(ConfigError, match="3 entries cannot be asked") as caught:
        exact(model, asked)
    for part in (
        "entry 0",
        "entry 2",
        "entry 3",
        "does not end with a 'gpt' turn",
        "has 0 <image>",
    ):
        assert part in str(caught.value)
    (asked / "q.json").write_text("[]")
    with pytest.raises(ConfigError, match="has no question to evaluate"):
        exact(model, asked)
    line = {"question_id": 1, "image": "a.jpg", "text": "Is it?"}
    (asked / "q.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ConfigError, match=r"the form of LLaVA's benchmarks.* --benchmark"):
        run("evaluate", model, "--questions", asked / "q.jsonl", "--images", asked)


def test_what_cannot_be_evaluated_is_a_sentence(model, files, tmp_path):
    questions = files["pope"]["questions"]
    with pytest.raises(ConfigError, match=r"'popee'; expected one of pope, .*Did you mean 'pope'"):
        evaluate(model, "popee", {"questions": questions})
    with pytest.raises(ConfigError, match="pope has no server; --submission is for gqa"):
        evaluate(model, "pope", files["pope"], "--submission", tmp_path / "u.json")
    with pytest.raises(
        ConfigError, match="--submission needs every answer and --partition gives some"
    ):
        evaluate(
            model, "gqa", files["gqa"], "--submission", tmp_path / "u.json", "--partition", "1/2"
        )
    with pytest.raises(ConfigError, match="--part is the old form of --partition"):
        evaluate(model, "gqa", files["gqa"], "--part", "1/2", "--partition", "0/2")
    with pytest.raises(ConfigError, match="--submission-split goes with --benchmark vqav2"):
        evaluate(model, "gqa", files["gqa"], "--submission-split", tmp_path / "u.json")
    with pytest.raises(ConfigError, match=r"none does not exist; expected the folder of coco_pope"):
        evaluate(model, "pope", files["pope"] | {"annotations": str(tmp_path / "none")})
    with pytest.raises(ConfigError, match=r"question 0 has the image 'a\.jpg'; give its folder"):
        evaluate(model, "pope", {"questions": questions}, "--answers", tmp_path / "a.jsonl")
    wrong = {"questions": questions, "images": str(tmp_path)}
    with pytest.raises(CorpusError, match=r"image 'a\.jpg' cannot be read"):
        evaluate(model, "pope", wrong, "--answers", tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match="--partition goes with --benchmark, which is not given"):
        run("evaluate", model, "--questions", questions, "--partition", "1/2")
    with pytest.raises(ConfigError, match="--images is missing"):
        run("evaluate", model, "--questions", questions)


def test_answers_of_another_model_are_refused(model, files, tmp_path):
    path = tmp_path / "a.jsonl"
    evaluate(model, "gqa", files["gqa"], "--answers", path)
    line = json.loads(path.read_text().splitlines()[0])
    line["metadata"]["model"] = "another"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(ConfigError, match=r"fingerprint another\); this is 'run'"):
        evaluate(model, "gqa", files["gqa"], "--answers", path)
    with pytest.raises(ConfigError, match="answers another question file"):
        evaluate(model, "pope", files["pope"], "--answers", _answered(model, files, tmp_path))


def _answered(model, files, folder):
    path = folder / "gqa.jsonl"
    evaluate(model, "gqa", files["gqa"], "--answers", path)
    return path


def test_scoring_answers_that_are_there_loads_no_torch(model, files, tmp_path):
    path = _answered(model, files, tmp_path)
    code = (
        "import sys; from movekd.cli.main import main; sys.argv = ['movekd', *sys.argv[1:]]\n"
        "try: main()\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    words = ["evaluate", model, "--benchmark", "gqa", "--answers", path, *SHORT]
    words += [word for key, value in files["gqa"].items() for word in (f"--{key}", value)]
    command = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "gqa, accuracy" in done.stdout
