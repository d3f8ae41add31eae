"""Text and tokens, without any model: prompts, decoding, sentences, and the bytes of tokens."""
