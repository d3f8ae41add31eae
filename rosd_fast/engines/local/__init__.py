"""The rollout engine in the trainer's process."""
