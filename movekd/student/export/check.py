"""Compare an export with the run that it came from, as a user of the export would load it.

``formats.export`` calls ``check_export`` before an export gets its name. ``load_again`` loads the
export in a fresh process: with stock transformers or onnxruntime, or with `movekd import` for the
official format. The weights must be the same bit for bit, the tokens of a question the same, and
the outputs for fixed inputs the same within ``TOLERANCES``.

Cost: the export is in memory a second time, one forward pass runs on each side, and the official
format is written a second time.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import movekd
from movekd.corpus.conversations import Conversation
from movekd.errors import MovekdError, WeightsError, shorten
from movekd.student.checkpoint import BASE_KEYS, TrainedStudent, local_base
from movekd.student.export import load_again
from movekd.student.export.load_again import checksums
from movekd.student.export.onnx import tokens_in_float32
from movekd.student.language_lora import adapter_parameters
from movekd.student.official.export_checkpoint import adapters_of_run, official_config
from movekd.student.official.state_dict import adapters_from_official
from movekd.student.parameters import plain_parameters
from movekd.student.tokenization import tokenize_question
from movekd.student.towers import num_prefix_tokens
from movekd.student.vlm import image_features

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of outputs, as a part of the largest output. The same operations run on both
sides, so it is usually 0; onnxruntime computes in another order."""

_PIXEL_TOLERANCE = 1e-4
_NUM_LOGITS = 8
_TURNS = (
    ("human", "<image>\nWhat is in the image?"),
    ("gpt", "A cat on a mat."),
    ("human", "What colour is it?"),
)
"""The question that is asked: several turns, the first one with an image."""


@dataclass(frozen=True)
class Expected:
    """What a run gives for the fixed inputs.

    Attributes:
        job: what ``load_again`` needs to know.
        inputs: tensors for the model.
        outputs: the run's own outputs, and pixels.
        checksums: of all weights, under the names that the export has.
        input_ids: tokens of the question; None for encoders.
        tolerance: see ``TOLERANCES``.
    """

    job: dict[str, Any]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    checksums: dict[str, str]
    input_ids: list[int] | None
    tolerance: float


def check_export(trained: TrainedStudent, kind: str, directory: Path, scratch: Path) -> float:
    """Return the largest difference between the outputs of an export and of its run.

    Args:
        trained: the student.
        kind: the format.
        directory: the export.
        scratch: an empty folder for files of the check.

    Raises:
        WeightsError: the export cannot be loaded, or is another model.
    """
    (found,) = check_exports([(trained, kind, directory)], scratch)
    if isinstance(found, MovekdError):
        raise found
    return found


def check_exports(
    exports: Sequence[tuple[TrainedStudent, str, Path]], scratch: Path
) -> list[float | WeightsError]:
    """Check several exports in one process; return the difference or the error of each.

    Raises:
        WeightsError: the process ended early.
    """
    expected = [
        _expect(trained, kind, directory, _made(scratch / str(number)))
        for number, (trained, kind, directory) in enumerate(exports)
    ]
    _run([each.job for each in expected], scratch)
    return [_compare(each) for each in expected]


def tolerance_of(trained: TrainedStudent, kind: str) -> float:
    """Return the largest difference that is allowed, relative to the largest output."""
    return TOLERANCES[torch.float32 if kind == "onnx" else trained.student.vlm.dtype]


def _expect(trained: TrainedStudent, kind: str, directory: Path, folder: Path) -> Expected:
    """Compute what the run gives, and write the inputs."""
    job: dict[str, Any] = {
        "kind": kind,
        "directory": str(directory.resolve()),
        "image": str(folder / "image.png"),
        "num_logits": _NUM_LOGITS,
        "layer": trained.student.vlm.config.vision_feature_layer,
        "num_prefix": num_prefix_tokens(trained.student.vlm.config.vision_config),
    }
    job |= {name: str(folder / name) for name in ("inputs", "outputs", "report", "imported")}
    _image().save(job["image"])
    expect = _expect_answers if kind in ("hf", "official") else _expect_tokens
    with torch.inference_mode():
        expected = expect(trained, kind, job)
    save_file({n: t.cpu().contiguous() for n, t in expected.inputs.items()}, job["inputs"])
    return expected


def _expect_answers(trained: TrainedStudent, kind: str, job: dict[str, Any]) -> Expected:
    student, vlm = trained.student, trained.student.vlm
    png = Path(job["image"]).read_bytes()
    seen = student.image_transform(trained.geometry).see(png, student.views)
    pixels_VCHW = torch.from_numpy(seen.pixels_VCHW)
    numbers = student.count_tokens([seen.width], [seen.height]).tolist()
    turns: Any = _TURNS
    conversation = Conversation("check", ("image",), turns)
    ids = tokenize_question(
        conversation, student.tokenizer, prompt=trained.prompt, num_image_tokens=numbers
    )
    inputs = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.int64),
        "pixel_values": pixels_VCHW.to(vlm.dtype),
    }
    if student.has_tiles:
        inputs["pixel_values"] = inputs["pixel_values"].unsqueeze(0)
        inputs["image_sizes"] = torch.tensor([[seen.height, seen.width]])
    on_device = {name: tensor.to(vlm.device) for name, tensor in inputs.items()}
    logits = vlm(**on_device, logits_to_keep=_NUM_LOGITS).logits.cpu()
    outputs, rows = {"logits": logits}, None
    if kind == "official":
        rows = int(official_config(trained)["vocab_size"])
        outputs = {"logits": logits[..., :rows]}
        job |= {"num_rows": rows, "bases": _bases(trained), "conversation": _as_json(turns)}
        job |= {"import_path": str(Path(str(movekd.__file__)).parents[1])}
    else:
        outputs["pixel_values"] = pixels_VCHW.reshape(-1, *pixels_VCHW.shape[1:])
        job["messages"] = None if trained.prompt == "plain" else _messages()
    sums = checksums(plain_parameters(vlm), rows)
    sums |= checksums(adapter_parameters(vlm, in_llava=True))
    if kind == "official":
        adapters = checksums(adapters_from_official(adapters_of_run(trained.directory)))
        sums |= {f"adapters.{name}": value for name, value in adapters.items()}
    return Expected(job, inputs, outputs, sums, ids, tolerance_of(trained, kind))


def _expect_tokens(trained: TrainedStudent, kind: str, job: dict[str, Any]) -> Expected:
    student, vlm = trained.student, trained.student.vlm
    size = student.image_size
    generator = torch.Generator().manual_seed(0)
    pixels_BCHW = torch.randn(2, 3, size, size, generator=generator)
    inputs = {"pixel_values": pixels_BCHW}
    if kind == "onnx":
        outputs: dict[str, Tensor] = {}
        for end, pixels in (("", pixels_BCHW), ("_first", pixels_BCHW[:1])):
            tokens, *cls = tokens_in_float32(trained, pixels)
            outputs |= {f"tokens{end}": tokens} | {f"cls{end}": each for each in cls}
        return Expected(job, inputs, outputs, {}, None, tolerance_of(trained, kind))
    png = Path(job["image"]).read_bytes()
    device = next(vlm.parameters()).device
    tokens = image_features(vlm, pixels_BCHW.to(device, vlm.dtype))[1].cpu()
    seen = torch.from_numpy(student.image_transform(trained.geometry)(png))
    outputs = {"tokens": tokens, "pixel_values": seen.unsqueeze(0)}
    prefix = "model.vision_tower."
    plain = plain_parameters(vlm)
    tower = {n.removeprefix(prefix): p for n, p in plain.items() if n.startswith(prefix)}
    return Expected(job, inputs, outputs, checksums(tower), None, tolerance_of(trained, kind))


def _run(jobs: list[dict[str, Any]], scratch: Path) -> None:
    """Load the exports in a fresh process, offline, with an empty cache for their code."""
    content = {"num_threads": torch.get_num_threads(), "jobs": jobs}
    (scratch / "jobs.json").write_text(json.dumps(content), encoding="utf-8")
    own = {"HF_MODULES_CACHE": str(scratch / "code"), "HF_HUB_OFFLINE": "1"}
    # -P: the program's folder holds an onnx.py, which is not the package of that name
    done = subprocess.run(
        [sys.executable, "-P", str(load_again.__file__), str(scratch / "jobs.json")],
        env=os.environ | own | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        memory = " (out of memory?)" if done.returncode == -9 else ""
        raise WeightsError(
            f"the process that loads the export again ended with {done.returncode}{memory}: "
            f"{shorten(lines[-1])}; expected the outputs of the export. It needs as much memory "
            "as the model; nothing was kept. --no-check exports without it."
        )


def _compare(expected: Expected) -> float | WeightsError:
    """Return the largest relative difference of outputs, or what is wrong with an export."""
    report = json.loads(Path(expected.job["report"]).read_text(encoding="utf-8"))
    if wrong := _difference(report, expected):
        return _refusal(wrong)
    found = load_file(expected.job["outputs"])
    if found.keys() != expected.outputs.keys():
        return _refusal(f"it gives {', '.join(found)}, expected {', '.join(expected.outputs)}")
    largest = 0.0
    for name, tensor in expected.outputs.items():
        is_pixels = name == "pixel_values"
        tolerance = _PIXEL_TOLERANCE if is_pixels else expected.tolerance
        there = found[name].reshape(-1, *tensor.shape[1:]) if is_pixels else found[name]
        if there.shape != tensor.shape:
            return _refusal(f"its {name} are {list(there.shape)}, expected {list(tensor.shape)}")
        scale = max(float(tensor.float().abs().max()), 1e-6)
        difference = float((there.float() - tensor.float()).abs().max()) / scale
        if not difference <= tolerance:  # also NaN
            return _refusal(f"its {name} differ by {difference:.1e}, expected {tolerance:.0e}")
        largest = largest if is_pixels else max(largest, difference)
    return largest


def _difference(report: Mapping[str, Any], expected: Expected) -> str:
    """Return how weights and tokens of an export differ from its run's; empty if they do not."""
    if "error" in report:
        return f"it cannot be loaded ({shorten(report['error'], 300)})"
    if keys := report.get("wrong_keys"):
        kind, names = next(iter(keys.items()))
        return f"it has {len(names)} {kind.replace('_', ' ')} ({shorten(', '.join(names[:2]))})"
    sums = report.get("checksums", {})
    names = sorted(expected.checksums.keys() ^ sums.keys())
    if names:
        return f"{len(names)} weights are only in one of them ({shorten(', '.join(names[:2]))})"
    names = sorted(name for name, value in expected.checksums.items() if sums[name] != value)
    if names:
        return f"{len(names)} weights have other values ({shorten(', '.join(names[:2]))})"
    for name, ids in report.get("input_ids", {}).items():
        if ids != expected.input_ids:
            return f"its {name} makes other tokens of a question than the training"
    if report.get("padding_side", "left") != "left":
        return "its tokenizer pads on the right, so batches would get wrong answers"
    return ""


def _refusal(what: str) -> WeightsError:
    return WeightsError(
        f"the export was loaded again in a fresh process, and {what}; expected the run's own "
        "model. Nothing was kept; please report it with the versions that `movekd doctor` prints."
    )


def _bases(trained: TrainedStudent) -> dict[str, str]:
    """Return what `movekd import` is given beside the files: the base models of the run."""
    student = trained.run["student"]
    bases = {key: str(local_base(student[key], trained.directory)) for key in BASE_KEYS}
    return bases | {"tokenizer": bases["language_model"]}


def _as_json(turns: Any) -> dict[str, Any]:
    conversations = [{"from": role, "value": text} for role, text in turns]
    return {"id": "check", "image": "image", "conversations": conversations}


def _messages() -> list[dict[str, Any]]:
    """Return the turns as users of transformers write them."""
    (_, first), (_, answer), (_, second) = _TURNS
    question = first.removeprefix("<image>\n")
    return [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        {"role": "user", "content": second},
    ]


def _image() -> Image.Image:
    """Return an image that is not square, with edges and noise."""
    rows, columns = np.mgrid[:120, :160]
    stripes = ((rows // 20 + columns // 16) % 2 * 160)[..., None]
    noise = np.random.default_rng(0).integers(0, 90, (120, 160, 3))
    return Image.fromarray((stripes + noise).astype(np.uint8))


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder
