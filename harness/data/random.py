"""Counter-based random numbers: hashes of (seed, stream, position), with no state that advances.

In: a seed, the number of a stream (an epoch), int64 positions on any device. Out: uniform numbers, or checksums.
Invariants: a number depends on its arguments alone, so it is the same bits on every device, at any number of processes
and after any resume; draw k of a position does not depend on how many draws are taken, so a draw appended to a list of
names changes none of those before it.
"""

import hashlib
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch

Draws = TypeVar("Draws", bound=NamedTuple)


def named_uniforms(seed: int, stream: int, positions: torch.Tensor, names: type[Draws]) -> Draws:
    """The draws of each position by name; a name's place in `names` is the number of its draw.

    Append names, never insert, reorder or remove them: the draws behind would take other values.

    Args:
        positions: (B,) int64. names: a NamedTuple class whose fields are the draws.

    Returns:
        an instance of `names`, each field (B,) float32 in [0, 1).
    """
    return names._make(uniforms(seed, stream, positions, len(names._fields)).unbind(1))


def uniforms(seed: int, stream: int, positions: torch.Tensor, n: int) -> torch.Tensor:
    """Random numbers that depend on their arguments alone: SplitMix64 (Steele, Lea, Flood 2014) as a hash.

    Args:
        positions: (B,) int64. n: draws for each.

    Returns:
        (B, n) float32 in [0, 1), multiples of 2^-24: the same bits on every device.
    """
    state = _mix(positions + _stream_key(seed, stream))  # (B,)
    draws = _mix(state[:, None] + _GOLDEN * torch.arange(1, n + 1, device=positions.device))  # (B, n)
    return _shift(draws, 40).float() * 2.0**-24


def stream_checksum(keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """A number for which samples stand at which positions; checksums of parts add up to that of the whole.

    Args:
        keys, positions: (B,) int64.

    Returns:
        scalar float64, a whole number; sums stay exact up to 2^17 samples.
    """
    return _shift(_mix(_mix(positions) + keys), 28).double().sum()


def noise_seed(seed: int, step: int, position: int) -> int:
    """A seed for a generator that advances (dropout): its arguments alone make it, and others make another.

    Args:
        seed: of the run. step: of the optimizer. position: in the global batch, of the first image that it is for.

    Returns:
        0 to 2^63 - 1.
    """
    digest = hashlib.blake2b(f"{seed} {step} {position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_generators(device: torch.device, seed: int) -> None:
    """`torch.manual_seed` for the CPU and one device: 1 us in place of 105, since it looks for no other kind of device."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


@lru_cache
def _stream_key(seed: int, stream: int) -> int:
    """What the numbers of one stream start from; on the CPU, as making it on a GPU would wait for the GPU."""
    return int(_mix(_mix(torch.tensor([seed])) + stream).item())


def _signed(value: int) -> int:
    """An unsigned 64-bit constant as the int64 of the same bits."""
    return value - 2**64 if value >= 2**63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, odd: SplitMix64's increment


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift: torch's is arithmetic on int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser; int64 arithmetic wraps, as it must."""
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)
