import threading

import pytest

from movekd.extract.background_worker import BackgroundWorker


def test_tasks_are_done_in_order_by_one_thread() -> None:
    done: list[tuple[int, str]] = []
    with BackgroundWorker("behind", 3) as behind:
        for number in range(50):
            behind.submit(
                lambda number=number: done.append((number, threading.current_thread().name))
            )
    assert [number for number, _ in done] == list(range(50))
    assert len({name for _, name in done}) == 1
    assert threading.current_thread().name not in {name for _, name in done}


def test_no_more_than_asked_for_wait() -> None:
    """The one who hands over is held until one of two is done."""
    gate, handed_over = threading.Event(), []

    def hand_over(behind: BackgroundWorker) -> None:
        for number in range(4):
            behind.submit(gate.wait)
            handed_over.append(number)

    with BackgroundWorker("behind", 2) as behind:
        thread = threading.Thread(target=hand_over, args=(behind,))
        thread.start()
        thread.join(0.2)  # the third cannot be handed over, however long one waits
        assert thread.is_alive()
        assert handed_over == [0, 1]
        gate.set()
        thread.join()
    assert handed_over == [0, 1, 2, 3]


def test_nothing_is_done_after_an_error_and_whoever_hands_over_hears_of_it() -> None:
    done: list[int] = []

    def fail() -> None:
        raise RuntimeError("the disk is full")

    def hand_over() -> None:
        with BackgroundWorker("behind", 2) as behind:
            behind.submit(done.append, 1)
            behind.submit(fail)
            for number in range(2, 9):
                behind.submit(done.append, number)

    with pytest.raises(RuntimeError, match="the disk is full"):
        hand_over()
    assert done == [1]


def test_what_waits_is_thrown_away_after_an_error_outside() -> None:
    gate, done = threading.Event(), []

    def hand_over() -> None:
        with BackgroundWorker("behind", 9) as behind:
            behind.submit(gate.wait)
            for number in range(5):
                behind.submit(done.append, number)
            threading.Timer(0.1, gate.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hand_over()
    assert done == []
