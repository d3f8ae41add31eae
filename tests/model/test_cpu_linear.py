"""Linear layers whose products oneDNN computes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rosd_fast import products
from rosd_fast.config import LoraConfig
from rosd_fast.model import cpu_linear
from rosd_fast.model.adapters import choose_trainable
from rosd_fast.model.cpu_linear import CpuLinear, linear, use_cpu_linear

pytestmark = pytest.mark.skipif(
    products.onednn_product() is None, reason="this torch has no oneDNN"
)

BOUND = 2e-6  # relative, of float32 sums over at most a few hundred products


@pytest.fixture(autouse=True)
def onednn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """oneDNN for products of any size, with a list of the shapes that it computed."""
    before, product, shapes = products.chosen(), cpu_linear._product, []

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        shapes.append((*x.shape, len(weight)))
        return product(x, weight, bias)

    monkeypatch.setattr(cpu_linear, "MIN_PRODUCT", 1)
    monkeypatch.setattr(cpu_linear, "_product", counted)
    products.use("onednn")
    yield shapes
    products.use(before)


def layer(inputs: int = 24, outputs: int = 17, *, bias: bool = True) -> CpuLinear:
    made = nn.Sequential(nn.Linear(inputs, outputs, bias=bias))
    use_cpu_linear(made)
    own = made[0]
    assert isinstance(own, CpuLinear)
    return own


def gap(ours: Tensor, expected: Tensor) -> float:
    return float((ours.double() - expected).norm() / expected.norm().clamp(min=1e-30))


@settings(deadline=None, max_examples=40)
@given(
    lead=st.lists(st.integers(1, 40), min_size=1, max_size=2),
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    bias=st.booleans(),
    trains_weight=st.booleans(),
    trains_input=st.booleans(),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_values_and_gradients_are_those_of_float64(
    lead, sizes, bias, trains_weight, trains_input, transposed, seed
) -> None:
    torch.manual_seed(seed)
    inputs, outputs = sizes
    ours = layer(inputs, outputs, bias=bias).requires_grad_(trains_weight)
    exact = nn.Linear(inputs, outputs, bias=bias).double()
    exact.load_state_dict(ours.state_dict())
    exact.requires_grad_(trains_weight)
    x = torch.randn(inputs, *lead).movedim(0, -1) if transposed else torch.randn(*lead, inputs)
    wide = x.double().requires_grad_(trains_input)
    x.requires_grad_(trains_input)
    y, expected = ours(x), exact(wide)
    assert y.shape == expected.shape
    assert y.requires_grad == expected.requires_grad
    assert gap(y.detach(), expected.detach()) < BOUND
    if y.requires_grad:
        grad = torch.randn_like(y)
        y.backward(grad)
        expected.backward(grad.double())
    pairs = zip((x, *ours.parameters()), (wide, *exact.parameters()), strict=True)
    for own, other in pairs:
        assert (own.grad is None) == (other.grad is None)
        if own.grad is not None and other.grad is not None:
            assert own.grad.shape == other.grad.shape
            assert gap(own.grad, other.grad) < BOUND


def test_only_what_is_needed_is_computed(onednn: list[tuple[int, ...]]) -> None:
    ours, x = layer(), torch.randn(5, 24)
    ours(x).sum().backward()  # an expanded gradient
    assert onednn == [(5, 24, 17), (17, 5, 24)]
    onednn.clear()
    ours.requires_grad_(False)
    ours(x.requires_grad_()).sum().backward()
    assert onednn == [(5, 24, 17), (5, 17, 24)]
    onednn.clear()
    with torch.inference_mode():
        ours(x.detach())
    assert onednn == [(5, 24, 17)]


def test_the_same_bits_each_time() -> None:
    ours, x, grad = layer(64, 96), torch.randn(300, 64), torch.randn(300, 96)
    found = []
    for _ in range(3):
        own = x.clone().requires_grad_()
        y = ours(own)
        found.append([y, *torch.autograd.grad(y, [own, *ours.parameters()], grad)])
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


def test_recomputed_activations_have_the_same_gradient() -> None:
    ours, x = layer(), torch.randn(9, 24, requires_grad=True)
    plain = torch.autograd.grad(ours(x).square().sum(), [x, ours.weight])
    again = checkpoint(ours, x, use_reentrant=False)
    assert isinstance(again, Tensor)
    recomputed = torch.autograd.grad(again.square().sum(), [x, ours.weight])
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def transposed_weight(ours: CpuLinear) -> Tensor:
    ours.weight = nn.Parameter(torch.randn(24, 17).t())
    return torch.randn(5, 24)


def double(ours: CpuLinear) -> Tensor:
    ours.double()
    return torch.randn(5, 24).double()


def bfloat16(ours: CpuLinear) -> Tensor:
    ours.bfloat16()
    return torch.randn(5, 24).bfloat16()


def meta(ours: CpuLinear) -> Tensor:
    ours.to("meta")
    return torch.randn(5, 24, device="meta")


def no_rows(_: CpuLinear) -> Tensor:
    return torch.randn(0, 24)


def subclass(_: CpuLinear) -> Tensor:
    class Wrapped(Tensor):
        pass

    return torch.randn(5, 24).as_subclass(Wrapped)


def small(_: CpuLinear) -> Tensor:
    cpu_linear.MIN_PRODUCT = 10**9
    return torch.randn(5, 24)


def unchosen(_: CpuLinear) -> Tensor:
    products.use("torch")
    return torch.randn(5, 24)


@pytest.mark.parametrize(
    "change", [transposed_weight, double, bfloat16, meta, no_rows, subclass, small, unchosen]
)
def test_all_else_is_torchs(
    onednn: list[tuple[int, ...]], change: Callable[[CpuLinear], Tensor]
) -> None:
    ours = layer()
    x = change(ours)
    y = ours(x)
    assert onednn == []
    assert y.shape == (len(x), 17)
    if not y.is_meta:
        assert torch.equal(y, F.linear(x, ours.weight, ours.bias))


def test_autocast_and_functional_weights_are_torchs(onednn: list[tuple[int, ...]]) -> None:
    ours, x = layer(), torch.randn(5, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
    weights = {name: torch.randn_like(value) for name, value in ours.named_parameters()}
    y = torch.func.functional_call(ours, weights, (x,))  # as DTensors, they are no parameters
    assert torch.equal(y, F.linear(x, weights["weight"], weights["bias"]))
    assert onednn == []


def test_a_wrong_width_is_torchs_error() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer()(torch.randn(17, 23))


def test_it_compiles_without_a_graph_break(onednn: list[tuple[int, ...]]) -> None:
    ours, x = layer(), torch.randn(5, 24)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), F.linear(x, ours.weight, ours.bias))
    assert onednn == []


def test_which_layers_are_turned() -> None:
    class Own(nn.Linear):
        pass

    model = nn.ModuleList([nn.Linear(2, 3), Own(2, 3), nn.Linear(2, 3).bfloat16(), nn.LayerNorm(3)])
    use_cpu_linear(model)
    assert [type(each) for each in model] == [CpuLinear, Own, nn.Linear, nn.LayerNorm]
    use_cpu_linear(model)
    assert type(model[0]) is CpuLinear


def test_copies_and_pickles() -> None:
    ours, x = layer(), torch.randn(5, 24)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is CpuLinear
        assert torch.equal(other(x), ours(x))


def test_a_model_with_adapters(tiny_llama, onednn: list[tuple[int, ...]]) -> None:
    """Base layers and the layers inside adapters; the loss falls as with torch's products."""
    losses = {}
    for library in products.LIBRARIES:
        products.use(library)
        model = tiny_llama()
        choose_trainable(model, lora=LoraConfig(rank=4), trainable="", seed=0)
        use_cpu_linear(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        ids = torch.arange(60).view(2, 30)
        losses[library] = []
        for _ in range(4):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[library].append(loss.item())
        names = {name for name, module in model.named_modules() if type(module) is CpuLinear}
        assert any("lora_A" in name for name in names)
        assert any("base_layer" in name for name in names)
        assert bool(onednn) == (library == "onednn")
    assert losses["onednn"] == pytest.approx(losses["torch"], rel=1e-4)
    assert losses["onednn"][-1] < losses["onednn"][0]


def test_the_public_function_takes_no_bias() -> None:
    x, weight = torch.randn(6, 8), torch.randn(5, 8)
    assert gap(linear(x, weight), x.double() @ weight.double().T) < BOUND
