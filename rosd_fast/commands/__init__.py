"""One module per command.

Each has `Options`, `POSITIONAL` (options that may be given without their names), `defaults` (what
`--help` shows) and `run`, which returns the exit code. None of them imports torch before `run` is
called, so `--help` and mistakes are answered at once.
"""
