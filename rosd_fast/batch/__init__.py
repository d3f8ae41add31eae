"""From rollouts to packed micro-batches. Nothing here acts on a model or a file."""
