"""Work that data-parallel replicas take from one list when they have room for it, so that none idles while another has
more than it can begin.

- a replica takes the next chunk by adding one to a counter in torch.distributed's store. The items of a chunk are a
  pure function of the list, so nothing else is sent, and a run with one replica does not use the store
- chunks are whole prompts at first, whose samples share a prefill, and single samples at the end: guided
  self-scheduling (Polychronopoulos & Kuck 1987, IEEE Trans. Comput. C-36)
- of the ranks that share a model, the first takes chunks, and the others read which ones it took
- ranks that have finished wait in a barrier without a timeout, since an ordinary collective would end the run after
  half an hour. It fails when the process of another rank ends, which a value in the store would not tell: torchrun ends
  the other ranks of a node, but not those of other nodes
"""

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _get_default_store  # torch 2.11 to 2.13 have no public name for it

T = TypeVar("T")

MOST_OF_A_CHUNK = 64  # items, unless a prompt has more samples: items taken but not begun wait for their replica


def chunks_of(counts: Sequence[int], num_replicas: int, most: int = MOST_OF_A_CHUNK) -> Iterator[range]:
    """Yields the chunks in which sum(counts) items are taken, in order; counts[i] items belong together.

    A chunk is half of an equal share of the remaining items, at most `most` or the largest count. It ends with the last
    group of items that belong together and fit; if none fits, it is a part of one.
    """
    ends = np.cumsum(counts, dtype=np.int64)
    total, start = int(ends[-1]) if len(ends) else 0, 0
    most = max(most, int(max(counts, default=0))) if most > 1 else 1
    while start < total:
        size = min(max(1, (total - start) // (2 * num_replicas)), most)
        first = int(np.searchsorted(ends, start, "right"))  # the group of the next item
        last = int(np.searchsorted(ends, start + size, "right"))  # the first group that ends after the chunk
        end = int(ends[last - 1]) if last > first else start + size
        yield range(start, end)
        start = end


class Place(NamedTuple):
    """A rank's place: replicas share the work; the ranks of a replica share a model and do the same work."""

    num_replicas: int
    replica: int
    tp_size: int
    tp_rank: int


class SharedWork:
    """A list of sum(counts) items that all replicas take from. Iterating takes chunks for this replica, as ranges of
    item indices; the ranks of a replica get the same ranges.

    All ranks must create, iterate over and close lists of a name in the same order. counts, most: see chunks_of. wait:
    returns when all ranks have called it.
    """

    def __init__(
        self,
        name: str,
        counts: Sequence[int],
        place: Place,
        store: dist.Store,
        wait: Callable[[], None],
        most: int = MOST_OF_A_CHUNK,
    ):
        self.wait_for_ranks = wait
        self.place, self.total, self.num_done = place, int(sum(counts)), 0
        self._chunks, self._num_taken = enumerate(chunks_of(counts, place.num_replicas, most)), 0
        self._keys: set[str] = set()  # that this rank has written
        self._store = store if place.num_replicas > 1 else None
        if self._store is not None:
            world = place.num_replicas * place.tp_size
            self._prefix = f"{name}/{(store.add(f'{name}/opened', 1) - 1) // world}"

    @property
    def share(self) -> int:
        """The number of items of a replica if all took equal shares, rounded up."""
        return -(-self.total // self.place.num_replicas)

    def __iter__(self) -> Iterator[range]:
        while True:
            number = self._take()
            chunk = next((chunk for i, chunk in self._chunks if i == number), None)
            if chunk is None:
                return
            yield chunk

    def _take(self) -> int:
        """The index of the next chunk, which may be beyond the last one."""
        turn, self._num_taken = self._num_taken, self._num_taken + 1
        if self._store is None:
            return turn
        key = f"{self._prefix}/{self.place.replica}/{turn}"
        if self.place.tp_rank:
            _wait_until(lambda: self._store.check([key]))
            return int(self._store.get(key))
        number = self._add("next", 1) - 1
        if self.place.tp_size > 1:
            self._store.set(key, str(number))
            self._keys.add(key)
        return number

    def _add(self, counter: str, number: int) -> int:
        key = f"{self._prefix}/{counter}"
        self._keys.add(key)
        return self._store.add(key, number)

    def end(self) -> None:
        """Ends the work: no replica takes another chunk."""
        if self._store is not None and not self.place.tp_rank:
            self._add("next", self.total)

    def done(self) -> int:
        """Counts one item as done; returns how many are done on all replicas, as far as this rank knows."""
        if self._store is None or self.place.tp_rank:
            self.num_done += 1
        else:
            self.num_done = self._add("done", 1)
        return self.num_done

    def close(self) -> None:
        """Waits until all ranks have finished."""
        if self._store is None:
            return
        self.wait_for_ranks()
        if not self.place.tp_rank:
            self.num_done = self._add("done", 0)
        self.wait_for_ranks()
        for key in self._keys:
            self._store.delete_key(key)  # a counter is deleted by the first rank that comes here


def shared_work(name: str, counts: Sequence[int], dp: DeviceMesh, most: int = MOST_OF_A_CHUNK) -> SharedWork:
    """SharedWork of this run's replicas."""
    tp_size = dist.get_world_size() // dp.size()
    replica, tp_rank = divmod(dist.get_rank(), tp_size)  # tensor-parallel ranks are adjacent
    place = Place(dp.size(), replica, tp_size, tp_rank)
    return SharedWork(name, counts, place, _get_default_store(), wait_for_all_ranks, most)


# ----------------------------------------------------------------------------------------- waiting


def _wait_until(condition: Callable[[], bool]) -> None:
    """Polls a condition, each time after a fiftieth of the time waited so far, half a second at most."""
    begun = time.monotonic()
    while not condition():
        time.sleep(min(0.5, max(0.0005, (time.monotonic() - begun) / 50)))


def agreed_name(store: dist.Store, rank: int, world: int, timeout: timedelta) -> str:
    """A name that no earlier ranks had. torchrun keeps its store when it restarts ranks, with the addresses of the dead
    ones; the number of restarts is no such name, since each node counts its own. Rank 0 answers all tokens that it
    finds with its own, until all ranks have confirmed it. Raises ValueError if a rank does not come."""
    own, deadline = secrets.token_hex(8), time.monotonic() + timeout.total_seconds()
    if rank:
        store.set(f"here/{rank}", own)
        store.wait([f"name/{own}"], timeout)
        name = store.get(f"name/{own}").decode()
        store.set(f"met/{name}/{rank}", "")
        return name

    def has_met(other: int) -> bool:
        if store.check([f"met/{own}/{other}"]):
            return True
        if store.check([f"here/{other}"]):
            store.set(f"name/{store.get(f'here/{other}').decode()}", own)
        if time.monotonic() > deadline:
            raise ValueError(f"rank {other} of {world} has not come within {timeout}")
        return False

    for other in range(1, world):
        _wait_until(partial(has_met, other))
    return own


_patient: list[dist.ProcessGroup] = []  # all ranks, with barriers that have no timeout


def begin_waiting() -> None:
    """Makes the group in which wait_for_all_ranks() waits. A collective, for when torch.distributed has started."""
    _patient[:] = [dist.new_group(backend="gloo", timeout=timedelta(days=365))]


def several_ranks() -> bool:
    """Whether torch.distributed has started, with more ranks than this one."""
    return dist.is_initialized() and dist.get_world_size() > 1


def wait_for_all_ranks() -> None:
    """Returns when all ranks are here, however long that takes: before a collective that follows uneven work. Raises
    RuntimeError if one of them ends."""
    if several_ranks():
        work = dist.barrier(group=_patient[0], async_op=True)
        _wait_until(work.is_completed)  # unlike work.wait(), lets signals be handled
        work.wait()


def leave_together() -> None:
    """wait_for_all_ranks() for ranks that exit after it."""
    if several_ranks():
        wait_for_all_ranks()
        leave(_get_default_store(), dist.get_rank(), dist.get_world_size())


def leave(store: dist.Store, rank: int, world: int) -> None:
    """Returns on rank 0 when all others have come here, since its process may hold the store that they ask."""
    store.add("ranks/left", 1)
    if rank == 0:
        _wait_until(lambda: store.add("ranks/left", 0) >= world)


def gather_parts(own: dict[int, T], dp: DeviceMesh) -> dict[int, T]:
    """Merges the entries of all replicas, on all ranks. A collective, for after SharedWork.close()."""
    parts = [None] * dp.size()
    dist.all_gather_object(parts, own, group=dp.get_group())
    return {key: value for part in parts for key, value in part.items()}
