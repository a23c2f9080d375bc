"""Large outputs: memory that served others before, never two at once."""

from __future__ import annotations

import threading

import pytest

from anyep import _native
from anyep.arrays import library_of

torch = pytest.importorskip("torch")
numpy = pytest.importorskip("numpy")

LARGE = (33 << 20) // 2  # elements of bfloat16: above what malloc keeps


@pytest.mark.parametrize("like", [torch.zeros(1), numpy.zeros(1)], ids=["torch", "numpy"])
def test_memory_of_a_dropped_output_serves_the_next_one(like):
    library = library_of(like)
    first = library.empty((LARGE,), "float16")
    first[:] = 1
    address = first.data_ptr() if hasattr(first, "data_ptr") else first.ctypes.data
    part = first[5:]
    del first
    second = library.empty((LARGE,), "float16")  # `part` still sees the memory
    assert (second.data_ptr() if hasattr(second, "data_ptr") else second.ctypes.data) != address
    second[:] = 2
    assert (part == 1).all()
    del part
    third = library.empty((LARGE,), "float16")
    assert (third.data_ptr() if hasattr(third, "data_ptr") else third.ctypes.data) == address


def test_a_block_serves_half_its_size_and_no_less():
    block = _native.recycled_memory(101 << 20)  # no other test has this size
    address = block.address
    del block
    small = _native.recycled_memory(40 << 20)
    assert small.address != address
    half = _native.recycled_memory(60 << 20)
    assert half.address == address and half.bytes == 60 << 20


def test_at_most_four_blocks_and_a_gibibyte_wait():
    def mapped_bytes() -> int:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * 4096

    blocks = [_native.recycled_memory(300 << 20) for _ in range(6)]
    held = mapped_bytes()
    del blocks
    assert mapped_bytes() <= held - (3 * 300 << 20)  # 3 of 300 MiB fit a GiB


def test_threads_never_share_a_block():
    library = library_of(torch.zeros(1))
    wrong = []

    def work(mark: int) -> None:
        for _ in range(30):
            tensor = library.empty((LARGE,), "float16")
            tensor[::4096] = mark
            if not bool((tensor[::4096] == mark).all()):
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
