"""The bookkeeping of the pages of a paged KV cache: the host's side, without tensors.

- a sequence has a list of pages, PAGE tokens each; a page may belong to several sequences, which only read it then
- full pages are found again by their tokens and all tokens before them, so samples of one prompt and prompts with the
  same beginning share them; unused pages stay findable until they are evicted, the least recently used first
- page 0 belongs to no sequence: rows that have ended write to it

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
        """Frees all pages and forgets their contents: for new weights."""
        self._free = list(range(self.num_pages, 0, -1))
        self._users: dict[int, int] = {}  # page -> number of sequences that use it
        # a node stands for a full page and all pages before it; 0 for the beginning. Numbers are never reused, so pages
        # that follow an evicted one are not found
        self._nodes: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}  # (node before, tokens) -> (node, page)
        self._names: dict[int, tuple[int, tuple[int, ...]]] = {}  # page -> its key in _nodes
        self._unused: OrderedDict[int, None] = OrderedDict()  # findable pages without users, the oldest first
        self._last_node = 0

    @property
    def num_free(self) -> int:
        """Number of pages that take() can give."""
        return len(self._free) + len(self._unused)

    def take(self, count: int) -> list[int]:
        """Returns `count` pages to write to, each with one user. There must be enough."""
        pages = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        self._users.update(dict.fromkeys(pages, 1))
        return pages

    def _evict(self) -> int:
        page, _ = self._unused.popitem(last=False)
        del self._nodes[self._names.pop(page)]
        return page

    def find(self, ids: list[int]) -> list[int]:
        """Returns pages that hold the beginning of ids, never the last token, whose logits are needed. The caller
        becomes a user of these pages."""
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
        """Adds a user to each of these pages."""
        for page in pages:
            self._users[page] = self._users.get(page, 0) + 1
            self._unused.pop(page, None)

    def publish(self, ids: list[int], pages: list[int], known: tuple[int, int] = (0, 0)) -> tuple[int, int]:
        """Makes the full pages of a sequence findable, which hold its ids from the first on. A page whose content is
        findable in another page is left out. Returns (number of full pages, node of the last), which saves hashing
        tokens again when it is passed as `known` for the same sequence, grown longer."""
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
        """Removes all users. Rebuilds all state from the findable pages: Ctrl-C between two lines of take() may have
        lost a page."""
        self._users, self._names = {}, {page: name for name, (_, page) in self._nodes.items()}
        self._unused = OrderedDict.fromkeys([*self._unused, *reversed(self._names)])
        self._free = [page for page in range(self.num_pages, 0, -1) if page not in self._names]

    def release(self, pages: list[int]) -> None:
        """Removes a user from each page. Later pages are evicted first, since they are found through earlier ones."""
        for page in reversed(pages):
            self._users[page] -= 1
            if not self._users[page]:
                del self._users[page]
                if page in self._names:
                    self._unused[page] = None
                else:
                    self._free.append(page)
