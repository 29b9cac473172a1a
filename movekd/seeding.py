"""Run code at a fixed random seed, then restore PyTorch's CPU generator.

Libraries draw initial weights from that generator, and a process has only one. Code whose numbers
must depend only on a seed runs inside ``seeded``. All other code of movekd that may run meanwhile
in another thread uses its own generator.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_drawing = threading.RLock()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run with PyTorch's CPU generator at ``seed``, and restore its state at the end.

    Only one thread at a time does so; others wait. Equal seeds give equal numbers as long as no
    thread outside of movekd draws from the generator meanwhile, which movekd cannot prevent.
    """
    with _drawing:
        state = torch.random.get_rng_state()
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            torch.random.set_rng_state(state)
