"""One module a subcommand: its options (`Options`), which arguments go without a name
(`POSITIONAL`), and what it does (`run`, which returns the exit code).

None of them imports torch before `run` is called, so that mistakes and `--help` are answered at
once.
"""
