"""The options of a run: `Config` and its sections.

`schema` defines every option once, `load` reads them from presets, TOML files and the command line,
`arguments` names them, `messages` words what is wrong with one, `toml` writes them. Importing this
package imports neither torch nor transformers.
"""

from __future__ import annotations

from rosd_fast.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    DecayRate,
    EngineConfig,
    EvalConfig,
    LearnerConfig,
    LoraConfig,
    LossConfig,
    NonNegativeFloat,
    NonNegativeInt,
    OptimConfig,
    PackConfig,
    ParallelConfig,
    PositiveFloat,
    PositiveInt,
    Probability,
    ReflectConfig,
    SampleConfig,
    Section,
    SelectConfig,
    SpanConfig,
    TeacherConfig,
    uses_teacher_weights,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DecayRate",
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
    "PositiveFloat",
    "PositiveInt",
    "Probability",
    "ReflectConfig",
    "SampleConfig",
    "Section",
    "SelectConfig",
    "SpanConfig",
    "TeacherConfig",
    "uses_teacher_weights",
]
