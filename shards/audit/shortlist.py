"""Which pairs of images are worth a look: those whose key points find each other among all of the collection's.

In: `Features`. Out: pairs of rows. Invariants: no image is compared with one of its own group; the work grows with the number of
images, not of pairs.
"""

import faiss  # pyright: ignore[reportMissingImports] - an extra
import numpy as np
import scipy.sparse
from tqdm import tqdm

from shards.audit.features import Features
from shards.audit.geometry import MIRRORED
from shards.files import usable_cores

DIMENSIONS = 64  # of descriptors, after a principal component analysis
NEIGHBOURS = 10  # of each descriptor
PER_IMAGE, PER_MIRRORED = 6, 3  # pairs of each image that are looked at
SAMPLED = 100_000  # descriptors that the components and the cells are learned from
LISTS = 2048  # cells of the index, at most
PROBES = 2  # cells that are searched for a descriptor
BLOCK = 100_000  # descriptors at a time


def shortlist(features: Features, groups: np.ndarray) -> list[tuple[int, int, bool]]:
    """Pairs of rows (a < b), and whether b is to be mirrored.

    Each descriptor votes for the images of its nearest neighbours, the more the nearer they are in comparison with the last of them
    (Jegou et al. 2011, "Exploiting descriptor distances for precise image search"); each image's pairs are those of most votes.

    Args:
        groups: (n,), images of one group are not compared.
    """
    if len(features.descriptors) < NEIGHBOURS:
        return []
    faiss.omp_set_num_threads(usable_cores())
    mean, components = _components(features.descriptors)
    index = _index(features.descriptors, mean, components)
    found: list[tuple[int, int, bool]] = []
    for mirrored, most in ((False, PER_IMAGE), (True, PER_MIRRORED)):
        votes = _votes(features, groups, index, mean, components, mirrored)
        found += [(a, b, mirrored) for a, b in sorted(_most(votes + votes.T, most))]
    return found


def _sample(descriptors: np.ndarray) -> np.ndarray:
    rows = np.random.default_rng(0).permutation(len(descriptors))[:SAMPLED]
    return descriptors[np.sort(rows)].astype(np.float32)


def _components(descriptors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    sample = _sample(descriptors)
    mean = sample.mean(0)
    _, vectors = np.linalg.eigh(np.cov((sample - mean).T))
    return mean, np.ascontiguousarray(vectors[:, ::-1][:, :DIMENSIONS], np.float32)


def _index(descriptors: np.ndarray, mean: np.ndarray, components: np.ndarray) -> faiss.Index:
    sample = (_sample(descriptors) - mean) @ components
    lists = max(1, min(LISTS, len(sample) // 40))  # fewer than 39 points a cell are too few to learn it
    coarse = faiss.IndexFlatL2(DIMENSIONS)
    index = faiss.IndexIVFScalarQuantizer(coarse, DIMENSIONS, lists, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_L2)
    index.cp.niter, index.nprobe = 8, PROBES
    index.train(sample)
    for start in range(0, len(descriptors), BLOCK):
        index.add((descriptors[start : start + BLOCK].astype(np.float32) - mean) @ components)
    return index


def _votes(
    features: Features,
    groups: np.ndarray,
    index: faiss.Index,
    mean: np.ndarray,
    components: np.ndarray,
    mirrored: bool,
) -> scipy.sparse.csr_matrix:
    """Votes of each image's descriptors for the images of other groups: (n, n)."""
    n = len(features.counts)
    owner = np.repeat(np.arange(n, dtype=np.int32), features.counts)
    _, of_group = np.unique(groups, return_inverse=True)
    votes = scipy.sparse.csr_matrix((n, n), dtype=np.float32)
    for start in tqdm(range(0, len(owner), BLOCK), desc="mirrored" if mirrored else "shortlist", disable=None):
        block = features.descriptors[start : start + BLOCK]
        block = block[:, MIRRORED] if mirrored else block
        distance, nearest = index.search((block.astype(np.float32) - mean) @ components, NEIGHBOURS)
        distance = np.where(nearest < 0, np.inf, distance)
        last = np.where(np.isfinite(distance), distance, 0).max(1, keepdims=True)
        weight = np.clip(1 - distance / np.maximum(last, 1e-6), 0, 1)
        here, there = np.repeat(owner[start : start + BLOCK], NEIGHBOURS), owner[np.maximum(nearest, 0)].ravel()
        counts = (weight.ravel() > 0) & (of_group[here] != of_group[there])
        votes = votes + scipy.sparse.csr_matrix((weight.ravel()[counts], (here[counts], there[counts])), (n, n))
    return votes


def _most(votes: scipy.sparse.csr_matrix, most: int) -> set[tuple[int, int]]:
    votes = votes.tocsr()
    pairs: set[tuple[int, int]] = set()
    for row in range(votes.shape[0]):
        others = votes.indices[votes.indptr[row] : votes.indptr[row + 1]]
        number = votes.data[votes.indptr[row] : votes.indptr[row + 1]]
        for other in others[np.argsort(-number, kind="stable")[:most]].tolist():
            pairs.add((min(row, other), max(row, other)))
    return pairs
