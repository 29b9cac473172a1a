"""An export of format ``hf``, back as a student that can be asked, evaluated and exported again."""

from pathlib import Path
from typing import Any, get_args

import torch
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

from movekd.corpus.transforms import Geometry
from movekd.errors import WeightsError
from movekd.student.checkpoint import ABOUT_FILE, TrainedStudent
from movekd.student.config import PromptFormat
from movekd.student.hf_loading import loading
from movekd.student.tensor_files import read_json
from movekd.student.tokenizer import load_tokenizer
from movekd.student.vlm import Student

MODELS = {"llava": LlavaForConditionalGeneration, "llava_next": LlavaNextForConditionalGeneration}


def load_export(directory: Path, device: str = "cpu") -> TrainedStudent:
    """Return the student of an export, frozen and in evaluation mode.

    Only movekd's own code runs, whatever code lies in the directory.

    Raises:
        WeightsError: it is another kind of directory, or lacks a file.
    """
    model_type = read_json(directory / "config.json").get("model_type")
    if model_type == "move_llava_llama":
        raise WeightsError(
            f"{directory} is a checkpoint of the released code; expected a model directory of "
            f"movekd. Make one of it: movekd import {directory} --output DIR."
        )
    if model_type == "movekd_clip_vision":
        raise WeightsError(
            f"{directory} holds a vision encoder alone, which answers no questions; expected a "
            "run, an imported model or an export of format hf."
        )
    if model_type not in MODELS or not (directory / ABOUT_FILE).exists():
        raise WeightsError(
            f"{directory} holds a model of type '{model_type}'"
            f"{'' if (directory / ABOUT_FILE).exists() else f' and no {ABOUT_FILE}'}; expected an "
            "export of `movekd export --format hf`."
        )
    about = read_json(directory / ABOUT_FILE)
    prompt: Any = about.get("prompt")
    geometry: Any = about.get("geometry")
    if prompt not in get_args(PromptFormat) or geometry not in get_args(Geometry):
        raise WeightsError(
            f"{directory / ABOUT_FILE} has prompt {prompt!r} and geometry {geometry!r}; expected "
            f"one of {', '.join(get_args(PromptFormat))} and of {', '.join(get_args(Geometry))}. "
            "Export the model again."
        )
    with loading(str(directory), "the model in"):
        vlm = MODELS[model_type].from_pretrained(
            directory, dtype="auto", use_safetensors=True, trust_remote_code=False
        )
    tokenizer = load_tokenizer(directory)
    vlm.eval().requires_grad_(False).to(torch.device(device))
    run = about.get("run") or {}
    mean, std = tuple(about["image_mean"]), tuple(about["image_std"])
    return TrainedStudent(Student(vlm, tokenizer, mean, std), prompt, geometry, directory, run)
