"""Build the data of a run: the samples to learn from, the held-out ones, and their collator.

Input: the config, and the opened corpus and cache. Output: ``RunData``. Used by ``run``.
"""

from collections.abc import Sequence
from typing import NamedTuple

from movekd.cache.reader import FeatureCache
from movekd.corpus.anyres import Views
from movekd.corpus.conversations import Conversation
from movekd.corpus.index import Corpus
from movekd.errors import ConfigError
from movekd.student.vlm import Student
from movekd.train.config import TrainConfig
from movekd.train.data import Collator, ConversationDataset
from movekd.train.encoder_data import EncoderCollator, EncoderDataset
from movekd.train.held_out import count_shared, describe, split_conversations, split_images


class RunData(NamedTuple):
    """What a run reads.

    Attributes:
        trained: the samples to learn from.
        held_out: the samples to measure the loss on; None if the run holds none out.
        collator: makes batches of both.
    """

    trained: ConversationDataset | EncoderDataset
    held_out: ConversationDataset | EncoderDataset | None
    collator: Collator | EncoderCollator

    def describe(self) -> str | None:
        """Return how many samples are held out, as one line; None if none are."""
        if self.held_out is None:
            return None
        shared = count_shared(self.trained.images, self.held_out.images)
        unit = "views" if isinstance(self.trained, EncoderDataset) else "conversations"
        return describe(len(self.trained), len(self.held_out), unit, shared)


def read_data(
    config: TrainConfig, corpus: Corpus, cache: FeatureCache | None, student: Student
) -> RunData:
    """Return the data sets and the collator of a run.

    Raises:
        MovekdError: samples do not match the corpus, the cache or the config; names some.
    """
    data, teachers = config.data, () if config.distill is None else tuple(config.distill.teachers)
    assert data.geometry is not None
    transform = student.image_transform(data.geometry)
    target_views: Views = "base"
    if config.distill is not None and config.distill.views == "all":
        target_views = "anyres"
    if config.stage == "distill":
        assert cache is not None
        is_held = split_images(data, corpus)
        trained = EncoderDataset(
            corpus, cache, teachers, target_views, None if is_held is None else ~is_held
        )
        held = None
        if is_held is not None:
            held = EncoderDataset(corpus, cache, teachers, target_views, is_held)
        return RunData(trained, held, EncoderCollator(corpus, transform, cache, teachers))

    def dataset(conversations: Sequence[Conversation]) -> ConversationDataset:
        assert config.student.prompt is not None
        return ConversationDataset(
            conversations,
            corpus,
            cache,
            teachers,
            student.tokenizer,
            student.count_tokens,
            config.student.prompt,
            config.recipe,
            data.model_max_length,
            target_views,
        )

    learned, held_out = split_conversations(data, corpus)
    measured = dataset(held_out) if held_out else None
    if measured is not None and not len(measured.images):
        _refuse_kd_metric(config)
    collator = Collator(
        corpus,
        transform,
        cache,
        teachers,
        student.tokenizer.pad_token_id,
        student.views,
        target_views,
    )
    return RunData(dataset(learned), measured, collator)


def _refuse_kd_metric(config: TrainConfig) -> None:
    metric = str(config.training.get("metric_for_best_model")).removeprefix("eval_")
    if metric.startswith(("loss_kd", "loss_summary")):
        raise ConfigError(
            f"training.metric_for_best_model is {metric}, but no held-out conversation has an "
            "image; set loss_text, or hold out conversations with images."
        )
