"""Random problems for the Triton kernels in the interpreter, and their results in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from rosd_kernels.logits import LogitTransform
from rosd_kernels.records import SpanOptions
from rosd_kernels.tiles import ROW_BLOCK, TILE, num_row_blocks, num_tiles

if TYPE_CHECKING:
    from rosd_kernels.gpu.pair import Pair


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Inputs of the kernels; `truth` and its parts work in float64 on the same rounded values."""

    hs: Tensor  # [N, H]
    ht: Tensor  # [N, Ht]
    Ws: Tensor  # [V, H]
    Wt: Tensor  # [V, Ht]
    bs: Tensor | None  # [V]
    bt: Tensor | None  # [V]
    order: Tensor | None  # [V] int64
    options: dict[str, Any]

    @property
    def transform(self) -> LogitTransform:
        """The transform of the student's logits."""
        return LogitTransform(self.bs, self.options["softcap"], self.options["temperature"])

    @property
    def pair(self) -> Pair:
        """Both sides as the launchers take them."""
        from rosd_kernels.gpu.pair import Pair

        return Pair(
            student_hidden=self.hs,
            teacher_hidden=self.ht,
            student_head=self.Ws,
            teacher_head=self.Wt,
            student_bias=self.bs,
            teacher_bias=self.bt,
            order=self.order,
            options=SpanOptions(**self.options),
        )

    def logits(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled logits in the vocabulary's order, float64: student, teacher, student's slope."""
        slope = torch.ones(self.hs.shape[0], self.Ws.shape[0], dtype=torch.float64)
        scaled = []
        for hidden, head, bias in ((self.ht, self.Wt, self.bt), (self.hs, self.Ws, self.bs)):
            s = hidden.double() @ head.double().T
            if bias is not None:
                s = s + bias.double()
            if self.order is not None:
                s = s[:, self.order]
            if (cap := self.options["softcap"]) is not None:
                slope = 1 - torch.tanh(s / cap) ** 2
                s = cap * torch.tanh(s / cap)
            scaled.append(s / self.options["temperature"])
        return scaled[1], scaled[0], slope

    def truth(self, active: Tensor) -> Truth:
        """Value, K and G over active tiles; gradients of `sum(row_scale * value)` but for 1/T."""
        s, t, slope = self.logits()
        lse_s, lse_t = s.logsumexp(1), t.logsumexp(1)
        c, e = entry_terms(s - lse_s[:, None], t - lse_t[:, None], **self.options)
        N, V = s.shape
        mask = active.repeat_interleave(ROW_BLOCK, 0)[:N].repeat_interleave(TILE, 1)[:, :V].bool()
        value, total = (c * mask).sum(1), (e * mask).sum(1)
        scale = torch.linspace(0.5, 2, N, dtype=torch.float64)
        p = (s - lse_s[:, None]).exp()
        G = (e - p * total[:, None]) * slope * scale[:, None] * mask
        dh, dW, db = self.gradients(G)
        return Truth(
            lse_s=lse_s,
            lse_t=lse_t,
            value=value,
            total=total,
            scale=scale,
            G=G,
            dh=dh,
            dW=dW,
            db=db,
        )

    def gradients(self, G: Tensor, *, absolute: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """dh, dW, db for G in the vocabulary's order; absolute: with |W| and |h|."""
        V = self.Ws.shape[0]
        hidden, head = self.hs.double(), self.Ws.double()
        if absolute:
            hidden, head = hidden.abs(), head.abs()
        order = torch.arange(V) if self.order is None else self.order
        dW, db = torch.zeros_like(head), torch.zeros(V, dtype=torch.float64)
        dW[order], db[order] = G.T @ hidden, G.sum(0)
        return G @ head[order], dW, db


@dataclass(frozen=True, kw_only=True)
class Truth:
    lse_s: Tensor
    lse_t: Tensor
    value: Tensor
    total: Tensor
    scale: Tensor
    G: Tensor  # [N, V] in the vocabulary's order
    dh: Tensor
    dW: Tensor
    db: Tensor


def entry_terms(
    log_p: Tensor,
    log_q: Tensor,
    *,
    divergence: str,
    beta: float,
    entry_clip: float | None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """c and e from the textbook formulas."""
    p, q = log_p.exp(), log_q.exp()
    if divergence == "forward_kl":
        c, e = q * (log_q - log_p), -q
    elif divergence == "reverse_kl":
        c = p * (log_p - log_q)
        e = c
    else:
        log_m = torch.logaddexp(
            log_q + torch.tensor(beta).double().log(), log_p + torch.tensor(1 - beta).double().log()
        )
        e = (1 - beta) * p * (log_p - log_m)
        c = beta * q * (log_q - log_m) + e
    if divergence == "reverse_kl":
        c = c + q - p
    if entry_clip is not None:
        return c.clamp(max=entry_clip), e.masked_fill(c > entry_clip, 0)
    # p - q sums to zero over the vocabulary, but not over some tiles of it.
    return c + (p - q if divergence == "forward_kl" else 0), e


def make(
    N: int,
    V: int,
    H: int,
    *,
    Ht: int | None = None,
    dtype: torch.dtype = torch.float32,
    head_dtype: torch.dtype | None = None,
    scale: float = 2.0,
    bias: bool = False,
    ordered: bool = False,
    divergence: str = "jsd",
    beta: float = 0.3,
    temperature: float = 1.0,
    softcap: float | None = None,
    entry_clip: float | None = None,
    seed: int = 0,
) -> Problem:
    """`scale` is about the standard deviation of the logits; Ht None: the head is shared."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * std

    hs = normal(N, H)
    Ws = normal(V, H, std=scale / H**0.5).to(head_dtype or dtype)
    if Ht is None:
        ht, Wt = hs + normal(N, H, std=0.5), Ws
    else:
        ht, Wt = normal(N, Ht), normal(V, Ht, std=scale / Ht**0.5).to(head_dtype or dtype)
    options = {"divergence": divergence, "beta": beta, "temperature": temperature}
    return Problem(
        hs=hs.to(dtype),
        ht=ht.to(dtype),
        Ws=Ws,
        Wt=Wt,
        bs=normal(V).to(dtype) if bias else None,
        bt=normal(V).to(dtype) if bias else None,
        order=torch.randperm(V, generator=generator) if ordered else None,
        options=options | {"softcap": softcap, "entry_clip": entry_clip},
    )


def assert_close(
    name: str, got: Tensor, want: Tensor, tolerance: float, slack: float | Tensor = 0.0
) -> None:
    """Within `tolerance` of the largest wanted element, and the rounding of a narrow dtype."""
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, want {list(want.shape)}"
    if want.numel() == 0:
        return
    rounding = 0.0 if got.dtype == torch.float32 else torch.finfo(got.dtype).eps / 2
    error = (got.double() - want.double()).abs()
    bound = tolerance * want.double().abs().max() + rounding * want.double().abs() + slack
    excess = torch.where(error <= bound, error - bound, error.nan_to_num(nan=torch.inf))
    worst = int(excess.argmax())
    place = [int(i) for i in torch.unravel_index(torch.tensor(worst), want.shape)]
    assert bool((error <= bound).all()), (
        f"{name}: element {place} is {got.flatten()[worst].item()}, "
        f"want {want.flatten()[worst].item()}, error {error.flatten()[worst].item():.2e}"
    )


def flags(N: int, V: int, *, share: float = 1.0, seed: int = 0) -> Tensor:
    """[B, T] uint8, of which about the fraction `share` is 1."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_row_blocks(N), num_tiles(V))
    return (torch.rand(shape, generator=generator) < share).to(torch.uint8)


@pytest.fixture(scope="session")
def make_problem() -> Callable[..., Problem]:
    return make


@pytest.fixture(scope="session")
def close() -> Callable[..., None]:
    return assert_close


@pytest.fixture(scope="session")
def make_flags() -> Callable[..., Tensor]:
    return flags


@pytest.fixture(scope="session")
def swap() -> Callable[..., Problem]:
    return replace


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """torch.empty returns NaN, as it may on a device; nondeterministic operations are refused."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill
