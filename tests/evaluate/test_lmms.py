"""Tests of movekd.evaluate.lmms against lmms-eval itself, where that is installed."""

import importlib
import io
import json
import re
import tomllib
import warnings
from pathlib import Path

import pytest

from movekd.corpus.conversations import Conversation
from movekd.errors import ConfigError
from movekd.evaluate.benchmarks.questions import Question
from movekd.evaluate.generate import generate_answers
from movekd.student.checkpoint import load_student
from small_run import write_run

GROUP = "lmms_eval.models"
pytestmark = pytest.mark.filterwarnings("ignore")  # lmms-eval and what it imports


def entry_point():
    """What pyproject.toml names for lmms-eval."""
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    entry_points = tomllib.loads(pyproject.read_text())["project"]["entry-points"]
    module, _, name = entry_points[GROUP]["movekd"].partition(":")
    return getattr(importlib.import_module(module), name)


def test_the_entry_point_is_there_without_lmms_eval():
    assert callable(entry_point())


@pytest.fixture(scope="module")
def models():
    """lmms-eval's table of models, with movekd in it as its entry point puts it there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = pytest.importorskip(GROUP)
    models.MODEL_REGISTRY_V2.register_manifest(entry_point()(), overwrite=True)
    return models


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("models") / "run")


@pytest.fixture(scope="module")
def model(models, run):
    return models.get_model("movekd").create_from_arg_string(
        f"pretrained={run},device=cpu", {"batch_size": 3, "max_batch_size": None}
    )


@pytest.fixture
def request_of(model, crops):
    """Makes a request of lmms-eval about an image, or about none."""
    from lmms_eval.api.instance import Instance

    documents = [{"image": crop} for crop in crops[:5]] + [{"image": None}]
    model.task_dict["t"] = {"test": documents}

    def make(place, text, **keys):
        def to_visual(document):
            return [] if document["image"] is None else [document["image"]]

        arguments = (text, {"max_new_tokens": 4} | keys, to_visual, place, "t", "test")
        metadata = {"task": "t", "doc_id": place, "repeats": 1}
        return Instance("generate_until", arguments, 0, metadata)

    return make


def test_it_is_registered_as_lmms_eval_wants(models):
    from lmms_eval.api.model import lmms

    assert "movekd" in models.list_available_models()
    found = models.MODEL_REGISTRY_V2.resolve("movekd")
    assert (found.model_type, found.class_name) == ("simple", "MovekdModel")
    assert issubclass(models.get_model("movekd"), lmms)


def test_answers_are_those_of_movekd_in_order(model, run, request_of, crops, tmp_path):
    texts = ["Is there a 3?", "What is the sum?", "Where?", "Which?", "Is there a 7?", "Who?"]
    requests = [request_of(n, text) for n, text in enumerate(texts)]
    found = model.generate_until(requests)
    assert len(set(found)) > 1, "equal answers would not show their order"
    for place, crop in enumerate(crops[:5]):
        crop.save(tmp_path / f"{place}.png")
    trained = load_student(run)
    questions = [Question(n, text, None if n == 5 else f"{n}") for n, text in enumerate(texts)]
    expected = generate_answers(
        trained.student,
        [question.to_conversation(str(n)) for n, question in enumerate(questions)],
        lambda name: (tmp_path / f"{name}.png").read_bytes(),
        prompt=trained.prompt,
        geometry=trained.geometry,
        max_new_tokens=4,
    )
    assert found == list(expected)
    assert model.generate_until(requests[::-1]) == found[::-1]


def test_length_and_end_are_each_requests_own(model, request_of, monkeypatch):
    def count(student, conversations, read_image, *, max_new_tokens, **keys):
        return [f"{c.id}: " + " ".join("abcdef"[:max_new_tokens]) for c in conversations]

    monkeypatch.setattr("movekd.evaluate.lmms.generate_answers", count)
    keys = [
        {"max_new_tokens": 2},
        {},
        {"until": ["d", "c"]},
        {"until": "\n"},
        {"max_new_tokens": 2},
    ]
    requests = [request_of(n, "?", **kept) for n, kept in enumerate(keys)]
    answers = model.generate_until(requests)
    assert answers == ["0: a b", "1: a b c d", "2: a b", "3: a b c d", "4: a b"]
    no_length = request_of(0, "?")
    del no_length.args[1]["max_new_tokens"]
    assert model.generate_until([no_length]) == ["0: a b c d e f"]


def test_an_image_that_the_context_places_is_not_put_twice(model, request_of):
    (there,) = model.generate_until([request_of(0, "<image>\nIs there a 3?")])
    (added,) = model.generate_until([request_of(0, "Is there a 3?")])
    assert there == added


def test_what_it_cannot_do_is_a_sentence(models, model, request_of):
    make = models.get_model("movekd").create_from_arg_string
    with pytest.raises(ConfigError, match="names pretained; expected pretrained=RUN"):
        make("pretained=x")
    with pytest.raises(ConfigError, match="names no pretrained"):
        make("device=cpu")
    request = request_of(0, "What?")
    model.task_dict["t"]["test"][0]["image"] = "film.mp4"
    with pytest.raises(ConfigError, match="task 't' shows a str; movekd accepts only images"):
        model.generate_until([request])
    with pytest.raises(NotImplementedError, match="only tasks of output_type generate_until"):
        model.loglikelihood([])


TASK = """
task: movekd_trial
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function trial.doc_to_visual
doc_to_text: !function trial.doc_to_text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 4, until: ["\\n\\n"]}}
process_results: !function trial.process_results
metric_list: [{{metric: is_right, aggregation: mean, higher_is_better: true}}]
"""
FUNCTIONS = """
from PIL import Image

def doc_to_visual(doc):
    return [Image.open(doc["image"])]

def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def process_results(doc, results):
    return {"is_right": float(results[0] == doc["answer"])}
"""


def test_lmms_eval_runs_a_task_with_it(models, run, crops, tmp_path, monkeypatch):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    trained = load_student(run)
    documents = []
    for number, crop in enumerate(crops[:4]):
        crop.save(tmp_path / f"{number}.png")
        question = Question(number, f"Is there a {number}?", "x").to_conversation("x")
        data = (tmp_path / f"{number}.png").read_bytes()
        (answer,) = generate_answers(
            trained.student,
            [question],
            {"x": data}.__getitem__,
            prompt=trained.prompt,
            geometry=trained.geometry,
            max_new_tokens=4,
        )
        right = answer if number else "something else"
        asked = f"Is there a {number}?"
        image = str(tmp_path / f"{number}.png")
        documents.append({"image": image, "question": asked, "answer": right})
    (tmp_path / "docs.json").write_text("".join(json.dumps(d) + "\n" for d in documents))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "trial.yaml").write_text(TASK.format(data=tmp_path / "docs.json"))
    (tasks / "trial.py").write_text(FUNCTIONS)
    results = simple_evaluate(
        model="movekd",
        model_args=f"pretrained={run},device=cpu",
        tasks=["movekd_trial"],
        batch_size=2,
        task_manager=TaskManager("ERROR", include_path=str(tasks)),
        bootstrap_iters=0,
        process_docs_parallel=1,
    )
    assert results["results"]["movekd_trial"]["is_right,none"] == 0.75


PICTURE, MCQ = "a picture", {"question": "Which?\nA. x\nB. y", "answer": "A"}
DOCUMENTS = {  # task -> split, one document with the columns that the task reads, its metric
    "mmstar": (
        "val",
        {"index": 0, "category": "math", "l2_category": "geometry", "image": PICTURE} | MCQ,
        "average",
    ),
    "mmmu_val": (
        "validation",
        {"id": "validation_Art_1", "options": "['x', 'y']", "question_type": "multiple-choice"}
        | {"question": "What do <image 1> and <image 2> show?", "answer": "A"}
        | {"image_1": PICTURE, "image_2": PICTURE},
        "mmmu_acc",
    ),
    "ocrbench": (
        "test",
        {"dataset": "IIIT5K", "question_type": "Regular Text Recognition", "image": PICTURE}
        | {"question": "What is written?", "answer": ["a"]},
        "ocrbench_accuracy",
    ),
    "chartqa": (
        "test",
        {"type": "human_test", "question": "How many?", "answer": "3", "image": PICTURE},
        "relaxed_overall",
    ),
    "docvqa_val": (
        "validation",
        {"questionId": "1", "question": "What?", "answers": ["x"], "image": PICTURE},
        "anls",
    ),
    "ai2d": (
        "test",
        {"question": "Which?", "options": ["x", "y"], "answer": "0", "image": PICTURE},
        "exact_match",
    ),
    "realworldqa": ("test", {"image": PICTURE} | MCQ, "exact_match"),
}


def png(image):
    """The bytes of an image."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def documented_tasks():
    """The tasks of the first lmms-eval command in docs/evaluation.md."""
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    return re.search(r"--tasks (\S+)", text).group(1).split(",")


def test_a_document_of_each_documented_task_is_made_here():
    assert documented_tasks() == list(DOCUMENTS)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_todays_benchmarks_run_on_a_document_made_here(
    name, models, run, crops, tmp_path, monkeypatch
):
    """lmms-eval's own task, with one made document: prompt, images, answer, filters, score."""
    from datasets import Dataset, Image
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)  # some tasks write their results here
    split, document, metric = DOCUMENTS[name]
    pictures = [key for key, value in document.items() if value == PICTURE]
    columns = document | dict.fromkeys(pictures, crops[0])
    data = Dataset.from_dict({key: [value] for key, value in columns.items()})
    for key in pictures:
        data = data.cast_column(key, Image())
    data.to_parquet(tmp_path / "docs.parquet")
    manager = TaskManager("ERROR")
    assert name in manager.all_subtasks
    source = {"dataset_path": "parquet", "dataset_name": None}
    source |= {"dataset_kwargs": {"data_files": {split: str(tmp_path / "docs.parquet")}}}
    results = simple_evaluate(
        model="movekd",
        model_args=f"pretrained={run},device=cpu",
        tasks=[{"task": name} | source],
        task_manager=manager,
        bootstrap_iters=0,
        process_docs_parallel=1,
    )
    scores = {
        key.partition(",")[0]: value
        for key, value in results["results"][name].items()
        if isinstance(value, int | float)
    }
    assert 0 <= scores[metric] <= 1
    (sample,) = results["samples"][name]
    context, keys = sample["arguments"][:2]
    assert document["question"].partition("\n")[0] in context
    trained, names = load_student(run), tuple(pictures)
    turn = "<image>\n" * len(names) + context
    (expected,) = generate_answers(
        trained.student,
        [Conversation("x", names, (("human", turn),))],
        dict.fromkeys(names, png(crops[0])).__getitem__,
        prompt=trained.prompt,
        geometry=trained.geometry,
        max_new_tokens=keys.get("max_new_tokens", 128),
    )
    assert sample["resps"] == [[expected]]
