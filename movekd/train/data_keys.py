"""The section `data` of student.yaml: images, conversations, and how a run reads them.

A run reads one corpus (`shards`), or several (`sources`), each with its cache, its conversations
and its weight. ``DataConfig.all_sources`` returns both in one form.
"""

from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from movekd.config import FilePath, FrozenModel, Integer, Number, Text
from movekd.corpus.transforms import Geometry

MAX_WEIGHT = 1_000


def _whole_from_one(size: float) -> float:
    if size >= 1 and not float(size).is_integer():
        raise ValueError("expected a share below 1, or a whole number")
    return int(size) if size >= 1 else size


HeldOutSize = Annotated[Number, Field(gt=0, lt=2**31), AfterValidator(_whole_from_one)]


class SourceConfig(FrozenModel):
    """One of the corpora that a run reads."""

    shards: FilePath = Field(description="Folder that `movekd shards pack` wrote.")
    cache: Text | None = Field(
        default=None,
        description="Its feature cache, a folder or a URL. Null: the one of `--cache`.",
    )
    conversations: list[FilePath] = Field(
        default_factory=list, description="As `data.conversations`, of this corpus."
    )
    eval_conversations: list[FilePath] = Field(
        default_factory=list, description="As `data.eval_conversations`, of this corpus."
    )
    weight: Number = Field(
        default=1.0,
        gt=0,
        le=MAX_WEIGHT,
        description="How often an epoch takes each sample: 2 takes all twice; .25 takes a quarter, "
        "the next quarter in the next epoch.",
    )

    @property
    def name(self) -> str:
        """What messages call it: the folder, and the conversations where it names some."""
        files = ", ".join(path.name for path in self.conversations)
        return f"{self.shards} ({files})" if files else str(self.shards)


class DataConfig(FrozenModel):
    """Images and conversations."""

    shards: FilePath | None = Field(
        default=None,
        description="Folder that `movekd shards pack` wrote. Null only with `sources`.",
    )
    conversations: list[FilePath] = Field(
        default_factory=list,
        description="LLaVA JSON files; empty: those packed with the images. Stage distill takes "
        "none: it sees every image of the corpus.",
    )
    eval_conversations: list[FilePath] = Field(
        default_factory=list,
        description="LLaVA JSON files of held-out conversations, whose loss `training.eval_steps` "
        "measures; their images are in `shards`, too. Stage distill holds out their images.",
    )
    sources: list[SourceConfig] = Field(
        default_factory=list,
        max_length=256,
        description="Several corpora in one run, each with its cache, conversations and weight, in "
        "place of `shards`, `conversations` and `eval_conversations`.",
    )
    val_size: HeldOutSize | None = Field(
        default=None,
        description="Hold out a share of the conversations (below 1) or a number of them, of "
        "images in stage distill. Conversations that share an image stay together.",
    )
    probe_images: FilePath | None = Field(
        default=None,
        description="Folder with `train/CLASS/` and `test/CLASS/` of image files, or a CSV file as "
        "`movekd probe` reads it: its kNN on the encoder's features, every `training.eval_steps` "
        "and at the end.",
    )
    geometry: Geometry | None = Field(
        default=None,
        description="Must be the cache's, so that student and teachers see the same pixels. Null: "
        "crop; for llava_next stretch.",
    )
    group_by_modality_length: bool | None = Field(
        default=None,
        description="A step holds only samples with images or only text, and its micro-batches "
        "have about equal numbers of words, as in LLaVA. Null: true in finetune, false with "
        "`packing`.",
    )
    packing: bool = Field(
        default=False,
        description="Put several conversations into one row of up to `model_max_length` tokens; "
        "each sees only itself. `training.per_device_train_batch_size` then counts rows.",
    )
    model_max_length: Integer = Field(
        default=2048, gt=0, le=2**24, description="Cut longer samples, in tokens."
    )

    @model_validator(mode="after")
    def _one_corpus_or_several(self) -> "DataConfig":
        if not self.sources and self.shards is None:
            raise ValueError(
                "shards is missing; give the folder that `movekd shards pack` wrote, or several "
                "of them in sources"
            )
        names = ("shards", "conversations", "eval_conversations")
        twice = [name for name in names if self.sources and getattr(self, name)]
        if twice:
            raise ValueError(
                f"{', '.join(twice)} and sources are both given; expected one of them, because "
                "each of the sources names its own. Move it into an entry of sources"
            )
        return self

    def all_sources(self) -> tuple[SourceConfig, ...]:
        """Return `sources`, or what stands in their place as one."""
        if self.sources:
            return tuple(self.sources)
        assert self.shards is not None  # the validator's
        return (
            SourceConfig(
                shards=self.shards,
                conversations=self.conversations,
                eval_conversations=self.eval_conversations,
            ),
        )

    @property
    def has_held_out_files(self) -> bool:
        """Whether a source names held-out conversations."""
        return any(source.eval_conversations for source in self.all_sources())
