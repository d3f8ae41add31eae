"""A transformers model as a function: token ids and a KV cache in, next-token logits out."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rosd_fast.engines.local.kv_cache import RowCache
from rosd_fast.errors import UserError
from rosd_fast.model.attention import LAYER_TYPES


class NextToken:
    """Computes next-token logits of left-padded rows with the model's own forward pass.

    context_length: the model's maximum number of tokens; None: unlimited.
    vocab_size: V, the width of the logits.

    Raises UserError for a model whose logits with cache and left padding are not those of its plain
    forward pass: recurrent layers, chunked attention, position schemes that cannot be padded.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        self.model = model
        self.context_length: int | None = getattr(config, "max_position_embeddings", None)
        self.vocab_size: int = config.vocab_size
        self._attention = "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"
        self._options: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            self._options["logits_to_keep"] = 1
        # A 4D mask saves transformers from building one per step. With a sliding window it has to,
        # since each type of layer has a mask of its own.
        types: set[str] = set(getattr(config, "layer_types", None) or ())
        self._passes_4d_mask = (
            types <= {"full_attention"} and getattr(config, "sliding_window", None) is None
        )
        self._check(types)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Switch to eval mode, no gradients and an attention that supports padding masks.

        Everything is restored on leaving. The block must not `await`: inference mode is a state of
        the thread.
        """
        model = self.model
        training = [module for module in model.modules() if module.training]
        attention = model.config._attn_implementation or "eager"
        try:
            if training:
                model.eval()
            if attention != self._attention:
                model.set_attn_implementation(self._attention)
            with torch.inference_mode():
                yield
        finally:
            if attention != self._attention:
                model.set_attn_implementation(attention)
            for module in training:
                module.training = True

    def prefill(self, cache: RowCache, ids: Tensor, starts: Tensor) -> Tensor:
        """Fill an empty cache with left-padded prompts; return the logits [B, V] of their ends.

        ids: [B, L] int64. starts: [B] int64, the column where each prompt begins.
        """
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
        if mask is not None:
            mask = mask[..., cache.first : cache.end + 1]
        return self._logits(cache, ids[:, None], positions[:, None], mask)

    def decode_mask(self, cache: RowCache, starts: Tensor) -> Tensor | None:
        """The mask over all cache columns, for rows that begin at `starts`; None: all visible."""
        if bool((starts == cache.first).all()):
            return None
        columns = torch.arange(cache.capacity, device=starts.device)
        visible = columns >= starts[:, None]
        if not self._passes_4d_mask:
            return visible
        bias = torch.zeros(visible.shape, dtype=self.model.dtype, device=starts.device)
        bias.masked_fill_(~visible, torch.finfo(bias.dtype).min)
        return bias[:, None, None, :]

    def _logits(
        self, cache: RowCache, ids: Tensor, positions: Tensor, mask: Tensor | None
    ) -> Tensor:
        output = self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            **self._options,
        )
        cache.end += ids.shape[1]
        return output.logits[:, -1]

    def _check(self, types: set[str]) -> None:
        """Compare two prompts of unequal length and a decoding step with the plain forward pass."""
        name = type(self.model).__name__
        fix = "Choose a model whose layers all use full or sliding-window attention"
        if types - LAYER_TYPES:
            kinds = ", ".join(sorted(types - LAYER_TYPES))
            raise UserError(
                f"its {kinds} layers are not supported by the local engine", where=name, fix=fix
            )
        device = self.model.device
        ids = (torch.arange(10, device=device) * 37 + 11).reshape(2, 5) % self.vocab_size
        starts = torch.tensor([0, 2], device=device)
        cache = RowCache(rows=2, columns=5)
        try:
            with self.running():
                self.prefill(cache, ids[:, :4], starts)
                mask = self.decode_mask(cache, starts)
                ours = self.decode(cache, ids[:, 4], 4 - starts, mask)
                plain = [self.model(input_ids=ids[:1]), self.model(input_ids=ids[1:, 2:])]
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"cannot be run with a cache ({error})", where=name, fix=fix) from error
        expected = torch.cat([output.logits[:, -1] for output in plain]).float()
        if not bool(expected.isfinite().all()):
            raise UserError("its logits are not finite", where=name, fix="Check the weights")
        difference = ((ours.float() - expected).norm(dim=-1) / expected.norm(dim=-1)).max()
        # A wrong mask or position changes the logits by about their own size.
        tolerance = 1e-3 if self.model.dtype in (torch.float32, torch.float64) else 1e-1
        if not float(difference) <= tolerance:
            raise UserError(
                "decoding with a cache does not reproduce its plain forward pass "
                f"(relative difference {float(difference):.1e})",
                where=name,
                fix=fix,
            )
