"""Truncated singular value decompositions, batched. The only file that calls torch.linalg.

Everything follows from one orthonormal basis of a matrix's shorter side, ordered by singular value. With A (rows, columns) and
Q its left singular vectors, the projection on rank r is ``Q_r Q_r^T A``, factors are ``Q_r`` and ``Q_r^T A``, and the nuclear
norm's sub-gradient is ``Q S^-1 Q^T A`` (TRP's regularisation); for a tall A the same on the right.

The whole basis comes from the Gram matrix of the short side, which is many times cheaper than an SVD. It is formed in float64:
for float32 and narrower weights that leaves singular values right down to 1e-6 of the largest, below which they are
rounding of the weights themselves. Float64 weights deserve more and get a true SVD. Where a large matrix has moved only
a little since its leading vectors were last known, as in training, the leading part of the basis is found from those by
subspace iteration (Halko, Martinsson and Tropp 2011), many times cheaper again.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from rankprune.errors import FactorizationError
from rankprune.precision import float32_products
from rankprune.schemes import Key
from rankprune.spectrum import Spectrum

K = TypeVar("K")

LinAlgError = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]

_LARGE = 256
"""Short sides from here on are worth a subspace iteration, and products in float32."""
_BATCH = 2**25
"""About how many values are factored in one batch: what it needs beside them is some ten times their space."""
_ITERATIONS = 4
_EXCESS = 0.01
"""Subspace iteration ends when its projection loses hardly more than the best one: by this share of what that loses."""


@dataclass(frozen=True)
class Basis:
    """Singular values of a stack of matrices, descending, and the singular vectors of their shorter side, all or the leading.

    Shapes, with k = min(rows, columns) and p <= k: vectors (stack, k, p), one vector a column; values (stack, p) float64;
    energy (stack,) float64, each matrix's sum of squares. `on_rows` tells whether the vectors are left ones (k = rows) or
    right ones. `coordinates` (stack, p, other side) are those of the matrix in this basis, where they are at hand.
    """

    vectors: Tensor
    values: Tensor
    energy: Tensor
    on_rows: bool
    coordinates: Tensor | None = None

    @property
    def spectrum(self) -> Spectrum:
        """What rank rules judge by."""
        return Spectrum(self.values, self.energy, self.vectors.shape[1])


@torch.no_grad()
def bases(stacks: Sequence[Tensor], names: Sequence[str], starts: Sequence[Tensor | None] | None = None) -> list[Basis]:
    """The basis of each stack (stack, rows, columns); stacks of equal matrix shape are factored in one batch.

    Args:
        names: of the layers, for messages.
        starts: for each stack the leading vectors (stack, k, r) that it had a little while ago, or None. Given at all, large
            stacks on the CPU are factored in float32, good enough for what is done again some steps later: singular values
            below 1e-3 of the largest are rounding. Where it is worth it, the basis holds somewhat more than r leading vectors
            and its projection may lose more than the best one, by about 1 % or 1e-7 of the energy. Errors told are those of the
            projection made.

    Raises:
        FactorizationError: if a stack holds a value that is not finite, or resists even a float64 SVD on the CPU; it
            names the layer from `names`.
    """
    found: dict[int, Basis] = {}
    batches: dict[tuple, list[int]] = defaultdict(list)
    fill: dict[tuple, int] = defaultdict(int)
    for i, stack in enumerate(stacks):
        basis = _from_start(stack.detach(), starts[i]) if starts is not None else None
        if basis is not None:
            found[i] = basis
        else:
            alike = (*stack.shape[1:], stack.dtype, stack.device)
            fill[alike] += stack.numel()
            batches[(*alike, fill[alike] // _BATCH)].append(i)
    for members in batches.values():
        batch = torch.cat([stacks[i].detach() for i in members]) if len(members) > 1 else stacks[members[0]].detach()
        labels = [names[i] for i in members for _ in range(stacks[i].shape[0])]
        values, vectors = _factor(batch, labels)
        on_rows = batch.shape[1] <= batch.shape[2]
        sizes = [stacks[i].shape[0] for i in members]
        for i, v, q in zip(members, values.split(sizes), vectors.split(sizes), strict=True):
            found[i] = Basis(q, v, v.square().sum(-1), on_rows)
    return [found[i] for i in range(len(stacks))]


def in_parts(sizes: Mapping[K, int], most: int | None = None) -> Iterator[list[K]]:
    """Keys in their order, in lists of at most so many values, by default one batch's, for those who need not hold all."""
    part, fill = [], 0
    for key, size in sizes.items():
        if part and fill + size > (most or _BATCH):
            yield part
            part, fill = [], 0
        part.append(key)
        fill += size
    if part:
        yield part


def bases_by_layer(stacks: Mapping[Key, Tensor], starts: Mapping[Key, Tensor] | None = None) -> dict[Key, Basis]:
    """As bases, for stacks by (layer name, scheme name)."""
    known = [starts.get(key) for key in stacks] if starts is not None else None
    return dict(zip(stacks, bases(list(stacks.values()), [layer for layer, _ in stacks], known), strict=True))


def _from_start(stack: Tensor, start: Tensor | None) -> Basis | None:
    """The basis of a large stack, in float32, by way of its last leading vectors if there are some; None if that fails."""
    if not _in_float32(stack):
        return None
    on_rows = stack.shape[1] <= stack.shape[2]
    a = _working(stack if on_rows else stack.mT)
    energy = torch.linalg.vector_norm(a if a.is_contiguous() else a.mT, dim=-1).double().square().sum(-1)
    if not energy.isfinite().all():
        return None
    try:
        return (None if start is None else _leading(a, energy, start, on_rows)) or _whole(a, energy, on_rows)
    except LinAlgError:
        return None


def worth_starting(stack: Tensor, rank: int) -> bool:
    """Whether so many leading vectors of a stack make its next factorisation faster."""
    return _in_float32(stack) and rank + _extra(rank) <= min(stack.shape[1:]) // 2


def _extra(rank: int) -> int:
    """Vectors to look for beyond those known."""
    return max(16, rank // 4)


def _whole(a: Tensor, energy: Tensor, on_rows: bool) -> Basis | None:
    """All of the basis of (stack, k, other side), from a Gram matrix in float32."""
    squares, vectors = _descending(a @ a.mT)
    values = squares.double().sqrt()
    return Basis(vectors, values, energy, on_rows) if values.isfinite().all() else None


def _leading(a: Tensor, energy: Tensor, start: Tensor, on_rows: bool) -> Basis | None:
    """The leading part of the basis, by subspace iteration; None if it is not worth it, or does not converge."""
    rank = start.shape[-1]
    if start.shape[:2] != a.shape[:2] or not worth_starting(a, rank):
        return None
    start = start.to(a.dtype)
    new = _sketch(a, _extra(rank))  # lets directions in that were not there before
    q = _orthonormal(torch.cat([start, new - start @ (start.mT @ new)], -1))
    b = q.mT @ a
    head = torch.linalg.vector_norm(b[..., :rank, :], dim=-1).double().square().sum(-1)  # captured by the first `rank` vectors
    for _ in range(_ITERATIONS):
        q = _orthonormal(a @ b.mT)
        b = q.mT @ a
        wide = b.double()
        squares, turn = _descending(wide @ wide.mT)
        turn = turn.to(q.dtype)
        if not squares.isfinite().all():
            return None
        before, head = head, squares[..., :rank].sum(-1)
        # What the next iteration would still gain: each gains less than the one before by the ratio of what is to be kept
        # out to what is to be kept in, or faster.
        ratio = squares[..., -1] / squares[..., rank - 1].clamp(min=torch.finfo(squares.dtype).tiny)
        if ((head - before).abs() * ratio <= _EXCESS * (energy - head) + 1e-7 * energy).all():
            return Basis(q @ turn, squares.sqrt(), energy, on_rows, turn.mT @ b)
    return None


def _sketch(a: Tensor, columns: int) -> Tensor:
    """Random combinations of the columns of `a`, (stack, k, columns), the same ones every time."""
    generator = torch.Generator("cpu").manual_seed(columns)
    return a @ torch.randn(a.shape[-1], columns, generator=generator, device="cpu").to(a)


def _orthonormal(y: Tensor) -> Tensor:
    """An orthonormal basis of the columns of (stack, k, p): by Cholesky where they are well apart, else by Householder QR."""
    wide = y.double()
    wide = wide / torch.linalg.vector_norm(wide, dim=-2, keepdim=True).clamp(min=torch.finfo(wide.dtype).tiny)
    root, failed = torch.linalg.cholesky_ex(wide.mT @ wide)
    diagonal = root.diagonal(dim1=-2, dim2=-1)
    if failed.any() or (diagonal.amin(-1) <= 1e-4 * diagonal.amax(-1)).any():
        return torch.linalg.qr(y).Q
    return torch.linalg.solve_triangular(root, wide.mT, upper=False).mT.to(y.dtype)


def _working(stack: Tensor) -> Tensor:
    """The stack in the type that products are made in."""
    return stack.float() if _in_float32(stack) else stack.double()


def _in_float32(stack: Tensor) -> bool:
    """Whether products are made in float32: of large matrices on the CPU, where nothing narrows it; else in float64."""
    kind = stack.device.type
    large = min(stack.shape[1:]) >= _LARGE and kind == "cpu" and stack.dtype != torch.float64
    return large and not torch.is_autocast_enabled(kind) and float32_products() == "highest"


def _factor(batch: Tensor, labels: list[str]) -> tuple[Tensor, Tensor]:
    """(b, rows, columns) -> singular values (b, k) float64 descending, and short-side vectors (b, k, k)."""
    finite = torch.linalg.vector_norm(batch, dim=(1, 2)).isfinite()  # cheaper than to look at every value
    if not finite.all() and not (finite := batch.isfinite().flatten(1).all(1)).all():
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
    squares, vectors = _descending(gram)
    return squares.sqrt(), vectors


@torch.no_grad()
def eigen(covariances: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, and eigenvectors, as columns, of symmetric positive matrices (b, k, k): (b, k), (b, k, k)."""
    try:
        values, vectors = _descending(covariances)
        if values.isfinite().all() and vectors.isfinite().all():
            return values, vectors
    except LinAlgError:
        pass
    return _by_svd(covariances)  # their singular vectors are their eigenvectors


def _descending(gram: Tensor) -> tuple[Tensor, Tensor]:
    squares, vectors = torch.linalg.eigh(gram)
    return squares.flip(-1).clamp(min=0), vectors.flip(-1)


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
    q, c = _split(stack, basis, rank)
    return _joined(q, c, basis, stack)


@torch.no_grad()
def project_with_subgradient(stack: Tensor, basis: Basis, rank: int | None) -> tuple[Tensor, Tensor]:
    """project and nuclear_subgradient at once, for less than the two; without a rank, the first is the stack itself."""
    q, c = _split(stack, basis, rank)
    low = stack if rank is None else _joined(q, c, basis, stack)
    return low, _joined(q * _inverse(c, stack), c, basis, stack)


@torch.no_grad()
def factors(stack: Tensor, basis: Basis, rank: int) -> tuple[Tensor, Tensor]:
    """Left (stack, rows, rank) and right (stack, rank, columns) with left @ right = project(stack, basis, rank).

    Each carries the square root of the singular values, so that neither is much larger than the other. Float64.
    """
    q, a, values = basis.vectors[..., :rank].double(), stack.double(), basis.values[..., :rank]
    scale = torch.where(values > 1e-12 * values[..., :1], values, 1.0).sqrt()
    if basis.on_rows:
        return q * scale[..., None, :], (q.mT @ a) / scale[..., None]
    return (a @ q) / scale[..., None, :], scale[..., None] * q.mT


@torch.no_grad()
def nuclear_subgradient(stack: Tensor, basis: Basis, rank: int | None = None) -> Tensor:
    """U V^T over the numerical rank of each matrix: the sub-gradient of the nuclear norm (TRP's regularisation).

    Shapes: (stack, rows, columns) -> the same. Singular values below max(rows, columns) * eps of the largest count as
    zero, as in torch.linalg.matrix_rank, and so do those after the first `rank`, as of the stack's projection on that rank.
    """
    q, c = _split(stack, basis, rank)
    return _joined(q * _inverse(c, stack), c, basis, stack)


def _split(stack: Tensor, basis: Basis, rank: int | None) -> tuple[Tensor, Tensor]:
    """The first `rank` vectors and the coordinates in them: (stack, k, r) and (stack, r, other side)."""
    if basis.coordinates is not None:
        return basis.vectors[..., :rank], basis.coordinates[..., :rank, :]
    a = _working(stack if basis.on_rows else stack.mT)
    q = basis.vectors[..., :rank].to(a.dtype)
    return q, q.mT @ a


def _joined(q: Tensor, c: Tensor, basis: Basis, stack: Tensor) -> Tensor:
    """What vectors and coordinates stand for, in the shape, type and memory order of `stack`."""
    left, right = (q, c) if basis.on_rows else (c.mT, q.mT)
    return ((right.mT @ left.mT).mT if stack.mT.is_contiguous() else left @ right).to(stack.dtype)


def _inverse(c: Tensor, stack: Tensor) -> Tensor:
    """One by the norm of each row of coordinates, which is a singular value, as a row; 0 where that is nothing but rounding."""
    eps = torch.finfo(torch.promote_types(stack.dtype, torch.float32)).eps
    norms = torch.linalg.vector_norm(c, dim=-1)[..., None, :]
    return torch.where(norms > max(stack.shape[1:]) * eps * norms.amax(-1, keepdim=True), 1 / norms, 0.0)
