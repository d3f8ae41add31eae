"""A transformers model as a function: token ids and a cache in, next-token logits out.

A model runs in the first of these ways that gives the logits of its plain forward pass, as a
comparison at load tells (`way_check`):

    padded     prompts of unequal length are prefilled together, padded on the left
    exact      prompts of equal length are prefilled together, so that no recurrent or convolution
               layer ever reads padding
    recompute  nothing is cached: each row is read again as a whole at every token
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from rosd_fast.engines.local.kv_cache import RowCache, RowGroup
from rosd_fast.engines.local.plain import evaluating
from rosd_fast.engines.local.recompute import recomputed_logits
from rosd_fast.engines.local.row_states import is_recurrent
from rosd_fast.engines.local.way_check import Trial
from rosd_fast.errors import UserError
from rosd_fast.model.layouts import FAILURES

Way = Literal["padded", "exact", "recompute"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to run the model, and how it decodes rows of unequal length.

    mask: what hides the columns before a row.
        bias: [B, 1, 1, columns] in the model's dtype, which saves transformers from building one
            per step.
        columns: [B, columns] bool, from which the model also derives what depends on positions
            (ALiBi) or on the type of layer (windows, chunks).
        none: nothing, as there are no columns.
        groups: nothing, as only rows of equal length are decoded together.
    """

    way: Way
    mask: Literal["bias", "columns", "none", "groups"]


RECOMPUTE = Candidate("recompute", "none")
FIX = "Choose a causal language model of another architecture"


class NextToken:
    """Computes next-token logits of rows of unequal length with the model's own forward pass.

    context_length: the model's maximum number of tokens; None: unlimited.
    vocab_size: V, the width of the logits.
    way: how the model is run.
    why_recompute: with `way` recompute, why no cache is used; otherwise empty.

    Raises UserError for a model whose logits depend on the tokens that follow or are not finite.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        self.model = model
        self.context_length: int | None = getattr(config, "max_position_embeddings", None)
        self.vocab_size: int = config.vocab_size
        capped = getattr(config, "attn_logit_softcapping", None) is not None
        sdpa = getattr(model, "_supports_sdpa", False) and not capped  # as in use_exact_attention
        self._attention = "sdpa" if sdpa else "eager"
        named = signature(model.forward).parameters
        self._options: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in named:
            self._options["logits_to_keep"] = 1
        self._takes_positions = "position_ids" in named
        self._cache_name = "cache_params" if "cache_params" in named else "past_key_values"
        self._choose(_candidates(model))

    @property
    def way(self) -> Way:
        return self._candidate.way

    @contextmanager
    def running(self) -> Iterator[None]:
        """Switch to eval mode, no gradients and an attention that supports padding masks.

        Everything is restored on leaving. The block must not `await`: inference mode is a state of
        the thread.
        """
        model, attention = self.model, self.model.config._attn_implementation or "eager"
        try:
            if attention != self._attention:
                model.set_attn_implementation(self._attention)
            with evaluating(model):
                yield
        finally:
            if attention != self._attention:
                model.set_attn_implementation(attention)

    def new_cache(self, *, rows: int, columns: int) -> RowCache:
        """An empty cache for this model."""
        recurrent = self.way == "exact" and self._candidate.mask != "groups"
        layers = _cache_layers(self.model) if recurrent else ()
        return RowCache(rows=rows, columns=columns, layers=layers)

    def prefill(self, cache: RowCache, ids: Tensor, starts: Tensor) -> Tensor:
        """Fill an empty cache with left-padded prompts; return the logits [B, V] of their ends.

        ids: [B, L] int64. starts: [B] int64, the column where each prompt begins; all 0 with
        `way` exact.
        """
        if self.way == "recompute":
            return recomputed_logits(self.model, cache, ids, ids.shape[1] - starts)
        columns = torch.arange(ids.shape[1], device=ids.device)
        positions = (columns - starts[:, None]).clamp_(min=0)
        mask = (columns >= starts[:, None]) if bool((starts > 0).any()) else None
        return self._logits(cache, ids, positions, mask)

    def decode(
        self, cache: RowCache, ids: Tensor, positions: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Feed one more token per row; return the logits [B, V].

        ids, positions: [B] int64. mask: the result of `decode_mask`.
        """
        if self.way == "recompute":
            return recomputed_logits(self.model, cache, ids[:, None], positions + 1)
        if self._candidate.mask == "groups":
            return self._decode_groups(cache, ids, positions)
        if mask is not None:
            mask = mask[..., cache.first : cache.end + 1]
        return self._logits(cache, ids[:, None], positions[:, None], mask)

    def decode_mask(self, cache: RowCache, starts: Tensor) -> Tensor | None:
        """The mask over all cache columns, for rows that begin at `starts`; None: all visible."""
        kind = self._candidate.mask
        if kind in ("none", "groups") or bool((starts == cache.first).all()):
            return None
        columns = torch.arange(cache.capacity, device=starts.device)
        visible = columns >= starts[:, None]
        if kind == "columns":
            return visible
        bias = torch.zeros(visible.shape, dtype=self.model.dtype, device=starts.device)
        bias.masked_fill_(~visible, torch.finfo(bias.dtype).min)
        return bias[:, None, None, :]

    def _decode_groups(self, cache: RowCache, ids: Tensor, positions: Tensor) -> Tensor:
        """The logits [B, V] of `decode`, computed for the rows of each length apart."""
        rows = [(positions == length).nonzero()[:, 0] for length in positions.unique()]
        logits = [
            self._logits(
                RowGroup(cache, own, length=int(positions[own[0]])),
                ids[own, None],
                positions[own, None],
                mask=None,
            )
            for own in rows
        ]
        cache.end += 1
        return torch.cat(logits)[torch.cat(rows).argsort()]

    def _logits(
        self, cache: RowCache, ids: Tensor, positions: Tensor, mask: Tensor | None
    ) -> Tensor:
        options: dict[str, Any] = {self._cache_name: cache, **self._options}
        if self._takes_positions:
            options["position_ids"] = positions
        output = self.model(input_ids=ids, attention_mask=mask, **options)
        cache.end += ids.shape[1]
        return output.logits[:, -1]

    def _choose(self, candidates: Sequence[Candidate]) -> None:
        """Set the first way that gives the logits of the plain forward pass."""
        name = type(self.model).__name__
        try:
            trial = Trial.of(self.model, self.context_length)
        except torch.OutOfMemoryError:
            raise
        except FAILURES as error:
            raise UserError(f"cannot be run ({error})", where=name, fix=FIX) from error
        if not trial.is_finite:
            raise UserError("its logits are not finite", where=name, fix="Check the weights")
        reason = "has no cache of transformers' kind"
        # A wrong mask or position changes the logits by about their own size.
        tolerance = 1e-3 if self.model.dtype in (torch.float32, torch.float64) else 1e-1
        for self._candidate in candidates:
            try:
                difference = trial.mismatch(self)
            except torch.OutOfMemoryError:  # says nothing of the way
                raise
            except FAILURES as error:
                reason = f"cannot be run with a cache ({' '.join(str(error).split())})"
                continue
            if difference <= tolerance:
                self.why_recompute = reason if self.way == "recompute" else ""
                return
            reason = (
                "decoding with a cache does not reproduce its plain forward pass "
                f"(relative difference {difference:.1e})"
            )
        raise UserError("its logits depend on the tokens that follow", where=name, fix=FIX)


def _candidates(model: PreTrainedModel) -> list[Candidate]:
    """The ways to try for `model`, the fastest first."""
    config = model.config.get_text_config()
    if not {"past_key_values", "cache_params"} & {*signature(model.forward).parameters}:
        return [RECOMPUTE]
    layers = _cache_layers(model)
    if any(is_recurrent(layer) for layer in layers):
        attends = any(isinstance(layer, CacheLayerMixin) for layer in layers)
        return [Candidate("exact", "columns" if attends else "none"), RECOMPUTE]
    candidates = [Candidate("exact", "groups"), RECOMPUTE]
    # Llama 4 scales queries by the number of columns, padding included, from 8,192 on.
    if getattr(config, "attn_temperature_tuning", False):
        return candidates
    candidates.insert(0, Candidate("padded", "columns"))
    # With a sliding window each type of layer has a mask of its own, which transformers builds.
    types: set[str] = set(getattr(config, "layer_types", None) or ())
    if types <= {"full_attention"} and getattr(config, "sliding_window", None) is None:
        candidates.insert(0, Candidate("padded", "bias"))
    return candidates


def _cache_layers(model: PreTrainedModel) -> list[Any]:
    """The layers of transformers' own cache for `model`, empty; none where it has no such cache."""
    try:
        return DynamicCache(config=model.config).layers
    except FAILURES:
        return []
