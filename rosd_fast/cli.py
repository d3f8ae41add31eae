"""The command line: `rosd-fast train | eval | data | presets | report | doctor`.

Arguments are read and checked before torch is imported. A user's mistake is one line on stderr and
exit code 2; Ctrl-C before training starts is exit code 130.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from rosd_fast import __version__
from rosd_fast.commands import rank
from rosd_fast.errors import RunFailed, UserError
from rosd_fast.threads import wait_briefly

COMMANDS = {
    "train": "train a model: sample, verify, reflect, locate, distil, evaluate",
    "eval": "measure a model's accuracy on a data set, by domain",
    "data": "check a data set and show what is in it",
    "presets": "list the named sets of options, with the source of each value",
    "report": "redraw a run's plots and print its accuracy before and after",
    "doctor": "check that everything a run needs is installed",
}
# transformers imports torchao if it is there, which warns of kernels that it has for GPUs only.
NOISY = ("torchao", "torch.utils._pytree")
FAILED, USAGE_ERROR, INTERRUPTED = 1, 2, 130


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = sys.argv[1:] if args is None else list(args)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    wait_briefly()
    try:
        return dispatch(args)
    except UserError as error:
        if not rank():  # the other ranks read the same options and fail the same way
            print(f"rosd-fast: error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except RunFailed as error:
        where = f"rank {rank()}: " if rank() else ""
        print(f"rosd-fast: error: {where}{error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of the output is gone, as in `rosd-fast ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def dispatch(args: Sequence[str]) -> int:
    """Find the command in `args`, read its options and run it; returns the exit code."""
    if not args or args[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if args[0] in ("-V", "--version"):
        print(f"rosd-fast {__version__}")
        return 0
    name, rest = args[0], args[1:]
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        known = f"Commands are {', '.join(COMMANDS)}"
        what = f"unknown {'option' if name.startswith('-') else 'command'} {name}"
        raise UserError(what, fix=f"Did you mean {near[0]}?" if near else known)
    command: Any = import_module(f"rosd_fast.commands.{name}")

    from rosd_fast.config.arguments import options_of, read_args

    wants_help = "-h" in rest or "--help" in rest
    rest = [arg for arg in rest if arg not in ("-h", "--help")]
    aliases = getattr(command, "ALIASES", {})
    given = read_args(rest, options_of(command.Options), command.POSITIONAL, aliases)
    if wants_help:
        places = [option.rpartition(".")[2].upper() for option in command.POSITIONAL]
        print_help(" ".join([name, *places]), command.defaults(given))
        return 0
    return command.run(given)


def overview() -> str:
    """The text of `rosd-fast --help`."""
    lines = [
        "usage: rosd-fast COMMAND [--option value ...]",
        "",
        "Reflective on-policy self-distillation of language models.",
        "",
        *(f"  {name:<8}{text}" for name, text in COMMANDS.items()),
        "",
        "rosd-fast COMMAND --help lists the options of a command, --version prints the version.",
        "",
        "  rosd-fast train                      the quickstart, in minutes on a CPU",
        "  rosd-fast train --model DIR_OR_HUB_ID --data.train FILE.jsonl --data.dev FILE.jsonl",
        "  rosd-fast train --resume runs/NAME   resume a run",
    ]
    return "\n".join(lines)


def print_help(usage: str, defaults: Any) -> None:
    """Print every option of a command with its meaning and default."""
    import tyro

    try:
        tyro.cli(type(defaults), prog=f"rosd-fast {usage}", args=["--help"], default=defaults)
    except SystemExit as end:  # tyro exits after printing the help
        if end.code:
            raise
