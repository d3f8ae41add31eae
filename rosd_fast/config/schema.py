"""Every option, once: its name, type, default, range and meaning.

One `Config` describes a run; `load` reads it from a preset, a TOML file and the command line. The
docstring of an option is its text in `--help`: lines are joined, except that a line which begins
with a value ("none: ...") stays a line. This module imports neither torch nor transformers, so that
`--help` stays fast.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rosd_fast.config.chat import wrong_kwargs
from rosd_fast.config.checks import conflict
from rosd_fast.config.problems import DataConfig, EvalConfig, VerifyConfig
from rosd_fast.config.section import (
    DecayRate,
    Device,
    Dtype,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    Section,
)


class RoleChat(Section):
    """The prompts of one role. What is left at None is not set, or for eval as the student's."""

    kwargs: str | None = None
    """Arguments of the chat template for this role, on top of chat.kwargs."""
    system: str | None = None
    """System prompt for problems that have none; a problem's own system turn replaces it.
    None: no system prompt (eval: the student's, and an empty text for none)."""
    template: str | None = None
    """A Jinja file that replaces the tokenizer's chat template. Its text is kept with the run.
    None: the tokenizer's (eval: the student's)."""


class ChatConfig(Section):
    """Chat templates: how prompts are rendered, for each role (see docs/chat.md)."""

    kwargs: str = ""
    """Arguments of the chat template for all roles, as in
    enable_thinking=false,reasoning_effort=low."""
    thinking: Literal["keep", "strip", "last"] = "keep"
    """The thinking of rollouts that a prompt shows: demonstrations, and rollouts to reflect on.
    keep: it is shown.
    strip: only the answer after it is shown.
    last: the last paragraph of it and the answer are shown."""
    student: RoleChat = RoleChat()
    """Rollouts."""
    reflector: RoleChat = RoleChat()
    """Reflections."""
    teacher: RoleChat = RoleChat()
    """The teacher's prompts, which contain a reflection."""
    eval: RoleChat = RoleChat()
    """Evaluation, as the student unless set."""

    @model_validator(mode="after")
    def _check(self) -> ChatConfig:
        if (message := wrong_kwargs(self)) is not None:
            raise ValueError(message)
        return self


class SampleConfig(Section):
    """Sampling of rollouts."""

    problems_per_step: PositiveInt = 32
    """Problems per step."""
    group_size: PositiveInt = 8
    """Rollouts per problem (G), at least 2: a wrong rollout learns from a correct sibling. One is
    enough for the methods opsd, opd and sft."""
    max_new_tokens: PositiveInt = 8192
    """Maximum number of tokens in a rollout."""
    max_prompt_tokens: PositiveInt = 2048
    """Maximum number of tokens in a problem's prompt; a longer prompt is an error."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature. The loss uses the same one unless loss.temperature is set."""
    top_p: Probability = 1.0
    """Nucleus sampling: sample from the smallest set of tokens with this total probability."""
    top_k: NonNegativeInt = 0
    """Sample from the k most likely tokens; 0: from all."""


class SelectConfig(Section):
    """Which groups are reflected on. A dropped group costs nothing further."""

    threshold: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Minimum score of a correct rollout."""
    on_no_success: Literal["skip", "reference", "answer", "keep"] = "skip"
    """What happens to a group without a correct rollout, which has no demonstration. The methods
    opsd, opd, grpo and sft need none and keep such groups.
    skip: it is dropped.
    reference: the problem's reference solution replaces the demonstration; without one the group is
    dropped.
    answer: reflect.answer_note, with the right answer, replaces the reflector's demonstration
    (method rosd).
    keep: it stays without a demonstration, which needs a reflector's template without one."""
    on_lone_success: Literal["skip", "reference", "own"] = "skip"
    """What replaces the sibling of the only correct rollout of a group, where the teacher's prompt
    shows one.
    skip: nothing; sdpo leaves the rollout out, and rosd's teacher reads the reflection alone.
    reference: the problem's reference solution; without one as skip.
    own: the rollout itself."""
    drop_zero_variance: bool = False
    """Drop groups whose rollouts all have the same score."""
    warn_after_steps: NonNegativeInt = 2
    """After this many steps in a row with nothing to learn from, say what would help.
    0: never."""
    stop_after_steps: NonNegativeInt = 5
    """End the run after this many steps in a row in which no rollout gives an answer, where the
    method learns from right and wrong.
    0: never."""


class ReflectConfig(Section):
    """The reflector: what it is shown and what it is asked."""

    control: Literal["off", "none", "shuffled"] = "off"
    """Control arm for the reflection (method rosd).
    off: each rollout has its own.
    none: there is none; {quote} and {explanation} are empty in the teacher's prompt, and wrong
    rollouts are distilled whole.
    shuffled: the teacher reads the reflection on a rollout of another problem; the span stays."""
    mode: Literal["verbatim", "sentence", "free"] = "verbatim"
    """How a reflection names the first error.
    verbatim: it quotes the rollout; constrained decoding allows no other words.
    sentence: it gives the number of a sentence.
    free: it quotes without constraint, so the quote may not be found."""
    weights: Literal["student", "teacher"] = "student"
    """The weights that write the reflections."""
    max_new_tokens: PositiveInt = 4096
    """Maximum number of tokens in a reflection."""
    max_prompt_tokens: PositiveInt = 8192
    """Maximum number of tokens in a reflection prompt; rollouts lose their middle to fit."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature of reflections; 0: greedy."""
    top_p: Probability = 1.0
    """Nucleus sampling of reflections."""
    min_quote_words: PositiveInt = 3
    """Minimum number of words in a quote (mode verbatim): a short one may occur several times."""
    think: bool = False
    """Let the reflector think within <think> tags first (modes verbatim and sentence)."""
    demonstration: Literal["first", "shortest", "random"] = "first"
    """The correct sibling that is shown beside a wrong rollout."""
    show_answer: bool = False
    """Show the reflector the right answer."""
    on_correct: Literal["reflect", "skip"] = "reflect"
    """What happens to correct rollouts.
    reflect: they are distilled whole, under a reflection of their own.
    skip: they are left out."""
    leak: Literal["keep", "redact", "drop"] = "keep"
    """What happens to an explanation that states the final answer.
    keep: it is used as it is.
    redact: the answer in it is replaced by [...].
    drop: it is not used."""
    min_explanation_words: PositiveInt = 1
    """Minimum number of words in an explanation; a shorter one is not used."""
    max_copied_frac: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Maximum share of an explanation's words that are copied from the correct solution in runs of
    eight or more; above it the explanation is not used."""
    probe_every: NonNegativeInt = 0
    """Measure every this many steps whether reflections help: the teacher answers some problems
    with a reflection in its prompt.
    0: never."""
    probe_problems: PositiveInt = 16
    """Maximum number of problems in such a measurement."""
    wrong_template: str = (
        "{problem}\n\n"
        "Here is a correct solution:\n<correct_solution>\n{demonstration}\n</correct_solution>\n\n"
        "Here is an attempt that ends in a wrong answer:\n<attempt>\n{rollout}\n</attempt>\n"
        "{answer_note}\n"
        "Find the first place where the reasoning of the attempt goes wrong. Copy that place word "
        "for word from the attempt, then explain the correct idea in a few sentences. Use exactly "
        "this format:\n"
        "<error_quote>words copied from the attempt</error_quote>\n"
        "<explanation>the correct idea</explanation>"
    )
    """User turn for wrong rollouts: {problem}, {demonstration}, {rollout}, {answer_note}."""
    sentence_template: str = (
        "{problem}\n\n"
        "Here is a correct solution:\n<correct_solution>\n{demonstration}\n</correct_solution>\n\n"
        "Here is an attempt that ends in a wrong answer, its sentences numbered:\n<attempt>\n"
        "{rollout}\n</attempt>\n"
        "{answer_note}\n"
        "Find the first sentence of the attempt where the reasoning goes wrong. Name its number, "
        "then explain the correct idea in a few sentences. Use exactly this format:\n"
        "<error_sentence>number</error_sentence>\n"
        "<explanation>the correct idea</explanation>"
    )
    """User turn for wrong rollouts in mode sentence, with the placeholders of wrong_template."""
    correct_template: str = (
        "{problem}\n\n"
        "Here is a correct solution:\n<correct_solution>\n{rollout}\n</correct_solution>\n"
        "{answer_note}\n"
        "Explain in a few sentences which idea makes this solution right. Use exactly this "
        "format:\n"
        "<explanation>the idea</explanation>"
    )
    """User turn for correct rollouts: {problem}, {rollout}, {answer_note}."""
    answer_note: str = "The right answer is {answer}."
    """Replaces {answer_note} when show_answer is set; otherwise {answer_note} is left empty."""


class SpanConfig(Section):
    """From a quote to the tokens that are distilled."""

    granularity: Literal["suffix", "span", "sentence"] = "suffix"
    """The tokens of a wrong rollout that are distilled.
    suffix: from the first token of the quote to the end of the rollout.
    span: the quote.
    sentence: the whole sentences that contain the quote."""
    occurrence: Literal["first", "last", "unique_only"] = "first"
    """Which occurrence of a repeated quote is used.
    first: at its first occurrence.
    last: at its last occurrence.
    unique_only: nowhere; it counts as missed."""
    on_miss: Literal["skip", "fuzzy", "full"] = "skip"
    """What happens to a wrong rollout whose quote is missed.
    skip: it is left out.
    fuzzy: the most similar passage is used; without one the rollout is left out.
    full: it is distilled whole."""
    min_score: Annotated[float, Field(ge=0, le=100)] = 90.0
    """Minimum similarity of quote and passage (on_miss fuzzy), of 100."""
    control: Literal["off", "whole", "random", "negative"] = "off"
    """Control arm for the span of wrong rollouts (method rosd).
    off: the span is distilled.
    whole: the whole rollout is distilled, under the same reflection.
    random: a random span of the same length is distilled.
    negative: the span gets a policy gradient with advantage -1 and no teacher."""
    negative_weight: PositiveFloat = 1.0
    """Weight of that policy gradient in the loss (control negative)."""
    thinking: bool = False
    """Distil thinking too. Otherwise a rollout's spans begin after its thinking, and a quote of
    thinking counts as missed."""


class TeacherConfig(Section):
    """The teacher: a copy of the student, or another model, under the privileged prompt."""

    model: str | None = None
    """Another model of the same tokenizer as the teacher, named like the option model (kind
    frozen); None: the student's initial weights."""
    kind: Literal["frozen", "ema", "live", "trust_region"] = "frozen"
    """The teacher's weights.
    frozen: the initial weights.
    ema: an exponential moving average of the student's weights.
    live: the student's current weights.
    trust_region: logits interpolated between those of frozen and live."""
    ema_rate: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Share of the student's weights in the average after each step (kind ema)."""
    mix: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the student's logits in the interpolation (kind trust_region)."""
    offload: bool = False
    """Keep the teacher's weights in host memory while they are not in use."""
    backend: Literal["trainer", "sglang"] = "trainer"
    """Where the teacher runs.
    trainer: in the trainer's process.
    sglang: on a server that returns the hidden states before the output head (kind frozen)."""
    url: str = ""
    """URLs of running teacher servers, comma-separated (backend sglang), each started with
    --return-hidden-states-mode full --chunked-prefill-size -1; empty: the trainer starts one with
    engine.python."""
    gpus: Annotated[str, Field(pattern=r"^(\d+(,\d+)*)?$")] = ""
    """GPUs of a teacher server that the trainer starts, as in 6,7; empty: all."""
    server_args: str = ""
    """More arguments of sglang.launch_server for a teacher server that the trainer starts, in one
    string; paths in it must be absolute."""
    max_logprob_gap: NonNegativeFloat | None = None
    """Maximum difference in nats between the log-probabilities of likely tokens on the teacher
    server and in the trainer, compared once at the start.
    0: no comparison.
    None: 0.01 in float32, 0.3 in bfloat16."""
    max_prompt_tokens: PositiveInt = 8192
    """Maximum number of tokens in a teacher prompt; the explanation loses its end to fit."""
    wrong_template: str = (
        "{problem}\n\n"
        "A note on an earlier attempt. It went wrong here: {quote}\n"
        "The correct idea: {explanation}\n"
        "Solve the problem with this in mind."
    )
    """User turn of the teacher for a wrong rollout: {problem}, {quote}, {explanation},
    {demonstration}, {feedback}."""
    correct_template: str = (
        "{problem}\n\n"
        "A note on how to solve it: {explanation}\n"
        "Solve the problem with this in mind."
    )
    """User turn of the teacher for a correct rollout: {problem}, {explanation}, {demonstration}."""
    demonstration_note: str = "{demonstration}"
    """Replaces {demonstration} in these two templates: the correct sibling that the reflector saw,
    for a correct rollout another one, or what select.on_no_success and select.on_lone_success put
    in its place. Without one nothing is left."""
    solution_template: str = (
        "{problem}\n\n"
        "Here is a correct solution:\n<correct_solution>\n{demonstration}\n</correct_solution>\n"
        "{feedback}\n"
        "Solve the problem in your own words."
    )
    """User turn of the teacher for the methods that show it a solution (sdpo, opsd): {problem},
    {demonstration}, {feedback}."""
    show_feedback: bool = False
    """Replace {feedback} by what the verifier says about a wrong rollout; otherwise it is empty."""


class LossConfig(Section):
    """The token-level divergence between student and teacher (see docs/kernels.md)."""

    distill_weight: NonNegativeFloat | None = None
    """Weight of the divergence in the loss; None: 1, and 0 for the methods grpo and sft."""
    policy_weight: NonNegativeFloat | None = None
    """Weight of the policy gradient in the loss; None: 0, and 1 for the methods grpo and sft."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "jsd"
    """Divergence, over the full vocabulary unless loss.top_k is set."""
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Weight of the teacher in the mixture (divergence jsd)."""
    temperature: PositiveFloat | None = None
    """Divides the logits of both sides; None: sample.temperature."""
    top_k: PositiveInt | None = None
    """Compare only the student's k most likely tokens; None: all."""
    tail: bool = True
    """With top_k: treat the remaining probability as one extra token; otherwise renormalize."""
    entry_clip: PositiveFloat | None = None
    """Maximum contribution of a vocabulary entry to a token's divergence; None: no limit."""
    importance_clip: PositiveFloat | None = 2.0
    """Maximum importance weight exp(student - rollout log-prob) of a token; None: no importance
    weights."""
    strategy: Literal["auto", "chunked", "tiled", "reference"] = "auto"
    """How the divergence is computed; results agree up to rounding.
    auto: chunked, but tiled with a sparsity on a GPU."""
    sparsity: Literal["exact", "entry", "mass"] = "exact"
    """Vocabulary entries (strategy chunked) or tiles of them (tiled) that have no gradient.
    exact: none.
    entry: those without any probability above sparsity_bound in 128 tokens.
    mass: each token's smallest ones, while their total mass stays below sparsity_bound."""
    sparsity_bound: Annotated[float, Field(gt=0, lt=1)] = 2**-12
    """Bound on the probability that is dropped (sparsity entry and mass)."""
    vocabulary_order: bool = True
    """With sparsity and strategy tiled: group likely entries into shared tiles, learned from the
    first 1024 distilled tokens."""
    workspace_mib: PositiveInt | None = None
    """Memory for logits in MiB, whatever the number of tokens. None: 256, on a GPU 1/32 of its
    memory from 256 to 2048: few and large chunks are fast there."""


class PolicyConfig(Section):
    """The policy gradient (GRPO), where loss.policy_weight is above 0."""

    advantage: Literal["group_std", "group_mean"] = "group_std"
    """The advantage of a rollout in its group.
    group_std: (score - mean) / standard deviation.
    group_mean: score - mean (Dr. GRPO)."""
    clip_low: Annotated[float, Field(gt=0, le=1)] = 0.2
    """The ratio of student to rollout probability is clipped at 1 - clip_low."""
    clip_high: PositiveFloat = 0.2
    """The ratio is clipped at 1 + clip_high; 0.28 is DAPO's clip-higher."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Maximum ratio of a token with a negative advantage; None: no limit."""
    normalize: Literal["token", "sequence", "constant"] = "token"
    """What the sum over tokens is divided by.
    token: the number of tokens of the update.
    sequence: the rollout's own number of tokens, then the number of rollouts.
    constant: sample.max_new_tokens times the number of rollouts (Dr. GRPO)."""
    mask_truncated: bool = False
    """Leave out rollouts that reached sample.max_new_tokens."""
    entropy_weight: NonNegativeFloat = 0.0
    """Weight of an entropy bonus per token."""


class OptimConfig(Section):
    """AdamW and the schedule of its learning rate."""

    lr: PositiveFloat = 1e-5
    """Learning rate after warm-up."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    """Learning rate after warm-up, over the updates of the whole run.
    constant: optim.lr.
    linear: falls in a line to optim.min_lr_frac of optim.lr.
    cosine: falls along half a cosine to the same value.
    wsd: warm-up, stable, decay; falls in a line over the last optim.decay_frac of the updates."""
    warmup_steps: NonNegativeInt | None = 10
    """Updates of the linear warm-up; None: optim.warmup_frac."""
    warmup_frac: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the run's updates in the linear warm-up, instead of optim.warmup_steps; None:
    optim.warmup_steps."""
    min_lr_frac: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of optim.lr at which a falling schedule ends."""
    decay_frac: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the run's updates in the decay (schedule wsd)."""
    lr_scale: str = ""
    """Factors of the learning rate for the parameters whose names match a pattern, comma-separated,
    as in *.embed_tokens.*=0.1,model.layers.?.*=0.5; of several that match, the last one counts."""
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.999)
    """AdamW's moment decay rates."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay, of the parameters that optim.decay names."""
    decay: Literal["matrices", "all"] = "matrices"
    """Parameters that weight decay applies to.
    matrices: those with two or more dimensions, so neither norms nor biases.
    all: every trained parameter."""
    grad_clip: PositiveFloat = 1.0
    """Maximum global gradient norm."""
    updates_per_step: PositiveInt = 1
    """Optimizer updates per step: its problems are split into this many mini-batches."""
    trainable: str = ""
    """Patterns of the names of the parameters to train, comma-separated, as in
    model.layers.2?.*,lm_head.weight; empty: all."""
    kind: Literal["adamw", "adamw8bit"] = "adamw"
    """The optimizer.
    adamw: AdamW with fp32 moments.
    adamw8bit: AdamW with moments of 8 bits (needs torchao; one process only)."""
    offload: bool = False
    """Keep full-precision weights, summed gradients and AdamW's moments in host memory and update
    the weights there, which saves 8 bytes per trained parameter on the GPU (16 in bfloat16)."""


class LoraConfig(Section):
    """Low-rank adapters, trained instead of the weights themselves (needs peft)."""

    rank: NonNegativeInt = 0
    """Rank of the adapters; 0: no adapters."""
    alpha: PositiveInt = 32
    """Adapters are scaled by alpha / rank."""
    targets: str = "all-linear"
    """Layers with an adapter, comma-separated, as in q_proj,v_proj; all-linear: every linear layer
    but the output head and those where an adapter would have no effect or could not be merged."""
    quantize: Literal["none", "nf4"] = "none"
    """Weights of the linear layers below the adapters (QLoRA).
    none: in the run's dtype.
    nf4: in 4 bits (needs lora.rank and bitsandbytes; one process only)."""


class LearnerConfig(Section):
    """How the learner runs the model."""

    activation_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass instead of storing them: less memory,
    a third more time."""
    liger: Literal["auto", "on", "off"] = "auto"
    """Use liger-kernel's norms, rotary embeddings and MLPs.
    auto: on a GPU, if liger-kernel is installed."""


class ParallelConfig(Section):
    """Training on several ranks, started by torchrun."""

    shard_size: PositiveInt | None = None
    """Ranks that share one copy of the weights, such as the ranks of a node: most communication is
    among them; None: all."""
    head: Literal["whole", "shard"] = "whole"
    """The output head during the learner's step.
    whole: every rank gathers all of it.
    shard: every rank keeps its rows of the vocabulary and receives the hidden states of all ranks.
    Cheaper when there are fewer distilled tokens than vocabulary entries; not for tied heads."""
    timeout_s: PositiveFloat = 1800.0
    """Seconds after which a rank that waits for the others gives up."""


class PackConfig(Section):
    """Micro-batches."""

    max_tokens: PositiveInt = 16384
    """Maximum number of tokens (student plus teacher) in a micro-batch; a longer sample gets a
    micro-batch of its own."""
    min_shared: NonNegativeInt = 16
    """Minimum length of a shared prefix in tokens, which the model computes once; 0: no sharing."""


class CheckpointConfig(Section):
    """Checkpoints: a Hugging Face model folder plus the state that resuming needs."""

    every: NonNegativeInt = 10
    """Steps between checkpoints; 0: only at the end and on Ctrl-C or SIGTERM."""
    keep_last: PositiveInt = 2
    """Number of recent checkpoints to keep; older ones are deleted."""
    keep_best: bool = True
    """Also keep the checkpoint with the best in-domain accuracy."""
    asynchronous: bool = True
    """Write checkpoints from a copy in host memory while training continues."""


class DiagnoseConfig(Section):
    """What is measured on the side; training does not depend on it (see docs/diagnostics.md)."""

    every: NonNegativeInt = 1
    """Compare student and teacher every this many steps; 0: never. The other diagnostics cost
    nothing and are always on."""
    top_k: PositiveInt = 16
    """Number of most likely tokens on which student and teacher are compared."""
    max_tokens: PositiveInt = 256
    """Maximum number of distilled tokens per optimizer update to compare them at, spread evenly,
    and of tokens before located errors."""
    max_logprob_gap: PositiveFloat | None = None
    """Maximum mean difference in nats between log-probabilities of rollouts under the engine and
    under the trainer; above it the run ends.
    None: a gap above 0.1 is a warning."""


class EngineConfig(Section):
    """The rollout engine."""

    kind: Literal["local", "sglang"] = "local"
    """Where rollouts are sampled.
    local: in the trainer's process.
    sglang: on SGLang servers."""
    max_rows: PositiveInt = 256
    """Maximum number of completions that the local engine decodes at once; others wait."""
    launch: Literal["local", "urls"] = "local"
    """The SGLang servers.
    local: the trainer starts them on this machine and stops them at the end.
    urls: they are running already, at engine.urls."""
    urls: str = ""
    """URLs of running servers, as in http://node1:30000,http://node2:30000. An API key is read from
    the environment variable ROSD_SGLANG_API_KEY."""
    servers: PositiveInt = 1
    """Number of servers to start. A problem's rollouts and reflections use the same server, whose
    KV cache they share."""
    gpus: Annotated[str, Field(pattern=r"^(\d+(,\d+)*)?$")] = ""
    """GPUs of the servers that the trainer starts, as in 0,1,2,3, split evenly among them; empty:
    every server sees all."""
    python: str | None = None
    """Python interpreter of an environment with sglang, which starts the servers; None: the
    trainer's own."""
    server_args: str = ""
    """More arguments of sglang.launch_server in one string, as in
    --engine.server-args="--tp-size 2 --mem-fraction-static 0.8"; paths in it must be absolute."""
    start_timeout_s: PositiveFloat = 900.0
    """Seconds that a server may take to start."""
    concurrency: PositiveInt = 64
    """Maximum number of requests in flight; a request asks for all rollouts of a problem."""
    request_timeout_s: PositiveFloat = 3600.0
    """Seconds that a request may take, all retries included."""
    health_every_s: PositiveFloat = 30.0
    """Interval of health checks on a pending request, in seconds. After two failed checks in a row
    the server counts as hung."""
    health_timeout_s: PositiveFloat = 30.0
    """Seconds that a health check may take."""
    max_failures: PositiveInt = 5
    """Consecutive failures of a request that end the run."""
    pipeline: Literal["streamed", "barrier"] = "streamed"
    """When reflections are requested (kind sglang).
    streamed: for each group, as soon as its rollouts are complete.
    barrier: for all groups, once every rollout is complete."""
    one_step_ahead: bool = False
    """Sample the next step's rollouts with the current weights while the learner works (kind
    sglang); importance weights (loss.importance_clip) correct for the older policy."""
    sync: Literal["disk", "distributed", "adapter"] = "disk"
    """How weights are sent to the servers.
    disk: through a folder that the servers read.
    distributed: by broadcast from the trainer's memory (NCCL between GPUs, gloo otherwise).
    adapter: LoRA adapters alone, through the folder; the servers keep the base weights."""
    sync_host: str = "127.0.0.1"
    """Address at which the servers reach this machine (sync distributed)."""
    sync_folder: str | None = None
    """Folder through which weights are sent (sync disk and adapter), as in /dev/shm/rosd on one
    machine or a folder that all machines share; None: a folder in the run folder."""
    max_logprob_gap: NonNegativeFloat | None = None
    """Maximum difference in nats between log-probabilities of a server and of the trainer, compared
    after each weight sync.
    0: no comparison.
    None: 0.01 in float32, 0.3 in bfloat16."""
    colocated: bool = False
    """Run the servers that the trainer starts on the trainer's GPU; they release its memory while
    the learner works."""


class CompatConfig(Section):
    """Known bugs of ROSD's public code, for the preset reference only (docs/method.md)."""

    reencode_span: bool = False
    """A bug of the public code: the span begins where the re-tokenized text before the quote ends,
    mostly one token late."""
    cut_prompts_right: bool = False
    """A bug of the public code: overlong prompts of reflector and teacher lose their end. The
    reflector's then lacks the wrong rollout and the format, the teacher's the generation prompt."""
    micro_batch_rollouts: NonNegativeInt = 0
    """A bug of the public code: the loss is a mean per micro-batch of this many rollouts, then over
    micro-batches, so that a short span weighs as much as a long one.
    0: the mean over all tokens of the update."""


class Config(Section):
    """The options of a training run."""

    method: str = "rosd"
    """Training method: what a rollout is trained on."""
    model: str = "quickstart"
    """quickstart, smollm2, a model folder, a run folder (its best checkpoint, else its last), or a
    Hugging Face hub id."""
    dtype: Dtype = "float32"
    """Data type of parameters and computation."""
    device: Device = "auto"
    """auto: CUDA if there is a GPU."""
    trust_remote_code: bool = False
    """Allow a model folder to run its own Python code."""
    seed: NonNegativeInt = 0
    """Seed of data order, rollouts, reflections and evaluation."""
    steps: PositiveInt = 100
    """Number of optimizer steps."""
    epochs: PositiveFloat | None = None
    """Number of passes over the training problems, instead of steps; None: steps."""
    out: str = "runs"
    """Folder in which run folders are created."""
    name: str | None = None
    """Name of the run folder; None: model name, date and time."""
    dump_rollouts: bool = True
    """Write the rollouts of each step to rollouts/step_*.jsonl."""
    data: DataConfig = DataConfig()
    verify: VerifyConfig = VerifyConfig()
    chat: ChatConfig = ChatConfig()
    sample: SampleConfig = SampleConfig()
    select: SelectConfig = SelectConfig()
    reflect: ReflectConfig = ReflectConfig()
    span: SpanConfig = SpanConfig()
    teacher: TeacherConfig = TeacherConfig()
    loss: LossConfig = LossConfig()
    policy: PolicyConfig = PolicyConfig()
    optim: OptimConfig = OptimConfig()
    lora: LoraConfig = LoraConfig()
    learner: LearnerConfig = LearnerConfig()
    parallel: ParallelConfig = ParallelConfig()
    pack: PackConfig = PackConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    diagnose: DiagnoseConfig = DiagnoseConfig()
    engine: EngineConfig = EngineConfig()
    compat: CompatConfig = CompatConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        if (message := conflict(self)) is not None:
            raise ValueError(message)
        return self
