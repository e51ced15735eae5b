"""Work that replicas share: what a chunk holds, which replica takes it, and which ranks wait for which."""

import heapq
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from models.common import on_main
from models.fsdp import start_ranks
from models.script import _reason
from models.sharing import (
    MOST_OF_A_CHUNK,
    Place,
    SharedWork,
    agreed_name,
    chunks_of,
    leave,
    wait_for_all_ranks,
)
from tests.forked import Forked


def test_chunks():
    """Catches an item in no chunk or in two, a prompt's samples split while much work is left, chunks that would leave
    other replicas idle at the end, and a chunk of parts of several prompts."""
    random_counts = random.Random(0).choices(range(1, 9), k=200)
    for counts in ([], [1], [3] * 40, [64] * 10, [1] * 1000, random_counts):
        for replicas in (1, 2, 8):
            found = list(chunks_of(counts, replicas))
            assert [i for chunk in found for i in chunk] == list(range(sum(counts)))
            ends = [sum(counts[: i + 1]) for i in range(len(counts))]
            for chunk in found:
                left = sum(counts) - chunk.start
                assert len(chunk) <= max(1, left / (2 * replicas), 0) and len(chunk) <= MOST_OF_A_CHUNK
                holding = next(end for end in ends if end > chunk.start)
                assert chunk.stop in ends or chunk.stop < holding  # whole prompts, or a part of one
                assert chunk.stop in ends or left < 2 * replicas * 64
    assert all(len(chunk) == 1 for chunk in chunks_of([5, 5], 2, most=1))


def idle_share(counts: list[int], costs: list[float], rows: int, replicas: int) -> tuple[float, float]:
    """Share of the time of replicas with `rows` rows each that is idle at the end: (prompts dealt in turn, shared)."""

    def end(sharing) -> float:
        """Each row takes the next item once it is free. sharing(replica) -> its next item, or None."""
        free = [(0.0, replica, row) for replica in range(replicas) for row in range(rows)]
        heapq.heapify(free)
        last = [0.0] * replicas
        while free:
            now, replica, row = heapq.heappop(free)
            thing = sharing(replica)
            if thing is None:
                last[replica] = max(last[replica], now)
            else:
                heapq.heappush(free, (now + costs[thing], replica, row))
        return 1 - sum(last) / (replicas * max(last))

    first = [sum(counts[:i]) for i in range(len(counts))]
    dealt = [
        iter([first[i] + j for i in range(r, len(counts), replicas) for j in range(counts[i])]) for r in range(replicas)
    ]
    chunks, held = chunks_of(counts, replicas), [iter(()) for _ in range(replicas)]

    def shared(replica: int) -> int | None:
        thing = next(held[replica], None)
        if thing is None:
            held[replica] = iter(next(chunks, ()))
            thing = next(held[replica], None)
        return thing

    return end(lambda replica: next(dealt[replica], None)), end(shared)


def test_ragged_tail():
    """Catches chunks that are too large near the end: by a simulated clock, replicas are idle less than half as long as
    where prompts are dealt in turn. Answers to hard prompts are long, 16 samples each."""
    lengths = random.Random(1)
    counts, costs = [16] * 40, []
    for count in counts:
        hard = lengths.expovariate(1 / 400)
        costs += [min(2048.0, 20 + hard * lengths.uniform(0.5, 1.5)) for _ in range(count)]
    dealt, shared = idle_share(counts, costs, rows=16, replicas=8)
    print(f"idle of 8 replicas: {dealt:.1%} dealt in turn, {shared:.1%} shared")
    assert shared < dealt / 2


def in_threads(rank: Callable[[int], None], count: int) -> None:
    """Runs rank(0) to rank(count - 1), each in a thread of its own."""
    threads = [threading.Thread(target=rank, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


def run_ranks(store: dist.Store, name: str, counts: list[int], layout: tuple[int, int], body) -> list:
    """Returns body(work, rank) of each rank, run in a thread of its own. layout: (replicas, tp ranks)."""
    replicas, tp_size = layout
    results = [None] * (replicas * tp_size)
    wait = threading.Barrier(len(results), timeout=60).wait

    def rank(number: int) -> None:
        work = SharedWork(name, counts, Place(replicas, number // tp_size, tp_size, number % tp_size), store, wait)
        results[number] = body(work, number)
        work.close()

    in_threads(rank, len(results))
    return results


def test_ranks_take_everything_once():
    """Catches an item that two replicas take or none does, ranks of one model that take different items or in another
    order, a fast replica that gets no more than a slow one, a second list of the same name that goes on with the
    first's counter, keys that stay in the store, and replicas that take items after end()."""
    store, counts = dist.HashStore(), [4] * 12

    def take(work: SharedWork, number: int) -> list[int]:
        taken = []
        for things in work:
            for thing in things:
                time.sleep(0.004 if number < 2 else 0.0)  # the first replica is slow
                taken.append(thing)
                work.done()
        return taken

    for layout in ((2, 2), (3, 1), (1, 2)):
        for _ in range(2):
            found = run_ranks(store, "list", counts, layout, take)
            of_replicas = found[:: layout[1]]
            assert all(found[i] == found[i - i % layout[1]] for i in range(len(found)))
            assert sorted(thing for taken in of_replicas for thing in taken) == list(range(48))
            if layout == (2, 2):
                assert len(of_replicas[0]) < len(of_replicas[1])
        assert store.num_keys() <= 1, store  # lists opened
        store = dist.HashStore()

    def end_at_once(work: SharedWork, number: int) -> int:
        taken = len(next(iter(work), ()))
        work.end()
        return taken + sum(map(len, work))

    assert sum(run_ranks(dist.HashStore(), "list", counts, (2, 1), end_at_once)) < 48

    def count(work: SharedWork, number: int) -> SharedWork:
        take(work, number)
        return work

    assert [work.num_done for work in run_ranks(dist.HashStore(), "list", counts, (2, 1), count)] == [48, 48]


def test_waiting():
    """Catches a rank that does not wait for a late one, or not beyond the timeout of a collective, or also when the
    other has ended: torchrun ends the ranks of the same node only."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "LOCAL_RANK": 0}
    world |= {"TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_USE_AGENT_STORE": True}
    ranks = [Forked("tests/models/test_sharing.py", "dies", **world, RANK=rank) for rank in range(2)]
    (out, errors), _ = [rank.communicate(60) for rank in ranks]
    assert out == "waited\nmain\nanother rank has ended or cannot be reached\n", errors
    assert [rank.returncode for rank in ranks] == [0, 9]


def test_the_store_leaves_last():
    """Catches a first rank, which may host the store, leaving before another has seen that all have arrived."""
    store, left = dist.HashStore(), []

    class Slow:
        """The store of a rank that sees this late."""

        def add(self, key, amount):
            if key == "ranks/left":
                time.sleep(0.2)
                left.append("another")
            return store.add(key, amount)

    def rank(number):
        leave(Slow() if number else store, number, 3)
        left.extend(["first"] * (number == 0))

    in_threads(rank, 3)
    assert left == ["another", "another", "first"]


def test_ranks_that_are_started_again():
    """Catches restarted ranks that wait for ranks that torchrun has ended, or go by their counts, since its store lives
    on; and ranks of two nodes that do not meet, because each node's agent counts its own restarts."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "LOCAL_RANK": 0}
    for attempts in ((0, 0), (1, 1), (3, 2)):
        ranks = []
        for rank in (1, 0):  # the first that comes finds only keys of ended ranks
            more = {"RANK": rank, "TORCHELASTIC_RESTART_COUNT": attempts[rank], "TORCHELASTIC_USE_AGENT_STORE": True}
            ranks.append(Forked("tests/models/test_sharing.py", **world, **more))
            time.sleep(1.5 * (attempts == (1, 1)))
        assert [rank.communicate(60) for rank in ranks] == 2 * [("met 2\n", "")]
        assert [rank.returncode for rank in ranks] == 2 * [9 * (attempts == (0, 0))]


def test_a_rank_that_does_not_come():
    """Catches ranks that wait forever for a missing one."""
    with pytest.raises(ValueError, match="rank 1 of 2 has not come within 0:00:00"):
        agreed_name(dist.HashStore(), 0, 2, timedelta(seconds=0.1))


def outlive() -> None:
    """Runs a rank that waits for the other, which is late, late again, and then dies."""
    start_ranks(torch.device("cpu"))
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)
    rank = dist.get_rank()
    time.sleep(1.5 * rank)
    begun = time.monotonic()
    wait_for_all_ranks()
    print("waited" if time.monotonic() - begun > 1 else "went on", flush=True)
    print(on_main(lambda: time.sleep(1.5) or "main"), flush=True)
    if rank == 1:
        time.sleep(0.5)
        os._exit(9)
    try:
        wait_for_all_ranks()
    except RuntimeError as error:
        print(_reason(error).partition(";")[0], flush=True)
    os._exit(0)


def meet() -> None:
    """Runs a rank that meets the other, and then, in the first attempt, dies."""
    start_ranks(torch.device("cpu"))
    wait_for_all_ranks()
    met = torch.ones(1)
    dist.all_reduce(met)
    print("met", int(met), flush=True)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os._exit(9)
    os._exit(0)


if __name__ == "__main__":
    outlive() if sys.argv[1:] else meet()
