"""Which windows of the corpus a training step reads, as a pure function of (seed, step).

There is no shuffle buffer and no reader state. Each epoch is a keyed permutation of the window numbers, evaluated
only where it is needed: a Feistel network over the next power of four, walked along its cycles until it lands inside
the range. Resuming therefore needs the step number alone, and a batch does not know how many ranks share it.
Only integer arithmetic and BLAKE2b are used, so every platform draws the same order.

Source: Luby and Rackoff (1988) for the network; Black and Rogaway (2002), "Ciphers with arbitrary finite domains",
for cycle walking; Steele, Lea and Flood (2014) for the splitmix64 finaliser that is the round function.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

INITIAL_HASH = "0" * 64
"""The order hash before the first step."""

_ROUNDS = 8  # 4 already hide the order of large ranges; small ranges have few round values and want more
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True)
class SampleOrder:
    """The order in which `n_windows` windows are visited under `seed`: each exactly once per epoch.

    Raises ValueError if there is no window to visit.
    """

    n_windows: int
    seed: int

    def __post_init__(self) -> None:
        if self.n_windows < 1:
            raise ValueError(
                f"sample order: {self.n_windows} windows; the text is shorter than one sequence, "
                "use more text or a shorter seq_len"
            )

    def ids(self, step: int, batch_size: int) -> list[int]:
        """The `batch_size` window ids of optimizer step `step` (0-based); a batch may span epochs.

        Raises ValueError for a negative step or an empty batch.
        """
        if step < 0 or batch_size < 1:
            raise ValueError(
                f"sample order: step {step} with batch size {batch_size}; "
                "a step counts from 0 and a batch holds at least 1 sequence"
            )
        first, end = step * batch_size, (step + 1) * batch_size
        ids: list[int] = []
        while first < end:
            epoch, offset = divmod(first, self.n_windows)
            count = min(end - first, self.n_windows - offset)
            ids.extend(self._epoch_slice(epoch, offset, count))
            first += count
        return ids

    def _epoch_slice(self, epoch: int, offset: int, count: int) -> list[int]:
        """Entries offset … offset+count-1 of the permutation of one epoch."""
        half_bits = max(1, ((self.n_windows - 1).bit_length() + 1) // 2)
        keys = _round_keys(self.seed, epoch)
        values = np.arange(offset, offset + count, dtype=np.uint64)
        outside = np.ones(count, dtype=bool)
        while outside.any():  # the domain is at most 4 times the range: 4 rounds of walking on average
            values[outside] = _feistel(values[outside], keys, half_bits)
            outside = values >= np.uint64(self.n_windows)
        return [int(value) for value in values]


def shard(ids: Sequence[int], rank: int, world: int) -> list[int]:
    """The contiguous part of a global batch that `rank` of `world` reads; parts in rank order make up the batch.

    Raises ValueError where the batch cannot be shared equally: unequal parts would change the mean of the gradient.
    """
    if not 0 <= rank < world:
        raise ValueError(f"sample order: rank {rank} of {world} ranks does not exist")
    if len(ids) % world:
        raise ValueError(
            f"sample order: a batch of {len(ids)} sequences cannot be shared equally by {world} ranks; "
            f"use a multiple of {world}"
        )
    size = len(ids) // world
    return list(ids[rank * size : (rank + 1) * size])


def next_hash(prev_hex: str, step: int, ids: Sequence[int]) -> str:
    """Extend the order hash by one step: two runs with equal hashes have read equal windows in equal order.

    Starts from INITIAL_HASH; `ids` is the global batch, so the hash does not depend on the number of ranks.
    """
    text = f"{prev_hex}|{step}|{','.join(map(str, ids))}"
    return hashlib.sha256(text.encode()).hexdigest()


def _round_keys(seed: int, epoch: int) -> NDArray[np.uint64]:
    digest = hashlib.blake2b(f"{seed}|{epoch}".encode(), digest_size=8 * _ROUNDS, person=b"sample-order").digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _feistel(values: NDArray[np.uint64], keys: NDArray[np.uint64], half_bits: int) -> NDArray[np.uint64]:
    """A bijection of the integers below 4**half_bits."""
    bits, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << bits) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser; array arithmetic wraps modulo 2**64."""
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))
