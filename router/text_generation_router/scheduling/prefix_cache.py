"""Computed blocks by the tokens in and before them, so that equal beginnings are computed once.

A radix tree whose edges are the tokens of one block. A node is pinned while a running sequence reads its block; all
nodes above a pinned one are pinned too. What is not pinned can be evicted, least recently used first, from the leaves.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterable, Iterator, Sequence

_MOST_STALE = 1024
"""Entries of the eviction order that may be out of date, beside one for each node, before they are sorted out."""


class Node:
    """One block, or the root of a salt, which has none."""

    __slots__ = ("block", "children", "key", "last_used", "parent", "pins")

    def __init__(self, parent: Node | None, key: bytes, block: int, last_used: int) -> None:
        self.parent = parent
        self.key = key
        """The block's tokens; of a root, its salt."""
        self.block = block
        self.children: dict[bytes, Node] = {}
        self.pins = 0
        """Sequences that hold this node or one below it."""
        self.last_used = last_used

    @property
    def is_evictable_leaf(self) -> bool:
        return self.pins == 0 and not self.children and self.parent is not None


_Entry = tuple[int, int, Node]
"""When a leaf was used last, the number of the entry, and the leaf."""


def _counts(entry: _Entry) -> bool:
    """Whether an entry is what its node would be entered as now. A node has many over time; use makes them stale."""
    last_used, _, node = entry
    return node.last_used == last_used and node.is_evictable_leaf


class PrefixTree:
    """Which blocks hold which tokens. It owns the blocks that were given to it until it evicts them.

    A salt separates tenants: what one of them computed tells another nothing, not even by how fast the answer comes.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.num_blocks = 0
        self.num_evictable = 0
        """Blocks that no sequence reads."""
        self._roots: dict[bytes, Node] = {}
        self._clock = 0
        self._order: list[_Entry] = []
        """A heap; most entries count, see `_counts`."""
        self._entries = 0

    def keys(self, token_ids: Sequence[int], first_block: int, stop_block: int) -> Iterator[bytes]:
        """The tokens of whole blocks as edges: hashing bytes costs a tenth of hashing a tuple of integers."""
        tokens = array("I", token_ids[first_block * self.block_size : stop_block * self.block_size])
        packed, step = tokens.tobytes(), tokens.itemsize * self.block_size
        return (packed[place : place + step] for place in range(0, len(packed), step))

    def pin(self, salt: bytes, token_ids: Sequence[int], most_blocks: int) -> tuple[Node, list[int]]:
        """Find the longest known beginning, of ``most_blocks`` whole blocks at most; it stays until `unpin`.

        Returns: its last node, which may be a root, and the blocks down to it.
        """
        node = self._roots.get(salt)
        if node is None:
            node = self._roots[salt] = Node(None, salt, 0, self._clock)
        node.pins += 1
        blocks: list[int] = []
        for key in self.keys(token_ids, 0, most_blocks):
            child = node.children.get(key)
            if child is None:
                break
            self._pin_one(child)
            node = child
            blocks.append(node.block)
        return node, blocks

    def extend(
        self, node: Node, keys: Iterable[bytes], blocks: Sequence[int], *, past_known: bool
    ) -> tuple[Node, list[int]]:
        """Enter the blocks that follow a pinned node, and pin them in its place.

        Where the tree has a block's tokens already, in a block of its own, entering ends, or goes on below that one if
        ``past_known``: pinned too then, for the sake of what follows it.

        Returns: the last node, and those of ``blocks`` that the tree owns now.
        """
        taken: list[int] = []
        for key, block in zip(keys, blocks, strict=True):
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = Node(node, key, block, self._clock)
                child.pins = 1
                self.num_blocks += 1
                taken.append(block)
            elif past_known:
                self._pin_one(child)
            else:
                break
            node = child
        return node, taken

    def unpin(self, node: Node) -> None:
        """Let go of a node and all above it."""
        self._clock += 1
        last = node
        above: Node | None = node
        while above is not None:
            above.pins -= 1
            above.last_used = self._clock
            if above.parent is not None:
                self.num_evictable += above.pins == 0
            else:
                self._drop_unused(above)
            above = above.parent
        self._enter(last)

    def evict(self, count: int) -> list[int]:
        """Give up to ``count`` blocks that nobody reads, those first that were not used for longest."""
        blocks: list[int] = []
        while len(blocks) < count and self._order:
            entry = heapq.heappop(self._order)
            if not _counts(entry):
                continue
            node = entry[2]
            parent = node.parent
            assert parent is not None
            del parent.children[node.key]
            blocks.append(node.block)
            self.num_blocks -= 1
            self.num_evictable -= 1
            if parent.parent is None:
                self._drop_unused(parent)
            self._enter(parent)
        return blocks

    def clear(self) -> list[int]:
        """Forget everything, pinned or not; returns the blocks."""
        blocks: list[int] = []
        left = list(self._roots.values())
        while left:
            node = left.pop()
            left += node.children.values()
            if node.parent is not None:
                blocks.append(node.block)
        self._roots.clear()
        self._order.clear()
        self.num_blocks = self.num_evictable = 0
        return blocks

    def _drop_unused(self, root: Node) -> None:
        """Forget a salt that has no blocks, once nobody computes under it."""
        if root.pins == 0 and not root.children:
            del self._roots[root.key]

    def _pin_one(self, node: Node) -> None:
        self.num_evictable -= node.pins == 0
        node.pins += 1

    def _enter(self, node: Node) -> None:
        """Put a node into the order of eviction, if it can be evicted as it is."""
        if not node.is_evictable_leaf:
            return
        self._entries += 1
        heapq.heappush(self._order, (node.last_used, self._entries, node))
        if len(self._order) > 2 * self.num_blocks + _MOST_STALE:
            self._order = [entry for entry in self._order if _counts(entry)]
            heapq.heapify(self._order)
