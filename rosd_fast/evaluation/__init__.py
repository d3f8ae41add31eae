"""Evaluation, during training and by `rosd-fast eval`.

records     how completions are sampled, what is stored of each, figures
sample      problems -> completions, verified
result      completions -> figures with intervals, and differences of two models
training    the metrics of a run's development splits

evaluation  an evaluation in a folder, from its start or where it was
model       the model that a name stands for; engine: what samples with it; data: its data sets
settings    what is stored of how it was made; folder: its files; stored: another one's
provenance  whether the model's run has seen the problems
report      result.json, table.md and the terminal's tables; picture: accuracy.png
progress    what the terminal shows meanwhile
"""
