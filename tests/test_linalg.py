import pytest
import torch
from torch import Tensor

from rankprune import linalg
from rankprune.errors import FactorizationError

SHAPES = [(24, 60), (60, 24), (32, 32), (1, 17), (17, 1), (16, 144), (7, 8)]
SPECTRA = {
    "geometric to 1e-8": lambda k: torch.logspace(0, -8, k, dtype=torch.float64),
    "clusters": lambda k: torch.tensor([3.0, 1.0, 0.02, 1e-4], dtype=torch.float64).repeat_interleave(-(-k // 4))[:k],
    "equal": lambda k: torch.full((k,), 0.7, dtype=torch.float64),
    "exact low rank": lambda k: torch.linspace(2, 1, k, dtype=torch.float64) * (torch.arange(k) < max(k // 3, 1)),
    "zero": lambda k: torch.zeros(k, dtype=torch.float64),
    "one giant": lambda k: torch.tensor([1e6] + [1.0] * (k - 1), dtype=torch.float64),
    "down to 1e-9": lambda k: torch.logspace(0, -9, k, dtype=torch.float64),
    "linear, tiny": lambda k: torch.linspace(1e-12, 1e-15, k, dtype=torch.float64),
    "cliff to 1e-4": lambda k: torch.where(torch.arange(k) < k // 2, 1.0, torch.linspace(2e-4, 1e-4, k).double()),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def matrix_with(values: Tensor, rows: int, columns: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A (rows, columns) matrix with these singular values, in float64, then rounded to `dtype`."""
    k = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, k, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, k, dtype=torch.float64)).Q
    return (left * values @ right.mT).to(dtype)


def factored(stack: Tensor) -> linalg.Basis:
    return linalg.bases([stack], ["layer"])[0]


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(matrix.double(), full_matrices=False)


def ranks_at_gaps(values: Tensor) -> list[int]:
    """The ranks at which a truncation is unique: those with a gap after them, and the full one."""
    return [r for r in range(1, len(values)) if values[r] < 0.99 * values[r - 1]] + [len(values)]


spectra_shapes_dtypes = [
    pytest.param(spectrum, shape, dtype, id=f"{name}-{shape[0]}x{shape[1]}-{str(dtype)[6:]}")
    for name, spectrum in SPECTRA.items()
    for shape in SHAPES
    for dtype in DTYPES
]


@pytest.mark.parametrize(("spectrum", "shape", "dtype"), spectra_shapes_dtypes)
def test_values_and_projections_are_those_of_a_float64_svd(spectrum, shape, dtype) -> None:
    matrix = matrix_with(spectrum(min(shape)), *shape, dtype)
    u, s, vh = svd(matrix)
    basis = factored(matrix[None])
    assert basis.values.shape == (1, min(shape))
    assert basis.values.dtype == torch.float64
    assert (basis.values.diff() <= 0).all()
    reach = 1e-10 if dtype == torch.float64 else 1e-5
    relevant = s >= reach * s[0]
    assert ((basis.values[0] - s).abs()[relevant] <= 0.01 * s[relevant]).all()
    assert (basis.values[0][~relevant] <= 1.1 * reach * s[0]).all()
    for r in ranks_at_gaps(s):
        nearest = u[:, :r] * s[:r] @ vh[:r]
        ours = linalg.project(matrix[None], basis, r)[0]
        assert ours.dtype == dtype
        assert ours.shape == shape
        if dtype == torch.bfloat16:  # the result itself is rounded to 8 bits
            assert ((ours - nearest).abs() <= 2**-8 * nearest.abs() + 1e-5 * nearest.norm()).all()
        else:
            assert (ours - nearest).norm() <= 1e-5 * nearest.norm()


@pytest.mark.parametrize("rank", [1, 5, 11])
@pytest.mark.parametrize("name", ["clusters", "equal", "one giant"])
def test_inside_a_cluster_the_projection_is_as_near_as_any(name: str, rank: int) -> None:
    matrix = matrix_with(SPECTRA[name](16), 16, 40, torch.float32)
    ours = linalg.project(matrix[None], factored(matrix[None]), rank)[0]
    least = svd(matrix)[1][rank:].norm()
    rounding = 2**-23 * matrix.norm().double()  # of the result, to float32
    assert (matrix.double() - ours.double()).norm() ** 2 <= least**2 * (1 + 2e-5) + rounding**2
    assert svd(ours)[1][rank:].norm() <= 1e-5 * svd(ours)[1].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_projecting_twice_is_projecting_once(shape, dtype) -> None:
    stack = torch.randn(3, *shape, dtype=dtype)
    rank = max(1, min(shape) // 3)
    once = linalg.project(stack, factored(stack), rank)
    twice = linalg.project(once, factored(once), rank)
    assert (twice - once).norm() <= 1e-6 * once.norm()
    assert (factored(once).values[:, rank:] <= 1e-6 * factored(once).values[:, :1]).all()


@pytest.mark.parametrize(("spectrum", "shape", "dtype"), spectra_shapes_dtypes)
def test_factors_multiply_to_the_projection_and_are_balanced(spectrum, shape, dtype) -> None:
    stack = matrix_with(spectrum(min(shape)), *shape, dtype)[None]
    basis = factored(stack)
    rank = max(1, min(shape) // 3)
    left, right = linalg.factors(stack, basis, rank)
    assert (left.shape, right.shape) == ((1, shape[0], rank), (1, rank, shape[1]))
    s = svd(stack[0])[1]
    assert (stack[0].double() - left[0] @ right[0]).norm() <= s[rank:].norm() + 1e-6 * s.norm()
    relevant = s[:rank] > 1e-4 * s[0]
    roots = s[:rank][relevant].sqrt()
    assert torch.allclose(left[0].norm(dim=0)[relevant], roots, rtol=1e-2, atol=0)
    assert torch.allclose(right[0].norm(dim=1)[relevant], roots, rtol=1e-2, atol=0)
    assert left.isfinite().all()
    assert right.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_nuclear_subgradient_is_u_vt(shape, dtype) -> None:
    matrix = matrix_with(torch.logspace(1, -3, min(shape), dtype=torch.float64), *shape, dtype)
    u, _, vh = svd(matrix)
    ours = linalg.nuclear_subgradient(matrix[None], factored(matrix[None]))[0]
    assert ours.dtype == dtype
    assert (ours - u @ vh).norm() <= 1e-3 * (u @ vh).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_nuclear_subgradient_of_narrow_weights_is_not_taken_for_rounding(dtype) -> None:
    matrix = matrix_with(torch.linspace(1, 0.5, 160, dtype=torch.float64), 160, 200, torch.float32)
    u, _, vh = svd(matrix)
    narrow = matrix.to(dtype)[None]
    ours = linalg.nuclear_subgradient(narrow, factored(narrow))[0]
    assert ours.dtype == dtype
    assert (ours.float() - u @ vh).norm() <= 0.02 * (u @ vh).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_nuclear_subgradient_stops_at_the_numerical_rank(shape, dtype) -> None:
    rank = max(1, min(shape) // 3)
    matrix = matrix_with(SPECTRA["exact low rank"](min(shape)), *shape, dtype)
    u, _, vh = svd(matrix)
    ours = linalg.nuclear_subgradient(matrix[None], factored(matrix[None]))[0]
    assert (ours - u[:, :rank] @ vh[:rank]).norm() <= 1e-4 * rank**0.5
    assert torch.equal(linalg.nuclear_subgradient(0 * matrix[None], factored(0 * matrix[None]))[0], 0 * matrix)


def test_the_nuclear_subgradient_is_the_gradient_of_the_nuclear_norm() -> None:
    matrix = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    torch.linalg.matrix_norm(matrix, "nuc").backward()
    assert torch.allclose(linalg.nuclear_subgradient(matrix[None], factored(matrix[None]))[0], matrix.grad)


@pytest.mark.parametrize("shape", [(300, 300), (300, 600), (600, 300)])
def test_in_float32_the_nuclear_subgradient_reaches_as_far_into_the_tail(shape) -> None:
    """Down to 1e-4 of the largest, where a Gram matrix in float32 says nothing of values, and little of vectors."""
    matrix = matrix_with(torch.logspace(0, -4, 300, dtype=torch.float64), *shape, torch.float32)
    (basis,) = linalg.bases([matrix[None]], ["a"], [None])
    values = svd(linalg.nuclear_subgradient(matrix[None], basis)[0])[1]
    assert values.min() > 0.1
    assert values.max() < 3
    assert ((values - 1).abs() < 0.01).sum() > 150


def test_a_batch_equals_one_by_one() -> None:
    shapes = [(2, 8, 20), (1, 20, 8), (3, 8, 20), (1, 8, 20), (4, 5, 5)]
    stacks = [torch.randn(shape) for shape in shapes] + [torch.randn(2, 8, 20, dtype=torch.float64)]
    together = linalg.bases(stacks, [str(i) for i in range(len(stacks))])
    for stack, basis in zip(stacks, together, strict=True):
        alone = factored(stack)
        assert torch.allclose(basis.values, alone.values, rtol=1e-6)
        assert torch.allclose(linalg.project(stack, basis, 2), linalg.project(stack, alone, 2), atol=1e-5)
    assert linalg.bases([], []) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factoring_is_deterministic(dtype: torch.dtype) -> None:
    stack = torch.randn(4, 12, 30, dtype=dtype)
    first, second = factored(stack), factored(stack.clone())
    assert torch.equal(first.values, second.values)
    assert torch.equal(first.vectors, second.vectors)


# -- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("guilty", [0, 1, 2])
def test_a_weight_that_is_not_finite_names_its_layer(guilty: int, bad: float, dtype: torch.dtype) -> None:
    stacks = [torch.randn(n, 4, 6, dtype=dtype) for n in (1, 3, 2)]
    stacks[guilty][-1, 2, 3] = bad
    names = ["first", "second", "third"]
    with pytest.raises(FactorizationError, match=f"'{names[guilty]}'"):
        linalg.bases(stacks, names)


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 6e4), (torch.bfloat16, 3e38), (torch.float32, 3e38)])
def test_a_large_weight_is_finite_though_its_norm_is_not(dtype: torch.dtype, value: float) -> None:
    stack = torch.full((1, 4, 6), value, dtype=dtype)
    (basis,) = linalg.bases([stack], ["large"])
    torch.testing.assert_close(linalg.project(stack, basis, 1), stack, rtol=1e-2, atol=0)


def refusing(*_: object, **__: object) -> None:
    raise torch.linalg.LinAlgError("did not converge")


def not_finite(matrix: Tensor, **_: object) -> tuple[Tensor, ...]:
    k = min(matrix.shape[-2:])
    values, vectors = matrix.new_full((*matrix.shape[:-2], k), torch.nan), matrix.new_zeros(*matrix.shape[:-1], k)
    return (values, vectors)


@pytest.mark.parametrize("broken", [refusing, not_finite])
def test_a_failed_factorisation_is_tried_again_by_a_float64_svd(monkeypatch: pytest.MonkeyPatch, broken) -> None:
    stacks = [torch.randn(2, 6, 10), torch.randn(1, 10, 6)]
    expected = [linalg.project(s, factored(s), 3) for s in stacks]
    moved, cpu = [], Tensor.cpu
    monkeypatch.setattr(torch.linalg, "eigh", broken)
    monkeypatch.setattr(Tensor, "cpu", lambda self: moved.append(tuple(self.shape)) or cpu(self))
    for stack, basis, right in zip(stacks, linalg.bases(stacks, ["a", "b"]), expected, strict=True):
        assert torch.allclose(linalg.project(stack, basis, 3), right, atol=1e-5)
    assert moved == [(6, 10), (6, 10), (10, 6)]


def test_a_large_layer_whose_start_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    stack = torch.randn(1, 300, 500)
    start = torch.linalg.qr(stack[0]).Q[None, :, :40].contiguous()
    expected = torch.linalg.svdvals(stack.double())

    def refusing(*args: object, **kwargs: object) -> None:
        raise linalg.LinAlgError("no eigenvalues today")

    monkeypatch.setattr(torch.linalg, "eigh", refusing)
    for known in (start, None):
        (basis,) = linalg.bases([stack], ["a"], [known])
        assert torch.allclose(basis.values, expected)


def test_many_large_layers_are_factored_in_batches_of_limited_size(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    stacks, sizes = [torch.randn(1, 8, 12) for _ in range(7)], []
    whole = linalg.bases(stacks, ["a"] * 7)
    factor = linalg._factor
    monkeypatch.setattr(linalg, "_BATCH", 200)
    monkeypatch.setattr(linalg, "_factor", lambda batch, labels: (sizes.append(batch.numel()), factor(batch, labels))[1])
    parts = linalg.bases(stacks, ["a"] * 7)
    assert len(sizes) > 1
    assert max(sizes) <= 200 + 96
    assert all(torch.allclose(a.values, b.values) for a, b in zip(parts, whole, strict=True))


def test_parts_hold_a_batch_of_values_and_any_single_one() -> None:
    third = linalg._BATCH // 3
    sizes = {"a": third, "b": third, "c": third + 3, "d": 5 * third, "e": 1, "f": 1}
    assert list(linalg.in_parts(sizes)) == [["a", "b"], ["c"], ["d"], ["e", "f"]]
    assert list(linalg.in_parts({})) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_that_no_svd_can_factor_is_named(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    good, bad, svd = torch.randn(2, 6, 10, dtype=dtype), torch.randn(1, 6, 10, dtype=dtype), torch.linalg.svd

    def choosy(matrix: Tensor, **keywords: bool) -> object:
        if any(torch.equal(m, bad[0].double()) for m in matrix):
            refusing()
        return svd(matrix, **keywords)

    monkeypatch.setattr(torch.linalg, "eigh", refusing)
    monkeypatch.setattr(torch.linalg, "svd", choosy)
    with pytest.raises(FactorizationError, match=r"'bad'.*\(6, 10\).*exclude"):
        linalg.bases([good, bad], ["good", "bad"])
    assert linalg.bases([good], ["good"])[0].values.shape == (2, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_svd_that_is_not_finite_names_the_layer(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(torch.linalg, "eigh", refusing)
    monkeypatch.setattr(torch.linalg, "svd", lambda m, **_: (m @ m.mT * torch.nan, m.sum(-1) * torch.nan, m))
    with pytest.raises(FactorizationError, match="'layer'"):
        factored(torch.randn(2, 6, 10, dtype=dtype))


# -- factorisations that start from the last one ----------------------------------------------------------------------


def drifted(rows: int, columns: int, rank: int, drift: float) -> tuple[Tensor, Tensor]:
    """A matrix of low rank after some training, `drift` its new energy's share, and the vectors of what it was before."""
    k = min(rows, columns)
    values = torch.linspace(1, 0.1, rank, dtype=torch.float64)
    low = matrix_with(torch.cat([values, torch.zeros(k - rank, dtype=torch.float64)]), rows, columns)
    u, _, vh = svd(low)
    step = matrix_with(torch.arange(1, k + 1).double() ** -0.8, rows, columns)
    moved = low + step * (drift**0.5 * low.norm() / step.norm())
    return moved.float(), (u if rows <= columns else vh.mT)[:, :rank].float()


def test_after_the_first_time_float32_does_also_where_no_layer_has_a_start() -> None:
    stacks = {("layer", "linear"): torch.randn(1, 300, 300)}
    assert linalg.bases_by_layer(stacks)["layer", "linear"].vectors.dtype == torch.float64
    assert linalg.bases_by_layer(stacks, {})["layer", "linear"].vectors.dtype == torch.float32


@pytest.mark.parametrize("drift", [0.0, 1e-4, 0.01, 0.2])
@pytest.mark.parametrize("shape", [(300, 500), (500, 300), (400, 400)])
def test_started_from_the_last_vectors_the_projection_is_hardly_worse_than_the_best(shape, drift: float) -> None:
    matrix, start = drifted(*shape, 60, drift)
    basis = linalg.bases([matrix[None]], ["layer"], [start[None]])[0]
    assert 60 < basis.values.shape[-1] < 150, "only the leading part"
    u, s, vh = svd(matrix)
    tail, rounding = s[60:].square().sum(), 1e-7 * s.square().sum()
    ours = linalg.project(matrix[None], basis, 60)[0]
    lost = (matrix.double() - ours.double()).square().sum()
    assert lost <= 1.02 * tail + rounding
    assert svd(ours)[1][60:].norm() <= 1e-5 * s.norm()
    error = basis.spectrum.errors()[60] * s.square().sum()
    assert abs(error - lost) <= 1e-3 * lost + rounding, "the error told is that of the projection made"
    u60, v60 = u[:, :60] @ vh[:60], linalg.nuclear_subgradient(matrix[None], basis, 60)[0]
    if drift <= 0.01:
        assert (u60 - v60).norm() <= 0.03 * u60.norm()
    low, term = linalg.project_with_subgradient(matrix[None], basis, 60)
    assert torch.equal(low[0], ours)
    assert torch.equal(term[0], v60)


def test_new_directions_are_found_also_orthogonal_ones() -> None:
    matrix, start = drifted(300, 500, 40, 0.0)
    u, _, vh = svd(matrix)
    matrix = matrix + (2.0 * u[:, 250:251] @ vh[250:251]).float()  # stronger than all, and orthogonal to what is known
    basis = linalg.bases([matrix[None]], ["layer"], [start[None]])[0]
    assert basis.values.shape[-1] < 300
    assert basis.values[0, 0] == pytest.approx(2.0, rel=1e-3)
    assert (basis.vectors[0, :, 0].double() @ u[:, 250]).abs() > 0.999


def test_the_whole_basis_where_a_start_does_not_pay_or_fit() -> None:
    for rank, shape, dtype in (
        (140, (300, 300), torch.float32),
        (20, (200, 300), torch.float32),
        (40, (300, 300), torch.float64),
    ):
        matrix = matrix_with(torch.linspace(1, 0.1, min(shape)).double(), *shape, dtype)
        basis = linalg.bases([matrix[None]], ["layer"], [torch.eye(min(shape))[None, :, :rank]])[0]
        assert basis.values.shape[-1] == min(shape)
    flat = torch.randn(300, 300)
    wrong = torch.eye(301)[None, :, :40]
    assert linalg.bases([flat[None]], ["a"], [wrong])[0].values.shape[-1] == 300


def test_the_whole_basis_where_nothing_converges(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = torch.randn(300, 300)
    start = torch.linalg.qr(torch.randn(300, 50)).Q[None]
    monkeypatch.setattr(linalg, "_EXCESS", -1.0)
    assert linalg.bases([flat[None]], ["a"], [start])[0].values.shape[-1] == 300


def test_a_start_does_its_work_whatever_the_default_device() -> None:
    matrix, start = drifted(300, 500, 40, 0.01)
    with torch.device("meta"):
        assert linalg.bases([matrix[None]], ["layer"], [start[None]])[0].values.shape[-1] < 300


def test_a_start_does_not_hide_what_is_not_finite() -> None:
    matrix, start = drifted(300, 500, 40, 0.01)
    matrix[3, 4] = float("inf")
    with pytest.raises(FactorizationError, match="'layer'"):
        linalg.bases([matrix[None]], ["layer"], [start[None]])


def test_products_stay_exact_where_the_user_lowers_the_precision() -> None:
    matrix, start = drifted(300, 500, 40, 0.01)
    exact = linalg.project(matrix[None], factored(matrix[None]), 40)
    with torch.autocast("cpu", torch.bfloat16):
        inside = linalg.project(matrix[None], linalg.bases([matrix[None]], ["a"], [start[None]])[0], 40)
    torch.set_float32_matmul_precision("medium")
    try:
        lowered = linalg.project(matrix[None], linalg.bases([matrix[None]], ["a"], [start[None]])[0], 40)
    finally:
        torch.set_float32_matmul_precision("highest")
    for other in (inside, lowered):
        assert (other - exact).norm() <= 2e-3 * exact.norm()
        assert svd(other[0])[1][40:].norm() <= 1e-5 * svd(other[0])[1].norm()
