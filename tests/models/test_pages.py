"""models/pages.py: which page holds which tokens."""

import random

import pytest

from models.pages import PAGE, PagePool, pages_for


@pytest.mark.parametrize("seed", range(3))
def test_pages_hold_what_they_are_found_for(seed):
    """Catches a page found for other tokens than it holds (also after the page before it was given away), a page given
    away while it has a user, and pages lost or counted twice."""
    generator = random.Random(seed)
    pool, held, content = PagePool(40), [], {}
    prompts = [[generator.randrange(3) for _ in range(n)] for n in (64, 65, 128, 130, 300)]
    prompts += [prompts[4][:128] + [9] * 70, prompts[4][:200]]
    num_found = 0
    for _ in range(2000):
        if held and generator.random() < 0.5:
            pool.release(held.pop(generator.randrange(len(held))))
            continue
        ids = generator.choice(prompts)
        found = pool.find(ids)
        num_found += len(found)
        assert len(found) * PAGE < len(ids)
        assert all(content[page] == ids[: PAGE * (i + 1)] for i, page in enumerate(found))
        count = pages_for(len(ids)) - len(found)
        if pool.num_free < count:
            pool.release(found)
            continue
        pages = found + pool.take(count)
        content |= {page: ids[: PAGE * (i + 1)] for i, page in enumerate(pages)}
        pool.publish(ids, pages)
        held.append(pages)
        users = {page for pages in held for page in pages}
        assert pool.num_free == 40 - len(users) and 0 not in users
    assert num_found > 500
    pool.forget()
    assert pool.num_free == 40 and not pool.find(prompts[4])


def test_the_oldest_page_goes_first():
    """Catches a pool that evicts what was used last, or the beginning of a sequence before its end."""
    pool = PagePool(4)
    first, second = [1] * 130, [2] * 130
    for ids in (first, second):
        pages = pool.take(2)
        pool.publish(ids, pages)
        pool.release(pages)
    pool.release(pool.find(first))  # used again
    pool.take(1)
    assert [len(pool.find(ids)) for ids in (second, first)] == [1, 2]


class BrokenOff:
    """A list or dict whose pop() is interrupted by Ctrl-C once it is done."""

    def pop(self, *args):
        super().pop(*args)
        raise KeyboardInterrupt


def test_what_is_broken_off_in_the_midst_loses_no_page():
    """Catches a page lost when Ctrl-C comes while it is given away, since a chat's cache has none to spare, and a page
    that is still found for its old tokens while new ones are written to it."""
    names, lists = type("Names", (BrokenOff, dict), {}), type("Pages", (BrokenOff, list), {})
    pool, ids = PagePool(3), [1] * 130
    pages = pool.take(2)
    pool.publish(ids, pages)
    pool._free = lists(pool._free)
    with pytest.raises(KeyboardInterrupt):
        pool.take(1)
    pool.release_all()
    assert pool.num_free == 3
    pool.release(pool.find(ids))
    pool.take(1)
    pool._names = names(pool._names)
    with pytest.raises(KeyboardInterrupt):
        pool.take(1)  # the second page of ids
    pool.release_all()
    found = pool.find(ids)
    assert found == pages[: len(found)] and pool.num_free == 3 - len(found)
    pool.release(found)
    assert not {*pool.find(ids)} & {*pool.take(pool.num_free)} and pool.num_free == 0
