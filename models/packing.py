"""Groups rows into forwards of a limited number of tokens: pure functions of lengths, the same on every rank."""

import bisect
import heapq


def best_fit(sizes: list[int], capacity: int) -> list[list[int]]:
    """Indices of the sizes in groups whose sums are at most `capacity`: largest first, each into the fullest group that
    has room (best-fit decreasing). A size larger than the capacity is alone."""
    groups: list[list[int]] = []
    groups_with_room: dict[int, list[int]] = {}  # free tokens -> groups
    rooms: list[int] = []  # the keys, sorted
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = min(sizes[i], capacity)
        place = bisect.bisect_left(rooms, size)
        if place < len(rooms):
            room = rooms[place]
            group = groups_with_room[room].pop()
            if not groups_with_room[room]:
                del groups_with_room[room], rooms[place]
        else:
            room, group = capacity, len(groups)
            groups.append([])
        groups[group].append(i)
        if room - size not in groups_with_room:
            groups_with_room[room - size] = []
            bisect.insort(rooms, room - size)
        groups_with_room[room - size].append(group)
    return groups


def groups_of_ranks(sizes: list[int], capacity: int, num_ranks: int) -> list[list[list[int]]]:
    """For each rank, indices of its sizes in groups whose sums are at most `capacity`; a larger size is alone. All
    ranks have the same number of groups, since each runs collectives: as few as best_fit finds, rounded up, so some may
    be empty. Groups are as even as possible. Groups that run at the same time are of similar size, since ranks wait for
    each other; the largest come first, so that running out of memory shows at once."""
    found = best_fit(sizes, capacity)
    count = -(-len(found) // num_ranks) * num_ranks
    groups = _evenly(sizes, capacity, count) or [*found, *([] for _ in range(count - len(found)))]
    groups.sort(key=lambda group: -sum(sizes[i] for i in group))
    turns = [groups[i : i + num_ranks] for i in range(0, count, num_ranks)]
    # in alternating order, so that no rank has the largest group of every turn
    return [[turn[-1 - rank if n % 2 else rank] for n, turn in enumerate(turns)] for rank in range(num_ranks)]


def _evenly(sizes: list[int], capacity: int, count: int) -> list[list[int]] | None:
    """Indices of the sizes in `count` groups: largest first, each into the smallest group. None if a group of several
    sizes would exceed the capacity."""
    groups: list[list[int]] = [[] for _ in range(count)]
    smallest = [(0, group) for group in range(count)]
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        total, group = smallest[0]
        if total and total + sizes[i] > capacity:
            return None
        heapq.heapreplace(smallest, (total + sizes[i], group))
        groups[group].append(i)
    return groups
