// The gradient of a row's loss w.r.t. its raw logits, where the loss depends on the sampled token's
// log-probability and on the entropy. The formulas are those of
// kernels/rosd_kernels/logprob/elementwise.py:
//
//     G_v = (a [v = y] - p_v (b log p_v + total)) w,   w = 1 - tanh^2,   total = a + b entropy
//
// It overwrites the logits. a, b and total are already divided by the temperature.

#pragma once

#include "logits.h"

#include <algorithm>

namespace rosd {

template <typename scalar_t>
struct RowFactors {
  scalar_t logprob, entropy, total;  // a, b and total
};

template <typename scalar_t, bool SOFTCAP>
void logprob_grad_row(
    scalar_t* row,
    int64_t size,
    int64_t column,  // y; -1: another shard's
    const LogitTransform<scalar_t>& transform,
    scalar_t lse,
    const RowFactors<scalar_t>& factors) {
  using V = Vec<scalar_t>;
  scalar_t of_sampled = factors.logprob;
  if constexpr (SOFTCAP) {
    if (column >= 0) {
      V slope;
      scalar_t lanes[V::size()];
      transform.template load<true>(row, column, 1, slope);
      slope.store(lanes);
      of_sampled *= lanes[0];
    }
  }
  for (int64_t v = 0; v < size; v += V::size()) {
    const int64_t count = std::min<int64_t>(V::size(), size - v);
    V slope;
    const V log_p = transform.template load<SOFTCAP>(row, v, count, slope) - V(lse);
    V g = log_p.exp().neg() * (V(factors.entropy) * log_p + V(factors.total));
    if constexpr (SOFTCAP) {
      g = g * slope;
    }
    g.store(row + v, count);
  }
  if (column >= 0) {
    row[column] += of_sampled;
  }
}

}  // namespace rosd
