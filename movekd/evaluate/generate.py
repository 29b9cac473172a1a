"""Generate greedy answers of a trained student to conversations about images.

Legend: B questions, L tokens, V views of images, C H W a view.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from movekd.corpus.conversations import Conversation
from movekd.corpus.transforms import Geometry, SeenImage
from movekd.student.config import PromptFormat
from movekd.student.generation import stop_tokens
from movekd.student.tokenization import tokenize_question
from movekd.student.vlm import Student, image_features


def generate_answers(
    student: Student,
    conversations: Sequence[Conversation],
    read_image: Callable[[str], bytes],
    *,
    prompt: PromptFormat,
    geometry: Geometry,
    batch_size: int = 32,
    max_new_tokens: int = 32,
) -> Iterator[str]:
    """Yield the answer to each conversation's last human turn, in order.

    Args:
        student: the model.
        conversations: the turns so far; each ends with a question.
        read_image: name of an image -> its bytes.
        prompt: prompt format of the training.
        geometry: resize mode of the training.
        batch_size: questions per batch.
        max_new_tokens: maximum new tokens per answer.
    """
    transform = student.image_transform(geometry)
    tokenizer, device = student.tokenizer, student.vlm.device
    stops = stop_tokens(tokenizer, student.vlm.generation_config, prompt)
    for start in range(0, len(conversations), batch_size):
        batch = conversations[start : start + batch_size]
        seen = [[transform.see(read_image(n), student.views) for n in c.images] for c in batch]
        questions = [
            tokenize_question(
                c, tokenizer, prompt=prompt, num_image_tokens=_num_tokens(student, images)
            )
            for c, images in zip(batch, seen, strict=True)
        ]
        length = max(map(len, questions))
        input_ids = torch.full((len(batch), length), tokenizer.pad_token_id)
        attention_mask = torch.zeros((len(batch), length), dtype=torch.int64)
        for i, question in enumerate(questions):  # padded on the left: new tokens come last
            input_ids[i, length - len(question) :] = torch.tensor(question)
            attention_mask[i, length - len(question) :] = 1
        images = [image for of_one in seen for image in of_one]
        with torch.inference_mode(), _greedy(student.vlm):
            outputs = {}
            if images:
                pixels = torch.from_numpy(np.concatenate([i.pixels_VCHW for i in images]))
                pixels_VCHW = pixels.to(device, student.vlm.dtype)
                sizes = [(i.height, i.width) for i in images] if student.has_tiles else None
                outputs = {"image": image_features(student.vlm, pixels_VCHW, sizes)[0]}
            generated = student.vlm.generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                mm_encoder_outputs=outputs or None,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=stops or None,
            )
        yield from (
            text.strip()
            for text in tokenizer.batch_decode(generated[:, length:], skip_special_tokens=True)
        )


@contextmanager
def _greedy(vlm: Any) -> Iterator[None]:
    """Leave the settings of the base's generation_config.json aside.

    Greedy answers would otherwise depend on its penalties, beams and forbidden tokens.
    """
    kept, vlm.generation_config = vlm.generation_config, GenerationConfig()
    try:
        yield
    finally:
        vlm.generation_config = kept


def _num_tokens(student: Student, images: Sequence[SeenImage]) -> list[int]:
    """Return the number of tokens of each image in the prompt."""
    widths, heights = [image.width for image in images], [image.height for image in images]
    return student.count_tokens(widths, heights).tolist() if images else []
