"""The optimizer step: learner, teacher, loss, optimizer, checkpoints and ranks."""
