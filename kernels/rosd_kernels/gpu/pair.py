"""Student's and teacher's log-probabilities of one tile, computed together.

Registers hold an accumulator per side; where both sides share the head, each block of the head is
loaded once for both. `loss.py` and `gradient.py` turn the result into sums and into G.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import triton
import triton.language as tl
from torch import Tensor

from rosd_kernels.gpu.active import active_pairs
from rosd_kernels.gpu.blocks import add_bias, dot, head_rows, project, sum_both
from rosd_kernels.gpu.launch import Gemm, launch, rowwise
from rosd_kernels.gpu.math import formula, pair_entries, round_to, tanh_each
from rosd_kernels.logits import LogitTransform
from rosd_kernels.records import SpanInputs, SpanOptions, same_memory
from rosd_kernels.tiles import ROW_BLOCK


@triton.jit
def project_both(
    student_hidden,
    teacher_hidden,
    head,
    rows,
    vocab_rows,
    first_row,
    first_column,
    H,
    student_stride,
    teacher_stride,
    head_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    USE_TMA: tl.constexpr,
    EVEN_H: tl.constexpr,
    CAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`project` of both sides on one head.

    A loop of its own, because each block of the head is loaded once for both accumulators.
    """
    student = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    teacher = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    if USE_TMA:
        for h in range(0, H, BLOCK_H):
            b = head.load([first_column, h]).T
            student = dot(student_hidden.load([first_row, h]), b, student, CAST, PRECISION)
            teacher = dot(teacher_hidden.load([first_row, h]), b, teacher, CAST, PRECISION)
    else:
        offsets = tl.arange(0, BLOCK_H)
        s_ptrs = student_hidden + rows[:, None] * student_stride + offsets[None, :]
        t_ptrs = teacher_hidden + rows[:, None] * teacher_stride + offsets[None, :]
        b_ptrs = head + vocab_rows[None, :] * head_stride + offsets[:, None]
        for h in range(0, H, BLOCK_H):
            if EVEN_H:
                s, t, b = tl.load(s_ptrs), tl.load(t_ptrs), tl.load(b_ptrs)
            else:
                s = tl.load(s_ptrs, mask=offsets[None, :] < H - h, other=0.0)
                t = tl.load(t_ptrs, mask=offsets[None, :] < H - h, other=0.0)
                b = tl.load(b_ptrs, mask=offsets[:, None] < H - h, other=0.0)
            student = dot(s, b, student, CAST, PRECISION)
            teacher = dot(t, b, teacher, CAST, PRECISION)
            s_ptrs += BLOCK_H
            t_ptrs += BLOCK_H
            b_ptrs += BLOCK_H
    return student, teacher


@triton.jit
def pair_terms(
    student_hidden,  # [N, H], descriptor or pointer, as the next three
    teacher_hidden,  # [N, Ht]
    student_head,  # [V, H]
    teacher_head,  # [V, Ht]; not used with SHARED_HEAD
    student_bias_ptr,
    teacher_bias_ptr,
    order_ptr,
    student_lse_ptr,
    teacher_lse_ptr,
    total,  # [BLOCK_M, 1], or 0.0: grad is then e
    first_row,
    first_column,
    N,
    V,
    H,
    Ht,
    student_stride,
    teacher_stride,
    student_head_stride,
    teacher_head_stride,
    beta,
    rest,
    clip,
    softcap,
    inv_temperature,
    DIVERGENCE: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_STUDENT_BIAS: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    SHARED_HEAD: tl.constexpr,
    USE_TMA: tl.constexpr,
    EVEN_H: tl.constexpr,
    CAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """[BLOCK_M, BLOCK_V] each: value and e - p total of math.py, and the student's tanh or logits.

    Columns beyond the vocabulary have p = q = 0; rows beyond N repeat the last one.
    """
    rows = tl.minimum(first_row + tl.arange(0, BLOCK_M), N - 1).to(tl.int64)
    columns = first_column + tl.arange(0, BLOCK_V)
    vocab_rows = head_rows(order_ptr, columns, V, HAS_ORDER)
    if SHARED_HEAD:
        student, teacher = project_both(
            student_hidden,
            teacher_hidden,
            student_head,
            rows,
            vocab_rows,
            first_row,
            first_column,
            H,
            student_stride,
            teacher_stride,
            student_head_stride,
            BLOCK_M,
            BLOCK_V,
            BLOCK_H,
            USE_TMA,
            EVEN_H,
            CAST,
            PRECISION,
        )
    else:
        student = project(
            student_hidden,
            student_head,
            rows,
            vocab_rows,
            first_row,
            first_column,
            H,
            student_stride,
            student_head_stride,
            BLOCK_M,
            BLOCK_V,
            BLOCK_H,
            USE_TMA,
            EVEN_H,
            CAST,
            PRECISION,
        )
        teacher = project(
            teacher_hidden,
            teacher_head,
            rows,
            vocab_rows,
            first_row,
            first_column,
            Ht,
            teacher_stride,
            teacher_head_stride,
            BLOCK_M,
            BLOCK_V,
            BLOCK_H,
            USE_TMA,
            EVEN_H,
            CAST,
            PRECISION,
        )
    student = add_bias(student, student_bias_ptr, vocab_rows, HAS_STUDENT_BIAS)
    teacher = add_bias(teacher, teacher_bias_ptr, vocab_rows, HAS_TEACHER_BIAS)
    scale = inv_temperature
    if HAS_SOFTCAP:
        scale *= softcap
        student = tanh_each(student / softcap)
        teacher = tanh_each(teacher / softcap)
    value, grad = pair_entries(
        student,
        teacher,
        tl.load(student_lse_ptr + rows)[:, None],
        tl.load(teacher_lse_ptr + rows)[:, None],
        total,
        (columns < V)[None, :],
        scale,
        beta,
        rest,
        clip,
        DIVERGENCE,
        HAS_CLIP,
    )
    return value, grad, student


@triton.jit(do_not_specialize=["N", "first_tile", "num_tiles"])
def pair_kernel(
    student_hidden,  # [N, H], descriptor or pointer, as the next three
    teacher_hidden,  # [N, Ht]
    student_head,  # [V, H]
    teacher_head,  # [V, Ht]
    student_bias_ptr,  # [V]
    teacher_bias_ptr,  # [V]
    order_ptr,  # [V] int64
    student_lse_ptr,  # [N]
    teacher_lse_ptr,  # [N]
    pairs_ptr,  # [B * num_tiles] int64: row block * num_tiles + tile, the active ones first
    num_pairs_ptr,  # [1] int32
    total_ptr,  # [N]; with WRITE_GRADIENT
    row_scale_ptr,  # [N]; with WRITE_GRADIENT
    out_ptr,  # partial sums [2, num_tiles, N], or G [N, num_tiles * TILE]
    out_stride,  # of G
    N,
    V,
    H,
    Ht,
    first_tile,
    num_tiles,
    student_stride,
    teacher_stride,
    student_head_stride,
    teacher_head_stride,
    beta,
    rest,
    clip,
    softcap,
    inv_temperature,
    WRITE_GRADIENT: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_STUDENT_BIAS: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    SHARED_HEAD: tl.constexpr,
    USE_TMA: tl.constexpr,
    EVEN_H: tl.constexpr,
    CAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
):
    """BLOCK_M rows of one active pair of row block and tile; BLOCK_V is a tile.

    The grid covers all pairs, and programs without an active one return: a persistent loop would
    cost registers for its state.
    """
    PARTS: tl.constexpr = ROW_BLOCK // BLOCK_M
    work = tl.program_id(0)
    if work >= tl.load(num_pairs_ptr) * PARTS:
        return
    pair = tl.load(pairs_ptr + work // PARTS)
    tile = (pair % num_tiles).to(tl.int32)
    first_row = (pair // num_tiles).to(tl.int32) * ROW_BLOCK + work % PARTS * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    inside = rows < N
    total = 0.0
    if WRITE_GRADIENT:
        total = tl.load(total_ptr + rows, mask=inside, other=0.0)[:, None]
    value, grad, bounded = pair_terms(
        student_hidden,
        teacher_hidden,
        student_head,
        teacher_head,
        student_bias_ptr,
        teacher_bias_ptr,
        order_ptr,
        student_lse_ptr,
        teacher_lse_ptr,
        total,
        first_row,
        (first_tile + tile) * BLOCK_V,
        N,
        V,
        H,
        Ht,
        student_stride,
        teacher_stride,
        student_head_stride,
        teacher_head_stride,
        beta,
        rest,
        clip,
        softcap,
        inv_temperature,
        DIVERGENCE,
        HAS_CLIP,
        HAS_SOFTCAP,
        HAS_STUDENT_BIAS,
        HAS_TEACHER_BIAS,
        HAS_ORDER,
        SHARED_HEAD,
        USE_TMA,
        EVEN_H,
        CAST,
        PRECISION,
        BLOCK_M,
        BLOCK_V,
        BLOCK_H,
    )
    if WRITE_GRADIENT:
        if HAS_SOFTCAP:
            grad *= 1.0 - bounded * bounded
        grad *= tl.load(row_scale_ptr + rows, mask=inside, other=0.0)[:, None]
        columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        out = out_ptr + rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
        tl.store(out, round_to(grad, out_ptr.dtype.element_ty), mask=inside[:, None])
    else:
        slots = out_ptr + tile.to(tl.int64) * N + rows
        value_sum, total_sum = sum_both(value, grad, 1)
        tl.store(slots, value_sum, mask=inside)
        tl.store(slots + num_tiles.to(tl.int64) * N, total_sum, mask=inside)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Student and teacher of one call, in the kernels' layout.

    Rows may have any stride, but the elements of a row are adjacent.
    """

    student_hidden: Tensor  # [N, H]
    teacher_hidden: Tensor  # [N, Ht]
    student_head: Tensor  # [V, H]
    teacher_head: Tensor  # [V, Ht]; the student's own tensor is read once for both
    student_bias: Tensor | None  # [V], contiguous
    teacher_bias: Tensor | None  # [V], contiguous
    order: Tensor | None  # [V] int64: the head's row of each position of the vocabulary
    options: SpanOptions

    @classmethod
    def of(cls, inputs: SpanInputs, options: SpanOptions, order: Tensor | None) -> Pair:
        """The tensors of `inputs`, detached and copied where the kernels need another layout."""
        student_head = rowwise(inputs.student_head.detach())
        student_bias, teacher_bias = (
            None if bias is None else bias.detach().contiguous()
            for bias in (inputs.student_bias, inputs.teacher_bias)
        )
        return cls(
            student_hidden=rowwise(inputs.student_hidden.detach()),
            teacher_hidden=rowwise(inputs.teacher_hidden),
            student_head=student_head,
            teacher_head=student_head if inputs.head_is_shared else rowwise(inputs.teacher_head),
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            order=order,
            options=options,
        )

    def at(self, rows: slice) -> Pair:
        """The same sides for some of the rows."""
        return replace(
            self,
            student_hidden=self.student_hidden[rows],
            teacher_hidden=self.teacher_hidden[rows],
        )

    @property
    def hidden(self) -> tuple[Tensor, Tensor]:
        """[N, H] of the student, [N, Ht] of the teacher."""
        return self.student_hidden, self.teacher_hidden

    @property
    def heads(self) -> tuple[Tensor, Tensor]:
        """[V, H] of the student, [V, Ht] of the teacher."""
        return self.student_head, self.teacher_head

    @property
    def transforms(self) -> tuple[LogitTransform, LogitTransform]:
        """The transforms of both sides' logits, with biases in their own dtype."""
        softcap, temperature = self.options.softcap, self.options.temperature
        return (
            LogitTransform(self.student_bias, softcap, temperature),
            LogitTransform(self.teacher_bias, softcap, temperature),
        )

    def launch(
        self,
        active: Tensor,  # [B, num_tiles], of the tiles from first_tile on
        student_lse: Tensor,  # [N]
        teacher_lse: Tensor,  # [N]
        *,
        first_tile: int,
        out: Tensor,
        total: Tensor | None = None,  # [N] float32: writes G instead of partial sums
        row_scale: Tensor | None = None,  # [N] float32
    ) -> None:
        """Run `pair_kernel`, which says what `out` is. There must be a token, N >= 1."""
        options, shared = self.options, same_memory(*self.heads)
        more = (self.student_bias, self.teacher_bias, options.softcap, options.entry_clip)
        skewed = formula(options) == "skewed_jsd"
        extras = not shared or skewed or any(option is not None for option in more)
        gemm = Gemm.of("pair", *self.hidden, *self.heads, order=self.order, extras=extras)
        config = gemm.config
        pairs, num_pairs = active_pairs(active, config.group)
        (V, H), Ht = self.student_head.shape, self.teacher_head.shape[1]
        launch(
            pair_kernel,
            (active.numel() * ROW_BLOCK // config.block_m,),
            config,
            student_hidden=gemm.operand(self.student_hidden, config.block_m, config.block_k),
            teacher_hidden=gemm.operand(self.teacher_hidden, config.block_m, config.block_k),
            student_head=gemm.operand(self.student_head, config.block_n, config.block_k),
            teacher_head=gemm.operand(self.teacher_head, config.block_n, config.block_k),
            student_bias_ptr=self.student_bias,
            teacher_bias_ptr=self.teacher_bias,
            order_ptr=self.order,
            student_lse_ptr=student_lse.float().contiguous(),
            teacher_lse_ptr=teacher_lse.float().contiguous(),
            pairs_ptr=pairs,
            num_pairs_ptr=num_pairs,
            total_ptr=total,
            row_scale_ptr=row_scale,
            out_ptr=out,
            out_stride=out.stride(0),
            N=self.student_hidden.shape[0],
            V=V,
            H=H,
            Ht=Ht,
            first_tile=first_tile,
            num_tiles=active.shape[1],
            student_stride=self.student_hidden.stride(0),
            teacher_stride=self.teacher_hidden.stride(0),
            student_head_stride=self.student_head.stride(0),
            teacher_head_stride=self.teacher_head.stride(0),
            beta=options.beta,
            rest=1 - options.beta,
            clip=options.entry_clip or 0.0,
            softcap=options.softcap or 1.0,
            inv_temperature=1.0 / options.temperature,
            WRITE_GRADIENT=total is not None,
            DIVERGENCE=formula(options),
            HAS_CLIP=options.entry_clip is not None,
            HAS_SOFTCAP=options.softcap is not None,
            HAS_STUDENT_BIAS=self.student_bias is not None,
            HAS_TEACHER_BIAS=self.teacher_bias is not None,
            HAS_ORDER=self.order is not None,
            SHARED_HEAD=shared,
            USE_TMA=gemm.use_tma,
            EVEN_H=H % config.block_k == 0 and Ht % config.block_k == 0,
            CAST=gemm.cast,
            PRECISION=gemm.precision,
            BLOCK_M=config.block_m,
            BLOCK_V=config.block_n,
            BLOCK_H=config.block_k,
            ROW_BLOCK=ROW_BLOCK,
        )
