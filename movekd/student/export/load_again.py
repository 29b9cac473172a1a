"""Load exports as their users do, and compute what they give for fixed inputs.

A program by itself: ``check`` starts it in a fresh process, with the path of a JSON file. Only the
format ``official`` imports movekd, because `movekd import` reads that one. Input, per export: the
folder, the format and a file of tensors. Output, per export: a file of tensors and a report, or the
reason why the export cannot be loaded.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor

Job = Mapping[str, Any]


def main() -> None:
    """Load each export of the JSON file and write what it computes."""
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(jobs["num_threads"])
    if not any(job["kind"] == "official" for job in jobs["jobs"]):
        sys.modules["movekd"] = None  # type: ignore[assignment]  # an import of it is an error
    for job in jobs["jobs"]:
        load = {"hf": load_hf, "encoder": load_encoder, "onnx": load_onnx}.get(job["kind"])
        try:
            with torch.inference_mode():
                tensors, report = (load or load_official)(job, load_file(job["inputs"]))
            save_file({n: t.contiguous() for n, t in tensors.items()}, job["outputs"])
        except Exception as error:  # whatever transformers raises about a folder
            report = {"error": f"{type(error).__name__}: {error}"}
        Path(job["report"]).write_text(json.dumps(report), encoding="utf-8")


def load_hf(job: Job, given: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return logits, what the processor makes of the image and the question, and checksums."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = job["directory"]
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder,
        dtype="auto",
        use_safetensors=True,
        trust_remote_code=_has_code(folder),
        output_loading_info=True,
    )
    processor = AutoProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    images = {"images": Image.open(job["image"]), "return_tensors": "pt"}
    if job["messages"] is None:
        text = "<image>"
        batches = {"processor": processor(text=text, **images)}
    else:
        text = processor.apply_chat_template(job["messages"], add_generation_prompt=True)
        from_image = json.loads(json.dumps(job["messages"]))
        from_image[0]["content"][0]["path"] = job["image"]
        batches = {
            "processor": processor(text=text, **images),
            "apply_chat_template": processor.apply_chat_template(
                from_image,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            ),
        }
    report = _report(model, info)
    report["input_ids"] = {n: batch["input_ids"][0].tolist() for n, batch in batches.items()}
    report["padding_side"] = processor.tokenizer.padding_side
    if (adapter := Path(folder) / "language_model_lora").is_dir():
        from peft import PeftModel

        report["checksums"] |= checksums(load_file(adapter / "adapter_model.safetensors"))
        model = PeftModel.from_pretrained(model, adapter)
    logits = model.eval()(**given, logits_to_keep=job["num_logits"]).logits
    pixels = batches["processor"]["pixel_values"]
    return {"logits": logits, "pixel_values": pixels.float()}, report


def load_encoder(job: Job, given: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tokens that LLaVA reads, the image processor's pixels, and checksums."""
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel

    folder = job["directory"]
    model, info = AutoModel.from_pretrained(
        folder,
        use_safetensors=True,
        trust_remote_code=_has_code(folder),
        output_loading_info=True,
    )
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels = processor(Image.open(job["image"]), return_tensors="pt")["pixel_values"]
    output = model.eval()(given["pixel_values"].to(model.dtype), output_hidden_states=True)
    tokens = output.hidden_states[job["layer"]][:, job["num_prefix"] :]
    return {"tokens": tokens, "pixel_values": pixels.float()}, _report(model, info)


def load_onnx(job: Job, given: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tokens and [CLS] of onnxruntime, of the batch and of its first image by itself."""
    import onnxruntime

    path = str(Path(job["directory"]) / "encoder.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found: dict[str, Tensor] = {}
    for end, pixels in (("", given["pixel_values"]), ("_first", given["pixel_values"][:1])):
        outputs = session.run(None, {"pixel_values": pixels.numpy()})
        names = [f"{output.name}{end}" for output in session.get_outputs()]
        found |= dict(zip(names, map(torch.from_numpy, outputs), strict=True))
    return found, {}


def load_official(job: Job, given: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Import the files with movekd; return the logits and checksums."""
    sys.path.append(job["import_path"])
    from movekd.student.checkpoint import ADAPTERS_FILE, load_student
    from movekd.student.official.import_checkpoint import import_official
    from movekd.student.parameters import plain_parameters
    from movekd.student.tokenization import tokenize_question

    out = Path(job["imported"])
    import_official(Path(job["directory"]), out, **job["bases"])
    trained = load_student(out)
    student, rows = trained.student, job["num_rows"]
    ids = tokenize_question(
        job["conversation"],
        student.tokenizer,
        prompt=trained.prompt,
        num_image_tokens=student.num_image_tokens,
    )
    report: dict[str, Any] = {
        "checksums": checksums(plain_parameters(student.vlm), rows),
        "input_ids": {"movekd import": ids},
    }
    if (out / "model" / ADAPTERS_FILE).exists():
        adapters = load_file(out / "model" / ADAPTERS_FILE)
        report["checksums"] |= {f"adapters.{n}": v for n, v in checksums(adapters).items()}
    logits = student.vlm(**given, logits_to_keep=job["num_logits"]).logits
    return {"logits": logits[..., :rows]}, report


def checksums(tensors: Mapping[str, Tensor], num_rows: int | None = None) -> dict[str, str]:
    """Return name -> checksum of a tensor's bytes; of the first ``num_rows`` of vocabularies."""
    found = {}
    for name, tensor in tensors.items():
        is_vocabulary = name.endswith(("embed_tokens.weight", "lm_head.weight"))
        part = tensor[:num_rows] if is_vocabulary else tensor
        flat = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found[name] = xxhash.xxh3_128_hexdigest(flat.numpy().data)
    return found


def _report(model: Any, info: Mapping[str, Any]) -> dict[str, Any]:
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    return {"wrong_keys": wrong, "checksums": checksums(dict(model.named_parameters()))}


def _has_code(folder: str) -> bool:
    """Return whether the export brings code, which its card says to trust."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return "auto_map" in config


if __name__ == "__main__":
    main()
