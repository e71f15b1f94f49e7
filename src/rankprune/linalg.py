"""Truncated singular value decompositions, batched. The only file that calls torch.linalg.

Everything follows from one orthonormal basis of a matrix's shorter side, ordered by singular value. With A (rows, columns) and
Q its left singular vectors, the projection on rank r is ``Q_r Q_r^T A``, factors are ``Q_r`` and ``Q_r^T A``, and the nuclear
norm's sub-gradient is ``Q S^-1 Q^T A`` (TRP's regularisation); for a tall A the same on the right. The basis comes from
the Gram matrix of the short side, which is many times cheaper than an SVD. It is formed in float64: for float32 and narrower
weights that leaves singular values right down to 1e-6 of the largest, below which they are rounding of the weights
themselves. Float64 weights deserve more and get a true SVD. All products are in float64 too, which neither autocast nor TF32
touches.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankprune.errors import FactorizationError

LinAlgError = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]


@dataclass(frozen=True)
class Basis:
    """Singular values of a stack of matrices, descending, and the singular vectors of their shorter side.

    Shapes, with k = min(rows, columns): vectors (stack, k, k), one vector a column; values (stack, k) float64.
    `on_rows` tells whether the vectors span the row space's side of length rows (left) or columns (right).
    """

    vectors: Tensor
    values: Tensor
    on_rows: bool


@torch.no_grad()
def bases(stacks: Sequence[Tensor], names: Sequence[str]) -> list[Basis]:
    """The basis of each stack (stack, rows, columns); stacks of equal matrix shape are factored in one batch.

    Raises:
        FactorizationError: if a stack holds a value that is not finite, or resists even a float64 SVD on the CPU; it
            names the layer from `names`.
    """
    found: dict[int, Basis] = {}
    batches: dict[tuple, list[int]] = defaultdict(list)
    for i, stack in enumerate(stacks):
        batches[(*stack.shape[1:], stack.dtype, stack.device)].append(i)
    for members in batches.values():
        batch = torch.cat([stacks[i].detach() for i in members])
        labels = [names[i] for i in members for _ in range(stacks[i].shape[0])]
        values, vectors = _factor(batch, labels)
        on_rows = batch.shape[1] <= batch.shape[2]
        sizes = [stacks[i].shape[0] for i in members]
        for i, v, q in zip(members, values.split(sizes), vectors.split(sizes), strict=True):
            found[i] = Basis(q, v, on_rows)
    return [found[i] for i in range(len(stacks))]


def bases_by_layer(stacks: Mapping[tuple[str, str], Tensor]) -> dict[tuple[str, str], Basis]:
    """As bases, for stacks by (layer name, scheme name)."""
    return dict(zip(stacks, bases(list(stacks.values()), [layer for layer, _ in stacks]), strict=True))


def _factor(batch: Tensor, labels: list[str]) -> tuple[Tensor, Tensor]:
    """(b, rows, columns) -> singular values (b, k) float64 descending, and short-side vectors (b, k, k)."""
    finite = batch.isfinite().flatten(1).all(1)
    if not finite.all():
        name = labels[int(finite.int().argmin())]
        raise FactorizationError(
            f"the weight of layer {name!r} holds NaN or infinite values; the training diverged before this step: lower the "
            "learning rate, or go back to a checkpoint from before"
        )
    try:
        values, vectors = _by_svd(batch) if batch.dtype == torch.float64 else _by_gram(batch)
        if values.isfinite().all() and vectors.isfinite().all():
            return values, vectors
    except LinAlgError:
        pass  # tried again below
    parts = [_one_by_one(matrix, label) for matrix, label in zip(batch, labels, strict=True)]
    values, vectors = (torch.stack(part).to(batch.device) for part in zip(*parts, strict=True))
    return values, vectors


def _by_gram(batch: Tensor) -> tuple[Tensor, Tensor]:
    wide = batch.double()
    gram = wide @ wide.mT if batch.shape[1] <= batch.shape[2] else wide.mT @ wide
    squares, vectors = torch.linalg.eigh(gram)
    return squares.flip(-1).clamp(min=0).sqrt(), vectors.flip(-1)


def _by_svd(batch: Tensor) -> tuple[Tensor, Tensor]:
    left, values, right = torch.linalg.svd(batch.double(), full_matrices=False)
    return values, left if batch.shape[1] <= batch.shape[2] else right.mT


def _one_by_one(matrix: Tensor, label: str) -> tuple[Tensor, Tensor]:
    try:
        values, vectors = _by_svd(matrix.cpu()[None])
        if not (values.isfinite().all() and vectors.isfinite().all()):
            raise LinAlgError("the result is not finite")
    except LinAlgError as error:
        raise FactorizationError(
            f"the weight of layer {label!r}, {tuple(matrix.shape)} as a matrix, has no singular value decomposition even in "
            f"float64 on the CPU ({error}); leave the layer out with exclude=[{label!r}]"
        ) from error
    return values[0], vectors[0]


@torch.no_grad()
def project(stack: Tensor, basis: Basis, rank: int) -> Tensor:
    """The nearest stack of rank `rank` (Eckart-Young). Shapes: (stack, rows, columns) -> the same."""
    q, a = basis.vectors[..., :rank], stack.double()
    return (q @ (q.mT @ a) if basis.on_rows else (a @ q) @ q.mT).to(stack.dtype)


@torch.no_grad()
def factors(stack: Tensor, basis: Basis, rank: int) -> tuple[Tensor, Tensor]:
    """Left (stack, rows, rank) and right (stack, rank, columns) with left @ right = project(stack, basis, rank).

    Each carries the square root of the singular values, so that neither is much larger than the other. Float64.
    """
    q, a, values = basis.vectors[..., :rank], stack.double(), basis.values[..., :rank]
    scale = torch.where(values > 1e-12 * values[..., :1], values, 1.0).sqrt()
    if basis.on_rows:
        return q * scale[..., None, :], (q.mT @ a) / scale[..., None]
    return (a @ q) / scale[..., None, :], scale[..., None] * q.mT


@torch.no_grad()
def nuclear_subgradient(stack: Tensor, basis: Basis) -> Tensor:
    """U V^T over the numerical rank of each matrix: the sub-gradient of the nuclear norm (TRP's regularisation).

    Shapes: (stack, rows, columns) -> the same. Singular values below max(rows, columns) * eps of the largest count as
    zero, as in torch.linalg.matrix_rank.
    """
    eps = torch.finfo(torch.promote_types(stack.dtype, torch.float32)).eps
    tolerance = max(stack.shape[1:]) * eps * basis.values[..., :1]
    weight = torch.where(basis.values > tolerance, 1 / basis.values, 0.0)
    q, a = basis.vectors, stack.double()
    inverse_root = (q * weight[..., None, :]) @ q.mT
    return (inverse_root @ a if basis.on_rows else a @ inverse_root).to(stack.dtype)


@dataclass(frozen=True)
class Whitening:
    """The square root of an input covariance and its inverse, (matrices, size, size) float64, for one side of a stack.

    Truncating the whitened stack loses the least energy in the layer's *output*, instead of in its weight (as in SVD-LLM).
    """

    root: Tensor
    inverse: Tensor
    on_rows: bool

    def apply(self, stack: Tensor) -> Tensor:
        """(stack, rows, columns) -> the same in float64, whitened on the side that faces the input."""
        return self.root @ stack.double() if self.on_rows else stack.double() @ self.root

    def undo(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of a whitened stack -> factors of the stack itself. Shapes: (stack, rows, r), (stack, r, columns)."""
        return (self.inverse @ left, right) if self.on_rows else (left, right @ self.inverse)


@torch.no_grad()
def whitening(covariance: Tensor, on_rows: bool, name: str) -> Whitening:
    """The Whitening of an input covariance (matrices, size, size).

    Directions with less than 1e-6 of the mean variance count as having that much, so that the root can be inverted.

    Raises:
        FactorizationError: naming the layer, if the covariance is not finite.
    """
    basis = bases([covariance.double()], [name])[0]  # the singular vectors of a covariance are its eigenvectors
    values, vectors = basis.values, basis.vectors
    floor = 1e-6 * values.mean(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    roots = values.maximum(floor).sqrt()
    return Whitening((vectors * roots[..., None, :]) @ vectors.mT, (vectors / roots[..., None, :]) @ vectors.mT, on_rows)
