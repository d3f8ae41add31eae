"""A first day on a GPU: what a bare machine can show of this project in ten minutes.

Reading order: `main` (the command), `registry` (the stages in their order), `runner` (one stage as
a process with a time limit), `stage` (what a stage is, and the loop over its items), `crew` and
`worker` (items in processes that may crash or hang), `stages/` (what is measured), `page` (the
Markdown). `dependencies` says which wheels a machine needs, `wheels` makes the folder of them.
"""
