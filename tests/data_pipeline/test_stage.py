"""A stage gives what it makes in order, a bounded number ahead, and ends when it is told to."""

import itertools
import threading
import time

import pytest

from data_pipeline.stage import Stage, Stopped


def stage(make, *, depth=2, workers=2):
    return Stage(itertools.count().__next__, make, depth=depth, workers=workers, name="stage")


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order_though_some_take_longer(workers):
    def make(number):
        time.sleep(0.004 if number % 3 == 0 else 0.0)
        return number

    made = stage(make, workers=workers)
    assert [made.take() for _ in range(40)] == list(range(40))
    made.stop()


def test_two_workers_take_the_time_of_one_for_half():
    made = stage(lambda number: time.sleep(0.02))
    made.take()
    began = time.perf_counter()
    for _ in range(20):
        made.take()
    assert time.perf_counter() - began < 20 * 0.02 * 0.8
    made.stop()


@pytest.mark.parametrize("workers", [1, 2])
def test_no_more_is_begun_than_may_wait(workers):
    begun = []
    made = stage(lambda number: begun.append(number), depth=3, workers=workers)
    made.take()
    time.sleep(0.3)
    assert sorted(begun) == [0, 1, 2, 3, 4]
    assert made.ready == 4
    made.stop()


def test_an_error_comes_in_its_turn():
    def make(number):
        if number == 2:
            raise TimeoutError("third")
        time.sleep(0.01)
        return number

    made = stage(make)
    assert [made.take(), made.take()] == [0, 1]
    with pytest.raises(TimeoutError, match="third"):
        made.take()
    made.stop()


def test_an_error_of_what_begins_comes_in_its_turn_too():
    def begin():
        if (number := next(numbers)) == 2:
            raise ValueError("no third")
        return number

    numbers = itertools.count()
    made = Stage(begin, lambda number: number, depth=2, workers=2, name="stage")
    assert [made.take(), made.take()] == [0, 1]
    with pytest.raises(ValueError, match="no third"):
        made.take()
    made.stop()


def test_stopping_ends_the_threads_whatever_they_wait_for():
    before = set(threading.enumerate())
    full, slow = stage(lambda number: number), stage(lambda number: time.sleep(0.1))
    full.take()
    for one in (full, slow):
        one.stop()
        with pytest.raises(Stopped):
            one.take()
    assert set(threading.enumerate()) == before
