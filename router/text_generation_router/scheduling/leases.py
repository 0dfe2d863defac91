"""Who holds which blocks: a sequence alone, the prefix cache, or sequences through the prefix cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from text_generation_router.scheduling.blocks import BlockAllocator
from text_generation_router.scheduling.prefix_cache import Node, PrefixTree


@dataclass(slots=True, eq=False)
class Lease:
    """The blocks of one running sequence."""

    table: list[int]
    """In the order of its tokens."""
    num_cached_tokens: int
    """Leading tokens that were computed before it came."""
    own: set[int]
    """Blocks of the table that are its alone; the cache owns the others, and keeps them as long as it is needed."""
    last: Node | None = None
    """The deepest node of the cache that it reads; None without a cache. It keeps no block there that it does not."""
    num_entered: int = 0
    """Leading blocks that are in the cache, or in ``later``."""
    later: list[tuple[bytes, int]] = field(default_factory=list)
    """Tokens and blocks that enter the cache at the end: it has the first of them from another sequence that computed
    the same at the same time, and to enter the others would keep that one's blocks although nobody reads them."""


class Leases:
    """Hands blocks to sequences and takes them back; keeps what was computed as long as nobody needs the room."""

    def __init__(self, blocks: BlockAllocator, *, prefix_caching: bool) -> None:
        self.block_size = blocks.block_size
        self.num_blocks = blocks.num_blocks
        self.num_evictions = 0
        """Blocks that the cache had to give up."""
        self._blocks = blocks
        self._tree = PrefixTree(blocks.block_size) if prefix_caching else None

    @property
    def num_available(self) -> int:
        """Blocks that can be had: free ones, and those that only the cache holds."""
        return self._blocks.num_free + (self._tree.num_evictable if self._tree is not None else 0)

    @property
    def num_used(self) -> int:
        """Blocks that running sequences need."""
        return self.num_blocks - self.num_available

    @property
    def num_cached(self) -> int:
        """Blocks of the prefix cache, whether sequences read them or not."""
        return self._tree.num_blocks if self._tree is not None else 0

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold ``num_tokens`` tokens."""
        return self._blocks.blocks_for(num_tokens)

    def take(self, token_ids: Sequence[int], *, salt: bytes, reuse: bool = True, spare: int = 0) -> Lease | None:
        """Blocks for a sequence; None, and nothing changed, if that leaves fewer than ``spare`` for others.

        What the cache knows of its beginning is reused, but for the last token: something has to be computed to sample
        behind it.
        """
        lease = self._begin(token_ids, salt, reuse=reuse)
        missing = self.blocks_for(len(token_ids)) - len(lease.table)
        if missing + spare > self.num_available:
            self._unpin(lease)
            return None
        own = self.grow(lease, missing)
        assert own is not None
        return lease

    def retake(self, lease: Lease, token_ids: Sequence[int], *, salt: bytes, num_sent: int) -> Lease | None:
        """Another lease for a prompt that is not computed yet, if the cache knows more of it now than ``num_sent``.

        The old one is given back then. None, and nothing changed, if the cache knows no more.
        """
        new = self._begin(token_ids, salt, reuse=True)
        if new.num_cached_tokens <= num_sent:
            self._unpin(new)
            return None
        self.give_back(lease)
        own = self.grow(new, self.blocks_for(len(token_ids)) - len(new.table))
        assert own is not None, "it needs fewer than it gave back"
        return new

    def grow(self, lease: Lease, count: int) -> list[int] | None:
        """``count`` more blocks behind those of the lease, or None when there are not that many."""
        lacking = count - self._blocks.num_free
        if lacking > 0:
            if self._tree is None or lacking > self._tree.num_evictable:
                return None
            evicted = self._tree.evict(lacking)
            self.num_evictions += len(evicted)
            self._blocks.free(evicted)
        taken = self._blocks.allocate(count)
        assert taken is not None
        lease.own.update(taken)
        lease.table += taken
        return taken

    def enter(self, lease: Lease, token_ids: Sequence[int], num_computed: int) -> None:
        """Let others share the blocks that are full of the first ``num_computed`` tokens; known to be good."""
        stop = num_computed // self.block_size
        if self._tree is None or lease.last is None or stop <= lease.num_entered:
            return
        keys = self._tree.keys(token_ids, lease.num_entered, stop)
        lease.later += zip(keys, lease.table[lease.num_entered : stop], strict=True)
        lease.num_entered = stop
        self._enter(lease, past_known=False)

    def give_back(self, lease: Lease) -> None:
        """End a lease; twice is harmless."""
        self._enter(lease, past_known=True)
        self._unpin(lease)
        self._blocks.free(lease.own)
        lease.own = set()
        lease.table = []

    def forget(self) -> None:
        """Empty the cache: what the blocks held is no more. Leases have to be given back first."""
        if self._tree is not None:
            self._blocks.free(self._tree.clear())

    def _begin(self, token_ids: Sequence[int], salt: bytes, *, reuse: bool) -> Lease:
        """A lease of what the cache knows, if that is to be used; the blocks behind it are still missing."""
        lease = Lease([], 0, set())
        if self._tree is not None:
            most = (len(token_ids) - 1) // self.block_size if reuse else 0
            lease.last, lease.table = self._tree.pin(salt, token_ids, most)
            lease.num_entered = len(lease.table)
            lease.num_cached_tokens = lease.num_entered * self.block_size
        return lease

    def _enter(self, lease: Lease, *, past_known: bool) -> None:
        if self._tree is None or lease.last is None or not lease.later:
            return
        keys, blocks = zip(*lease.later, strict=True)
        lease.last, taken = self._tree.extend(lease.last, keys, blocks, past_known=past_known)
        lease.own.difference_update(taken)
        # Without ``past_known`` it takes leading ones; with it, the lease is at its end.
        del lease.later[: len(taken)]

    def _unpin(self, lease: Lease) -> None:
        if self._tree is not None and lease.last is not None:
            self._tree.unpin(lease.last)
        lease.last = None
