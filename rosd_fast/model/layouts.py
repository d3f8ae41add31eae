"""How a model runs sequences: its layout, which is chosen by numbers when the model is loaded.

    shared   packed sequences without padding, a common prefix stored once; attention is ours
    packed   packed sequences, each with a prefix of its own; layers with a state over the tokens
             read where a sequence begins (`cu_seq_lens`, `seq_idx`)
    padded   rows of whole sequences, padded on the right; everything is the model's own

`choose_layout` takes the first whose logits equal those of the model's own forward pass of each
sequence alone. The last is exact for every causal model, whatever its layers are: a token sees only
what is before it, and the padding is behind. What a layout computes is one record,
`PackedSequences`, and one result, a state for each of its rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rosd_fast.errors import UserError
from rosd_fast.model.attention import (
    PACKED,
    Segments,
    backbone,
    check_config,
    name,
    num_embeddings,
)
from rosd_fast.model.head import head, logits
from rosd_fast.types import PackedSequences
from rosd_fast.utils.transfer import on_device

Layout = Literal["shared", "packed", "padded"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
ATTRIBUTE = "rosd_layout"  # of a model; copies of the model, skeletons among them, have it too
FAILURES = (
    UserError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)  # what a layout that a model does not suit may raise


def layout_of(model: PreTrainedModel) -> Layout:
    """The layout that `choose_layout` found, "shared" for a model that it has not seen."""
    return getattr(model, ATTRIBUTE, "shared")


def hidden_states(model: PreTrainedModel, packed: PackedSequences) -> Tensor:
    """The [T, H] hidden states after the final norm, in the model's dtype and on its device.

    Logits are never computed. Differentiable when grad mode is on.
    """
    with packed_forward(model):
        return decode(model, packed, model.device)[0]


def decode(model: PreTrainedModel, packed: PackedSequences, device: torch.device) -> Tensor:
    """The [1, T, H] states of `hidden_states`; call it within `packed_forward`.

    device: the device to compute on; the weights of a sharded model may be kept on another.
    """
    layout = layout_of(model)
    if layout == "shared":
        return _packed_states(model, packed, device)
    whole = WholeSequences.of(packed)
    if layout == "packed":
        states = _packed_states(model, whole.packed(), device, by_state=True)
        places = whole.places
    else:
        ids = on_device(whole.padded(), device)
        states = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
        places = whole.padded_places
    return states.flatten(0, 1).index_select(0, on_device(places, device))[None]


def _packed_states(
    model: PreTrainedModel,
    packed: PackedSequences,
    device: torch.device,
    *,
    by_state: bool = False,
) -> Tensor:
    """[1, T, H] states of one row of packed sequences.

    by_state: tell layers with a state over the tokens where a sequence begins, by the arguments
        that transformers has for it.
    """
    segments = Segments.of(packed, device)
    borders = {}
    if by_state:
        lengths = torch.tensor(packed.lengths)
        index = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(lengths)
        longest = max(packed.lengths)
        borders = {
            "cu_seq_lens_q": segments.cu_seqlens_q,
            "cu_seq_lens_k": segments.cu_seqlens_q,
            "max_length_q": longest,
            "max_length_k": longest,
            "seq_idx": on_device(index, device)[None],
        }
    output = backbone(model)(
        input_ids=on_device(packed.input_ids[None], device),
        position_ids=on_device(packed.position_ids[None], device),
        use_cache=False,
        packed_segments=segments,
        **borders,
    )
    return output.last_hidden_state


@contextmanager
def packed_forward(model: PreTrainedModel) -> Iterator[None]:
    """Make the model's attention layers attend within packed sequences; undone on leaving (0.2 ms).

    May be nested. Recomputed activations read the setting again, so run the backward pass inside
    the block too. Nothing changes for the layout padded. Raises UserError if the model bypasses
    transformers' attention interface.
    """
    before = model.config._attn_implementation or "eager"
    if before == PACKED or layout_of(model) == "padded":
        yield
        return
    try:
        model.set_attn_implementation(PACKED)
        if model.config._attn_implementation != PACKED:
            raise UserError(
                "its attention layers do not use transformers' attention interface",
                where=name(model),
                fix="Choose a model of another architecture",
            )
        yield
    finally:
        model.set_attn_implementation(before)


@dataclass(frozen=True, slots=True)
class WholeSequences:
    """The sequences of a pack, each with its prefix: a path from a root to a leaf.

    input_ids: the token ids of each sequence.
    places: [T] int64, where the token of each packed row is among all tokens, sequence after
        sequence. A row that several sequences share is taken from the first.
    """

    input_ids: tuple[Tensor, ...]
    places: Tensor

    @classmethod
    def of(cls, packed: PackedSequences) -> WholeSequences:
        """The sequences of `packed`."""
        rows = torch.arange(len(packed.input_ids)).split(packed.lengths)
        leaves = set(range(len(rows))) - set(packed.parents)
        sequences = [
            torch.cat([rows[index] for index in path])
            for leaf, path in enumerate(packed.paths)
            if leaf in leaves
        ]
        places = torch.empty(len(packed.input_ids), dtype=torch.int64)
        ends = [*accumulate(len(each) for each in sequences)]
        for end, each in zip(reversed(ends), reversed(sequences), strict=True):
            places[each] = torch.arange(end - len(each), end)  # the first sequence writes last
        return cls(tuple(packed.input_ids[rows] for rows in sequences), places)

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each sequence."""
        return [len(ids) for ids in self.input_ids]

    def packed(self) -> PackedSequences:
        """The sequences end to end, without shared prefixes; nothing is gathered."""
        return PackedSequences(
            input_ids=torch.cat(self.input_ids),
            position_ids=torch.cat([torch.arange(length) for length in self.lengths]),
            cu_seqlens=(0, *accumulate(self.lengths)),
            gather=torch.empty(0, dtype=torch.int64),
        )

    def padded(self) -> Tensor:
        """[B, L] int64 token ids of the sequences, with zeros behind shorter ones."""
        return torch.nn.utils.rnn.pad_sequence([*self.input_ids], batch_first=True)

    @property
    def padded_places(self) -> Tensor:
        """[T] int64, where the token of each packed row is among the B L tokens of `padded`."""
        lengths = torch.tensor(self.lengths)
        skipped = (int(lengths.max()) - lengths).cumsum(0) - (int(lengths.max()) - lengths)
        sequence = torch.arange(len(lengths)).repeat_interleave(lengths)
        return (torch.arange(len(sequence)) + skipped[sequence])[self.places]


@torch.no_grad()
def choose_layout(model: PreTrainedModel, layouts: Sequence[Layout] = LAYOUTS) -> Layout:
    """Find the first of `layouts` that gives the model's own logits, and set it on the model.

    Three short sequences, two of which share a prefix, are compared with the model's own forward
    pass of each. Raises UserError, with what each layout did wrong, if there is none.
    """
    reasons: list[str] = []
    for layout in layouts:
        setattr(model, ATTRIBUTE, layout)
        try:
            check_layout(model)
        except torch.OutOfMemoryError:
            raise
        except FAILURES as error:
            reasons.append(f"{layout}: {getattr(error, 'what', error)}".splitlines()[0])
        else:
            return layout
    delattr(model, ATTRIBUTE)
    raise UserError(
        f"no layout gives the model's own logits ({'; '.join(reasons)})",
        where=name(model),
        fix="Choose a causal language model of another architecture",
    )


@torch.no_grad()
def check_layout(model: PreTrainedModel) -> None:
    """Raise UserError unless the states of the model's layout and the head give its own logits."""
    if layout_of(model) != "padded":
        check_config(model, by_state=layout_of(model) == "packed")
    lengths = (7, 5, 4, 6)
    ids = (torch.arange(sum(lengths)) * 37 + 11) % num_embeddings(model)
    packed = PackedSequences(
        input_ids=ids,
        position_ids=torch.cat(
            [torch.arange(n) + 7 * (i in (1, 2)) for i, n in enumerate(lengths)]
        ),
        cu_seqlens=(0, *accumulate(lengths)),
        gather=torch.arange(sum(lengths)),
        parents=(-1, 0, 0, -1),
    )
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 5e-2
    states = hidden_states(model, packed).split(lengths)
    for last, segment in zip(packed.cu_seqlens[1:], states, strict=True):
        sequence = torch.tensor([packed.sequence(last - 1)]).to(model.device)
        expected = model(input_ids=sequence, use_cache=False).logits[0, -len(segment) :]
        difference = (logits(segment, head(model)) - expected).norm(dim=-1) / expected.norm(dim=-1)
        # The median, because a router that flips on a rounding error changes one token, not most.
        if not float(difference.median()) <= tolerance:
            raise UserError(
                f"its logits are not the model's own (relative difference "
                f"{float(difference.median()):.1e})",
                where=name(model),
            )
