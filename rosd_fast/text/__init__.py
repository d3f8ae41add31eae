"""Pure text and token arithmetic: prompts, sentences, and the bytes of each token."""
