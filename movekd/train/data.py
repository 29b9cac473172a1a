"""Join conversations with their images and cached targets, and collate batches of them.

A sample is a conversation. Its images (by offset, from the tar) and their targets (by row) are
joined by key, never by order. The DataLoader's workers read them when they collate a batch: one
batched read per teacher.

Legend: B samples, L tokens of text, V views of the batch's images (LLaVA-1.5: one per image), I
views with targets, C H W the pixels of a view.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from movekd.cache.reader import FeatureCache
from movekd.corpus.anyres import Views, num_views
from movekd.corpus.conversations import Conversation, load_conversations
from movekd.corpus.index import Corpus
from movekd.corpus.transforms import ImageTransform
from movekd.errors import CacheError, ConfigError, shorten
from movekd.student.config import PromptFormat, Recipe
from movekd.student.prompts import check_conversation
from movekd.student.tokenization import (
    IGNORED,
    TokenizedConversation,
    tokenize_conversation,
)
from movekd.train.data_keys import SourceConfig
from movekd.train.encoder_data import name_bad_image
from movekd.train.joined_inputs import JoinedCaches, JoinedCorpora
from movekd.train.sampler import EMPTY


@dataclass(frozen=True)
class Sample:
    """One tokenised conversation and the positions of its images and targets."""

    key: str
    input_ids: list[int]
    labels: list[int]
    images: list[int]
    """Positions in the corpus."""
    rows: list[int]
    """Rows of the cache, image after image; empty without distillation."""
    lengths: tuple[int, ...] = ()
    """Tokens of each conversation, where several are packed into one row (``packed_data``)."""

    def shifted(self, image_start: int, row_start: int) -> "Sample":
        """Return the same sample with its images and rows counted from other starts."""
        images = [image + image_start for image in self.images]
        return replace(self, images=images, rows=[row + row_start for row in self.rows])


class ConversationDataset(Dataset[Sample]):
    """Conversations of a corpus, every image of which is present in corpus and cache.

    Args:
        conversations: the texts, with the names of their images.
        corpus: holds the images.
        cache: holds their targets; None without distillation.
        teachers: the teachers to read targets of.
        tokenizer: what ``load_tokenizer`` returns.
        count_tokens: widths, heights -> tokens of each image in the prompt.
        prompt: the format that turns conversations into text.
        recipe: decides which tokens have labels.
        max_length: cut longer samples, in tokens.
        target_views: the views of an image that have targets.

    Raises:
        ConfigError: no conversation was given, or some cannot be trained on: without an answer,
            or with images that do not match their text or ``max_length``; names them.
        UnknownKeyError: an image is missing from the shards or the cache; names some.
        CacheError: the cache has skipped an image that a conversation uses; names some.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        corpus: Corpus,
        cache: FeatureCache | None,
        teachers: Sequence[str],
        tokenizer: Any,
        count_tokens: Callable[[ArrayLike, ArrayLike], NDArray[np.int64]],
        prompt: PromptFormat,
        recipe: Recipe,
        max_length: int,
        target_views: Views = "base",
    ) -> None:
        if not conversations:
            raise ConfigError(
                f"{corpus.data_dir} holds no conversation to train on; give data.conversations a "
                "LLaVA JSON file, or pack one with the images."
            )
        self.conversations, self.corpus = conversations, corpus
        self.tokenizer, self.prompt, self.recipe = tokenizer, prompt, recipe
        self.max_length = max_length
        names = [name for conversation in conversations for name in conversation.images]
        counts = [len(conversation.images) for conversation in conversations]
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._images = corpus.rows(names) if names else np.empty(0, np.int64)
        widths, heights = (np.asarray(corpus.index[c])[self._images] for c in ("width", "height"))
        self._num_tokens = count_tokens(widths, heights)
        self._num_rows = num_views(widths, heights, target_views)
        self._check_images()
        self._rows: NDArray[np.int64] | None = None  # of the base views; the rows of tiles follow
        if cache is not None:
            self._rows = cache.rows(names) if names else np.empty(0, np.int64)
            for teacher in teachers:
                cache[teacher].require_images(cache.catalog)
            _refuse_skipped(cache, teachers, names, self._rows, self._num_rows)

    def _check_images(self) -> None:
        """Check all images now, so that none stops the run at a later step."""
        refused: list[str] = []
        first = ""
        for position, conversation in enumerate(self.conversations):
            num_tokens = self.num_image_tokens(position)
            problem = ""
            if num_tokens >= self.max_length:
                problem = (
                    f"the images of conversation '{conversation.id}' are {num_tokens} tokens, and "
                    f"data.model_max_length is {self.max_length}; raise it above that."
                )
            else:
                try:
                    check_conversation(conversation, self.prompt)
                except ConfigError as error:
                    problem = str(error)
            if problem:
                refused.append(conversation.id)
                first = first or problem
        require_none_refused(refused, first, len(self.conversations))

    @property
    def images(self) -> NDArray[np.int64]:
        """Position in the corpus of every image of every conversation, in order."""
        return self._images

    def num_image_tokens(self, position: int) -> int:
        """Return how many tokens the images of a conversation are."""
        return int(self._num_tokens[self._starts[position] : self._starts[position + 1]].sum())

    def tokenize(self, position: int, max_length: int | None) -> TokenizedConversation:
        """Return tokens and labels of a conversation, cut at ``max_length``.

        Raises:
            ConfigError: the prompt cannot be made of it, or the cut would go through an image.
        """
        images = slice(self._starts[position], self._starts[position + 1])
        return tokenize_conversation(
            self.conversations[position],
            self.tokenizer,
            prompt=self.prompt,
            num_image_tokens=self._num_tokens[images].tolist(),
            recipe=self.recipe,
            model_max_length=max_length,
        )

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, position: int) -> Sample:
        if position == EMPTY:
            return Sample("(filled up)", [self.tokenizer.pad_token_id or 0], [IGNORED], [], [])
        conversation = self.conversations[position]
        images = slice(self._starts[position], self._starts[position + 1])
        tokenized = self.tokenize(position, self.max_length)
        rows: list[int] = []
        if self._rows is not None:
            bases, counts = self._rows[images].tolist(), self._num_rows[images].tolist()
            for base, count in zip(bases, counts, strict=True):
                rows += range(base, base + count)
        image_rows = self._images[images].tolist()
        return Sample(conversation.id, tokenized.input_ids, tokenized.labels, image_rows, rows)

    def modality_lengths(self) -> list[int]:
        """Return the words of each conversation, placeholders included; negative for text-only.

        Image tokens do not count. Words instead of tokens: tokenising a corpus twice costs more
        than this precision is worth.

        Source: haotian-liu/LLaVA llava/train/train.py, modality_lengths.
        """
        lengths = []
        for conversation in self.conversations:
            words = max(sum(len(text.split()) for _, text in conversation.turns), 1)
            lengths.append(words if conversation.images else -words)
        return lengths


@dataclass(frozen=True)
class Collator:
    """Turn samples into one batch of model input, with targets as the cache stores them."""

    corpus: Corpus | JoinedCorpora
    transform: ImageTransform
    cache: FeatureCache | JoinedCaches | None
    teachers: tuple[str, ...]
    pad_token_id: int
    views: Views = "base"
    """The views that the student sees."""
    target_views: Views = "base"
    """The views that have targets."""

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Return the keyword arguments of ``DistillModel.forward``.

        Keys: input_ids, labels, attention_mask int64 (B, L); keys (for error messages);
        pixel_values float32 (V, C, H, W) or None; image_sizes: height and width of each image, or
        None where an image is one view; targets: teacher -> TeacherTargets of I rows, or None;
        target_views: int64 (I,), which of the V views these are, or None for all; position_ids
        int64 (B, L) if a row holds several conversations, otherwise None.
        """
        input_ids = [torch.tensor(sample.input_ids) for sample in samples]
        labels = [torch.tensor(sample.labels) for sample in samples]
        attention = [torch.ones_like(ids) for ids in input_ids]
        images = [image for sample in samples for image in sample.images]
        rows = [row for sample in samples for row in sample.rows]
        targets = None
        if self.cache is not None and rows:
            targets = {teacher: self.cache[teacher].read(rows) for teacher in self.teachers}
        position_ids = None
        if any(len(sample.lengths) > 1 for sample in samples):
            position_ids = _restarting_positions(samples)
        return {
            "position_ids": position_ids,
            "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=self.pad_token_id),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            "attention_mask": pad_sequence(attention, batch_first=True),
            "keys": [sample.key for sample in samples],
            "targets": targets,
            **self._image_inputs(images),
        }

    def _image_inputs(self, images: list[int]) -> dict[str, Any]:
        """Return pixel_values, image_sizes and target_views of the given images."""
        seen = []
        for image in images:
            with name_bad_image(self.corpus, image):
                seen.append(self.transform.see(self.corpus.read_image(image), self.views))
        inputs: dict[str, Any] = dict.fromkeys(("pixel_values", "image_sizes", "target_views"))
        if not seen:
            return inputs
        inputs["pixel_values"] = torch.from_numpy(np.concatenate([s.pixels_VCHW for s in seen]))
        if self.views != "base":
            inputs["image_sizes"] = [(image.height, image.width) for image in seen]
        if self.views != self.target_views:
            counts = torch.tensor([len(image.pixels_VCHW) for image in seen])
            inputs["target_views"] = counts.cumsum(0) - counts  # position of each base view
        return inputs


def _restarting_positions(samples: Sequence[Sample]) -> torch.Tensor:
    """Return positions (B, L) that count from 0 in every conversation, and in the padding.

    transformers takes a position that does not follow the one before as the start of another
    sequence, and gives each layer type its mask (full, sliding) inside of it.
    """
    width = max(len(sample.input_ids) for sample in samples)
    rows = []
    for sample in samples:
        lengths = sample.lengths or (len(sample.input_ids),)
        parts = [*lengths, width - len(sample.input_ids)]
        rows.append(torch.cat([torch.arange(length) for length in parts]))
    return torch.stack(rows)


def read_conversations(source: SourceConfig, corpus: Corpus) -> list[Conversation]:
    """Return the conversations of the given files, or those packed with the images.

    Raises:
        ConfigError: the corpus has none, or a file is malformed.
    """
    paths = list(source.conversations)
    if not paths and corpus.conversations_path is not None:
        paths = [corpus.conversations_path]
    if not paths:
        raise ConfigError(
            f"{source.shards} was packed without conversations; give data.conversations a LLaVA "
            "JSON file."
        )
    return [conversation for path in paths for conversation in load_conversations(path)]


def require_none_refused(ids: Sequence[str], first: str, num_all: int) -> None:
    """Refuse to train while some conversations cannot be used, and name all that fit into a line.

    Raises:
        ConfigError: ``first``, which is what is wrong with the first one, and the others' ids.
    """
    if not ids:
        return
    if len(ids) > 1:
        first += (
            f" {len(ids) - 1:,} more of the {num_all:,} conversations cannot be trained on: "
            f"{shorten(', '.join(ids[1:]), 800)}."
        )
    raise ConfigError(first)


def _refuse_skipped(
    cache: FeatureCache,
    teachers: Sequence[str],
    names: Sequence[str],
    rows: NDArray[np.int64],
    num_rows: NDArray[np.int64],
) -> None:
    of = np.repeat(np.arange(len(rows)), num_rows)  # the image of every row
    every_row = rows[of] + np.arange(len(of)) - (np.cumsum(num_rows) - num_rows)[of]
    for teacher in teachers:
        skipped = cache[teacher].skipped
        hit = np.flatnonzero(np.isin(every_row, list(skipped)))
        if len(hit):
            row, images = int(every_row[hit[0]]), of[hit]
            raise CacheError(
                f"teacher '{teacher}' has no features of {len(np.unique(rows[images]))} images "
                f"that the conversations use, '{names[images[0]]}' first ({skipped[row]}). Take "
                "them out of data.conversations, or repair the images and build the cache again."
            )
