"""Write the model card, README.md of every export: what it is, made of, and how to load it."""

from collections.abc import Mapping
from typing import Any, Literal

import yaml
from torch import nn

from movekd.corpus.conversations import Conversation
from movekd.student.checkpoint import TrainedStudent
from movekd.student.language_lora import has_adapter
from movekd.student.parameters import mole_layers
from movekd.student.projector import projector_type
from movekd.student.prompts import render_question
from movekd.student.provenance import base_models, is_hub_id
from movekd.student.towers import num_prefix_tokens, tower_type

Format = Literal["hf", "encoder", "onnx", "official"]

LICENCES = {
    "openai/clip-vit-large-patch14-336": "OpenAI's CLIP: code under MIT; its model card advises "
    "against deployment without a study of the use.",
    "lmsys/vicuna-7b-v1.5": "Llama 2 Community License.",
    "lmsys/vicuna-13b-v1.5": "Llama 2 Community License.",
}
"""Base models whose licence is known here; see the cards of other models."""

_LIBRARY = {"hf": "transformers", "encoder": "transformers", "onnx": "onnx", "official": "pytorch"}
_TASK = {"hf": "image-text-to-text", "official": "image-text-to-text"}

_LOADING: dict[Format, str] = {
    "hf": """With movekd installed, no code of this directory runs:

```python
from transformers import AutoProcessor, MODEL_CLASS

from movekd.student import register_auto_classes

register_auto_classes()
model = MODEL_CLASS.from_pretrained("DIR", dtype="auto")
processor = AutoProcessor.from_pretrained("DIR")
```

Without movekd, `modeling_movekd.py` beside the weights is the model's code. Read it first, because
`trust_remote_code=True` runs it:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("DIR", trust_remote_code=True, dtype="auto")
processor = AutoProcessor.from_pretrained("DIR")
```

`AutoProcessor.from_pretrained("DIR", backend="pil")` makes the pixels that the training saw, bit
for bit; the default backend differs by rounding. On the command line: `movekd ask DIR image.jpg
"question"`.
""",
    "encoder": """With movekd installed, no code of this directory runs:

```python
from transformers import AutoImageProcessor, AutoModel

from movekd.student import register_auto_classes

register_auto_classes()
encoder = AutoModel.from_pretrained("DIR")
processor = AutoImageProcessor.from_pretrained("DIR")
output = encoder(**processor(image, return_tensors="pt"), output_hidden_states=True)
tokens = output.hidden_states[LAYER][:, PREFIX:]  # of the patches: what LLaVA reads
```

Without movekd, `AutoModel.from_pretrained("DIR", trust_remote_code=True)` runs
`modeling_movekd.py` beside the weights; read it first.
""",
    "onnx": """```python
import onnxruntime

session = onnxruntime.InferenceSession("DIR/encoder.onnx")
tokens, *cls = session.run(None, {"pixel_values": pixels})  # float32 (batch, 3, SIZE, SIZE)
```

Pixels are normalised as `movekd.json` says (`image_mean`, `image_std`, `geometry`).
""",
    "official": """These are the files of the released MoVE-KD code, under its names
(github.com/hey-cjj/MoVE-KD). Back into movekd: `movekd import DIR --output MODEL`.
""",
}

_ADAPTER = """The language model's LoRA lies beside its weights. Without these lines they are those
of its base:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(model, "DIR/language_model_lora")
```

`movekd ask` loads it by itself.
"""

_QUESTION = "What is in the image?"
_ASKING = """```python
content = [{"type": "image", "path": "image.jpg"}, {"type": "text", "text": "QUESTION"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device, model.dtype)
output = model.generate(**inputs, do_sample=False, max_new_tokens=64)
answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
```

`pipeline("image-text-to-text")` takes the same messages. Batches are padded on the left.
"""


def model_card(trained: TrainedStudent, kind: Format, name: str) -> str:
    """Return the README.md of an export.

    Args:
        trained: what was exported.
        kind: the format.
        name: the title; the directory's name will do.
    """
    student, run = trained.student, trained.run
    random = random_parts(student.vlm)
    bases = base_models(run)
    front: dict[str, Any] = {
        "library_name": _LIBRARY[kind],
        "tags": ["movekd", "llava", "distillation", "mixture-of-experts"],
        "license": "other",
    }
    if kind in _TASK:
        front["pipeline_tag"] = _TASK[kind]
    if hub_ids := [base for base in bases.values() if is_hub_id(base)]:
        front["base_model"] = hub_ids
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {name}\n",
        _warning(random),
        _what(trained, kind),
        "## Loading\n\n"
        + _imports(_LOADING[kind], student.vlm)
        .replace("MODEL_CLASS", type(student.vlm).__name__)
        .replace("DIR", name)
        .replace("PREFIX", str(num_prefix_tokens(student.vlm.config.vision_config)))
        .replace("LAYER", str(student.vlm.config.vision_feature_layer))
        .replace("SIZE", str(student.image_size)),
        _ADAPTER.replace("DIR", name) if kind == "hf" and has_adapter(student.vlm) else "",
        _prompt(trained) if kind == "hf" else "",
        _made_of(run, bases),
        _licences(bases),
    ]
    return "\n".join(section for section in sections if section)


def _imports(loading: str, vlm: Any) -> str:
    """Return the code that loads a model, with movekd's own import of a class that is its own."""
    module = type(vlm).__module__
    if not module.startswith("movekd."):
        return loading
    stock = "import AutoProcessor, MODEL_CLASS\n\n"
    return loading.replace(stock, f"import AutoProcessor\n\nfrom {module} import MODEL_CLASS\n")


def random_parts(vlm: Any) -> list[str]:
    """Return the parts of a model that were never trained.

    Training moves the weights of normalisations away from exactly one.
    """
    towers = {
        "vision tower": vlm.model.vision_tower,
        "language model": getattr(vlm.model, "language_model", None),  # an encoder has none
    }
    return [n for n, tower in towers.items() if tower is not None and _is_untouched(tower)]


def _is_untouched(tower: nn.Module) -> bool:
    weights = [p for n, p in tower.named_parameters() if "norm" in n and n.endswith("weight")]
    return bool(weights) and all(bool((weight == 1).all()) for weight in weights)


def _warning(random: list[str]) -> str:
    if not random:
        return ""
    return (
        f"> **Random weights.** The {' and the '.join(random)} of this model never learned "
        "anything: it is for tests, and its answers mean nothing.\n"
    )


def _what(trained: TrainedStudent, kind: Format) -> str:
    vlm, student = trained.student.vlm, trained.student
    layers = mole_layers(vlm)
    experts = "without experts"
    if layers:
        first = next(iter(layers.values()))
        gate = "multiplied by" if first["use_gate"] else "not multiplied by"
        experts = (
            f"with {first['num_experts']} LoRA experts of rank {first['r']} in the MLPs of "
            f"{len(layers)} blocks (scale {first['lora_alpha'] / first['r']:g}, {gate} the "
            "router's probability)"
        )
    views = " a view (the whole image, and up to four tiles)" if student.has_tiles else ""
    encoder = "The vision encoder of a LLaVA" if student.tokenizer else "A vision encoder"
    what = {
        "hf": "A LLaVA whose vision tower",
        "encoder": f"{encoder}: it",
        "onnx": f"{encoder} as ONNX: it",
        "official": "A LLaVA whose vision tower",
    }[kind]
    tower = tower_type(vlm.config.vision_config).title
    prompt = f"Prompt format: `{trained.prompt}`. " if student.tokenizer else ""
    projected = ""
    if kind == "hf" and student.num_image_tokens != student.num_patches:
        projected = (
            f"The projector ({projector_type(vlm)}) makes {student.num_image_tokens} tokens of "
            "a view for the language model. "
        )
    return (
        f"{what} is a {tower} {experts}, distilled from several vision encoders (MoVE-KD, "
        f"arXiv 2501.01709) with movekd. Images: {student.image_size} x {student.image_size} "
        f"pixels{views}, geometry `{trained.geometry}`; {student.num_patches} tokens of "
        f"{student.width} channels, hidden state {vlm.config.vision_feature_layer}. "
        f"{projected}"
        f"{prompt}The experts cannot be merged into the MLPs, since every token "
        "chooses its own.\n"
    )


def _prompt(trained: TrainedStudent) -> str:
    """Return the prompt format, what it looks like, and how a question is asked."""
    tokenizer = trained.student.tokenizer
    turns: Any = (("human", f"<image>\n{_QUESTION}"),)
    prompt = render_question(Conversation("", ("image",), turns), tokenizer, trained.prompt)
    image = "Each `<image>` becomes the tokens of an image."
    if not prompt.has_special_tokens:
        image += f" The tokenizer puts {_begin(tokenizer)} in front."
    if trained.prompt == "plain":
        return (
            "## Prompt\n\nFormat `plain`: only the image; the model writes a caption. The text for "
            f"the processor is `<image>`. {image}\n"
        )
    code = _ASKING.replace("QUESTION", _QUESTION)
    return (
        f"## Prompt\n\nFormat `{trained.prompt}`, which `apply_chat_template` writes. {image} "
        f"`{_QUESTION}` with an image is this text:\n\n```text\n{prompt.text}\n```\n\n{code}"
    )


def _begin(tokenizer: Any) -> str:
    ids = tokenizer("")["input_ids"]
    return f"`{tokenizer.decode(ids)}`" if ids else "nothing"


def _made_of(run: Mapping[str, Any], bases: Mapping[str, str]) -> str:
    distill = run.get("distill") or {}
    teachers = ", ".join(distill.get("teachers") or []) or "not recorded"
    if run and "imported" not in run and not distill:
        teachers = "none: trained without distillation"
    language_model = _shown(bases.get("language_model"))
    if run.get("stage") == "distill":
        language_model = "none: the encoder learned only from its teachers"
    lines = [
        f"| vision tower started from | {_shown(bases.get('vision_tower'))} |",
        f"| language model started from | {language_model} |",
        f"| recipe | {run.get('recipe', 'not recorded')} |",
        f"| last stage | {run.get('stage', 'not recorded')} |",
        f"| teachers | {teachers} |",
    ]
    if lora := (run.get("student") or {}).get("language_model_lora"):
        said = f"r {lora['r']}, lora_alpha {lora['lora_alpha']:g}"
        lines.append(f"| LoRA on the language model | {said} |")
    if (run.get("student") or {}).get("load_in_4bit"):
        lines.append("| language model in training | 4 bit; exports hold its original weights |")
    if source := (run.get("imported") or {}).get("from"):
        lines.append(f"| imported from | {source} |")
    return "## Made of\n\n| | |\n|---|---|\n" + "\n".join(lines) + "\n"


def _shown(base: str | None) -> str:
    if base is None:
        return "not recorded"
    return base if is_hub_id(base) else f"a local directory, `{base.rstrip('/').split('/')[-1]}`"


def _licences(bases: Mapping[str, str]) -> str:
    said = [
        f"- {_shown(base)}: {LICENCES.get(base, 'see its own card.')}"
        for base in dict.fromkeys(bases.values())
    ]
    return (
        "## Licence\n\nmovekd and the code beside the weights are Apache-2.0. The weights derive "
        "from those of their base models, of the teachers and of the training data, each with "
        "its own terms; check them before you publish or deploy.\n\n" + "\n".join(said) + "\n"
    )
