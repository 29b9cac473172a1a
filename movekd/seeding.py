"""Draw random numbers at a seed without disturbing anybody, or being disturbed.

Libraries draw initial weights from PyTorch's CPU generator, of which a process has one. Whoever
needs numbers that depend on a seed alone takes it through ``seeded``. All other code of movekd that
may run beside that, in another thread, draws from generators of its own.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_drawing = threading.RLock()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run with PyTorch's CPU generator at ``seed`` and put its state back in the end.

    One thread at a time does so; others wait. Equal numbers for equal seeds are promised as long as
    no thread outside of movekd draws from the generator meanwhile: nothing can keep it from that.
    """
    with _drawing:
        state = torch.random.get_rng_state()
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            torch.random.set_rng_state(state)
