"""Which pages of a paged KV cache hold what: the host's side, without tensors.

- a sequence has a list of pages, PAGE tokens each; a page may belong to several, which read it and never write it
- full pages are found again by the tokens that they and all before them hold, so samples of one prompt and prompts
  with the same beginning share them; they stay findable when nobody uses them, until their place is needed, those that
  were used longest ago first
- page 0 belongs to nobody: rows that have ended write there

Kwon et al. 2023 (PagedAttention, arXiv 2309.06180); sharing by tokens as in Zheng et al. 2023 (SGLang, 2312.07104).
"""

from collections import OrderedDict

PAGE = 64  # tokens: as many keys as the kernels read at a time


def pages_for(num_tokens: int) -> int:
    return -(-num_tokens // PAGE)


class PagePool:
    """The pages 1 to num_pages of a cache."""

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self.forget()

    def forget(self) -> None:
        """Nothing is held by anybody, and nothing is found again: for new weights."""
        self._free = list(range(self.num_pages, 0, -1))
        self._users: dict[int, int] = {}  # page -> sequences that have it
        # a node stands for a full page and all before it; 0 for the beginning. A number is never used again, so what
        # follows a page that was given away is not found
        self._nodes: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}  # (node before, tokens) -> (node, page)
        self._names: dict[int, tuple[int, tuple[int, ...]]] = {}  # page -> where it stands in _nodes
        self._unused: OrderedDict[int, None] = OrderedDict()  # findable pages that nobody has, the oldest first
        self._last_node = 0

    @property
    def num_free(self) -> int:
        """Pages that take() can give."""
        return len(self._free) + len(self._unused)

    def take(self, count: int) -> list[int]:
        """So many pages to write to, with one user. There must be enough."""
        pages = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        self._users.update(dict.fromkeys(pages, 1))
        return pages

    def _evict(self) -> int:
        page, _ = self._unused.popitem(last=False)
        del self._nodes[self._names.pop(page)]
        return page

    def find(self, ids: list[int]) -> list[int]:
        """The pages that hold the beginning of ids, but for the last token, whose logits are wanted. They are the
        caller's too from here on."""
        pages, node = [], 0
        for start in range(0, len(ids) - PAGE, PAGE):
            found = self._nodes.get((node, tuple(ids[start : start + PAGE])))
            if found is None:
                break
            node, page = found
            pages.append(page)
        self.share(pages)
        return pages

    def share(self, pages: list[int]) -> None:
        """One more user of these pages."""
        for page in pages:
            self._users[page] = self._users.get(page, 0) + 1
            self._unused.pop(page, None)

    def publish(self, ids: list[int], pages: list[int], known: tuple[int, int] = (0, 0)) -> tuple[int, int]:
        """The full ones of a sequence's pages, which hold ids from its beginning on, can be found. One that holds what
        another page does already stays as it is. Returns how many there are and where they end, which is `known` when
        the sequence has gone on: hashing tokens takes time."""
        count, node = known
        while count < len(pages) and (count + 1) * PAGE <= len(ids):
            name = (node, tuple(ids[count * PAGE : (count + 1) * PAGE]))
            found = self._nodes.get(name)
            if found is None:
                self._last_node += 1
                found = self._nodes[name] = (self._last_node, pages[count])
                self._names[pages[count]] = name
            node = found[0]
            count += 1
        return count, node

    def release_all(self) -> None:
        """No page has a user any more. All is made anew from what can be found: Ctrl-C may have come between two lines
        of take(), which has lost a page then."""
        self._users, self._names = {}, {page: name for name, (_, page) in self._nodes.items()}
        self._unused = OrderedDict.fromkeys([*self._unused, *reversed(self._names)])
        self._free = [page for page in range(self.num_pages, 0, -1) if page not in self._names]

    def release(self, pages: list[int]) -> None:
        """One user less. Later pages are given away first, since they are found by those before them."""
        for page in reversed(pages):
            self._users[page] -= 1
            if not self._users[page]:
                del self._users[page]
                if page in self._names:
                    self._unused[page] = None
                else:
                    self._free.append(page)
