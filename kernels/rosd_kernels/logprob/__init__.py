"""The sampled tokens' log-probabilities and entropies; `api.py` has the public `span_logprob`.

    api.py          the public function
    records.py      inputs and options (each checked once), output
    token_loss.py   the caller's loss per token, and its derivatives
    reference.py    strategy "reference": plain PyTorch, autograd does the gradient
    chunked.py      strategy "chunked": dense GEMMs through a bounded workspace
    elementwise.py  its passes over logits: Triton, C++ or plain PyTorch
    sparse_chunks.py, sparse_block.py
                    "chunked" with a sparsity
    tiled.py        strategy "tiled": one tile of the vocabulary at a time
    autograd.py     gradients of log-probabilities and entropies whose loss is not known in forward

What `span_divergence` has as well is shared with it, and is one folder up.
"""
