"""The join: conversations -> image bytes (by offset, from the tar) and targets (by row).

Samples are joined by key, never by order. A sample is a conversation; its images and their targets
are read when its batch is collated, in the DataLoader's workers: one batched read a teacher.

Legend: B samples, L tokens of text, I images of the batch, C H W an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from movekd.cache.reader import FeatureCache
from movekd.corpus.conversations import Conversation, load_conversations
from movekd.corpus.images import ImageTransform
from movekd.corpus.index import Corpus
from movekd.errors import CacheError, ConfigError, UnreadableImageError
from movekd.student.config import PromptFormat
from movekd.student.prompts import IGNORED, tokenize
from movekd.student.vlm import Student
from movekd.train.config import DataConfig


@dataclass(frozen=True)
class Sample:
    """One tokenised conversation and where its images and targets lie."""

    key: str
    input_ids: list[int]
    labels: list[int]
    images: list[int]
    """Positions in the corpus."""
    rows: list[int]
    """Rows of the cache; empty without distillation."""


class ConversationDataset(Dataset[Sample]):
    """Conversations of a corpus, every image of which is present in corpus and cache.

    Raises:
        ConfigError: there is no conversation.
        UnknownKeyError: an image is in no shard, or not in the cache; names some.
        CacheError: the cache has skipped an image that is needed; names some.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        corpus: Corpus,
        cache: FeatureCache | None,
        teachers: Sequence[str],
        student: Student,
        prompt: PromptFormat,
        max_length: int,
    ) -> None:
        if not conversations:
            raise ConfigError(
                f"{corpus.data_dir} holds no conversation to train on; give data.conversations a "
                "LLaVA JSON file, or pack one with the images."
            )
        self.conversations = conversations
        self._tokenizer, self._prompt = student.tokenizer, prompt
        self._num_image_tokens, self._max_length = student.num_image_tokens, max_length
        names = [name for conversation in conversations for name in conversation.images]
        counts = [len(conversation.images) for conversation in conversations]
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._images = corpus.rows(names) if names else np.empty(0, np.int64)
        self._rows: np.ndarray[Any, np.dtype[np.int64]] | None = None
        if cache is not None:
            self._rows = cache.rows(names) if names else np.empty(0, np.int64)
            for teacher in teachers:
                cache[teacher].require_images(cache.catalog)
            _refuse_skipped(cache, teachers, names, self._rows)

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, position: int) -> Sample:
        conversation = self.conversations[position]
        tokenized = tokenize(
            conversation, self._tokenizer, self._prompt, self._num_image_tokens, self._max_length
        )
        images = slice(self._starts[position], self._starts[position + 1])
        return Sample(
            conversation.id,
            tokenized.input_ids,
            tokenized.labels,
            self._images[images].tolist(),
            [] if self._rows is None else self._rows[images].tolist(),
        )

    def modality_lengths(self) -> list[int]:
        """Return words and image tokens of each sample; negative for text-only ones.

        Source: haotian-liu/LLaVA llava/train/train.py, modality_lengths (words, not tokens:
        tokenising a corpus twice costs more than this precision is worth).
        """
        lengths = []
        for conversation in self.conversations:
            words = sum(len(text.split()) for _, text in conversation.turns)
            images = len(conversation.images) * self._num_image_tokens
            lengths.append(words + images if images else -max(words, 1))
        return lengths


@dataclass(frozen=True)
class Collator:
    """Samples -> one batch of model input, with the teachers' targets as they are stored."""

    corpus: Corpus
    transform: ImageTransform
    cache: FeatureCache | None
    teachers: tuple[str, ...]
    pad_token_id: int

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Return the keyword arguments of ``DistillModel.forward``.

        Keys: input_ids, labels, attention_mask int64 (B, L); keys (for error messages);
        pixel_values float32 (I, C, H, W) or None; targets: teacher -> TeacherTargets of I rows,
        or None.
        """
        length = max(len(sample.input_ids) for sample in samples)
        input_ids = torch.full((len(samples), length), self.pad_token_id)
        labels = torch.full((len(samples), length), IGNORED)
        attention_mask = torch.zeros((len(samples), length), dtype=torch.int64)
        for i, sample in enumerate(samples):
            n = len(sample.input_ids)
            input_ids[i, :n] = torch.tensor(sample.input_ids)
            labels[i, :n] = torch.tensor(sample.labels)
            attention_mask[i, :n] = 1
        images = [image for sample in samples for image in sample.images]
        rows = [row for sample in samples for row in sample.rows]
        targets = None
        if self.cache is not None and rows:
            targets = {teacher: self.cache[teacher].read(rows) for teacher in self.teachers}
        return {
            "input_ids": input_ids,
            "labels": labels,
            "attention_mask": attention_mask,
            "keys": [sample.key for sample in samples],
            "pixel_values": self._pixels(images) if images else None,
            "targets": targets,
        }

    def _pixels(self, images: list[int]) -> torch.Tensor:
        pixels = []
        for image in images:
            try:
                pixels.append(self.transform(self.corpus.read_image(image)))
            except UnreadableImageError as error:
                key = self.corpus.index["key"][image].as_py()
                raise UnreadableImageError(
                    f"image {key} of {self.corpus.data_dir}: {error}"
                ) from None
        return torch.from_numpy(np.stack(pixels))


def read_conversations(data: DataConfig, corpus: Corpus) -> list[Conversation]:
    """Return the conversations of the given files, or those packed with the images.

    Raises:
        ConfigError: there are none, or a file is malformed.
    """
    paths = list(data.conversations)
    if not paths and corpus.conversations_path is not None:
        paths = [corpus.conversations_path]
    if not paths:
        raise ConfigError(
            f"{data.shards} was packed without conversations; give data.conversations a LLaVA "
            "JSON file."
        )
    return [conversation for path in paths for conversation in load_conversations(path)]


def _refuse_skipped(
    cache: FeatureCache,
    teachers: Sequence[str],
    names: Sequence[str],
    rows: np.ndarray[Any, np.dtype[np.int64]],
) -> None:
    for teacher in teachers:
        skipped = cache[teacher].skipped
        hit = np.flatnonzero(np.isin(rows, list(skipped)))
        if len(hit):
            row = int(rows[hit[0]])
            raise CacheError(
                f"teacher '{teacher}' has no features of {len(np.unique(rows[hit]))} images that "
                f"the conversations use, '{names[hit[0]]}' first ({skipped[row]}). Take them out "
                "of data.conversations, or mend the images and build the cache anew."
            )
