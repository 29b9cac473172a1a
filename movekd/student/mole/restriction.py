"""Let the routers of a tower choose only one teacher's expert and the shared ones.

Input: a model whose ``MoleConfig`` names teachers. Used by ``train.teacher_passes``, which takes
the KD loss of a teacher on such a pass, so that it changes no other teacher's expert.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import nn

from movekd.errors import ConfigError
from movekd.student.mole.layer import MoleLayer


@contextmanager
def restricted(model: nn.Module, teacher: str) -> Iterator[int]:
    """Restrict every forward pass inside the block to a teacher's expert and the shared ones.

    ``routing(model)`` inside the block is that of the restricted pass; afterwards it is what it was
    before. A model under gradient checkpointing needs ``checkpoint_contexts`` as well.

    Yields:
        The index of the teacher's expert, the same in all layers.

    Raises:
        ConfigError: the teacher has no expert.
    """
    layers = _layers(model)
    orders = {
        tuple(layer.mole_config[name].teachers or ())
        for layer in layers
        for name in layer.active_adapters
        if name in layer.mole_config
    }
    if len(orders) != 1 or teacher not in (order := next(iter(orders))):
        known = ", ".join(sorted({name for names in orders for name in names})) or "no teacher"
        raise ConfigError(
            f"a pass was to be restricted to the expert of '{teacher}', and the model has experts "
            f"of {known}; expected it in all layers. Name the teacher in MoleConfig(teachers=...)."
        )
    before = [layer.routing for layer in layers]
    with _Restriction(layers, [teacher] * len(layers)):
        try:
            yield order.index(teacher)
        finally:
            for layer, record in zip(layers, before, strict=True):
                layer.routing = record


def checkpoint_contexts(
    model: nn.Module,
) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
    """Return ``context_fn`` of ``torch.utils.checkpoint.checkpoint``, which needs non-reentrant.

    Backward computes a block again after its ``restricted`` block has ended. With this argument
    the block then sees the restriction that it saw the first time:

        tower.gradient_checkpointing_enable(
            {"use_reentrant": False, "context_fn": checkpoint_contexts(tower)}
        )
    """
    layers = _layers(model)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _Restriction(layers, [layer.teacher for layer in layers])

    return contexts


class _Restriction:
    """The restriction of each layer inside of a block; may be entered again after its end."""

    def __init__(self, layers: Sequence[MoleLayer], teachers: Sequence[str | None]) -> None:
        self._layers, self._teachers = layers, teachers
        self._before: list[str | None] = []

    def __enter__(self) -> None:
        self._before = [layer.teacher for layer in self._layers]
        self._set(self._teachers)

    def __exit__(self, *error: object) -> None:
        self._set(self._before)

    def _set(self, teachers: Sequence[str | None]) -> None:
        for layer, teacher in zip(self._layers, teachers, strict=True):
            layer.teacher = teacher


def _layers(model: nn.Module) -> list[MoleLayer]:
    return [module for module in model.modules() if isinstance(module, MoleLayer)]
