"""Export a student as a directory that stock transformers loads: ``hf`` and ``encoder``.

    hf                                        encoder
      config.json, model*.safetensors           config.json, model*.safetensors
      generation_config.json                    preprocessor_config.json
      processor_config.json, tokenizer files    movekd.json
      movekd.json                               modeling_movekd.py
      modeling_movekd.py
      language_model_lora/, with --lora adapter

Input: a loaded student. ``movekd.json`` holds its prompt format and how its images become pixels,
for ``checkpoint.load_export``. Experts are not merged, because each token chooses its expert.
"""

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    LlavaImageProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
)

from movekd.errors import ConfigError
from movekd.student.checkpoint import ABOUT_FILE, TrainedStudent
from movekd.student.export import modeling_movekd
from movekd.student.export.chat_template import chat_template
from movekd.student.generation import export_settings
from movekd.student.language_lora import (
    LORA_DIR,
    adapter_keys,
    has_adapter,
    write_llava_adapter,
)
from movekd.student.llava_next import GRID_PINPOINTS
from movekd.student.parameters import mole_layers, plain_parameters
from movekd.student.projector import FACTORS, projector_type
from movekd.student.provenance import made_of, public_name
from movekd.student.tensor_files import write_shards
from movekd.student.tokenizer import forget_calls
from movekd.student.towers import EXPORTED_TYPES, tower_type

TOWER = "model.vision_tower."


def export_hf(trained: TrainedStudent, directory: Path) -> None:
    """Write files for ``Llava(Next)ForConditionalGeneration`` and ``AutoProcessor``.

    Raises:
        ConfigError: transformers has no processor that makes images square as the training did.
    """
    student = trained.student
    directory.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(student.vlm.config)
    config.vision_config = tower_config(student.vlm)
    name = "LlavaNext" if student.has_tiles else "Llava"
    config.architectures = [type(student.vlm).__name__]
    for part in (config, config.vision_config, config.text_config):
        part.dtype = student.vlm.dtype
        part.name_or_path = public_name(part.name_or_path)  # no path of this machine
    # both are written: the student's output layer is never the input embeddings
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    factor = FACTORS[projector_type(student.vlm)]
    is_stock = type(student.vlm).__module__.startswith("transformers.")
    if exported_model(config.vision_config.model_type) is not None or not is_stock:
        config.auto_map = {
            "AutoConfig": f"modeling_movekd.Movekd{name}Config",
            "AutoModelForImageTextToText": f"modeling_movekd.Movekd{name}ForConditionalGeneration",
        }
        _copy_code(directory)
    processor_class = LlavaNextProcessor if student.has_tiles else LlavaProcessor
    processor = processor_class(
        image_processor=image_processor(trained, cuts_tiles=student.has_tiles),
        tokenizer=_tokenizer(trained),
        patch_size=config.vision_config.patch_size * factor,  # from it the tokens are counted
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(
            config.vision_feature_select_strategy == "default"
        ),  # [CLS]
        chat_template=chat_template(student.tokenizer, trained.prompt),
    )
    write_shards(directory, stored(plain_parameters(student.vlm), config.vision_config, TOWER))
    if has_adapter(student.vlm):
        write_llava_adapter(student.vlm, directory / LORA_DIR)
    config.save_pretrained(directory)
    _generation_config(trained).save_pretrained(directory)
    forget_calls(processor.tokenizer)
    processor.save_pretrained(directory)


def export_encoder(trained: TrainedStudent, directory: Path) -> None:
    """Write only the vision tower, as ``AutoModel`` and ``AutoImageProcessor`` load it.

    Raises:
        ConfigError: as ``export_hf``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    processor = image_processor(trained)
    config = tower_config(trained.student.vlm)
    config.dtype = trained.student.vlm.dtype
    if (model := exported_model(config.model_type)) is not None:
        config.auto_map = {
            "AutoConfig": f"modeling_movekd.{model.config_class.__name__}",
            "AutoModel": f"modeling_movekd.{model.__name__}",
        }
        _copy_code(directory)
    write_shards(directory, stored(tower_parameters(trained.student.vlm), config))
    config.save_pretrained(directory)
    processor.save_pretrained(directory)


def tower_parameters(vlm: Any) -> dict[str, Tensor]:
    """Return the tower's weights under the names of ``modeling_movekd``."""
    plain = plain_parameters(vlm)
    return {n.removeprefix(TOWER): p for n, p in plain.items() if n.startswith(TOWER)}


def stored(
    parameters: Mapping[str, Tensor], tower_config: Any, prefix: str = ""
) -> dict[str, Tensor]:
    """Return weights under the names that transformers reads in a file.

    Args:
        parameters: weights by the names that the model has.
        tower_config: the exported tower's.
        prefix: start of the tower's names.
    """
    kind = tower_type(tower_config)
    if kind.stored_blocks is None or exported_model(tower_config.model_type) is not None:
        return dict(parameters)  # transformers renames only for its own classes
    here, there = f"{prefix}{kind.blocks}.", f"{prefix}{kind.stored_blocks}."
    return {
        there + name.removeprefix(here) if name.startswith(here) else name: tensor
        for name, tensor in parameters.items()
    }


def tower_config(vlm: Any) -> Any:
    """Return the config of the tower with its experts; a tower without keeps its own.

    Raises:
        ConfigError: the tower has experts and its type has no class in ``modeling_movekd``.
    """
    config = copy.deepcopy(vlm.config.vision_config)
    layers = mole_layers(vlm)
    if not layers:
        config.architectures = [type(vlm.model.vision_tower).__name__]
        return config
    model = exported_model(EXPORTED_TYPES.get(config.model_type, config.model_type))
    if model is None:
        raise ConfigError(
            f"the experts stand in a tower of type '{config.model_type}'; exports know experts "
            f"only in {', '.join(EXPORTED_TYPES)}. Use the model directory itself."
        )
    keys = config.to_dict() | next(iter(layers.values()))
    for key in ("model_type", "transformers_version", "auto_map"):
        keys.pop(key, None)
    keys |= {"architectures": [model.__name__], "layers_to_transform": sorted(layers)}
    return model.config_class(**keys)


def exported_model(model_type: str) -> Any:
    """Return the class of ``modeling_movekd`` for the type of a config; None for a stock type."""
    classes = {model.config_class.model_type: model for model in modeling_movekd.TOWERS}
    return classes.get(model_type)


def image_processor(trained: TrainedStudent, *, cuts_tiles: bool = False) -> Any:
    """Return transformers' processor that makes images square as the training did.

    With ``cuts_tiles`` it cuts an image into the views of LLaVA-NeXT.

    Raises:
        ConfigError: transformers has none.
    """
    if cuts_tiles and trained.geometry != "stretch":
        raise ConfigError(
            f"the student was trained with geometry '{trained.geometry}'; the processor of "
            "LLaVA-NeXT stretches the whole image. Train with data.geometry: stretch, or use the "
            "model directory itself."
        )
    size = trained.student.image_size
    square = {"height": size, "width": size}
    keys: dict[str, Any] = {
        "image_mean": list(trained.student.image_mean),
        "image_std": list(trained.student.image_std),
        "crop_size": square,
    }
    short = {"shortest_edge": size}
    if cuts_tiles:
        return LlavaNextImageProcessor(size=short, image_grid_pinpoints=GRID_PINPOINTS, **keys)
    if trained.geometry == "pad":
        return LlavaImageProcessor(do_pad=True, size=short, **keys)
    if trained.geometry == "crop":
        return CLIPImageProcessor(size=short, **keys)
    if trained.geometry == "stretch":
        return CLIPImageProcessor(size=square, do_center_crop=False, **keys)
    raise ConfigError(
        f"the student was trained with geometry '{trained.geometry}'; transformers has a processor "
        "for crop, pad and stretch. Train with one of these, or use the model directory itself."
    )


def _tokenizer(trained: TrainedStudent) -> Any:
    """Return the tokenizer as users of transformers call it: with texts of the chat template."""
    tokenizer = copy.deepcopy(trained.student.tokenizer)
    tokenizer.padding_side = "left"  # new tokens stand behind the question, also in a batch
    tokenizer.init_kwargs["padding_side"] = "left"  # or else it would not be saved
    tokenizer.chat_template = chat_template(tokenizer, trained.prompt)
    if trained.prompt == "chat_template" and tokenizer("")["input_ids"]:
        # the template writes <s> itself, or the training had none
        tokenizer.backend_tokenizer.post_processor = None
        tokenizer.init_kwargs |= {"add_bos_token": False, "add_eos_token": False}
    return tokenizer


def _generation_config(trained: TrainedStudent) -> Any:
    """Return the settings with which the student answers, see ``generation``."""
    student = trained.student
    return export_settings(student.tokenizer, student.vlm.generation_config, trained.prompt)


def _copy_code(directory: Path) -> None:
    path = Path(str(modeling_movekd.__file__))
    shutil.copyfile(path, directory / path.name)


def write_about(trained: TrainedStudent, directory: Path) -> None:
    """Write ``movekd.json``: the prompt format and how images become pixels."""
    about = {
        "format": 1,
        "prompt": None if trained.student.tokenizer is None else trained.prompt,
        "geometry": trained.geometry,
        "image_mean": list(trained.student.image_mean),
        "image_std": list(trained.student.image_std),
        "vision_feature_layer": trained.student.vlm.config.vision_feature_layer,
        "run": made_of(trained.run),
    }
    if (directory / LORA_DIR).is_dir():
        about[LORA_DIR] = adapter_keys(trained.student.vlm).model_dump(mode="json")
    text = json.dumps(about, indent=1) + "\n"
    (directory / ABOUT_FILE).write_text(text, encoding="utf-8")
