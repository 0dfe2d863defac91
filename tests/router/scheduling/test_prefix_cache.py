from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from text_generation_router.scheduling.prefix_cache import PrefixTree

SALT = b"tenant"
SIZE = 4


def enter(tree: PrefixTree, token_ids: Sequence[int], blocks: Sequence[int], salt: bytes = SALT) -> list[int]:
    """Enter whole blocks and let go of them at once; returns those that the tree took."""
    node, known = tree.pin(salt, token_ids, len(blocks))
    keys = tree.keys(token_ids, len(known), len(blocks))
    node, taken = tree.extend(node, keys, blocks[len(known) :], past_known=True)
    tree.unpin(node)
    return taken


def find(tree: PrefixTree, token_ids: Sequence[int], salt: bytes = SALT) -> list[int]:
    node, blocks = tree.pin(salt, token_ids, len(token_ids) // SIZE)
    tree.unpin(node)
    return blocks


def test_the_longest_known_beginning_is_found_in_whole_blocks() -> None:
    tree = PrefixTree(SIZE)
    enter(tree, range(12), [7, 8, 9])
    assert find(tree, range(12)) == [7, 8, 9]
    assert find(tree, [*range(8), 99, 98, 97, 96]) == [7, 8]
    assert find(tree, [*range(7), 99]) == [7]
    assert find(tree, [99, *range(11)]) == []


def test_equal_tokens_behind_different_ones_are_different() -> None:
    tree = PrefixTree(SIZE)
    enter(tree, [1] * 4 + [5] * 4, [1, 2])
    enter(tree, [2] * 4 + [5] * 4, [3, 4])
    assert find(tree, [1] * 4 + [5] * 4) == [1, 2]
    assert find(tree, [2] * 4 + [5] * 4) == [3, 4]


def test_salts_share_nothing() -> None:
    tree = PrefixTree(SIZE)
    enter(tree, range(8), [1, 2])
    assert find(tree, range(8), b"other") == []
    assert enter(tree, range(8), [3, 4], b"other") == [3, 4]
    assert find(tree, range(8)) == [1, 2]


def test_what_is_known_already_is_not_taken_again() -> None:
    tree = PrefixTree(SIZE)
    first, _ = tree.pin(SALT, range(12), 2)
    second, _ = tree.pin(SALT, range(12), 2)
    first, taken = tree.extend(first, tree.keys(range(12), 0, 2), [1, 2], past_known=False)
    assert taken == [1, 2]
    second, taken = tree.extend(second, tree.keys(range(12), 0, 3), [5, 6, 7], past_known=False)
    assert taken == []
    second, taken = tree.extend(second, tree.keys(range(12), 0, 3), [5, 6, 7], past_known=True)
    assert taken == [7]
    assert find(tree, range(12)) == [1, 2, 7]
    tree.unpin(first)
    assert tree.num_evictable == 0
    tree.unpin(second)
    assert tree.num_evictable == tree.num_blocks == 3


def test_a_pinned_block_and_those_before_it_stay() -> None:
    tree = PrefixTree(SIZE)
    enter(tree, range(16), [1, 2, 3, 4])
    node, _ = tree.pin(SALT, range(16), 2)
    assert tree.num_evictable == 2
    assert tree.evict(9) == [4, 3]
    assert tree.evict(9) == []
    tree.unpin(node)
    assert tree.evict(9) == [2, 1]
    assert tree.num_blocks == 0


def test_the_least_recently_used_goes_first() -> None:
    tree = PrefixTree(SIZE)
    for first in (10, 20, 30):
        enter(tree, [first] * SIZE, [first])
    find(tree, [10] * SIZE)
    assert tree.evict(2) == [20, 30]
    assert find(tree, [10] * SIZE) == [10]


def test_a_beginning_that_others_use_outlives_their_ends() -> None:
    tree = PrefixTree(SIZE)
    enter(tree, [1] * 4 + [2] * 4, [1, 2])
    enter(tree, [1] * 4 + [3] * 4, [1, 3])
    enter(tree, [9] * 4, [9])
    assert tree.evict(3) == [2, 3, 1]


def test_use_without_eviction_leaves_nothing_behind() -> None:
    tree = PrefixTree(SIZE)
    enter(tree, range(8), [1, 2])
    for _ in range(5000):
        find(tree, range(8))
        find(tree, [9] * 8, b"a salt that never enters anything")
    assert len(tree._order) < 2000
    assert set(tree._roots) == {SALT}
    assert tree.evict(9) == [2, 1]
    assert not tree._roots


def test_everything_can_be_forgotten() -> None:
    tree = PrefixTree(SIZE)
    enter(tree, range(8), [1, 2])
    enter(tree, range(8), [3, 4], b"other")
    assert sorted(tree.clear()) == [1, 2, 3, 4]
    assert (tree.num_blocks, tree.num_evictable, tree.evict(9)) == (0, 0, [])
    assert find(tree, range(8)) == []


class SlowCache:
    """The same by plain search: every known beginning in a dictionary, with its block and its last use."""

    def __init__(self) -> None:
        self.blocks: dict[tuple[int, ...], int] = {}
        self.used: dict[tuple[int, ...], int] = {}
        self.clock = 0

    def find(self, token_ids: Sequence[int]) -> list[int]:
        self.clock += 1
        known = [beginning for beginning in _beginnings(token_ids) if beginning in self.blocks]
        self.used.update(dict.fromkeys(known, self.clock))
        return [self.blocks[beginning] for beginning in known]

    def enter(self, token_ids: Sequence[int], first_block: int) -> list[int]:
        taken = []
        for beginning in _beginnings(token_ids):
            if beginning not in self.blocks:
                self.blocks[beginning] = first_block + len(beginning) // SIZE
                taken.append(self.blocks[beginning])
        self.find(token_ids)
        return taken

    def evict(self) -> int:
        leaves = [each for each in self.blocks if not any(other[: len(each)] == each != other for other in self.blocks)]
        oldest = min(leaves, key=lambda beginning: self.used[beginning])
        return self.blocks.pop(oldest)


def _beginnings(token_ids: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(token_ids[:stop]) for stop in range(SIZE, len(token_ids) + 1, SIZE)]


@pytest.mark.parametrize("seed", range(20))
def test_it_finds_and_evicts_what_a_plain_search_does(seed: int) -> None:
    choose = random.Random(seed)
    tree, slow = PrefixTree(SIZE), SlowCache()
    for turn in range(400):
        # Few different tokens: beginnings are shared often.
        token_ids = [token for _ in range(choose.randint(1, 4)) for token in [choose.randint(0, 2)] * SIZE]
        action = choose.random()
        if action < 0.4:
            fresh = 10 * turn
            blocks = [fresh + stop for stop in range(1, len(token_ids) // SIZE + 1)]
            assert enter(tree, token_ids, blocks) == slow.enter(token_ids, fresh)
        elif action < 0.7:
            assert find(tree, token_ids) == slow.find(token_ids)
        elif slow.blocks:
            count = choose.randint(1, min(3, len(slow.blocks)))
            assert tree.evict(count) == [slow.evict() for _ in range(count)]
        assert tree.num_blocks == tree.num_evictable == len(slow.blocks)
