"""Decoded images that are kept in memory after their first use, so that later epochs decode nothing.

In: images of a split by their place in it, which counts through its shards. Out: the same bytes again. Invariants: an image that
cannot be decoded is never kept; what is computed does not depend on what is kept.
"""

from collections.abc import Sequence

import numpy as np
import torch

from harness.distributed.hardware import free_memory

FREE_SHARE, GPU_SHARE = 0.5, 0.25  # at most: of the memory that is free, and of all that a GPU has


class DecodedCache:
    """Images (N, H, W, 3) uint8 of a split, in host memory or on a device. Safe to use from many threads."""

    def __init__(self, shard_sizes: Sequence[int], height: int, width: int, memory: memoryview | torch.device):
        """An empty cache.

        Args:
            memory: the device that keeps the images; or host memory, `nbytes_of` bytes that are 0, where other processes may put
                and get images, too.
        """
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        n_images = int(self._sizes.sum())
        self._starts, shape = np.cumsum(self._sizes) - self._sizes, (n_images, height, width, 3)
        self.device = memory if isinstance(memory, torch.device) else None
        if isinstance(memory, torch.device):
            self._images, self._is_kept = (
                torch.empty(shape, dtype=torch.uint8, device=memory),
                np.zeros(n_images, np.uint8),
            )
        else:
            block = np.frombuffer(memory, np.uint8)
            self._images, self._is_kept = block[n_images:].reshape(shape), block[:n_images]

    def places(self, shards: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Places in the split of images by shard and row, all (n,) int64."""
        return self._starts[shards] + rows

    def is_kept(self, places: np.ndarray) -> np.ndarray:
        """Whether images are here, (n,) bool."""
        return self._is_kept[places] != 0

    def has_shard(self, shard: int) -> bool:
        """Whether all images of a shard are here."""
        start = self._starts[shard]
        return bool(self._is_kept[start : start + self._sizes[shard]].all())

    def put(self, places: np.ndarray, images: np.ndarray) -> None:
        """Keep images, (n, H, W, 3), in host memory."""
        assert isinstance(self._images, np.ndarray)
        self._images[places] = images
        self._is_kept[places] = 1  # last: whoever sees it finds the image

    def get(self, places: np.ndarray, out: np.ndarray) -> None:
        """Copy images that host memory keeps, (n, H, W, 3)."""
        np.take(self._images, places, axis=0, out=out, mode="clip")  # `raise`, the default, would copy twice

    def exchange(self, places: np.ndarray, is_kept: np.ndarray, images: torch.Tensor) -> torch.Tensor:
        """Keep the images that the device has not, and gather all of them there, in the current stream.

        Args:
            places, is_kept: (n,). images: (n, H, W, 3) on the host; those that are kept may be anything.

        Returns:
            (n, H, W, 3) on the device.
        """
        assert isinstance(self._images, torch.Tensor)
        new, index = np.flatnonzero(~is_kept), torch.from_numpy(places).to(self.device, non_blocking=True)
        if len(new):
            fresh = images if len(new) == len(places) else images[torch.from_numpy(new)]
            moved = torch.from_numpy(places[new]).to(self.device, non_blocking=True)
            self._images.index_copy_(0, moved, fresh.to(self.device, non_blocking=True))
            self._is_kept[places[new]] = 1
        return self._images.index_select(0, index)


def nbytes_of(shard_sizes: Sequence[int], height: int, width: int) -> int:
    """Bytes of a cache: of the images of a split, and one more for each."""
    return sum(shard_sizes) * (3 * height * width + 1)


def lacking_room(kind: str, n_bytes: int, device: torch.device) -> str:
    """Why images of so many bytes should not be kept there; nothing where there is room to spare.

    Args:
        kind: host or device.
    """
    size = f"{n_bytes / 1e9:.1f} GB of decoded images"
    if kind == "device":
        if device.type != "cuda":
            return "there is no GPU"
        free, total = torch.cuda.mem_get_info(device)
        if n_bytes > min(FREE_SHARE * free, GPU_SHARE * total):
            return f"{size} are more than {FREE_SHARE:.0%} of the {free / 1e9:.1f} GB free on the GPU, or {GPU_SHARE:.0%} of all"
    elif n_bytes > FREE_SHARE * (free := free_memory()):
        return f"{size} are more than {FREE_SHARE:.0%} of the {free / 1e9:.1f} GB free in host memory"
    return ""


def choose_kind(asked: str, of_ranks: Sequence[dict[str, str]]) -> tuple[str, str]:
    """The first kind that every rank has room for, in the order of what was asked for.

    Args:
        asked: host, device or auto. of_ranks: what each rank says against each kind; nothing where it has room.

    Returns:
        none, host or device, and what was said against those before it.
    """
    said = []
    for kind in ("host",) if asked == "host" else ("device", "host"):
        against = [answer[kind] for answer in of_ranks if answer[kind]]
        if not against:
            return kind, "; ".join(said)
        said.append(against[0])
    return "none", "; ".join(said)
