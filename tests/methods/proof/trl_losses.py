"""TRL's losses, in a module of their own: importing TRL takes seconds."""

from __future__ import annotations

import os
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

from accelerate import Accelerator
from torch import Tensor

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # GKD is called experimental, with a warning

from trl.experimental.gkd.gkd_trainer import GKDTrainer
from trl.experimental.sdpo.loss_utils import compute_topk_self_distillation_loss
from trl.trainer.grpo_trainer import GRPOTrainer

__all__ = ["GrpoLoss", "compute_topk_self_distillation_loss", "generalized_jsd_loss"]

generalized_jsd_loss = GKDTrainer.generalized_jsd_loss


class GrpoLoss(GRPOTrainer):
    """TRL's trainer with what its loss reads, and log-probabilities from plain logits."""

    def __init__(self, model: Any, loss_type: str, config: Any) -> None:
        policy = config.policy
        self.model, self.loss_type = model, loss_type
        self.epsilon_low, self.epsilon_high = policy.clip_low, policy.clip_high
        self.args = SimpleNamespace(delta=policy.dual_clip)  # type: ignore[assignment]
        self.entropy_coef, self._entropy_bonus_enabled = policy.entropy_weight, True
        self.use_adaptive_entropy = self.aux_loss_enabled = self.use_vllm = False
        self.beta, self.top_entropy_quantile = 0.0, 1.0
        self.off_policy_mask_threshold, self.importance_sampling_level = None, "token"
        self.max_completion_length = config.sample.max_new_tokens
        self.accelerator = Accelerator(cpu=True)
        self._metrics = {"eval": defaultdict(list), "train": defaultdict(list)}
        self.temperature = config.sample.temperature

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, **_: Any
    ) -> tuple[Tensor, Tensor, None]:
        position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
        logits = model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids
        ).logits[:, -logits_to_keep - 1 : -1]
        log_p = (logits / self.temperature).log_softmax(-1)
        chosen = log_p.gather(2, input_ids[:, -logits_to_keep:, None])[..., 0]
        return chosen, -(log_p.exp() * log_p).sum(-1), None
