"""One answer at a time: a question about one image, with all that was said before.

`movekd ask` and the page in the browser go through here.

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
from movekd.student.towers import num_prefix_tokens


@dataclass(frozen=True)
class Answer:
    """What the model says.

    Attributes:
        text: the answer.
        experts_LGG: which expert each patch of the whole image chose, int8, a block each; None
            where the student has no experts.
        num_experts: how many there are to choose from.
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
    """Return the answer to the last of the turns, all of which the model sees, the image too.

    Args:
        trained: the model.
        image: bytes of an image file.
        turns: what was said; the first one holds ``<image>``, the last one is the question.
        max_new_tokens: longest answer.

    Raises:
        ConfigError: the conversation is longer than the language model holds.
        UnreadableImageError: the image cannot be decoded.
    """
    student, conversation = trained.student, Conversation("ask", ("image",), tuple(turns))
    decoded = decode_image(image)  # a LLaVA-NeXT has tokens by the image's size
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
        said = next(
            generate_answers(
                student,
                [conversation],
                lambda _: image,
                prompt=trained.prompt,
                geometry=trained.geometry,
                max_new_tokens=left,
            )
        )
        return Answer(said, *_experts(trained))


def _experts(trained: TrainedStudent) -> tuple[npt.NDArray[np.int8] | None, int]:
    """Return the choice of each patch in the pass that was recorded, and the number of experts."""
    vlm = trained.student.vlm
    if trained.run.get("student", {}).get("mole") is None:
        return None, 0
    choices_LNE = [record.choice_BNE[0] for record in routing(vlm)]  # the whole image comes first
    prefix = num_prefix_tokens(vlm.config.vision_config)
    chosen_LN = np.stack([c_NE[prefix:].argmax(-1).cpu().numpy() for c_NE in choices_LNE])
    side = math.isqrt(chosen_LN.shape[1])
    return chosen_LN.reshape(-1, side, side).astype(np.int8), choices_LNE[0].shape[-1]
