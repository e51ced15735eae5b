"""Which samples have rows and pages: the host's side of the generation engine, without tensors.

- a sample waits, is filled (its prompt is prefilled, in chunks), and runs in a row (slot) of the decode step; it takes
  the first free row when it begins to run, so that the rows in use stay together
- samples of one prompt share its prefill and its pages; a prompt that begins like an earlier one shares those of its
  pages that are still cached
- when pages run out, the youngest sample is preempted: it gives its pages back, and is prefilled again later
- the page table is kept here and updated where something changes, so that each look at results costs the host little

Dimensions: B slots, M pages of a row at most.
"""

import heapq
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from models.paged_cache import Chunk
from models.pages import PAGE, PagePool, pages_for
from models.sequences import Prompt, Sample

CONTEXTS = 16  # times prefill_tokens: most tokens that the chunks of a prefill attend to; a GPU gathers them from pages


class Prefill(NamedTuple):
    """Tokens to be computed, packed end to end."""

    ids: list[int]
    positions: list[int]
    chunks: list[Chunk]
    done: list[Sample]  # samples that it completes
    last: list[int]  # indices of their last tokens


class Scheduler:
    """num_slots: most samples that run at a time. look_every: most tokens that a running sample draws between two calls
    of reserve(). prefill_tokens: most tokens of one prefill."""

    def __init__(self, pool: PagePool, *, num_slots: int, max_seq_len: int, look_every: int, prefill_tokens: int):
        self.pool, self.num_slots = pool, num_slots
        self.look_every, self.prefill_tokens = look_every, prefill_tokens
        self.table = np.zeros((num_slots, pages_for(max_seq_len)), dtype=np.int32)  # [B, M]
        self.num_preempted = 0
        self.begin()

    def begin(self) -> None:
        """Frees all rows and pages, also those that an interrupted call has left in use."""
        self.pool.release_all()
        self.waiting: deque[Sample] = deque()
        self.filling: deque[Sample] = deque()
        self.ready: list[Sample] = []  # samples of the newest prompt, whose prefill is done
        self.running: dict[Sample, None] = {}  # from the oldest to the youngest
        self.free_slots = list(range(self.num_slots))  # a heap
        self.stale_slots = set(self.free_slots)  # free slots that the device does not know to be free yet
        self.table[:] = 0
        self.newest: Prompt | None = None

    # -------------------------------------------------------------------------------- admission

    def admit(self, samples: Iterator[Sample]) -> bool:
        """Gives pages to waiting samples, in order, as long as there are rows and pages. Returns whether any sample is
        filling or ready."""
        begun = sum(1 + len(leader.followers) for leader in (*self.filling, *self.ready))
        leaders = None
        for _ in range(self.num_slots - len(self.running) - begun):
            sample = self.waiting.popleft() if self.waiting else next(samples, None)
            if sample is None:
                break
            if leaders is None:
                leaders = {tuple(s.request.prompt_ids): s for s in self.filling if not s.num_drawn}
            if not self._begin(sample, leaders):
                self.waiting.appendleft(sample)
                break
        return bool(self.filling or self.ready)

    def _begin(self, sample: Sample, leaders: dict[tuple[int, ...], Sample]) -> bool:
        """Gives a sample its pages; False if there are not enough. leaders: prompt -> the sample that prefills it."""
        prompt_ids = sample.request.prompt_ids
        leader = None if sample.num_drawn else leaders.get(tuple(prompt_ids))
        is_newest = not sample.num_drawn and self.newest is not None and self.newest.ids == prompt_ids
        is_placed = self._find_pages(sample, self.newest if is_newest else leader)
        if is_newest and not is_placed and not self.ready:  # the newest prompt holds pages that the sample needs
            self.remember(None)
            is_newest, is_placed = False, self._find_pages(sample, None)
        if not is_placed:
            return False
        if is_newest:
            self.ready.append(sample)
        elif leader is not None:
            leader.followers.append(sample)
        else:
            self.filling.append(sample)
            if not sample.num_drawn:  # a preempted sample draws no first token, so it leads no others
                leaders.setdefault(tuple(prompt_ids), sample)
        return True

    def _find_pages(self, sample: Sample, other: Sample | Prompt | None) -> bool:
        """Takes pages for a sample's tokens and look_every more: full pages of `other`, with the same prompt, or cached
        ones that hold its beginning, and new pages. False if fewer than one page for each running sample would be left,
        so that none is preempted at once."""
        ids = sample.ids[: sample.num_to_cache]
        if other is not None:
            found = other.pages[: len(ids) // PAGE]
            self.pool.share(found)
        else:
            found = self.pool.find(ids)
        count = pages_for(min(len(ids) + self.look_every, sample.most_tokens)) - len(found)
        if not self._has_room(count + len(self.running), may_forget=other is None or other is not self.newest):
            self.pool.release(found)
            return False
        sample.pages, sample.num_cached = found + self.pool.take(count), len(found) * PAGE
        return True

    def next_prefill(self) -> Prefill:
        """At most prefill_tokens tokens of the filling samples, which count as cached from here on. Including cached
        tokens, the chunks attend to at most CONTEXTS times as many, unless there is only one chunk."""
        batch, seen = Prefill([], [], [], [], []), 0
        while self.filling and len(batch.ids) < self.prefill_tokens:
            sample = self.filling[0]
            start = sample.num_cached
            end = min(sample.num_to_cache, start + self.prefill_tokens - len(batch.ids))
            seen += end
            if batch.chunks and seen > CONTEXTS * self.prefill_tokens:
                break
            batch.ids.extend(sample.ids[start:end])
            batch.positions.extend(range(start, end))
            batch.chunks.append(Chunk(sample.pages, start, end - start))
            sample.num_cached = end
            if end == sample.num_to_cache:
                batch.done.append(self.filling.popleft())
                batch.last.append(len(batch.ids) - 1)
        return batch

    def publish(self, batch: Prefill) -> None:
        """Makes the pages of a launched prefill findable; not before the launch, which Ctrl-C may prevent."""
        for sample in batch.done:
            sample.published = self.pool.publish(sample.ids[: sample.num_cached], sample.pages)

    # ------------------------------------------------------------------------------ rows and pages

    def place(self, sample: Sample) -> None:
        """Gives a row to a sample whose prompt is in the cache."""
        sample.slot, sample.num_launched = heapq.heappop(self.free_slots), sample.num_cached
        self.stale_slots.discard(sample.slot)
        self.table[sample.slot, : len(sample.pages)] = sample.pages
        self.running[sample] = None

    def release(self, sample: Sample) -> None:
        """Frees a sample's row and pages; its full pages stay findable."""
        self.pool.publish(sample.ids[: sample.num_cached], sample.pages, sample.published)
        for each in (sample, *sample.followers):
            self.pool.release(each.pages)
            each.pages, each.num_cached, each.published = [], 0, (0, 0)
        if sample in self.running:
            del self.running[sample]
            self._free(sample.slot)

    def _free(self, slot: int) -> None:
        heapq.heappush(self.free_slots, slot)
        self.stale_slots.add(slot)
        self.table[slot] = 0

    def compact(self, num_rows: int) -> tuple[list[int], list[int]]:
        """Moves running samples into the first num_rows slots; returns (old slots, new slots)."""
        sources, targets = [], []
        for sample in [sample for sample in self.running if sample.slot >= num_rows]:
            sources.append(sample.slot)
            target = heapq.heappop(self.free_slots)
            self.table[target] = self.table[sample.slot]
            self.stale_slots.discard(target)
            self._free(sample.slot)
            sample.slot = target
            targets.append(target)
        return sources, targets

    def reserve(self) -> bool:
        """Gives all running samples pages for look_every more tokens; if there are too few, gives none: False."""
        ahead, short = self.look_every, []
        for sample in self.running:
            target = sample.num_launched + ahead
            if target > len(sample.pages) * PAGE:
                count = pages_for(min(target, sample.most_tokens)) - len(sample.pages)
                if count > 0:
                    short.append((sample, count))
        if not self._has_room(sum(count for _, count in short)):
            return False
        for sample, count in short:
            self._give(sample, count)
        return True

    def make_room(self) -> None:
        """reserve(), preempting the youngest samples until there are enough pages. The host must know all tokens that
        the samples have drawn, so no launched step may be in flight."""
        for sample in list(self.running):  # from the oldest to the youngest
            count = pages_for(min(sample.num_launched + self.look_every, sample.most_tokens)) - len(sample.pages)
            while sample in self.running and not self._has_room(count):
                youngest = self.filling.pop() if self.filling else next(reversed(self.running))
                self.release(youngest)
                self.waiting.extendleft(reversed((youngest, *youngest.followers)))
                youngest.followers = []
                self.num_preempted += 1
            if sample in self.running and count > 0:
                self._give(sample, count)

    def _give(self, sample: Sample, count: int) -> None:
        held = len(sample.pages)
        sample.pages += self.pool.take(count)
        self.table[sample.slot, held : held + count] = sample.pages[held:]

    def _has_room(self, count: int, *, may_forget: bool = True) -> bool:
        """Whether `count` pages are free. If not, it gives up the newest prompt's pages, unless samples are ready."""
        if may_forget and count > self.pool.num_free and not self.ready:
            self.remember(None)
        return count <= self.pool.num_free

    def remember(self, prompt: Prompt | None) -> None:
        """Keeps the pages of a prompt for its later samples, instead of the prompt remembered before."""
        if prompt is not None:
            self.pool.share(prompt.pages)
        if self.newest is not None:
            self.pool.release(self.newest.pages)
        self.newest = prompt
