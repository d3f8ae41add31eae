"""Shapes of rows: GSM8K, MATH, conversations and others, recognized by their columns.

    registry   the shapes by name: `register_shape`; which one rows have: `recognize`
    shape      Shape, what it reads (Fields), and the columns that all shapes may have
    row        a row under its column map
    plain maths chat options code    what each shape reads
    answers    the final answer of a worked solution

`register_shape` adds one, here or in a script of your own before it calls `train`.
"""

from __future__ import annotations

from rosd_fast.data.shapes import chat, code, maths, options, plain
from rosd_fast.data.shapes.registry import recognize, register_shape
from rosd_fast.data.shapes.row import Row
from rosd_fast.data.shapes.shape import Fields, Shape

__all__ = ["Fields", "Row", "Shape", "recognize", "register_shape"]

# From the general to the special: the last one that fits is taken.
register_shape(
    "own",
    plain.read_own,
    says="plain rows: a problem and its answer",
    matches=plain.is_own,
)
register_shape(
    "chat",
    chat.read_messages,
    says="conversations in prompt: the last user turn is the problem",
    matches=chat.is_chat_prompt,
)
register_shape(
    "solved",
    maths.read_math,
    says="mathematics: problem, solution and answer",
    matches=maths.is_solved,
)
register_shape(
    "messages",
    chat.read_messages,
    says="conversations: the last user turn is the problem",
    matches=chat.is_messages,
)
register_shape(
    "math",
    maths.read_math,
    says=r"MATH: answer in the solution's last \boxed{}",
    matches=maths.is_math,
)
register_shape(
    "aime",
    maths.read_math,
    says="AIME: whole numbers from 0 to 999",
    matches=maths.is_aime,
    needs_all=True,
)
register_shape("gsm8k", maths.read_gsm8k, says="GSM8K: answer after ####", matches=maths.is_gsm8k)
register_shape(
    "options",
    options.read_options,
    says="multiple choice: options A, B, ... after the question",
    matches=options.is_options,
)
register_shape("code", code.read_code, says="code problems: tests in tests", matches=code.is_code)
register_shape("mbpp", code.read_mbpp, says="MBPP: assertions in test_list", matches=code.is_mbpp)
register_shape(
    "humaneval",
    code.read_humaneval,
    says="HumanEval: a function to complete, tests in test",
    matches=code.is_humaneval,
)
register_shape(
    "verl",
    chat.read_verl,
    says="verl: turns in prompt, answer in reward_model.ground_truth",
    matches=chat.is_verl,
)
register_shape(
    "tooluse",
    plain.read_tool_use,
    says="tool use: answer is a list of Action and Action_Input",
    matches=plain.is_tool_use,
)
register_shape(
    "sciknoweval",
    plain.read_own,
    says="SciKnowEval: multiple choice, domain is the folder",
    matches=plain.is_science,
)
register_shape(
    "reasoning_gym",
    plain.read_gym,
    says="reasoning_gym: scored by the task itself",
    matches=plain.is_gym,
)
