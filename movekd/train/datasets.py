"""Build the data of a run: the samples to learn from, the held-out ones, and their collator.

Input: the config, and the opened corpora and caches. Output: ``RunData``. Used by ``run``.
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
from movekd.train.joined_inputs import JoinedCaches, JoinedCorpora
from movekd.train.mixture import Mixture, Part, join
from movekd.train.sources import Source

Learned = ConversationDataset | EncoderDataset
"""The samples of a source, before any packing."""


class RunData(NamedTuple):
    """What a run reads.

    Attributes:
        trained: the samples to learn from, per source.
        held_out: the samples to measure the loss on; None if the run holds none out.
        collator: makes batches of both.
    """

    trained: list[Part[Learned]]
    held_out: Learned | Mixture | None
    collator: Collator | EncoderCollator

    def describe(self) -> str | None:
        """Return how many samples are held out, as one line; None if none are."""
        if self.held_out is None:
            return None
        trained = join(self.trained)
        shared = count_shared(trained.images, self.held_out.images)
        unit = "views" if isinstance(self.trained[0].dataset, EncoderDataset) else "conversations"
        return describe(len(trained), len(self.held_out), unit, shared)


def read_data(config: TrainConfig, sources: Sequence[Source], student: Student) -> RunData:
    """Return the data sets and the collator of a run.

    Raises:
        MovekdError: samples do not match the corpus, the cache or the config; names some.
    """
    assert config.data.geometry is not None
    transform = student.image_transform(config.data.geometry)
    target_views: Views = "base"
    if config.distill is not None and config.distill.views == "all":
        target_views = "anyres"
    teachers = () if config.distill is None else tuple(config.distill.teachers)
    corpus: Corpus | JoinedCorpora = sources[0].corpus
    cache: FeatureCache | JoinedCaches | None = sources[0].cache
    if len(sources) > 1:
        corpus = JoinedCorpora(sources)
        cache = None if cache is None else JoinedCaches(sources)
    if config.stage == "distill":
        assert cache is not None
        parts, held = _images(config, sources, teachers, target_views)
        return RunData(parts, held, EncoderCollator(corpus, transform, cache, teachers))
    parts, held = _conversations(config, sources, student, teachers, target_views)
    collator = Collator(
        corpus,
        transform,
        cache,
        teachers,
        student.tokenizer.pad_token_id,
        student.views,
        target_views,
    )
    return RunData(parts, held, collator)


def _images(
    config: TrainConfig, sources: Sequence[Source], teachers: tuple[str, ...], views: Views
) -> tuple[list[Part[Learned]], Learned | Mixture | None]:
    """Return the images to learn from, and the held-out ones, of each source."""
    masks = split_images(config.data, [source.corpus for source in sources])
    trained: list[Part[Learned]] = []
    held: list[Part[Learned]] = []
    for number, source in enumerate(sources):
        is_held = None if masks is None else masks[number]
        assert source.cache is not None
        for parts, chosen in ((trained, None if is_held is None else ~is_held), (held, is_held)):
            if (chosen is None and parts is trained) or (chosen is not None and chosen.any()):
                dataset = EncoderDataset(source.corpus, source.cache, teachers, views, chosen)
                parts.append(Part(source, dataset))
    return trained, join(held) if held else None


def _conversations(
    config: TrainConfig,
    sources: Sequence[Source],
    student: Student,
    teachers: tuple[str, ...],
    target_views: Views,
) -> tuple[list[Part[Learned]], Learned | Mixture | None]:
    """Return the conversations to learn from, and the held-out ones, of each source."""

    def part(source: Source, conversations: Sequence[Conversation]) -> Part[Learned]:
        assert config.student.prompt is not None
        dataset = ConversationDataset(
            conversations,
            source.corpus,
            source.cache,
            teachers,
            student.tokenizer,
            student.count_tokens,
            config.student.prompt,
            config.recipe,
            config.data.model_max_length,
            target_views,
        )
        return Part(source, dataset)

    split = split_conversations(config.data, [source.corpus for source in sources])
    pairs = list(zip(sources, split, strict=True))
    measured = [part(source, held) for source, (_, held) in pairs if held]
    if measured and not any(len(each.dataset.images) for each in measured):
        _refuse_kd_metric(config)
    trained = [part(source, learned) for source, (learned, _) in pairs]
    return trained, join(measured) if measured else None


def _refuse_kd_metric(config: TrainConfig) -> None:
    metric = str(config.training.get("metric_for_best_model")).removeprefix("eval_")
    if metric.startswith(("loss_kd", "loss_summary")):
        raise ConfigError(
            f"training.metric_for_best_model is {metric}, but no held-out conversation has an "
            "image; set loss_text, or hold out conversations with images."
        )
