"""TRP under every way of stepping an optimizer."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.nn import functional as F

import rankprune as rp
from by_hand import CONSIDERED, assert_same, backward, batches, exactly_same, network, reference, sgd, train, truncate
from rankprune.optimizer_step import add_to_gradients


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


class Derived(torch.optim.SGD):
    """Its steps are steps of its base class, which has hooks called for both, and may fail first."""

    fails = False

    def step(self, closure: Callable | None = None) -> Tensor | None:
        if self.fails:
            raise RuntimeError("stop")
        return super().step(closure)


@pytest.mark.parametrize("step", [plainly, by_position, by_keyword])
def test_a_step_that_calls_its_base_classs_is_one_step(step: Callable) -> None:
    def derived(model: nn.Module) -> torch.optim.SGD:
        return Derived(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)

    plain, other = stepped(plainly, sgd)
    model, trp = stepped(step, derived)
    exactly_same(model, plain)
    assert (trp.steps, trp.history) == (8, other.history)


def test_an_optimizer_may_tell_its_closure_something() -> None:
    class Telling(torch.optim.SGD):
        def step(self, closure: Callable) -> Tensor:  # type: ignore[override]
            with torch.enable_grad():
                loss = closure(backward=True)
            super().step()
            return loss

    model = network()
    optimizer = Telling(model.parameters(), lr=0.05)
    trp = rp.TRP(model, rule=rp.Energy(0.8), every=2, nuclear=1e-2).attach(optimizer)

    ((x, y),) = batches(1)

    def closure(backward: bool) -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        if backward:
            loss.backward()
        return loss

    optimizer.step(closure)
    assert trp.steps == 1


def test_steps_count_on_after_one_that_failed() -> None:
    model = network()
    optimizer = Derived(model.parameters(), lr=0.05)
    trp = rp.TRP(model, rule=rp.Energy(0.8), every=3).attach(optimizer)
    optimizer.fails = True
    for _ in range(2):
        with pytest.raises(RuntimeError, match="stop"):
            optimizer.step()
    optimizer.fails = False
    train(model, optimizer, 3)
    assert (trp.steps, len(trp.history)) == (3, 1)


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


@pytest.mark.parametrize("tensor", [False, True])
def test_a_step_that_only_makes_the_optimizers_state_does_not_count(tensor: bool) -> None:
    model = network()
    lr = torch.tensor(0.01) if tensor else 0.01
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    trp = rp.TRP(model, rule=rp.Energy(0.8), every=1, nuclear=1e-2).attach(optimizer)
    before = copy.deepcopy(model)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    assert state.keys() >= {"state.first.weight.exp_avg"}
    assert not any(moments["exp_avg"].any() for moments in optimizer.state.values())
    exactly_same(model, before)
    assert (trp.steps, trp.history) == (0, [])


def test_a_step_at_a_learning_rate_of_zero_counts() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # the first of a warm-up
    trp = rp.TRP(model, rule=rp.Energy(0.8), every=1).attach(optimizer)
    backward(model, *next(iter(batches(1))))
    optimizer.step()
    assert (trp.steps, [step for step, _ in trp.history]) == (1, [1])


def test_so_does_one_with_a_closure_which_has_no_gradients_before() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trp = rp.TRP(model, rule=rp.Energy(0.8), every=1, nuclear=1e-2).attach(optimizer)
    optimizer.step(lambda: backward(model, *next(iter(batches(1)))))
    assert (trp.steps, [step for step, _ in trp.history]) == (1, [1])


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


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.:DeprecationWarning")  # Inductor, which is imported for it
def test_a_compiled_step_runs_the_hooks() -> None:
    torch._dynamo.reset()
    models = network(), network()
    for model, compiled in zip(models, (False, True), strict=True):
        optimizer = sgd(model)
        trp = rp.TRP(model, rule=rp.Energy(0.8), every=2, nuclear=1e-2).attach(optimizer)

        def step(optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()

        stepping = torch.compile(step, backend="eager") if compiled else step
        for x, y in batches(6):
            optimizer.zero_grad()
            backward(model, x, y)
            stepping()
        assert (trp.steps, len(trp.history)) == (6, 3)
    exactly_same(*models)


def test_an_argument_of_step_that_is_no_closure_is_handed_on() -> None:
    class Optioned(torch.optim.SGD):
        def step(self, options: dict | None = None) -> None:
            assert options == {"history": 3}
            super().step()

    model, plain = network(), network()
    optimizer, other = Optioned(model.parameters(), lr=0.05), torch.optim.SGD(plain.parameters(), lr=0.05)
    for held, opt, arguments in ((model, optimizer, [{"history": 3}]), (plain, other, [])):
        rp.TRP(held, rule=rp.Energy(0.8), every=2, nuclear=1e-2).attach(opt)
        for x, y in batches(4):
            opt.zero_grad()
            backward(held, x, y)
            opt.step(*arguments)
    exactly_same(model, plain)


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


def test_terms_follow_a_model_to_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[tuple] = []
    add = torch.Tensor.add_
    monkeypatch.setattr(torch.Tensor, "add_", lambda self, term, **more: added.append((term, more)) or add(self, term, **more))
    with FakeTensorMode():
        weight = nn.Parameter(torch.zeros(2, 3, device="cuda"))
        weight.grad = torch.zeros_like(weight)
        add_to_gradients(torch.optim.SGD([weight]), {weight: torch.ones(2, 3)}, 0.1)
    assert [(term.device.type, more) for term, more in added] == [("cuda", {"alpha": 0.1})]


def test_frozen_layers_are_projected_as_others_are() -> None:
    for exclude in ([], ["body"]):
        model = network()
        model.body.weight.requires_grad_(False)
        optimizer = sgd(model)
        before = model.body.weight.detach().clone()
        trp = rp.TRP(model, rule=rp.Energy(0.8), exclude=exclude, every=2, nuclear=1e-2).attach(optimizer)
        train(model, optimizer, 2)
        assert model.body.weight.grad is None
        assert trp.plan is not None
        assert torch.equal(model.body.weight, before) == ("body" not in trp.plan.ranks) == bool(exclude)


def test_a_step_within_autocast_is_as_one_without() -> None:
    models = [network(), network()]
    for model, inside in zip(models, (False, True), strict=True):
        forward = model.forward
        model.forward = lambda x, forward=forward: torch.autocast("cpu", torch.bfloat16)(forward)(x).float()
        optimizer = sgd(model)
        rp.TRP(model, scheme="channel", rule=rp.Energy(0.8), every=2, nuclear=0.1).attach(optimizer)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            train(model, optimizer, 4)
    assert_same(*models, rtol=1e-4, atol=1e-5)


def test_terms_and_scales_that_only_together_fit_into_float16() -> None:
    weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.float16))
    weight.grad = torch.zeros_like(weight)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.grad_scale = torch.tensor(2.0**17)  # as a GradScaler tells a fused one
    add_to_gradients(optimizer, {weight: torch.eye(2)}, 1e-3)
    torch.testing.assert_close(weight.grad, torch.eye(2).half() * 131.1, rtol=1e-2, atol=0)
