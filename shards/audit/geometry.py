"""Whether two images show one thing: key points that agree on one shift, turn, scale and, where asked, mirroring.

In: `Features` and two rows. Out: an `Alignment`. Invariants: the same features give the same alignment; two images without key
points agree on nothing.
"""

from dataclasses import dataclass

import cv2  # pyright: ignore[reportMissingImports] - an extra
import numpy as np

from shards.audit.features import SIDE, SMALL, Features

RATIO = 0.85  # of the distances to the nearest and the second nearest descriptor (Lowe 2004), at most
TOLERANCE = 5.0  # pixels between where a key point is and where the alignment puts it
LARGEST_SCALE = 4.0
LEAST_OVERLAP = 150  # pixels of thumbnails, for a correlation
# A SIFT descriptor is 4 x 4 places by 8 directions. In a mirror, the rows of places and the directions run the other way.
MIRRORED = np.arange(128).reshape(4, 4, 8)[::-1][:, :, (-np.arange(8)) % 8].ravel()


@dataclass(frozen=True)
class Alignment:
    """How image b lies on image a.

    inliers: key points that agree, each place counted once. matrix: (2, 3), from points of a to points of b (mirrored first, where
    `mirrored`), in pixels of the scaled images. correlation: of the grey values where both overlap, -1 to 1, by Pearson; overlap: the
    share of a that b covers.
    """

    inliers: int
    mirrored: bool
    matrix: np.ndarray | None = None
    correlation: float = 0.0
    overlap: float = 0.0

    @property
    def scale(self) -> float:
        """How much larger b shows what a shows."""
        return 0.0 if self.matrix is None else float(np.hypot(self.matrix[0, 0], self.matrix[1, 0]))

    @property
    def angle(self) -> float:
        """By how many degrees b is turned, clockwise on the screen, -180 to 180."""
        return 0.0 if self.matrix is None else float(np.degrees(np.arctan2(self.matrix[1, 0], self.matrix[0, 0])))


def align(features: Features, a: int, b: int, mirrored: bool) -> Alignment:
    """The similarity transform that most key points of two images agree on, by RANSAC (Fischler and Bolles 1981)."""
    starts = features.starts
    (points_a, of_a), (points_b, of_b) = (
        (features.points[starts[row] : starts[row + 1]], features.descriptors[starts[row] : starts[row + 1]])
        for row in (a, b)
    )
    if mirrored:
        of_b, points_b = of_b[:, MIRRORED], mirror(points_b, features.sizes[b, 0])
    pairs = match(of_a, of_b)
    if len(pairs) < 4:
        return Alignment(0, mirrored)
    here, there = points_a[pairs[:, 0]], points_b[pairs[:, 1]]
    matrix, agrees = cv2.estimateAffinePartial2D(
        here, there, method=cv2.RANSAC, ransacReprojThreshold=TOLERANCE, maxIters=500, confidence=0.99
    )
    if matrix is None or not 1 / LARGEST_SCALE < np.hypot(matrix[0, 0], matrix[1, 0]) < LARGEST_SCALE:
        return Alignment(0, mirrored)
    agrees = agrees.ravel().astype(bool)
    inliers = min(_places(here[agrees]), _places(there[agrees]))
    correlation, overlap = _correlate(features, a, b, matrix, mirrored)
    return Alignment(inliers, mirrored, matrix, correlation, overlap)


def match(of_a: np.ndarray, of_b: np.ndarray) -> np.ndarray:
    """Descriptors that are each other's nearest, and far nearer than the second: (m, 2) int64 of (k, 128) and (l, 128) uint8."""
    if len(of_a) < 2 or len(of_b) < 2:
        return np.zeros((0, 2), np.int64)
    first, second = of_a.astype(np.float32), of_b.astype(np.float32)
    distance = (first**2).sum(1)[:, None] + (second**2).sum(1)[None] - 2 * (first @ second.T)
    rows = np.arange(len(distance))
    two = np.argpartition(distance, 1, axis=1)[:, :2]
    of_two = distance[rows[:, None], two]
    nearest = two[rows, of_two.argmin(1)]
    is_nearer = of_two.min(1) < RATIO**2 * of_two.max(1)
    agrees = is_nearer & (distance.argmin(0)[nearest] == rows)
    return np.stack([rows[agrees], nearest[agrees]], axis=1)


def mirror(points: np.ndarray, width: int) -> np.ndarray:
    """Points, (k, 2), of the mirrored image."""
    return np.stack([width - 1 - points[:, 0], points[:, 1]], axis=1)


def _places(points: np.ndarray) -> int:
    """Several key points of one place, of different sizes and directions, are one witness."""
    return len(np.unique(np.round(points / 3), axis=0))


def _correlate(features: Features, a: int, b: int, matrix: np.ndarray, mirrored: bool) -> tuple[float, float]:
    (width_a, height_a), (width_b, height_b) = (
        np.maximum(features.sizes[row] * SMALL // SIDE, 1).tolist() for row in (a, b)
    )
    on_a = features.thumbnails[a][:height_a, :width_a]
    on_b = features.thumbnails[b][:height_b, :width_b]
    if mirrored:
        on_b = np.ascontiguousarray(on_b[:, ::-1])
    small = matrix.copy()
    small[:, 2] *= SMALL / SIDE
    size, back = (width_a, height_a), cv2.WARP_INVERSE_MAP
    moved = cv2.warpAffine(on_b, small, size, flags=cv2.INTER_LINEAR | back)
    covered = cv2.warpAffine(np.full_like(on_b, 255), small, size, flags=cv2.INTER_LINEAR | back) == 255
    overlap = float(covered.mean())
    if covered.sum() < LEAST_OVERLAP:
        return 0.0, overlap
    one, other = (grey[covered].astype(np.float64) for grey in (on_a, moved))
    one, other = one - one.mean(), other - other.mean()
    length = np.sqrt((one**2).sum() * (other**2).sum())
    return (float((one * other).sum() / length) if length > 0 else 0.0), overlap
