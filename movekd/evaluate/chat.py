"""Answer one question about one image, given the earlier turns of the chat.

Input: a trained student, an image, the turns. Output: an ``Answer``. Used by `movekd ask` and
`movekd view`.

Legend: L blocks with experts, G side of the student's grid.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from movekd.corpus.conversations import Conversation, Role
from movekd.corpus.decode import decode_image
from movekd.errors import ConfigError
from movekd.evaluate.generate import generate_answers
from movekd.student.checkpoint import TrainedStudent
from movekd.student.mole import recorded_routing, routing
from movekd.student.tokenization import tokenize_question
from movekd.student.vlm import num_prefix_tokens


@dataclass(frozen=True)
class Answer:
    """An answer of the model.

    Attributes:
        text: the answer.
        experts_LGG: index of the expert that each patch of the whole image chose, int8, per block;
            None if the student has no experts.
        num_experts: number of experts.
    """

    text: str
    experts_LGG: npt.NDArray[np.int8] | None
    num_experts: int


def answer(
    trained: TrainedStudent,
    image: bytes,
    turns: Sequence[tuple[Role, str]],
    max_new_tokens: int = 256,
) -> Answer:
    """Return the answer to the last turn; the model sees the image and all turns.

    Args:
        trained: the model.
        image: bytes of an image file.
        turns: the chat; the first turn holds ``<image>``, the last one is the question.
        max_new_tokens: maximum new tokens.

    Raises:
        ConfigError: the conversation is too long for the language model.
        UnreadableImageError: the image cannot be decoded.
    """
    student, conversation = trained.student, Conversation("ask", ("image",), tuple(turns))
    decoded = decode_image(image)  # LLaVA-NeXT's number of tokens depends on the image's size
    num_tokens = student.count_tokens([decoded.width], [decoded.height]).tolist()
    tokens = tokenize_question(
        conversation, student.tokenizer, prompt=trained.prompt, num_image_tokens=num_tokens
    )
    most = getattr(student.vlm.config.text_config, "max_position_embeddings", None)
    if most is not None and len(tokens) >= most:
        raise ConfigError(
            f"image and conversation are {len(tokens)} tokens; the language model holds {most}. "
            "Ask less, or begin a new chat."
        )
    left = max_new_tokens if most is None else min(max_new_tokens, most - len(tokens))
    with recorded_routing(student.vlm):
        text = next(
            generate_answers(
                student,
                [conversation],
                lambda _: image,
                prompt=trained.prompt,
                geometry=trained.geometry,
                max_new_tokens=left,
            )
        )
        return Answer(text, *_experts(trained))


def _experts(trained: TrainedStudent) -> tuple[npt.NDArray[np.int8] | None, int]:
    """Return the chosen expert of each patch in the recorded pass, and the number of experts."""
    vlm = trained.student.vlm
    if trained.run.get("student", {}).get("mole") is None:
        return None, 0
    choices_LNE = [record.choice_BNE[0] for record in routing(vlm)]  # the whole image comes first
    prefix = num_prefix_tokens(vlm.config.vision_config)
    chosen_LN = np.stack([c_NE[prefix:].argmax(-1).cpu().numpy() for c_NE in choices_LNE])
    side = math.isqrt(chosen_LN.shape[1])
    return chosen_LN.reshape(-1, side, side).astype(np.int8), choices_LNE[0].shape[-1]
