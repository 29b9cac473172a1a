"""Checksums of what a run reads: a resume, and every rank, must read the same.

``input_fingerprints`` returns what OUTPUT/inputs.json holds: checksums of corpus, conversations and
each teacher's features, the samples per step, and the order of grouped samples. Paths are not part
of it: data may move.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from movekd.errors import ConfigError, shorten
from movekd.files.reading import read_json
from movekd.train.config import TrainConfig
from movekd.train.held_out import SPLIT
from movekd.train.sources import Source

INPUTS_FILE = "inputs.json"
GROUPED_ORDER = "grouped per step"
"""Name of the order in which grouped samples train; another name is another order."""
PACKED_ORDER = "packed, best-fit decreasing"
"""The same for rows of packed samples."""
PACKED_ROWS = "packed rows"
"""Checksum of which samples stand in which row; known only after the tokenizer has been loaded."""


def input_fingerprints(
    config: TrainConfig, sources: Sequence[Source], global_batch_size: int
) -> dict[str, Any]:
    """Return checksums of a run's input; the same input elsewhere has the same ones.

    Of several sources, what each has its own of is a list.
    """
    each = [_of_source(config, source) for source in sources]
    inputs: dict[str, Any] = {key: [found[key] for found in each] for key in each[0]}
    if len(sources) == 1:
        inputs = each[0]
    inputs["global_batch_size"] = global_batch_size
    if config.data.sources:
        inputs["weights"] = [source.keys.weight for source in sources]
    if config.data.group_by_modality_length:
        inputs["order"] = GROUPED_ORDER
    if config.data.packing:
        inputs["order"] = PACKED_ORDER
    if config.data.val_size is not None:
        inputs["split"] = SPLIT
    if not config.data.has_held_out_files:
        inputs.pop("held-out conversations", None)
    return inputs


def _of_source(config: TrainConfig, source: Source) -> dict[str, Any]:
    """Return the checksums of one source."""
    corpus, cache = source.corpus, source.cache
    paths = list(source.keys.conversations)
    if not paths and corpus.conversations_path is not None and config.stage != "distill":
        paths = [corpus.conversations_path]
    held_out = source.keys.eval_conversations
    inputs: dict[str, Any] = {
        "corpus": corpus.fingerprint(),
        "conversations": [_sha256(path) for path in paths if path.exists()],
        "held-out conversations": [_sha256(path) for path in held_out if path.exists()],
    }
    if cache is not None and config.distill is not None:
        inputs["geometry"] = cache.geometry
        for name in config.distill.teachers:
            inputs[f"features of {name}"] = cache[name].calibration.hash
    return inputs


def read_inputs(output_dir: Path) -> dict[str, Any] | None:
    """Return what inputs.json of a run holds, or None if a run of an older version has none.

    Raises:
        ConfigError: the file is damaged.
    """
    path = output_dir / INPUTS_FILE
    if not path.exists():
        return None
    remedy = "Restore it, or start again in another --output."
    inputs = read_json(path, remedy=remedy)
    size = inputs.get("global_batch_size", 1) if isinstance(inputs, dict) else None
    if type(size) is not int or not 1 <= size < 2**31:
        raise ConfigError(f"{path} is damaged; expected checksums and samples per step. {remedy}")
    return dict(inputs)


def require_same_inputs(inputs: Sequence[dict[str, Any]]) -> None:
    """Refuse ranks that read other data than rank 0, for example from an old copy on their node.

    Raises:
        ConfigError: names the rank and what differs.
    """
    for number, found in enumerate(inputs):
        changed = [key for key in found if found[key] != inputs[0].get(key)]
        if changed:
            raise ConfigError(
                f"process {number} reads other data than process 0: {', '.join(changed)} differ. "
                "Give every node the same corpus, conversations and cache."
            )


def require_unchanged_inputs(output_dir: Path, inputs: dict[str, Any]) -> None:
    """Refuse to resume a run with other data than it was started with.

    Without `packed rows` among the inputs, those are not compared yet.

    Raises:
        ConfigError: says what differs.
    """
    old = read_inputs(output_dir)
    if old is None:  # a run of an older version
        return
    keys = (old.keys() | inputs.keys()) - ({PACKED_ROWS} - inputs.keys())
    changed = sorted(k for k in keys if old.get(k) != inputs.get(k))
    if "global_batch_size" in changed:
        raise ConfigError(
            f"{output_dir} was begun with {old.get('global_batch_size')} samples per step, and "
            f"this is {inputs['global_batch_size']} (processes x per_device_train_batch_size x "
            "gradient_accumulation_steps). Choose the last two so that the product is the old one."
        )
    if "order" in changed:
        order = shorten(old.get("order", "grouped over many steps"))
        raise ConfigError(
            f"{output_dir} was begun with another order of samples "
            f"({order}; now: {inputs.get('order')}), and a "
            "resume would see some samples twice and others never. Start again in another --output."
        )
    if changed == [PACKED_ROWS]:
        raise ConfigError(
            f"{output_dir} was begun with other packed rows, because some conversations had "
            "another number of tokens, as another version of the tokenizer gives; a resume would "
            "see some samples twice and others never. Resume with the former version, or start "
            "again in another --output."
        )
    if changed:
        raise ConfigError(
            f"{output_dir} was begun with other data: {shorten(', '.join(changed))} differ. Give "
            "the corpus and the cache that it was begun with, or another --output."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
