"""The random numbers of sampling: a pure function of (seed, choice index, output index), so no state to lose.

They are hashed on the host, a batch at a time, and travel to the device with the other parameters of the step:
equal on every device by construction, and no generator to keep for a sequence.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Weyl increments: odd numbers with no pattern in their bits (golden ratio, and the square roots of 2 and 3).
_SEED_STEP = np.uint64(0x9E3779B97F4A7C15)
_CHOICE_STEP = np.uint64(0x6A09E667F3BCC909)
_INDEX_STEP = np.uint64(0xBB67AE8584CAA73B)


def uniform(
    seeds_S: NDArray[np.uint64], choices_S: NDArray[np.uint64], indices_S: NDArray[np.uint64]
) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) with 53 random bits; float64 [S]. Equal keys give equal numbers.

    Source: a 64-bit finaliser between the parts of the key, as in SplitMix64 (Steele, Lea and Flood 2014).
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is the point
        state = _mix(seeds_S + _SEED_STEP)
        state = _mix((state ^ (choices_S * _CHOICE_STEP)) + _SEED_STEP)
        state = _mix((state ^ (indices_S * _INDEX_STEP)) + _SEED_STEP)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection on 64 bits in which every input bit changes half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return result
