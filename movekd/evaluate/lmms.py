"""Run a trained student in lmms-eval: ``lmms-eval --model movekd --model_args pretrained=RUN``.

Input: lmms-eval's requests, each a context and the images of a document. Output: greedy answers,
generated as by `movekd evaluate`. Needs ``pip install 'movekd[lmms]'``; lmms-eval finds it through
``lmms_entry``. With `accelerate launch`, each process answers a part of the requests.
"""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from PIL import Image

from movekd.corpus.conversations import IMAGE_PLACEHOLDER, Conversation
from movekd.errors import ConfigError
from movekd.evaluate.generate import generate_answers
from movekd.student.checkpoint import load_student
from movekd.student.hf_loading import quiet_libraries

MAX_NEW_TOKENS = 128
"""Default maximum of new tokens, as in LLaVA's scripts."""


class MovekdModel(lmms):
    """lmms-eval's interface to a trained student; ignores a task's temperature and is greedy.

    Args:
        pretrained: output of `movekd train` or `import`, or an export of format hf.
        device: auto, cpu, cuda, ...; each of several processes uses its own GPU.
        batch_size: requests per batch.

    Attributes:
        device: device of the model.
        batch_size: requests per batch.

    Raises:
        ConfigError: an argument is unknown.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "",
        device: str | None = "auto",
        batch_size: int | str = 1,
        **unknown: Any,
    ) -> None:
        super().__init__()
        unknown.pop("max_batch_size", None)  # lmms-eval hands it to every model
        if unknown or not pretrained:
            raise ConfigError(
                f"--model_args names {', '.join(sorted(unknown)) or 'no pretrained'}; expected "
                "pretrained=RUN and, optionally, device=..."
            )
        quiet_libraries()
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        place = self.accelerator.device if device in (None, "auto") else torch.device(str(device))
        if self._world_size > 1:
            place = self.accelerator.device
        self.device = place
        self.batch_size = 1 if batch_size == "auto" else int(batch_size)
        self._trained = load_student(Path(pretrained), str(place))

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return the answer to each request, in order.

        Requests of one batch share ``max_new_tokens``; an answer ends before the first of the
        task's ``until`` strings. Documents without an image are asked as text.

        Args:
            requests: Instances whose ``args`` are (context, generation kwargs, doc_to_visual, index
                of the document, task, split).

        Raises:
            ConfigError: a task shows something other than images.
        """
        by_length: dict[int, list[int]] = {}
        for place, request in enumerate(requests):
            longest = request.args[1].get("max_new_tokens", MAX_NEW_TOKENS)
            by_length.setdefault(int(longest), []).append(place)
        answers = [""] * len(requests)
        for longest, places in by_length.items():
            given = self._generate([requests[place].args for place in places], longest)
            for place, text in zip(places, given, strict=True):
                context, keys = requests[place].args[:2]
                answers[place] = _before(text, keys.get("until"))
                self.cache_hook.add_partial("generate_until", (context, keys), answers[place])
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        """Refuse: LLaVA's benchmarks generate, and have one question and one answer.

        Raises:
            NotImplementedError: always; lmms-eval shows it.
        """
        raise NotImplementedError("movekd answers only tasks of output_type generate_until.")

    generate_until_multi_round = loglikelihood

    def _generate(self, requests: Sequence[tuple[Any, ...]], longest: int) -> Iterator[str]:
        """Yield answers, with the images of one batch in memory at a time."""
        for start in range(0, len(requests), self.batch_size):
            images: dict[str, bytes] = {}
            conversations = []
            for request in requests[start : start + self.batch_size]:
                context, _, to_visual, document, task, split = request
                names = []
                for visual in to_visual(self.task_dict[task][split][document]) or []:
                    names.append(str(len(images)))
                    images[names[-1]] = _png(visual, task)
                conversations.append(_conversation(context, tuple(names), str(document)))
            yield from generate_answers(
                self._trained.student,
                conversations,
                images.__getitem__,
                prompt=self._trained.prompt,
                geometry=self._trained.geometry,
                batch_size=self.batch_size,
                max_new_tokens=longest,
            )


def _conversation(context: str, images: tuple[str, ...], name: str) -> Conversation:
    """Return a request as a conversation; images without a placeholder are put first."""
    missing = len(images) - context.count(IMAGE_PLACEHOLDER)
    turn = f"{IMAGE_PLACEHOLDER}\n" * max(missing, 0) + context
    return Conversation(name, images, (("human", turn),))


def _png(visual: Any, task: str) -> bytes:
    """Return an image as the bytes of a PNG."""
    if not isinstance(visual, Image.Image):
        raise ConfigError(
            f"task '{task}' shows a {type(visual).__name__}; movekd accepts only images. Choose "
            "another task."
        )
    file = io.BytesIO()
    visual.convert("RGB").save(file, "PNG", compress_level=1)
    return file.getvalue()


def _before(text: str, until: Any) -> str:
    """Return a text up to the first stop string."""
    for end in [until] if isinstance(until, str) else until or []:
        text = text.partition(end)[0] if end else text
    return text.strip()
