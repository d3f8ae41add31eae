"""The options of a run: `Config` and its sections.

    schema        every option, defined once; problems: those of data, verifiers and evaluation
    section       what a section of options is made of
    alternatives  options that say the same thing in two ways
    checks        options that do not go together
    templates     the placeholders of prompt templates
    chat          the options of chat templates: their arguments and files
    renamed       options that had another name before
    load          reads options from presets, TOML files and the command line
    arguments     the names of options on the command line
    toml          writes options to a file
    messages      one line for a wrong option

Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from rosd_fast.config.checks import control_arms, uses_teacher_weights
from rosd_fast.config.problems import (
    ColumnsConfig,
    DataConfig,
    EvalConfig,
    SourceConfig,
    VerifyConfig,
)
from rosd_fast.config.schema import (
    ChatConfig,
    CheckpointConfig,
    CompatConfig,
    Config,
    DiagnoseConfig,
    EngineConfig,
    LearnerConfig,
    LoraConfig,
    LossConfig,
    OptimConfig,
    PackConfig,
    ParallelConfig,
    PolicyConfig,
    ReflectConfig,
    RoleChat,
    SampleConfig,
    SelectConfig,
    SpanConfig,
    TeacherConfig,
)
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
    same_as,
)

__all__ = [
    "ChatConfig",
    "CheckpointConfig",
    "ColumnsConfig",
    "CompatConfig",
    "Config",
    "DataConfig",
    "DecayRate",
    "Device",
    "DiagnoseConfig",
    "Dtype",
    "EngineConfig",
    "EvalConfig",
    "LearnerConfig",
    "LoraConfig",
    "LossConfig",
    "NonNegativeFloat",
    "NonNegativeInt",
    "OptimConfig",
    "PackConfig",
    "ParallelConfig",
    "PolicyConfig",
    "PositiveFloat",
    "PositiveInt",
    "Probability",
    "ReflectConfig",
    "RoleChat",
    "SampleConfig",
    "Section",
    "SelectConfig",
    "SourceConfig",
    "SpanConfig",
    "TeacherConfig",
    "VerifyConfig",
    "control_arms",
    "same_as",
    "uses_teacher_weights",
]
