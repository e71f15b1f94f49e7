"""TRP against a training loop written out by hand, under every way of stepping an optimizer."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import rankprune as rp

SCHEMES = ("channel", "spatial", "decoupled")
CONSIDERED = ("body", "hidden", "small")


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = OrderedDict(
        first=nn.Conv2d(3, 8, 3, padding=1),
        norm=nn.BatchNorm2d(8),
        act=nn.ReLU(),
        body=nn.Conv2d(8, 16, 3, padding=1, bias=False),
        act2=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
        hidden=nn.Linear(16, 32),  # a tall matrix; the others are wide
        small=nn.Linear(32, 8),  # break-even rank 6.4
        act3=nn.ReLU(),
        head=nn.Linear(8, 5),
    )
    return nn.Sequential(layers)


def batches(steps: int, seed: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.randn(8, 3, 6, 6, generator=generator), torch.randint(5, (8,), generator=generator)


def sgd(model: nn.Module, **options: object) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, **options})


def backward(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(model(x.to(model.head.weight.dtype)), y)
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> None:
    for x, y in batches(steps, seed):
        optimizer.zero_grad()
        backward(model, x, y)
        optimizer.step()


def as_matrices(weight: Tensor, scheme: str) -> Tensor:
    if weight.dim() == 2:
        return weight[None]
    n, c, k1, k2 = weight.shape
    if scheme == "channel":
        return weight.reshape(1, n, c * k1 * k2)
    if scheme == "spatial":
        return weight.permute(1, 2, 0, 3).reshape(1, c * k1, n * k2)
    return weight.reshape(n, c, k1 * k2)


def as_weight(matrices: Tensor, weight: Tensor, scheme: str) -> Tensor:
    if weight.dim() == 4 and scheme == "spatial":
        n, c, k1, k2 = weight.shape
        return matrices.reshape(c, k1, n, k2).permute(2, 0, 1, 3)
    return matrices.reshape(weight.shape)


def truncate(weight: Tensor, scheme: str, keep: float) -> tuple[Tensor, Tensor, int | None]:
    """The truncated weight, its U V^T, and the rank; None as the rank of a layer whose pair would not pay."""
    u, s, vh = torch.linalg.svd(as_matrices(weight.detach(), scheme).double(), full_matrices=False)
    energy = s.square().sum(0)
    rank = next(r for r in range(1, len(energy) + 1) if energy[r:].sum() <= (1 - keep) * energy.sum())
    pays = rank * s.shape[0] * (u.shape[1] + vh.shape[2]) < weight.numel()
    low = (u[..., :rank] * s[:, None, :rank]) @ vh[:, :rank]
    term = as_weight(u[..., :rank] @ vh[:, :rank], weight, scheme).to(weight)
    return as_weight(low, weight, scheme).to(weight), term, rank if pays else None


def reference(model: nn.Module, steps: int, *, every: int, keep: float, scheme: str, nuclear: float, cadence: str) -> list:
    optimizer = sgd(model)
    weights = {name: model.get_submodule(name).weight for name in CONSIDERED}
    first = cadence == "step" and nuclear
    terms = {name: truncate(weight, scheme, 1.0)[1] for name, weight in weights.items()} if first else {}
    history = []
    for step, (x, y) in enumerate(batches(steps), start=1):
        optimizer.zero_grad()
        backward(model, x, y)
        for name, term in terms.items():
            weights[name].grad += nuclear * term
        optimizer.step()
        if cadence == "projection":
            terms = {}
        if step % every == 0:
            ranks = {}
            for name, weight in weights.items():
                low, terms[name], ranks[name] = truncate(weight, scheme, keep)
                weight.data.copy_(low)
            history.append((step, {name: r for name, r in ranks.items() if r}))
    return history


def assert_same(a: nn.Module, b: nn.Module, **tolerance: float) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def exactly_same(a: nn.Module, b: nn.Module) -> None:
    assert_same(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("nuclear", "cadence"), [(0.0, "step"), (3e-3, "step"), (3e-3, "projection")])
def test_equals_a_loop_written_by_hand(scheme: str, nuclear: float, cadence: str) -> None:
    ours, theirs = network(), network()
    trp = rp.TRP(ours, scheme=scheme, rule=rp.Energy(0.8), every=3, nuclear=nuclear, nuclear_cadence=cadence)
    optimizer = sgd(ours)
    trp.attach(optimizer)
    train(ours, optimizer, 11)
    history = reference(theirs, 11, every=3, keep=0.8, scheme=scheme, nuclear=nuclear, cadence=cadence)
    assert_same(ours, theirs, rtol=1e-4, atol=2e-6)
    assert trp.history == history
    assert [step for step, _ in history] == [3, 6, 9]
    assert history[-1][1].keys() >= {"body", "hidden"}


def singular_values(layer: nn.Module) -> Tensor:
    return torch.linalg.svdvals(layer.weight.detach().flatten(1))


@pytest.mark.parametrize(("cadence", "every", "terms"), [("step", 1, 10), ("step", 5, 10), ("projection", 5, 2)])
def test_nuclear_strength(cadence: str, every: int, terms: int) -> None:
    """With no other gradient each term lowers every singular value by lr * nuclear."""
    model = network()
    optimizer = sgd(model, momentum=0, weight_decay=0)
    trp = rp.TRP(model, scheme="channel", rule=rp.Energy(1.0), every=every, nuclear=1e-2, nuclear_cadence=cadence)
    trp.attach(optimizer)
    trp.project()
    before = {name: singular_values(model.get_submodule(name)) for name in CONSIDERED}
    for _ in range(10):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for name, values in before.items():
        after = singular_values(model.get_submodule(name))
        torch.testing.assert_close(values - after, torch.full_like(after, terms * 0.05 * 1e-2), rtol=1e-2, atol=1e-6)


def test_nuclear_term_empties_the_tail() -> None:
    def tail(nuclear: float) -> float:
        model = network()
        optimizer = sgd(model, momentum=0)
        rp.TRP(model, scheme="channel", rule=rp.Energy(1.0), every=2, nuclear=nuclear).attach(optimizer)
        train(model, optimizer, 80)
        energy = singular_values(model.body).square()
        return float(energy[4:].sum() / energy.sum())

    assert tail(0.1) < 0.7 * tail(0.0)


def stepped(
    step: Callable, optimizer: Callable, nuclear: float = 3e-3, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, rp.TRP]:
    model = network().to(dtype)
    opt = optimizer(model)
    trp = rp.TRP(model, scheme="spatial", rule=rp.Energy(0.8), every=3, nuclear=nuclear).attach(opt)
    for x, y in batches(8):

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            opt.zero_grad()
            return backward(model, x, y)

        step(opt, closure)
    return model, trp


def plainly(optimizer: torch.optim.Optimizer, closure: Callable) -> None:
    closure()
    optimizer.step()


def by_position(optimizer: torch.optim.Optimizer, closure: Callable) -> None:
    assert optimizer.step(closure) is not None


def by_keyword(optimizer: torch.optim.Optimizer, closure: Callable) -> None:
    assert optimizer.step(closure=closure) is not None


@pytest.mark.parametrize("step", [by_position, by_keyword])
def test_closure_changes_nothing(step: Callable) -> None:
    model, trp = stepped(step, sgd)
    plain, other = stepped(plainly, sgd)
    exactly_same(model, plain)
    assert (trp.steps, trp.history) == (8, other.history)


@pytest.mark.parametrize("step", [by_position, by_keyword])
def test_lbfgs_sees_the_term_at_each_evaluation(step: Callable) -> None:
    def lbfgs(model: nn.Module) -> torch.optim.LBFGS:
        return torch.optim.LBFGS(model.parameters(), lr=0.05, max_iter=3)

    model, trp = stepped(step, lbfgs, dtype=torch.float64)  # in float32 its line of search magnifies rounding
    assert trp.steps == 8
    theirs = network().double()
    optimizer = lbfgs(theirs)
    weights = {name: theirs.get_submodule(name).weight for name in CONSIDERED}
    terms = {name: truncate(weight, "spatial", 1.0)[1] for name, weight in weights.items()}
    for i, (x, y) in enumerate(batches(8), start=1):

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = backward(theirs, x, y)
            for name, term in terms.items():
                weights[name].grad += 3e-3 * term
            return loss

        optimizer.step(closure)
        if i % 3 == 0:
            for name, weight in weights.items():
                low, terms[name], _ = truncate(weight, "spatial", 0.8)
                weight.data.copy_(low)
    assert_same(model, theirs, rtol=1e-6, atol=1e-8)


OPTIMIZERS = {
    "sgd": lambda m: sgd(m),
    "fused sgd": lambda m: sgd(m, fused=True),
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=1e-2),
    "fused adam": lambda m: torch.optim.Adam(m.parameters(), lr=1e-2, fused=True),
}


def scaled(make: Callable, *, unscale: bool = False, overflow_at: tuple[int, ...] = ()) -> tuple[nn.Module, rp.TRP]:
    model = network()
    optimizer = make(model)
    trp = rp.TRP(model, scheme="spatial", rule=rp.Energy(0.8), every=3, nuclear=3e-2).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, backoff_factor=0.5)
    for i, (x, y) in enumerate(batches(8)):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        if i in overflow_at:
            model.body.weight.grad.view(-1)[0] = torch.inf
        if unscale:
            scaler.unscale_(optimizer)
        weights, state = copy.deepcopy(dict(model.named_parameters())), (trp.steps, len(trp.history))
        scaler.step(optimizer)
        scaler.update()
        if i in overflow_at:
            assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
            assert (trp.steps, len(trp.history)) == state
    return model, trp


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_grad_scaler_changes_nothing(make: Callable, unscale: bool) -> None:
    model, trp = scaled(make, unscale=unscale)
    plain, other = stepped(plainly, make, nuclear=3e-2)
    assert_same(model, plain, rtol=1e-4, atol=1e-5)
    assert trp.history == other.history


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_steps_skipped_for_overflow_do_not_count(make: Callable) -> None:
    model, trp = scaled(make, overflow_at=(2, 3, 5))
    assert trp.steps == 5
    assert [step for step, _ in trp.history] == [3]
    assert all(p.isfinite().all() for p in model.parameters())


def test_accumulated_gradients_count_once() -> None:
    model = network()
    optimizer = sgd(model)
    trp = rp.TRP(model, rule=rp.Energy(0.8), every=2).attach(optimizer)
    for i, (x, y) in enumerate(batches(12)):
        backward(model, x, y)
        if i % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
    assert (trp.steps, [step for step, _ in trp.history]) == (4, [2, 4])


def test_parameter_groups() -> None:
    models = [network(), network()]
    for model, split in zip(models, (1, 3), strict=True):
        parameters = list(model.parameters())
        groups = [{"params": part} for part in (parameters[:split], parameters[split:])]
        optimizer = torch.optim.SGD(groups, lr=0.05)
        rp.TRP(model, rule=rp.Energy(0.8), every=2, nuclear=1e-2).attach(optimizer)
        train(model, optimizer, 5)
    exactly_same(*models)


def test_compiled_model_sees_projections_without_recompiling() -> None:
    model, plain = network(), network()
    torch._dynamo.reset()  # what other tests compiled would count
    compiler = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=compiler)
    for forward, holder in ((compiled, model), (plain, plain)):
        optimizer = sgd(holder)
        trp = rp.TRP(forward, rule=rp.Energy(0.8), every=2, nuclear=1e-2).attach(optimizer)
        for x, y in batches(6):
            optimizer.zero_grad()
            F.cross_entropy(forward(x), y).backward()
            optimizer.step()
        assert len(trp.history) == 3
    assert compiler.frame_count == 1
    assert_same(model, plain, rtol=1e-4, atol=1e-5)


def test_channels_last_weights_stay_so_and_the_same_objects() -> None:
    model, plain = network().to(memory_format=torch.channels_last), network()
    parameters = dict(model.named_parameters())
    for m in (model, plain):
        optimizer = sgd(m)
        rp.TRP(m, scheme="channel", rule=rp.Energy(0.8), every=2, nuclear=1e-2).attach(optimizer)
        train(m, optimizer, 4)
    assert all(parameters[name] is p for name, p in model.named_parameters())
    weight = model.body.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    assert_same(model, plain, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("around", ["forward", "loop"])
def test_autocast_to_bfloat16(around: str) -> None:
    model, theirs = network(), network()
    for m in (model, theirs):
        m.forward = torch.autocast("cpu", torch.bfloat16)(m.forward)
    optimizer = sgd(model)
    trp = rp.TRP(model, scheme="channel", rule=rp.Energy(0.8), every=2, nuclear=3e-3).attach(optimizer)
    with torch.autocast("cpu", torch.bfloat16, enabled=around == "loop"):  # the step is in it, too
        train(model, optimizer, 4)
    reference(theirs, 4, every=2, keep=0.8, scheme="channel", nuclear=3e-3, cadence="step")
    assert model.body.weight.dtype == torch.float32
    assert trp.plan is not None
    assert torch.linalg.matrix_rank(model.body.weight.detach().flatten(1), rtol=1e-5) == trp.plan.ranks["body"]
    assert_same(model, theirs, rtol=5e-2, atol=1e-2)


def test_only_planned_layers_change() -> None:
    model, plain = network(), network()
    ours, theirs = sgd(model), sgd(plain)
    trp = rp.TRP(model, scheme="channel", rule=rp.FixedRank(7), every=2, exclude=["body"]).attach(ours)
    train(model, ours, 2)
    train(plain, theirs, 2)
    assert trp.plan is not None
    assert trp.plan.ranks.keys() == {"hidden"}
    assert trp.plan.skipped.keys() == {"first", "body", "small", "head"}  # small: 7 > its break-even rank
    changed = {n for n, p in model.state_dict().items() if not torch.equal(p, plain.state_dict()[n])}
    assert changed == {"hidden.weight"}
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"])


def ranks_of(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    weights = {name: model.get_submodule(name).weight.detach().flatten(1) for name in names}
    return {name: int(torch.linalg.matrix_rank(weight, rtol=1e-5)) for name, weight in weights.items()}


def test_layers_without_a_cheaper_pair_are_held_at_their_ranks() -> None:
    model, (x, _) = network(), next(iter(batches(1)))
    trp = rp.TRP(model, scheme="channel", rule=rp.Energy(0.93), freeze=0)
    plan = trp.project()
    assert plan.projected.keys() == set(CONSIDERED)
    held = plan.projected.keys() - plan.ranks.keys()
    assert held
    assert held <= plan.skipped.keys()
    assert ranks_of(model, plan.projected) == {name: entry.rank for name, entry in plan.projected.items()}
    assert all(0 < entry.error <= 0.07 for entry in plan.projected.values())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    assert trp.project() is plan, "ranks are kept from freeze on"
    assert rp.Plan.from_json(plan.to_json()) == plan
    small = trp.finalize()
    assert ranks_of(small, held) == {name: plan.projected[name].rank for name in held}
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rank_of_the_weights_is_the_plans_and_stays(scheme: str) -> None:
    model = network()
    trp = rp.TRP(model, scheme=scheme, rule=rp.Energy(0.7))
    plan = trp.project()
    assert plan.ranks.keys() >= {"body", "hidden"}
    for name, rank in plan.ranks.items():
        matrices = as_matrices(model.get_submodule(name).weight.detach(), scheme)
        assert set(torch.linalg.matrix_rank(matrices, rtol=1e-5).tolist()) == {rank}
    before = copy.deepcopy(model)
    rp.project(model, plan)
    assert_same(model, before, rtol=1e-5, atol=1e-6)
