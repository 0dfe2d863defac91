from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from text_generation_router.scheduling.blocks import BlockAllocator
from text_generation_router.scheduling.leases import Lease, Leases

SALT = b""
SIZE = 4


def leases(num_blocks: int = 16, *, caching: bool = True) -> Leases:
    return Leases(BlockAllocator(num_blocks, SIZE), prefix_caching=caching)


def take(held: Leases, num_tokens: int, *, salt: bytes = SALT, reuse: bool = True, spare: int = 0) -> Lease:
    lease = held.take(range(num_tokens), salt=salt, reuse=reuse, spare=spare)
    assert lease is not None
    return lease


def compute(held: Leases, num_tokens: int) -> None:
    """Leave the blocks of a prompt in the cache."""
    lease = take(held, num_tokens)
    held.enter(lease, range(num_tokens), num_tokens)
    held.give_back(lease)


def test_a_second_prompt_reuses_what_the_first_has_computed() -> None:
    held = leases()
    first = take(held, 10)
    assert (first.num_cached_tokens, len(first.table)) == (0, 3)
    held.enter(first, range(10), 10)
    second = take(held, 10)
    assert (second.num_cached_tokens, second.table[:2]) == (8, first.table[:2])
    assert second.table[2] != first.table[2]
    assert held.num_used == 4


@pytest.mark.parametrize(("num_tokens", "num_cached"), [(8, 4), (9, 8), (12, 8), (4, 0), (1, 0)])
def test_one_token_at_least_is_left_to_compute(num_tokens: int, num_cached: int) -> None:
    held = leases()
    compute(held, 12)
    assert take(held, num_tokens).num_cached_tokens == num_cached


def test_only_full_blocks_of_what_is_computed_are_shared() -> None:
    held = leases()
    lease = take(held, 12)
    held.enter(lease, range(12), 7)
    assert take(held, 12).num_cached_tokens == 4


def test_a_prompt_that_waits_takes_what_another_has_computed_meanwhile() -> None:
    held = leases(num_blocks=6)  # both prompts fit, and nothing else
    first, second = take(held, 12), take(held, 12)
    held.enter(first, range(12), 12)
    again = held.retake(second, range(12), salt=SALT, num_sent=4)
    assert again is not None
    assert again.num_cached_tokens == 8
    assert again.table[:2] == first.table[:2]
    assert second.table == []
    assert held.num_used == 4
    assert held.retake(again, range(12), salt=SALT, num_sent=8) is None, "nothing new"


def test_generated_tokens_are_shared_too() -> None:
    held = leases()
    lease = take(held, 6)
    held.enter(lease, range(6), 6)
    assert held.grow(lease, 1) is not None
    held.enter(lease, range(12), 11)
    held.give_back(lease)
    assert take(held, 12).num_cached_tokens == 8


def test_without_reuse_nothing_is_taken_from_the_cache() -> None:
    held = leases()
    compute(held, 8)
    assert take(held, 9, reuse=False).num_cached_tokens == 0


def test_salts_share_nothing() -> None:
    held = leases()
    compute(held, 8)
    assert take(held, 9, salt=b"other").num_cached_tokens == 0


def test_what_two_computed_at_once_is_kept_once() -> None:
    held = leases()
    first, second = take(held, 9), take(held, 9)
    assert not set(first.table) & set(second.table)
    for lease in (first, second):
        held.enter(lease, range(9), 9)
    assert held.num_cached == 2
    assert held.num_used == 6
    held.give_back(first)
    assert held.num_used == 3
    held.give_back(second)
    assert (held.num_used, held.num_cached, held.num_available) == (0, 2, 16)


def test_a_sequence_keeps_no_block_of_the_cache_that_it_does_not_read() -> None:
    held = leases(num_blocks=8)
    first, second = take(held, 9), take(held, 17)
    held.enter(first, range(9), 9)
    held.enter(second, range(17), 17)
    held.give_back(first)
    assert held.num_used == len(second.table) == 5
    assert len(held.grow(second, 3) or []) == 3
    held.give_back(second)
    assert (held.num_used, held.num_cached) == (0, 4)
    assert take(held, 17).num_cached_tokens == 16


def test_what_another_had_and_lost_is_entered_whole_at_the_end() -> None:
    held = leases(num_blocks=8)
    first, second = take(held, 9), take(held, 17)
    held.enter(first, range(9), 9)
    held.enter(second, range(17), 17)
    held.give_back(first)
    assert held.grow(second, 2) is not None
    assert (held.num_cached, held.num_evictions) == (1, 1)
    held.give_back(second)
    assert held.num_cached == 4
    assert take(held, 17).num_cached_tokens == 16


def test_the_cache_gives_way_to_sequences() -> None:
    held = leases(num_blocks=4)
    compute(held, 16)
    assert (held.num_cached, held.num_available) == (4, 4)
    other = held.take([9] * 12, salt=SALT)
    assert other is not None
    assert (held.num_cached, held.num_evictions, held.num_available) == (1, 3, 1)
    held.give_back(other)
    assert take(held, 8).num_cached_tokens == 4


def test_what_does_not_fit_changes_nothing() -> None:
    held = leases(num_blocks=4)
    compute(held, 8)
    assert held.take(range(17), salt=SALT) is None
    assert held.take(range(16), salt=SALT, spare=1) is None
    # Reused blocks cannot make room for the others at the same time.
    lease = take(held, 9)
    assert held.take(range(100, 108), salt=SALT) is None
    assert (held.num_used, held.num_cached) == (3, 2)
    assert held.grow(lease, 2) is None
    assert len(held.grow(lease, 1) or []) == 1


def test_a_lease_given_back_twice_is_given_back_once() -> None:
    held = leases()
    lease = take(held, 9)
    held.enter(lease, range(9), 9)
    held.give_back(lease)
    held.give_back(lease)
    assert (held.num_used, held.num_available) == (0, 16)


def test_forgetting_empties_the_cache() -> None:
    held = leases()
    compute(held, 9)
    held.forget()
    assert (held.num_cached, held.num_available) == (0, 16)
    assert take(held, 9).num_cached_tokens == 0


def test_without_a_cache_nothing_is_kept() -> None:
    held = leases(caching=False)
    compute(held, 9)
    assert take(held, 9).num_cached_tokens == 0
    assert held.num_cached == 0
    held.forget()


@dataclass(slots=True, eq=False)
class Running:
    token_ids: list[int]
    salt: bytes
    lease: Lease


@pytest.mark.parametrize("caching", [True, False])
def test_every_block_has_one_owner_through_100_000_operations(caching: bool) -> None:
    """What lies in a block is written down beside it: whoever is handed a cached block gets the tokens it asked for."""
    choose = random.Random(1)
    num_blocks = 40
    held = leases(num_blocks, caching=caching)
    running: list[Running] = []
    content: dict[int, tuple[bytes, tuple[int, ...]]] = {}
    hits = retaken = 0
    for turn in range(100_000):
        action = choose.random()
        if action < 0.3:
            token_ids = [choose.randint(0, 1) for _ in range(choose.randint(1, 24))]
            salt = choose.choice([b"", b"a"])
            before = held.num_available
            lease = held.take(token_ids, salt=salt, reuse=choose.random() < 0.9, spare=choose.randint(0, 3))
            if lease is None:
                assert held.num_available == before
            else:
                hits += lease.num_cached_tokens
                for index in range(lease.num_cached_tokens // SIZE):
                    assert content[lease.table[index]] == (salt, tuple(token_ids[: (index + 1) * SIZE]))
                running.append(Running(token_ids, salt, lease))
        elif running:
            sequence = choose.choice(running)
            if action < 0.6:  # it grows, and what it writes changes no block that somebody else reads
                sequence.token_ids.append(choose.randint(0, 1))
                missing = held.blocks_for(len(sequence.token_ids)) - len(sequence.lease.table)
                if held.grow(sequence.lease, missing) is None:
                    sequence.token_ids.pop()
            elif action < 0.65:  # it goes on from what others have computed meanwhile, if it has computed nothing
                old, num_cached = sequence.lease, sequence.lease.num_cached_tokens
                if old.num_entered * SIZE > num_cached:
                    continue
                new = held.retake(old, sequence.token_ids, salt=sequence.salt, num_sent=num_cached)
                if new is None:
                    continue
                retaken += 1
                assert new.num_cached_tokens > num_cached
                assert len(new.table) == held.blocks_for(len(sequence.token_ids))
                for index in range(new.num_cached_tokens // SIZE):
                    assert content[new.table[index]] == (sequence.salt, tuple(sequence.token_ids[: (index + 1) * SIZE]))
                sequence.lease = new
            elif action < 0.8:
                num_computed = choose.randint(0, len(sequence.token_ids))
                for index in range(sequence.lease.num_entered, num_computed // SIZE):
                    block = sequence.lease.table[index]
                    assert block in sequence.lease.own
                    content[block] = sequence.salt, tuple(sequence.token_ids[: (index + 1) * SIZE])
                held.enter(sequence.lease, sequence.token_ids, num_computed)
            elif action < 0.999:
                running.remove(sequence)
                held.give_back(sequence.lease)
            else:
                for each in running:
                    held.give_back(each.lease)
                running.clear()
                held.forget()
        own = [block for sequence in running for block in sequence.lease.own]
        assert len(own) == len(set(own))
        # Free, owned by a sequence, owned by the cache: together all there are.
        assert held._blocks.num_free + len(own) + held.num_cached == num_blocks
        if held._tree is not None and turn % 100 == 0:
            cached = _blocks_in(held)
            assert len(cached) == len(set(cached)) == held.num_cached
            assert not set(cached) & set(own)
            read = {block for sequence in running for block in sequence.lease.table} - set(own)
            assert read <= set(cached)
            assert held.num_cached - held._tree.num_evictable == len(read)
    assert (hits > 5_000) is caching
    assert (retaken > 100) is caching
    for sequence in running:
        held.give_back(sequence.lease)
    assert held.num_available == num_blocks


def _blocks_in(held: Leases) -> list[int]:
    assert held._tree is not None
    blocks = []
    left = list(held._tree._roots.values())
    while left:
        node = left.pop()
        left += node.children.values()
        if node.parent is not None:
            blocks.append(node.block)
    return blocks
