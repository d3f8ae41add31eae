"""The rollout engine on SGLang servers, and a teacher that a server runs."""
