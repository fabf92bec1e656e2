"""Reused memory: two calls never use it at the same time, and it does not grow without end."""

import gc
import mmap
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from pytest import fixture, mark

from grjca_kernels import memory
from grjca_kernels.memory import SMALLEST, STEP, take

pytestmark = mark.skipif(not hasattr(mmap, "MAP_PRIVATE"), reason="this system leaves it to the C library.")


@fixture(autouse=True)
def unused(monkeypatch):
    """The blocks that are not in use, of which there are none yet."""
    blocks = []
    monkeypatch.setattr(memory, "_unused", blocks)
    yield blocks
    gc.collect()  # what tests still hold comes back here, and not to the others


def beginning(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def test_what_it_gives_is_memory():
    for size in (0, 1, SMALLEST - 1, SMALLEST, STEP, STEP + 1, 5 * STEP - 7):
        x = take(size)
        assert x.dtype == torch.uint8 and x.shape == (size,) and x.is_contiguous() and x.device.type == "cpu"
        assert size < SMALLEST or x.untyped_storage().nbytes() == size
        x.fill_(7)
        assert x.eq(7).all()
        assert not size or x.data_ptr() % 64 == 0


def test_live_tensors_share_nothing():
    draw = random.Random(0)
    live = {}
    for i in range(300):
        x = take(draw.choice((SMALLEST, STEP - 1, STEP, STEP + 1, 2 * STEP, 3 * STEP)))
        x[0] = x[-1] = i % 251
        live[i] = x
        if len(live) > 12:
            del live[draw.choice([*live])]
        places = sorted((of.data_ptr(), of.data_ptr() + of.numel()) for of in live.values())
        assert all(end <= begin for (_, end), (begin, _) in pairwise(places))
        assert all(of[0] == of[-1] == j % 251 for j, of in live.items())


def test_a_freed_block_is_used_again(unused):
    x = take(STEP)
    where = x.data_ptr()
    assert unused == []
    del x
    (block,) = unused
    x = take(STEP - 1000)
    assert x.data_ptr() == where and unused == []
    del x
    assert [*map(id, unused)] == [id(block)]


def test_the_smallest_that_fits_is_used_and_none_that_is_much_larger(unused):
    several = [take(size * STEP) for size in (3, 1, 8, 2)]
    begin = {x.numel() // STEP: beginning(x) for x in several}
    del several
    assert len(unused) == 4
    two, three = take(2 * STEP - 1), take(2 * STEP)
    assert (beginning(two), beginning(three)) == (begin[2], begin[3])
    another = take(2 * STEP)
    assert beginning(another) not in begin.values()
    assert sorted(map(len, unused)) == [STEP, 8 * STEP]


@mark.parametrize(
    "look",
    [
        lambda x: x[5:9],
        lambda x: x.view(torch.float32),
        lambda x: x.detach(),
        lambda x: torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()),
        lambda x: x.numpy(),
        lambda x: x.untyped_storage(),
        lambda x: torch.utils.dlpack.from_dlpack(x),
    ],
    ids=["slice", "dtype", "detached", "set_", "numpy", "storage", "dlpack"],
)
def test_whatever_looks_at_it_keeps_it(look, unused):
    x = take(STEP)
    where = x.data_ptr()
    view = look(x)
    del x
    assert unused == []
    assert take(STEP).data_ptr() != where
    del view
    assert len(unused) == 2


def test_a_graph_of_autograd_keeps_it(unused):
    x = take(STEP).view(torch.float32).fill_(2)
    leaf = torch.ones(len(x), requires_grad=True)
    y = leaf * x
    del x
    assert unused == []
    assert torch.autograd.grad(y.sum(), leaf)[0].eq(2).all()
    del y
    assert len(unused) == 1


def test_what_is_unused_is_bounded(unused, monkeypatch):
    monkeypatch.setattr(memory, "MOST", 4 * STEP)
    several = [take(size * STEP) for size in (1, 2, 1, 3, 1)]
    for i in range(len(several)):
        several[i] = None
        assert sum(map(len, unused)) <= 4 * STEP
    assert [len(block) // STEP for block in unused] == [3, 1], "those that came back last"
    x = take(5 * STEP)
    del x
    assert all(len(block) <= 4 * STEP for block in unused)


def test_what_is_no_longer_kept_is_given_back_to_the_system(monkeypatch):
    monkeypatch.setattr(memory, "MOST", 0)
    blocks = []
    monkeypatch.setattr(memory, "_new", lambda size, new=memory._new: blocks.append(new(size)) or blocks[-1])
    x = take(STEP)
    del x
    (block,) = blocks
    assert memory._unused == []
    block.close()  # which mmap refuses of a block that anything points into


def test_small_sizes_go_to_the_c_library(unused, monkeypatch):
    monkeypatch.setattr(memory, "_new", lambda size: pytest.fail("a block for so little"))
    x = take(SMALLEST - 1)
    assert x.numel() == SMALLEST - 1
    del x
    assert unused == []


def test_without_mappings_all_sizes_do(unused, monkeypatch):
    monkeypatch.setattr(memory, "mmap", type("Other", (), {}))
    x = take(3 * STEP)
    assert x.numel() == 3 * STEP
    del x
    assert unused == []


def test_a_default_device_changes_nothing():
    with torch.device("meta"):
        assert take(10).device.type == take(STEP).device.type == "cpu"


@mark.skipif(not hasattr(os, "fork"), reason="this system has no fork.")
@mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_writes_for_itself(unused):
    """Into what the parent holds, and into what neither holds and each takes again."""
    x, free = take(STEP).fill_(1), take(STEP).fill_(1)
    where = free.data_ptr()
    del free
    child = os.fork()
    if not child:
        x.numpy().fill(2)
        again = take(STEP)
        again.numpy().fill(3)
        os._exit(0 if again.data_ptr() == where and x[0] == 2 else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert x.eq(1).all()
    again = take(STEP)
    assert again.data_ptr() == where and again.eq(1).all()


def test_threads_never_get_the_same_block():
    """Each writes its number to both ends and the middle, and finds it there."""
    count, turns = 8, 400
    start = threading.Barrier(count)

    def hammer(number: int) -> int:
        draw, held, wrong = random.Random(number), [], 0
        start.wait()
        for _ in range(turns):
            x = take(draw.choice((SMALLEST, STEP, 2 * STEP))).numpy()
            places = [0, len(x) // 2, len(x) - 1]
            x[places] = number
            held.append((x, places))
            if len(held) > 2:
                before, there = held.pop(0)
                wrong += int((before[there] != number).sum())
        return wrong

    with ThreadPoolExecutor(count) as pool:
        assert [*pool.map(hammer, range(1, count + 1))] == [0] * count
    assert len(set(map(id, memory._unused))) == len(memory._unused)


def test_what_comes_back_while_the_rest_is_searched(unused, monkeypatch):
    """As when a signal handler, or the collection of garbage, runs in between."""
    first, second = take(STEP), take(STEP)
    places = [beginning(first), beginning(second)]
    del first, second
    taken = []

    class Stolen(list):
        def remove(self, block):
            if not taken:
                taken.append(block)
                super().remove(block)  # by another thread
            super().remove(block)

    monkeypatch.setattr(memory, "_unused", stolen := Stolen(unused))
    assert beginning(take(STEP)) == places[1]
    assert taken == unused[:1]
    assert len(stolen) == 1
