"""Every option, once: its name, type, default, range and meaning.

A run is described by one `Config`. It is read from a preset or a TOML file and then from the
command line, later wins; `rosd_fast.cli` does the reading. This module imports neither torch nor
transformers, so that `--help` stays fast.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(gt=0, le=1)]
DecayRate = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A group of options. Unknown keys are errors, and nothing changes after reading."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class DataConfig(Section):
    """Where problems come from."""

    train: str = "quickstart:train"
    """Training problems: a .jsonl file, or quickstart:train."""
    dev: str | None = "quickstart:dev"
    """In-domain development problems, evaluated on; None: no evaluation in domain."""
    dev_ood: str | None = None
    """Out-of-domain development problems; None: no evaluation out of domain."""
    verifier: str | None = None
    """Verifier for problems that name none (number, choice, exact, contains)."""
    shuffle: bool = True
    """Draw the problems of each pass over the data in a new seeded order."""


class SampleConfig(Section):
    """Sampling of rollouts."""

    problems_per_step: PositiveInt = 32
    """Problems a step."""
    group_size: PositiveInt = 8
    """Rollouts of each problem (G). At least 2: a group needs a sibling to learn from."""
    max_new_tokens: PositiveInt = 8192
    """Tokens a rollout may have."""
    max_prompt_tokens: PositiveInt = 2048
    """Tokens a problem's prompt may have; a longer one is an error that names the problem."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; the loss uses the same unless loss.temperature is set."""
    top_p: Probability = 1.0
    """Nucleus sampling: keep the smallest set of tokens with this much probability."""
    top_k: NonNegativeInt = 0
    """Keep the k most likely tokens; 0: all."""


class SelectConfig(Section):
    """Which groups are worth a reflection. Dropped groups cost nothing further."""

    threshold: Annotated[float, Field(gt=0, le=1)] = 1.0
    """A rollout is a success when its score is at least this."""
    require_success: bool = True
    """Drop groups without any success: they have no demonstration."""
    drop_zero_variance: bool = False
    """Drop groups whose rollouts all have the same score."""


class ReflectConfig(Section):
    """The reflector: what it sees, and what is asked of it."""

    mode: Literal["verbatim", "sentence", "free"] = "verbatim"
    """How a reflection names the first error. verbatim: it can quote nothing but words of the
    rollout; sentence: the number of a sentence; free: any text, which may not be found."""
    weights: Literal["student", "teacher"] = "student"
    """Whose weights write the reflections."""
    max_new_tokens: PositiveInt = 4096
    """Tokens a reflection may have."""
    max_prompt_tokens: PositiveInt = 8192
    """Tokens a reflection prompt may have; the middle of the rollouts is cut to fit."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature of reflections; 0: greedy."""
    top_p: Probability = 1.0
    """Nucleus sampling of reflections."""
    min_quote_words: PositiveInt = 3
    """Words a quote of mode verbatim has at least: short ones stand in several places."""
    think: bool = False
    """Let the reflector think within <think> tags first (modes verbatim and sentence)."""
    demonstration: Literal["first", "shortest", "random"] = "first"
    """Which correct sibling is shown beside a wrong rollout."""
    show_answer: bool = False
    """Show the ground-truth answer to the reflector."""
    on_correct: Literal["reflect", "skip"] = "reflect"
    """Correct rollouts: distil them whole under their own reflection, or leave them out."""
    leak: Literal["keep", "redact", "drop"] = "keep"
    """Explanations that state the final answer: as they are, with the answer blotted out, or not
    used."""
    min_explanation_words: PositiveInt = 1
    """Words an explanation has at least; shorter ones are not used."""
    max_copied_frac: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of an explanation's words that may be copied from the correct solution, in runs of
    eight or more; above it, the explanation is not used."""
    probe_every: NonNegativeInt = 0
    """Steps between two looks at whether reflections help: the teacher answers probe_problems
    problems with a reflection in its prompt; 0: never."""
    probe_problems: PositiveInt = 16
    """Problems of such a look."""
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
    """User turn for wrong rollouts in mode sentence: as wrong_template."""
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
    """Put in place of {answer_note} when show_answer is set; otherwise that place stays empty."""


class SpanConfig(Section):
    """From a quote to the tokens that are distilled."""

    granularity: Literal["suffix", "span", "sentence"] = "suffix"
    """suffix: from the first token of the quote to the end; span: the quote; sentence: its
    sentences."""
    occurrence: Literal["first", "last", "unique_only"] = "first"
    """Of a quote that stands in several places: the first, the last, or count it as missed."""
    on_miss: Literal["skip", "fuzzy", "full"] = "skip"
    """A quote that is not in the rollout: leave the rollout out, take what is most like it, or
    distil the whole rollout."""
    min_score: Annotated[float, Field(ge=0, le=100)] = 90.0
    """With on_miss fuzzy: how alike, of 100, the quote and what is taken for it must be."""


class TeacherConfig(Section):
    """The teacher: the student's own architecture, shown problem and reflection."""

    kind: Literal["frozen", "ema", "live", "trust_region"] = "frozen"
    """frozen: the initial weights; ema: their moving average with the student's; live: the
    student's as they are; trust_region: logits between those of frozen and of live."""
    ema_rate: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Share of the student's weights that enters the average after each step (kind ema)."""
    mix: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the student's logits (kind trust_region)."""
    offload: bool = False
    """Keep the teacher's copy of the weights in host memory while it is not used."""
    backend: Literal["trainer", "sglang"] = "trainer"
    """trainer: a copy in the trainer's process; sglang: on a server, which gives the states that
    enter the head (kind frozen)."""
    url: str = ""
    """With backend sglang: address of a running server, started with --return-hidden-states-mode
    full --chunked-prefill-size -1 (several: with commas); empty: one of our own is started, by
    engine.python."""
    gpus: Annotated[str, Field(pattern=r"^(\d+(,\d+)*)?$")] = ""
    """Devices of a server of our own, as in 6,7; empty: it sees all of them."""
    server_args: str = ""
    """Further arguments of sglang.launch_server for a server of our own, in one text; paths in it
    must be absolute."""
    max_logprob_gap: NonNegativeFloat | None = None
    """At the start, largest difference of a log-probability between the server and a copy in the
    trainer's process, in nats, over likely tokens; 0: no comparison; None: 0.01 in float32, 0.3 in
    bfloat16."""
    max_prompt_tokens: PositiveInt = 8192
    """Tokens a teacher prompt may have; the explanation's end is cut to fit."""
    wrong_template: str = (
        "{problem}\n\n"
        "A note on an earlier attempt. It went wrong here: {quote}\n"
        "The correct idea: {explanation}\n"
        "Solve the problem with this in mind."
    )
    """User turn after a wrong rollout: {problem}, {quote}, {explanation}."""
    correct_template: str = (
        "{problem}\n\n"
        "A note on how to solve it: {explanation}\n"
        "Solve the problem with this in mind."
    )
    """User turn after a correct rollout: {problem}, {explanation}."""


class LossConfig(Section):
    """The token-level divergence between student and teacher; see kernels/rosd_kernels."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "jsd"
    """Divergence over the full vocabulary."""
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Weight of the teacher in the mixture of jsd."""
    temperature: PositiveFloat | None = None
    """Divides both logits; None: sample.temperature."""
    top_k: PositiveInt | None = None
    """Compare on the student's k most likely tokens only; None: on all."""
    tail: bool = True
    """With top_k: one more bucket holds the remaining mass; otherwise renormalize."""
    entry_clip: PositiveFloat | None = None
    """Bound on each vocabulary entry's contribution; None: no bound."""
    importance_clip: PositiveFloat | None = 2.0
    """Bound on the importance weight exp(student - rollout log-prob); None: no importance
    weight."""
    strategy: Literal["auto", "chunked", "tiled", "reference"] = "auto"
    """How the divergence is computed; all give the same numbers, rounding aside. auto: tiled with a
    sparsity, otherwise chunked."""
    sparsity: Literal["exact", "entry", "mass"] = "exact"
    """Parts of the vocabulary that tiled leaves out: none; those where no token has an entry above
    sparsity_bound; the smallest ones of a token up to that mass."""
    sparsity_bound: Annotated[float, Field(gt=0, lt=1)] = 2**-12
    """Probability that sparsity entry or mass may drop."""
    vocabulary_order: bool = True
    """With sparsity: put likely entries together, by what the first 1024 distilled tokens show."""
    workspace_mib: PositiveInt = 256
    """Memory for logits, whatever the number of tokens."""


class OptimConfig(Section):
    """AdamW with linear warm-up to a constant learning rate."""

    lr: PositiveFloat = 1e-5
    """Learning rate after warm-up."""
    warmup_steps: NonNegativeInt = 10
    """Steps over which the learning rate rises linearly."""
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.999)
    """AdamW's moment decay rates."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay, on matrices only."""
    grad_clip: PositiveFloat = 1.0
    """Largest global gradient norm."""
    trainable: str = ""
    """Names of the parameters to train, as in model.layers.2?.*,lm_head.weight; empty: all."""


class LoraConfig(Section):
    """Low-rank adapters in place of training the weights themselves (needs peft)."""

    rank: NonNegativeInt = 0
    """Rank of the adapters; 0: none, the weights are trained."""
    alpha: PositiveInt = 32
    """Adapters count alpha / rank times."""
    targets: str = "all-linear"
    """Layers that get one, as in q_proj,v_proj; all-linear: all but the output head."""


class LearnerConfig(Section):
    """How the learner computes."""

    activation_checkpointing: bool = False
    """Compute each layer's activations again in the backward pass instead of keeping them: less
    memory, a third more time."""
    compile: bool = False
    """torch.compile the layers; attention is left out."""
    liger: Literal["auto", "on", "off"] = "auto"
    """liger-kernel's norms, rotations and MLPs; auto: on a GPU, where it is installed."""


class ParallelConfig(Section):
    """Several ranks, as torchrun starts them."""

    shard_size: PositiveInt | None = None
    """Ranks that share one copy of the weights, between which most is sent (those of a node); None:
    all."""
    head: Literal["whole", "shard"] = "whole"
    """Output head of each rank while it learns: whole, or its rows of the vocabulary, to which all
    ranks send their states: cheaper for fewer distilled tokens than entries, not for tied heads."""
    timeout_s: PositiveFloat = 1800.0
    """Seconds after which ranks that wait for one another give up."""


class PackConfig(Section):
    """Micro-batches."""

    max_tokens: PositiveInt = 16384
    """Tokens (student plus teacher) of a micro-batch; one longer sample is a micro-batch of its
    own."""
    min_shared: NonNegativeInt = 16
    """Tokens that sequences must begin with alike for these to go through the model only once; 0:
    each sequence goes through whole."""


class EvalConfig(Section):
    """Evaluation on the development splits: before, every few steps, and after."""

    every: NonNegativeInt = 10
    """Steps between evaluations; 0: only before and after."""
    problems: NonNegativeInt = 0
    """Evaluate on the first this many problems of each split; 0: on all."""
    samples: PositiveInt = 4
    """Rollouts per problem; the figure is their mean accuracy (mean@k)."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature of evaluation; 0: greedy."""
    top_p: Probability = 1.0
    """Nucleus sampling of evaluation."""


class CheckpointConfig(Section):
    """Checkpoints: a Hugging Face model folder plus what a resume needs."""

    every: NonNegativeInt = 10
    """Steps between checkpoints; 0: only at the end and on Ctrl-C."""
    keep_last: PositiveInt = 2
    """Older checkpoints are deleted."""
    keep_best: bool = True
    """Besides, keep the one with the best accuracy in domain, of those with an evaluation."""
    asynchronous: bool = True
    """Write while the run goes on, from a copy in host memory."""


class EngineConfig(Section):
    """The rollout engine."""

    kind: Literal["local", "sglang"] = "local"
    """local: in the trainer's process; sglang: servers, of our own or at given addresses."""
    max_rows: PositiveInt = 256
    """Completions that the local engine decodes side by side; more wait their turn."""
    launch: Literal["local", "urls"] = "local"
    """SGLang servers: started on this machine and stopped at the end, or those at engine.urls."""
    urls: str = ""
    """Addresses of running servers, as in http://node1:30000,http://node2:30000; their key, if any,
    is read from the environment variable ROSD_SGLANG_API_KEY."""
    servers: PositiveInt = 1
    """Servers to start. A problem's rollouts and reflections share one server's cache."""
    gpus: Annotated[str, Field(pattern=r"^(\d+(,\d+)*)?$")] = ""
    """Devices for the servers that are started, as in 0,1,2,3, shared out evenly; empty: each sees
    all of them."""
    python: str | None = None
    """Interpreter of an environment with sglang, to start servers with; None: this one."""
    server_args: str = ""
    """Further arguments of sglang.launch_server in one text, as in
    --engine.server-args="--tp-size 2 --mem-fraction-static 0.8"; paths in it must be absolute."""
    start_timeout_s: PositiveFloat = 900.0
    """Seconds a server may take to start."""
    concurrency: PositiveInt = 64
    """Requests under way at once; each asks for all rollouts of a problem."""
    request_timeout_s: PositiveFloat = 3600.0
    """Seconds a request may take, however often it is tried."""
    health_every_s: PositiveFloat = 30.0
    """Seconds without an answer after which a server's health is looked at; two bad looks in a row
    and it is taken to hang."""
    health_timeout_s: PositiveFloat = 30.0
    """Seconds such a look may take."""
    max_failures: PositiveInt = 5
    """Failures of one request in a row that end the run."""
    pipeline: Literal["streamed", "barrier"] = "streamed"
    """SGLang: ask for a group's reflections as soon as its rollouts are there, or after all groups
    are done."""
    one_step_ahead: bool = False
    """SGLang: sample the next step's rollouts, with the weights at hand, while the learner works;
    loss.importance_clip corrects for their age."""
    sync: Literal["disk", "distributed"] = "disk"
    """How weights reach the servers: by a folder that they read; by broadcast from the trainer's
    memory (NCCL between GPUs, gloo otherwise)."""
    sync_host: str = "127.0.0.1"
    """With sync distributed: address of this machine under which the servers reach it."""
    sync_folder: str | None = None
    """With sync disk: where weights are written for the servers, as in /dev/shm/rosd on one
    machine, or a folder that all see; None: in the run folder."""
    max_logprob_gap: NonNegativeFloat | None = None
    """After each hand-over of weights: largest difference of a log-probability between server and
    trainer, in nats; 0: no comparison; None: 0.01 in float32, 0.3 in bfloat16."""
    colocated: bool = False
    """A server of our own on the trainer's GPU: it gives its memory back while the learner
    works."""


class Config(Section):
    """Options of a training run."""

    method: str = "rosd"
    """Training method: what a rollout is trained on."""
    model: str = "quickstart"
    """quickstart, a model folder, or a Hugging Face hub id."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Parameter and compute type."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where present."""
    trust_remote_code: bool = False
    """Allow a model folder to run Python code of its own."""
    seed: NonNegativeInt = 0
    """Fixes data order, rollouts, reflections and evaluation."""
    steps: PositiveInt = 100
    """Optimizer steps."""
    out: str = "runs"
    """Folder that holds run folders."""
    name: str | None = None
    """Name of the run folder; None: model, date and time."""
    dump_rollouts: bool = True
    """Write rollouts/step_*.jsonl."""
    data: DataConfig = DataConfig()
    sample: SampleConfig = SampleConfig()
    select: SelectConfig = SelectConfig()
    reflect: ReflectConfig = ReflectConfig()
    span: SpanConfig = SpanConfig()
    teacher: TeacherConfig = TeacherConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    lora: LoraConfig = LoraConfig()
    learner: LearnerConfig = LearnerConfig()
    parallel: ParallelConfig = ParallelConfig()
    pack: PackConfig = PackConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    engine: EngineConfig = EngineConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.loss.top_k is not None and (
            self.loss.strategy == "tiled" or self.loss.sparsity != "exact"
        ):
            raise ValueError(
                f"loss.top_k is {self.loss.top_k}: top-k needs every logit of a token, so "
                "loss.strategy cannot be tiled nor loss.sparsity other than exact"
            )
        if self.loss.sparsity != "exact" and self.loss.strategy not in ("auto", "tiled"):
            raise ValueError(
                f"loss.sparsity is {self.loss.sparsity}: only loss.strategy tiled leaves anything "
                f"out, and it is {self.loss.strategy}"
            )
        engine = self.engine
        if (engine.launch == "urls") != bool(engine.urls):
            raise ValueError(
                "engine.launch urls and engine.urls go together: give the addresses, or neither"
            )
        if engine.one_step_ahead and (
            engine.kind != "sglang" or self.reflect.weights == "teacher" or engine.colocated
        ):
            raise ValueError(
                "engine.one_step_ahead samples while the learner works, which needs engine.kind "
                "sglang, reflect.weights student and no engine.colocated"
            )
        teacher = self.teacher
        if teacher.backend == "sglang" and (teacher.kind != "frozen" or uses_teacher_weights(self)):
            raise ValueError(
                "teacher.backend sglang: the server keeps its weights and only scores, which needs "
                "teacher.kind frozen, reflect.weights student and reflect.probe_every 0"
            )
        if uses_teacher_weights(self) and (
            teacher.kind in ("live", "trust_region") or self.lora.rank
        ):
            raise ValueError(
                "reflect.weights teacher and reflect.probe_every write with the teacher's weights, "
                "which needs teacher.kind frozen or ema, and no lora.rank"
            )
        if teacher.offload and (teacher.kind == "live" or self.lora.rank):
            raise ValueError(
                "teacher.offload: this teacher has no copy of the weights (teacher.kind live, or "
                "adapters that are switched off)"
            )
        if self.lora.rank and self.optim.trainable:
            raise ValueError("optim.trainable and lora.rank go different ways: give one of them")
        if teacher.backend != "sglang" and teacher.url:
            raise ValueError("teacher.url needs teacher.backend sglang")
        if engine.sync == "distributed" and engine.kind != "sglang":
            raise ValueError("engine.sync distributed needs engine.kind sglang")
        if engine.colocated and (engine.kind != "sglang" or engine.launch != "local"):
            raise ValueError("engine.colocated needs engine.kind sglang and engine.launch local")
        if engine.colocated and engine.sync == "distributed":
            raise ValueError("engine.colocated needs engine.sync disk: NCCL joins GPUs, not one")
        if self.sample.group_size < 2:
            raise ValueError(
                f"sample.group_size is {self.sample.group_size}: a wrong rollout learns from a "
                "correct sibling, so a group needs at least 2"
            )
        return self


def uses_teacher_weights(config: Config) -> bool:
    """Whether something is written with the teacher's weights, besides scoring."""
    return config.reflect.weights == "teacher" or config.reflect.probe_every > 0
