"""Options that are right by themselves and do not go together."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rosd_fast.config.schema import Config


def uses_teacher_weights(config: Config) -> bool:
    """Whether anything is sampled with the teacher's weights, which otherwise only score."""
    reflect = config.reflect
    written = reflect.weights == "teacher" and reflect.control != "none"
    return written or reflect.probe_every > 0


def control_arms(config: Config) -> list[str]:
    """The control arms that a run is in, as in `span.control random`; empty: none."""
    controls = {"reflect.control": config.reflect.control, "span.control": config.span.control}
    return [f"{name} {value}" for name, value in controls.items() if value != "off"]


def conflict(config: Config) -> str | None:
    """The first conflict between options, in words that begin with an option; None: there is none.

    The option that a message begins with is where an error in a TOML file is reported.
    """
    loss, engine, teacher, lora = config.loss, config.engine, config.teacher, config.lora
    optim = config.optim
    sglang = engine.kind == "sglang"
    shares_weights = lora.rank > 0 and teacher.model is None  # with the adapters switched off
    rules = (
        (
            teacher.model is not None and teacher.kind != "frozen",
            f"teacher.model is another model than the student, which needs teacher.kind frozen; "
            f"it is {teacher.kind}",
        ),
        (
            loss.top_k is not None and (loss.strategy == "tiled" or loss.sparsity != "exact"),
            f"loss.top_k is {loss.top_k}: top-k needs every logit of a token, so loss.strategy "
            "cannot be tiled and loss.sparsity must be exact",
        ),
        (
            loss.sparsity != "exact" and loss.strategy == "reference",
            f"loss.sparsity is {loss.sparsity}: loss.strategy reference computes every entry; want "
            "chunked, tiled or auto",
        ),
        (
            (engine.launch == "urls") != bool(engine.urls),
            "engine.launch urls and engine.urls go together: give both or neither",
        ),
        (
            engine.one_step_ahead
            and (not sglang or config.reflect.weights == "teacher" or engine.colocated),
            "engine.one_step_ahead samples while the learner works, which needs engine.kind "
            "sglang, reflect.weights student and no engine.colocated",
        ),
        (
            teacher.backend == "sglang"
            and (teacher.kind != "frozen" or uses_teacher_weights(config)),
            "teacher.backend sglang: the server never changes its weights and only scores, which "
            "needs teacher.kind frozen, reflect.weights student and reflect.probe_every 0",
        ),
        (
            uses_teacher_weights(config)
            and (teacher.kind in ("live", "trust_region") or shares_weights),
            "reflect.weights teacher and reflect.probe_every sample with the teacher's weights, "
            "which needs teacher.kind frozen or ema, and teacher.model or no lora.rank",
        ),
        (
            teacher.offload and (teacher.kind == "live" or shares_weights),
            "teacher.offload: this teacher has no weights of its own (teacher.kind is live, or "
            "adapters are switched off for it)",
        ),
        (
            lora.rank > 0 and bool(config.optim.trainable),
            "optim.trainable and lora.rank exclude each other: give one of them",
        ),
        (
            lora.quantize != "none" and not lora.rank,
            f"lora.quantize {lora.quantize} needs lora.rank: weights of 4 bits cannot be trained",
        ),
        (
            (optim.warmup_steps is None) == (optim.warmup_frac is None),
            "optim.warmup_frac and optim.warmup_steps exclude each other: set one of them to none",
        ),
        (
            optim.kind == "adamw8bit" and optim.offload,
            "optim.offload needs optim.kind adamw: host memory has room for moments of 32 bits",
        ),
        (
            teacher.backend != "sglang" and bool(teacher.url),
            "teacher.url needs teacher.backend sglang",
        ),
        (
            engine.sync == "distributed" and not sglang,
            "engine.sync distributed needs engine.kind sglang",
        ),
        (
            engine.sync == "adapter" and (not sglang or not lora.rank or engine.colocated),
            "engine.sync adapter sends LoRA adapters to servers that keep the base weights, which "
            "needs engine.kind sglang, lora.rank and no engine.colocated",
        ),
        (
            engine.colocated and (not sglang or engine.launch != "local"),
            "engine.colocated needs engine.kind sglang and engine.launch local",
        ),
        (
            engine.colocated and engine.sync == "distributed",
            "engine.colocated needs engine.sync disk: NCCL connects different GPUs",
        ),
        (
            config.eval.overlap and (not sglang or engine.colocated),
            "eval.overlap evaluates on the servers while the learner works, which needs "
            "engine.kind sglang and no engine.colocated",
        ),
        (
            config.reflect.control == "none" and config.span.control != "off",
            f"span.control is {config.span.control}: with reflect.control none there is no quote "
            "and no span, and wrong rollouts are distilled whole",
        ),
        (
            config.span.control == "negative" and bool(config.loss.policy_weight),
            "loss.policy_weight gives wrong rollouts another policy gradient than span.control "
            "negative does: give one of them",
        ),
        (
            config.compat.reencode_span and config.span.granularity != "suffix",
            "compat.reencode_span knows no end of a quote, which needs span.granularity suffix",
        ),
        (
            (config.compat.reencode_span or config.compat.cut_prompts_right)
            and config.reflect.mode != "free",
            "compat.reencode_span and compat.cut_prompts_right need reflect.mode free",
        ),
        (
            config.compat.micro_batch_rollouts > 0 and config.optim.updates_per_step > 1,
            "compat.micro_batch_rollouts needs optim.updates_per_step 1",
        ),
        (
            config.sample.group_size < 2
            and (config.method == "grpo" or bool(loss.policy_weight))
            and config.method != "sft",
            f"sample.group_size is {config.sample.group_size}: the policy gradient compares a "
            "rollout with its siblings, so a group needs at least 2",
        ),
        (
            config.sample.group_size < 2 and config.method not in ("opsd", "opd", "sft"),
            f"sample.group_size is {config.sample.group_size}: a wrong rollout learns from a "
            "correct sibling, so a group needs at least 2",
        ),
    )
    return next((message for wrong, message in rules if wrong), None)
