"""Counter-based uniform random numbers: a pure function of (seed, iteration, prompt, sample,
position).

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), vectorised
over its counter. No state: a response can be replayed token by token in any batch, on any rank,
after any crash.
"""

from __future__ import annotations

import numpy as np

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_ROUNDS = 10


def philox4x32(counter_4N: np.ndarray, key: tuple[int, int | np.ndarray]) -> np.ndarray:
    """[4, N] uint64 holding 32-bit words -> [4, N] random 32-bit words.  The second word of the key is
    one for all, or [N].
    """
    c0, c1, c2, c3 = counter_4N.astype(np.uint64)
    k0, k1 = np.uint64(key[0] & 0xFFFFFFFF), np.asarray(key[1], np.uint64) & _LOW
    for _ in range(_ROUNDS):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ k0,
            product1 & _LOW,
            (product0 >> _SHIFT) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack([c0, c1, c2, c3])


def uniform(
    seed: int,
    iteration: int | np.ndarray,
    prompt_N: np.ndarray,
    sample_N: np.ndarray,
    position: int | np.ndarray,
) -> np.ndarray:
    """[N] float64 in [0, 1): the number that draws the token at ``position`` of each response.

    ``prompt_N``: 64-bit prompt numbers; ``sample_N``: which of a prompt's responses; ``iteration``
    and ``position``: one for all, or [N].
    """
    prompt_N = prompt_N.astype(np.uint64)
    counter_4N = np.stack(
        [
            prompt_N & _LOW,
            prompt_N >> _SHIFT,
            sample_N.astype(np.uint64),
            np.broadcast_to(np.asarray(position, np.uint64), prompt_N.shape),
        ]
    )
    words = philox4x32(counter_4N, (seed, iteration))
    return (
        (words[0] >> np.uint64(5)) * 67108864.0 + (words[1] >> np.uint64(6))
    ) / 9007199254740992.0  # 53 bits
