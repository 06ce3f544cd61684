"""Initial weights for the training of a drafter, and a centroid head whose token clusters have equal size."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlx_mtp.gemma4.drafter import Drafter
from mlx_mtp.gemma4.target import Target

Floats = npt.NDArray[np.float32]

_ROUNDS = 12


def start_from_target(drafter: Drafter, target: Target, seed: int) -> None:
    """Initialize an untrained drafter from the target's embeddings.

    The drafter's hidden states begin as the principal components of the target's embeddings. The rows of the head are
    the token embeddings in these components. The projections map the target's hidden states to the components and back.
    Without training, the drafter then predicts the token that the target's last hidden state predicts. The clusters of
    a centroid head hold tokens with similar embeddings. `seed` seeds the clustering.
    """
    table = _embedding_rows(target.embed_tokens)
    # The mean adds an equal amount to every logit, so it can be removed.
    table -= table.mean(axis=0)
    size = drafter.config.text.hidden_size
    _, vectors = np.linalg.eigh(table.T @ table)
    basis = np.ascontiguousarray(vectors[:, ::-1][:, :size])
    if basis.shape[1] < size:
        basis = np.pad(basis, ((0, 0), (0, size - basis.shape[1])))
    drafter.model.embed_tokens.weight = mx.array(table @ basis)
    drafter.post_projection.weight = mx.array(basis)
    # The input is the embedding, then the hidden state. A small share of the embedding distinguishes the tokens.
    drafter.pre_projection.weight = mx.array(np.concatenate([0.1 * basis.T, basis.T], axis=1))
    scale = mx.sqrt(mx.square(target.norm.weight.astype(mx.float32)).mean())
    drafter.model.norm.weight = mx.ones((size,)) * scale
    if drafter.masked_embedding is not None:
        build_centroids(drafter, seed)


def build_centroids(drafter: Drafter, seed: int) -> None:
    """Cluster the rows of a drafter's head, and set each centroid to the mean of its rows."""
    head = drafter.masked_embedding
    assert head is not None
    rows = _embedding_rows(drafter.model.embed_tokens)
    count = drafter.config.num_centroids
    clusters = balanced_clusters(rows, count, seed)
    ordering = np.argsort(clusters, kind="stable").astype(np.int32)
    head.token_ordering = mx.array(ordering)
    head.centroids.weight = mx.array(rows[ordering].reshape(count, -1, rows.shape[1]).mean(axis=1))


def balanced_clusters(rows: Floats, count: int, seed: int) -> npt.NDArray[np.int64]:
    """Assign the rows to `count` clusters of equal size. Return the cluster of each row, int64 [rows].

    Spherical k-means finds the cluster centers. Then each row takes the most similar cluster that still has room. The
    rows with the strongest preference for one cluster choose first.
    """
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
    rng = np.random.default_rng(seed)
    centers = _spread(unit, count, rng)
    for _ in range(_ROUNDS):
        nearest = np.argmax(unit @ centers.T, axis=1)
        sums = np.zeros_like(centers)
        np.add.at(sums, nearest, unit)
        # An empty cluster gets a random row as its new center.
        empty = np.bincount(nearest, minlength=count) == 0
        sums[empty] = unit[rng.choice(len(unit), int(empty.sum()), replace=False)]
        centers = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-9)
    similarity = unit @ centers.T
    best_two = -np.partition(-similarity, 1, axis=1)[:, :2]
    room = np.full(count, len(rows) // count)
    clusters = np.zeros(len(rows), np.int64)
    for row in np.argsort(best_two[:, 1] - best_two[:, 0], kind="stable"):
        clusters[row] = np.argmax(np.where(room > 0, similarity[row], -np.inf))
        room[clusters[row]] -= 1
    return clusters


def _spread(unit: Floats, count: int, rng: np.random.Generator) -> Floats:
    """Draw the initial cluster centers from the rows, as k-means++ does.

    The weight of a row is its squared distance to the nearest center that is already drawn.
    """
    chosen = [int(rng.integers(len(unit)))]
    distance = np.full(len(unit), np.inf, np.float32)
    for _ in range(count - 1):
        distance = np.minimum(distance, np.maximum(1 - unit @ unit[chosen[-1]], 0))
        # If every distance is zero (all rows are equal), the draw is uniform.
        weights = (distance if distance.any() else np.ones_like(distance)).astype(np.float64)
        chosen.append(int(rng.choice(len(unit), p=weights / weights.sum())))
    return unit[chosen]


def _embedding_rows(table: nn.Module) -> Floats:
    """Return all rows of an embedding in float32. The embedding may be quantized."""
    size = table.weight.shape[0]
    return np.array(
        mx.concatenate([table(mx.arange(i, min(i + 4096, size))) for i in range(0, size, 4096)]).astype(mx.float32)
    )
