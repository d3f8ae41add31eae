"""Evaluation, during training and by `rosd-fast eval`.

records   what is stored of each completion, and how completions are sampled
sample    problems -> completions, verified
result    completions -> figures with intervals
training  the metrics of a run's development splits
"""
