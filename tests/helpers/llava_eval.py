"""Write small versions of LLaVA's eight benchmarks, in the folders of LLaVA's scripts.

Used by the tests of `movekd evaluate` and of docs/reproduce.md.
"""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image


def write_benchmarks(folder: Path, crops: Sequence[Image.Image]) -> dict[str, dict[str, str]]:
    """Write the files; return questions, images and annotations for `movekd evaluate` by name."""

    def put(name: str, content: Any) -> str:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Image.Image):
            content.save(path)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        else:
            path.write_text(json.dumps(content), encoding="utf-8")
        return str(path)

    def lines(entries: list[dict[str, Any]]) -> str:
        return "".join(json.dumps(entry) + "\n" for entry in entries)

    def ask(number: int | str, image: str, text: str, category: str = "x") -> dict[str, Any]:
        prompt = f"{text}\nAnswer the question using a single word or phrase."
        return {"question_id": number, "image": image, "text": prompt, "category": category}

    def ten(answer: str) -> list[dict[str, Any]]:
        answers = [answer] * 8 + ["zebra"] * 2
        return [{"answer": a, "answer_id": i + 1} for i, a in enumerate(answers)]

    options = {}
    kinds = ("random", "popular", "adversarial")
    labels = [("a.jpg", "Is there a 3?", "yes"), ("b.jpg", "Is there a 7?", "no")]
    asked = [(kind, *label) for kind in kinds for label in labels]
    entries = [ask(n, image, text, kind) for n, (kind, image, text, _) in enumerate(asked)]
    for kind in kinds:
        rows = [{"image": i, "text": t, "label": right} for i, t, right in labels]
        put(f"pope/coco/coco_pope_{kind}.json", lines(rows))
    for place, name in enumerate(("a.jpg", "b.jpg")):
        for where in ("pope/val2014", "textvqa/train_images", "gqa/data/images"):
            put(f"{where}/{name}", crops[place])
        for where in ("vqav2/test2015", "vizwiz/test", "scienceqa/images/test"):
            put(f"{where}/{name}", crops[place])
    options["pope"] = {
        "questions": put("pope/llava_pope_test.jsonl", lines(entries)),
        "images": str(folder / "pope/val2014"),
        "annotations": str(folder / "pope/coco"),
    }

    words = [
        ask("a", "a.jpg", "What is it?\nReference OCR token: A"),
        ask("a", "a.jpg", "Who?"),
    ]
    data = [
        {"image_id": "a", "question": text, "answers": [a["answer"] for a in ten("stop")]}
        for text in ("what is it?", "who?")
    ]
    options["textvqa"] = {
        "questions": put("textvqa/llava_textvqa_val_v051_ocr.jsonl", lines(words)),
        "images": str(folder / "textvqa/train_images"),
        "annotations": put("textvqa/TextVQA_0.5.1_val.json", {"data": data}),
    }

    ids = {"201": "yes", "202": "no"}
    answers = {n: {"answer": a, "types": {"structural": "verify"}} for n, a in ids.items()}
    entries = [ask(number, "a.jpg", "Is it red?") for number in ids]
    options["gqa"] = {
        "questions": put("gqa/llava_gqa_testdev_balanced.jsonl", lines(entries)),
        "images": str(folder / "gqa/data/images"),
        "annotations": put("gqa/data/testdev_balanced_questions.json", answers),
    }

    turns = [{"from": "human", "value": "Which?\nA. x\nB. y"}, {"from": "gpt", "value": "A"}]
    put("scienceqa/problems.json", {n: {"choices": ["x", "y"], "answer": 0} for n in "12"})
    put("scienceqa/pid_splits.json", {"test": ["1", "2"]})
    entries = [{"id": "1", "image": "a.jpg", "conversations": turns}]
    entries.append({"id": "2", "conversations": turns})
    options["sqa"] = {
        "questions": put("scienceqa/llava_test_CQM-A.json", entries),
        "images": str(folder / "scienceqa/images/test"),
        "annotations": str(folder / "scienceqa"),
    }

    texts = ["Is there a 3?", "What is the sum?", "Which?", "How many?"]
    entries = [ask(n, "ab"[n % 2] + ".jpg", text) for n, text in enumerate(texts)]
    put("vqav2/llava_vqav2_mscoco_test2015.jsonl", lines([*entries, ask(9, "a.jpg", "No?")]))
    people = [{"question_id": n, "answer_type": "number", "answers": ten("3")} for n in range(4)]
    options["vqav2"] = {
        "questions": put("vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", lines(entries)),
        "images": str(folder / "vqav2/test2015"),
        "annotations": put("vqav2/annotations.json", {"annotations": people}),
    }

    entries = [ask(n, f"{'ab'[n]}.jpg", "What is this?") for n in range(2)]
    people = [{"image": f"{n}.jpg", "answer_type": "other", "answers": ten("3")} for n in "ab"]
    options["vizwiz"] = {
        "questions": put("vizwiz/llava_test.jsonl", lines(entries)),
        "images": str(folder / "vizwiz/test"),
        "annotations": put("vizwiz/val.json", people),
    }

    release, entries = "MME/MME_Benchmark_release_version", []
    for task in ("color", "OCR", "code_reasoning"):
        put(f"{release}/{task}/1.png", crops[0])
        ends = [("Is it red?", "Yes"), ("Is it blue?", "No")]
        text = "".join(f"{q} Please answer yes or no.\t{right}\n" for q, right in ends)
        put(f"{release}/{task}/1.txt", text)
        entries += [ask(f"{task}/1.png", f"{task}/1.png", q, task) for q, _ in ends]
    options["mme"] = {
        "questions": put("MME/llava_mme.jsonl", lines(entries)),
        "images": str(folder / release),
    }

    file = io.BytesIO()
    crops[0].save(file, "PNG")
    image = base64.b64encode(file.getvalue()).decode()
    rows = [["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]]
    rows += [["1", "Which?", "", "x", "y", "", "", "A", "logic", image]]
    rows += [["1000001", "Which?", "", "y", "x", "", "", "B", "logic", image]]
    sheet = "".join("\t".join(row) + "\n" for row in rows)
    options["mmbench"] = {"questions": put("mmbench/mmbench_dev_20230712.tsv", sheet)}
    return options
