from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from text_generation_server.generation.uniform import uniform

U64 = st.integers(0, 2**64 - 1)
PINNED = [0.13870941014555427, 0.6873806369114803, 0.23792445849308153]


def numbers(seeds: object, choices: object, indices: object) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return uniform(*(np.asarray(part, dtype=np.uint64) for part in (seeds, choices, indices)))


@given(seed=U64, choice=st.integers(0, 2**32 - 1), index=st.integers(0, 2**32 - 1))
def test_a_number_is_in_range_and_depends_on_its_key_alone(seed: int, choice: int, index: int) -> None:
    (alone,) = numbers([seed], [choice], [index])
    assert 0.0 <= alone < 1.0
    assert numbers([1, seed, 2], [0, choice, 9], [5, index, 5])[1] == alone


def test_the_numbers_of_a_seed_never_change() -> None:
    # Replay after a restart, and every release, must draw what was drawn before.
    keys = [(0, 0, 0), (42, 1, 7), (2**64 - 1, 2, 1000)]
    drawn = numbers(*zip(*keys, strict=True)).tolist()
    assert drawn == [plain_uniform(*key) for key in keys]
    assert drawn == PINNED


def plain_uniform(seed: int, choice: int, index: int) -> float:
    """The same in Python's integers, which do not overflow."""
    mask = 2**64 - 1

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    state = mix((seed + 0x9E3779B97F4A7C15) & mask)
    state = mix(((state ^ (choice * 0x6A09E667F3BCC909 & mask)) + 0x9E3779B97F4A7C15) & mask)
    state = mix(((state ^ (index * 0xBB67AE8584CAA73B & mask)) + 0x9E3779B97F4A7C15) & mask)
    return (state >> 11) / 2**53


def test_indices_seeds_and_choices_each_give_uniform_numbers() -> None:
    count, zeros, steps = 100_000, np.zeros(100_000), np.arange(100_000)
    for keys in ((zeros, zeros, steps), (steps, zeros, zeros), (zeros, steps, zeros)):
        drawn = numbers(*keys)
        assert stats.kstest(drawn, "uniform").pvalue > 1e-3
        assert np.unique(drawn).size == count


def test_neighbouring_keys_are_independent() -> None:
    steps = np.arange(50_000)
    for ours, theirs in (
        ((steps, 0, 0), (steps, 0, 1)),
        ((steps, 0, 0), (steps, 1, 0)),
        ((0, 0, steps), (1, 0, steps)),
        ((0, 0, steps), (0, 0, steps + 1)),
        ((0, 1, steps), (1, 0, steps)),
    ):
        first, second = (numbers(*np.broadcast_arrays(*keys)) for keys in (ours, theirs))
        table = np.bincount((first * 16).astype(int) * 16 + (second * 16).astype(int), minlength=256)
        assert stats.chisquare(table).pvalue > 1e-3
