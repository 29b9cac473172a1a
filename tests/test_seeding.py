import threading

import torch

from movekd.seeding import seeded


def test_numbers_depend_on_the_seed_alone_and_the_state_is_put_back() -> None:
    torch.rand(3)
    before = torch.random.get_rng_state()
    drawn = []
    for seed in (1, 2, 1):
        with seeded(seed):
            drawn.append(torch.rand(3))
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_seed_within_a_seed_changes_nothing_outside() -> None:
    with seeded(1):
        expected = torch.rand(2)
    with seeded(1):
        first = torch.rand(1)
        with seeded(2):
            torch.rand(5)
        second = torch.rand(1)
    assert torch.equal(torch.cat([first, second]), expected)


def test_threads_do_not_disturb_each_other() -> None:
    with seeded(3):
        expected = torch.cat([torch.rand(1) for _ in range(200)])
    found = []

    def draw() -> None:
        with seeded(3):
            found.append(torch.cat([torch.rand(1) for _ in range(200)]))

    threads = [threading.Thread(target=draw) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(torch.equal(numbers, expected) for numbers in found)
