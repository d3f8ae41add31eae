"""The methods by their definitions: from rollouts, verdicts and texts to the loss of an update.

Nothing of the trainer computes here. The tokenizer renders the prompts, each sequence goes alone
through plain transformers, and the losses are written out on full logits.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rosd_fast.config import Config
from rosd_fast.types import Group, Problem, Reflection, Rollout, Verdict


@dataclass(frozen=True, kw_only=True)
class Textbook:
    """One update: models, texts, and the groups that it trains on.

    teacher_texts below are user turns; `distilled` yields (rollout, user turn, first token).
    """

    student: Any
    teacher: Any
    tokenizer: Any
    config: Config
    groups: Sequence[Group]
    verdicts: Mapping[str, Verdict]
    reflections: Mapping[str, Reflection]

    def log_probs(self, model: Any, user: str, rollout: Rollout) -> Tensor:
        """[n, V] log-probabilities for each token of the rollout after a user turn."""
        prompt = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": user}], add_generation_prompt=True, return_dict=False
        )
        ids = torch.tensor([[*prompt, *rollout.completion_ids]])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        temperature = self.config.loss.temperature or self.config.sample.temperature
        return (logits / temperature).log_softmax(-1)

    def is_correct(self, rollout: Rollout) -> bool:
        return self.verdicts[rollout.id].success

    def rollouts(self) -> Iterator[tuple[Problem, Rollout]]:
        for group in self.groups:
            yield from ((group.problem, rollout) for rollout in group.rollouts)

    # What each method distils: (problem, rollout, the teacher's user turn, first token).

    def rosd(self) -> Iterator[tuple[Problem, Rollout, str, int]]:
        """From the quote on, of a teacher that has read the explanation."""
        for problem, rollout in self.rollouts():
            said = self.reflections.get(rollout.id)
            if said is None or not said.explanation:
                continue
            options, start = self.config.teacher, 0
            template = options.correct_template if said.correct else options.wrong_template
            if not said.correct:
                if not said.quote or (place := rollout.text.find(said.quote)) < 0:
                    continue
                ids, text = rollout.completion_ids, self.tokenizer.decode
                start = next(n for n in range(len(ids)) if len(text(ids[: n + 1])) > place)
            user = template.replace("{quote}", said.quote or "")
            user = user.replace("{explanation}", said.explanation)
            yield problem, rollout, user.replace("{problem}", problem.prompt), start

    def sdpo(self) -> Iterator[tuple[Problem, Rollout, str, int]]:
        """All tokens, of a teacher that has read the first other correct rollout."""
        for group in self.groups:
            for rollout in group.rollouts:
                others = [r for r in group.rollouts if r is not rollout and self.is_correct(r)]
                if others:
                    yield group.problem, rollout, self.solved(group.problem, others[0].text), 0

    def opsd(self) -> Iterator[tuple[Problem, Rollout, str, int]]:
        """All tokens, of a teacher that has read the reference solution."""
        for problem, rollout in self.rollouts():
            yield problem, rollout, self.solved(problem, problem.reference or ""), 0

    def opd(self) -> Iterator[tuple[Problem, Rollout, str, int]]:
        """All tokens, of a teacher that has read the problem: another model, or an older one."""
        for problem, rollout in self.rollouts():
            yield problem, rollout, problem.prompt, 0

    def solved(self, problem: Problem, solution: str) -> str:
        template = self.config.teacher.solution_template
        return template.replace("{demonstration}", solution).replace("{problem}", problem.prompt)

    # The losses.

    def distillation(self, chosen: Iterator[tuple[Problem, Rollout, str, int]]) -> Tensor:
        """The mean divergence over all distilled tokens, with clipped importance weights."""
        terms = [torch.zeros(0)]
        for problem, rollout, user, start in chosen:
            log_p = self.log_probs(self.student, problem.prompt, rollout)[start:]
            log_q = self.log_probs(self.teacher, user, rollout)[start:].detach()
            value = self.divergence(log_p, log_q)
            if (clip := self.config.loss.importance_clip) is not None:
                ids = torch.tensor(rollout.completion_ids[start:])
                sampled = torch.tensor(rollout.logprobs[start:], dtype=log_p.dtype)
                lp = log_p.detach().gather(1, ids[:, None])[:, 0]
                value = value * (lp - sampled).exp().clamp(max=clip)
            terms.append(value)
        return torch.cat(terms).mean()

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """[n] divergences of [n, V] log-probabilities."""
        options = self.config.loss
        if options.top_k is not None:
            ids = log_p.topk(options.top_k).indices
            log_p, log_q = (with_tail(x, ids) for x in (log_p, log_q))
        p, q = log_p.exp(), log_q.exp()
        if options.divergence == "forward_kl":
            entries = q * (log_q - log_p)
        elif options.divergence == "reverse_kl":
            entries = p * (log_p - log_q)
        else:
            beta = options.beta
            log_m = (beta * q + (1 - beta) * p).log()
            entries = beta * q * (log_q - log_m) + (1 - beta) * p * (log_p - log_m)
        return (
            entries.clamp(max=options.entry_clip).sum(-1) if options.entry_clip else entries.sum(-1)
        )

    def policy_gradient(self) -> Tensor:
        """GRPO's clipped surrogate, with its variants."""
        options, total, lengths = self.config.policy, torch.zeros(()), []
        for group in self.groups:
            scores = [self.verdicts[r.id].score for r in group.rollouts]
            for rollout, score in zip(group.rollouts, scores, strict=True):
                if options.mask_truncated and rollout.finish_reason == "length":
                    continue
                advantage = score - statistics.mean(scores)
                if options.advantage == "group_std":
                    advantage /= statistics.stdev(scores) + 1e-6
                log_p = self.log_probs(self.student, group.problem.prompt, rollout)
                lp = log_p.gather(1, torch.tensor(rollout.completion_ids)[:, None])[:, 0]
                ratio = (lp - torch.tensor(rollout.logprobs, dtype=lp.dtype)).exp()
                clipped = ratio.clamp(1 - options.clip_low, 1 + options.clip_high)
                gain = torch.minimum(ratio * advantage, clipped * advantage)
                if options.dual_clip is not None and advantage < 0:
                    gain = gain.clamp(min=options.dual_clip * advantage)
                gain = gain + options.entropy_weight * -(log_p.exp() * log_p).sum(-1)
                total = total - gain.sum() * self.share(len(lp))
                lengths.append(len(lp))
        return total / (sum(lengths) if options.normalize == "token" else len(lengths))

    def share(self, length: int) -> float:
        """The weight of a token of a rollout of this length, before the last division."""
        options = self.config
        shares = {
            "token": 1.0,
            "sequence": 1 / length,
            "constant": 1 / options.sample.max_new_tokens,
        }
        return shares[options.policy.normalize]

    def likelihood(self) -> Tensor:
        """The mean negative log-likelihood of the tokens of correct rollouts."""
        terms = [torch.zeros(0)]
        for problem, rollout in self.rollouts():
            if self.is_correct(rollout):
                log_p = self.log_probs(self.student, problem.prompt, rollout)
                ids = torch.tensor(rollout.completion_ids)
                terms.append(-log_p.gather(1, ids[:, None])[:, 0])
        return torch.cat(terms).mean()

    def loss(self) -> Tensor:
        """The loss of the method that the options name, blended as its weights say."""
        method, weights = self.config.method, self.config.loss
        if method == "sft":
            return self.likelihood()
        chosen = {"rosd": self.rosd, "sdpo": self.sdpo, "opsd": self.opsd}.get(method, self.opd)
        distill = weights.distill_weight if weights.distill_weight is not None else method != "grpo"
        policy = weights.policy_weight if weights.policy_weight is not None else method == "grpo"
        total = torch.zeros(())
        if distill:
            total = total + float(distill) * self.distillation(chosen())
        if policy:
            total = total + float(policy) * self.policy_gradient()
        return total


def with_tail(log_p: Tensor, ids: Tensor) -> Tensor:
    """[n, k + 1] log-probabilities of the tokens `ids` and of all other tokens together."""
    rest = log_p.exp().scatter(1, ids, 0.0).sum(1, keepdim=True)
    return torch.cat([log_p.gather(1, ids), rest.log()], dim=1)
