"""Show training samples as tokens, with the learned tokens marked, for people to check.

Input: a resolved run. Output: some of its samples. Used by `movekd train --show-samples`. It loads
the tokenizer and the vision tower's config, but no weights.
"""

from dataclasses import dataclass
from itertools import groupby

from movekd.errors import ConfigError
from movekd.student.tokenization import IGNORED
from movekd.student.tokenizer import IMAGE_TOKEN, load_tokenizer
from movekd.student.vlm import image_token_counter
from movekd.train.config import TrainConfig
from movekd.train.data import ConversationDataset
from movekd.train.held_out import split_conversations
from movekd.train.sources import open_corpora


@dataclass(frozen=True)
class ShownSample:
    """One training sample.

    Attributes:
        id: id of the conversation.
        images: names of its images.
        input_ids: the model's input.
        labels: -100 for tokens that are not learned.
        pieces: the tokens as the tokenizer writes them.
        num_samples: number of samples of the whole run.
    """

    id: str
    images: list[str]
    input_ids: list[int]
    labels: list[int]
    pieces: list[str]
    num_samples: int

    def as_text(self) -> str:
        """Return the pieces, learned ones in [[ ]], each image as one ``<image>``."""
        num_learned = sum(label != IGNORED for label in self.labels)
        images = ", ".join(self.images) or "no image"
        head = f"{self.id} ({images}): {len(self.input_ids)} tokens, {num_learned} learned"
        if not num_learned:
            head += "; nothing is learned from it"
        parts = []
        pieces = zip(self.pieces, self.labels, strict=True)
        for (is_learned, is_image), run in groupby(
            pieces, lambda piece: (piece[1] != IGNORED, piece[0] == IMAGE_TOKEN)
        ):
            found = [piece for piece, _ in run]
            if is_image:
                parts.append(f"{IMAGE_TOKEN}x{len(found)}")
            else:
                parts.append(f"[[ {' '.join(found)} ]]" if is_learned else " ".join(found))
        return f"{head}\n  {' '.join(parts)}"


def show_samples(config: TrainConfig, number: int) -> list[ShownSample]:
    """Return ``number`` samples at equal distances in the conversations, or all if that is fewer.

    Raises:
        ConfigError: the run reads no text, or a conversation cannot be tokenised.
        WeightsError: the tokenizer or the tower's config cannot be found.
    """
    datasets, _ = open_conversations(config)
    everything = [(dataset, at) for dataset in datasets for at in range(len(dataset))]
    shown = []
    for at in range(min(number, len(everything))):
        dataset, position = everything[at * len(everything) // min(number, len(everything))]
        sample = dataset[position]
        shown.append(
            ShownSample(
                sample.key,
                list(dataset.conversations[position].images),
                sample.input_ids,
                sample.labels,
                dataset.tokenizer.convert_ids_to_tokens(sample.input_ids),
                len(everything),
            )
        )
    return shown


def open_conversations(
    config: TrainConfig,
) -> tuple[list[ConversationDataset], list[ConversationDataset]]:
    """Return the samples of each source and the held-out ones, without targets or weights.

    Raises:
        ConfigError, WeightsError: as ``show_samples``.
    """
    if config.student.language_model is None or config.student.prompt is None:
        raise ConfigError(
            "stage: distill reads no text, so it has no samples of tokens to show; give the "
            "config of a pretrain or a finetune."
        )
    corpora = open_corpora(config.data)
    rest = (
        None,
        (),
        load_tokenizer(config.student.language_model, key="student.language_model"),
        image_token_counter(config.student),
        config.student.prompt,
        config.recipe,
        config.data.model_max_length,
    )
    parts = list(zip(split_conversations(config.data, corpora), corpora, strict=True))
    trained = [ConversationDataset(learned, corpus, *rest) for (learned, _), corpus in parts]
    held_out = [ConversationDataset(held, corpus, *rest) for (_, held), corpus in parts if held]
    return trained, held_out
