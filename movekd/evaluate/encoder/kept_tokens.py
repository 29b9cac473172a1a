"""Keep a model's patch tokens in the folder of ``--features``, or read those of an earlier probe.

The dense probe and the fit to teachers need every token, and ``features`` keeps pooled ones. A file
holds the tokens of one batch, float32, whole or not at all.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from movekd.corpus.transforms import Geometry
from movekd.evaluate.encoder.features import block_file, read_block, write_block
from movekd.evaluate.encoder.probed_model import EncoderTokens, ImageTokens, ProbedModel


class KeptTokens:
    """A probed model that computes the tokens of a batch once.

    A teacher in a cache has its tokens on disk already: ``keeping`` returns it as it is.
    """

    def __init__(self, model: ProbedModel, identity: str, folder: Path) -> None:
        self._model, self._identity, self._folder = model, identity, folder

    @property
    def identity(self) -> str:
        """SHA-256 of all that decides a feature."""
        return self._identity

    @property
    def geometry(self) -> Geometry:
        """How its images became square."""
        return self._model.geometry

    def encode(self, keys: Sequence[str], contents: Iterable[bytes]) -> ImageTokens:
        """Return the tokens of images; their files are read only if the batch was not kept.

        Raises:
            ConfigError: the kept file is damaged, or the folder cannot be written.
        """
        path = block_file(self._folder, f"{self._identity} tokens", keys)
        if path.exists():
            kept = read_block(path)
            return EncoderTokens(kept["tokens"], kept.get("cls"))
        output = self._model.encode(keys, contents)
        tensors = {"tokens": output.tokens_BND.float().cpu().contiguous()}
        if output.cls_BD is not None:
            tensors["cls"] = output.cls_BD.float().cpu().contiguous()
        write_block(path, tensors)
        return output


def keeping(model: ProbedModel, folder: Path | None) -> ProbedModel:
    """Return a model that keeps its tokens in a folder; the model itself without one."""
    if folder is None or model.identity is None:
        return model
    return KeptTokens(model, model.identity, folder)
