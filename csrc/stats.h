// Statistics of the scaled logits of a tile of a row, in one pass over memory:
//     lse = log sum_v exp(s_v),   max,   min,   entropy of exp(s - lse)
// Blocks of kBlock entries are merged first to last; the sums are relative to the highest so far.

#pragma once

#include "logits.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace rosd {

struct TileStats {
  double lse, max, min, entropy;
};

template <typename scalar_t, bool SOFTCAP>
TileStats tile_stats(
    const scalar_t* row, const LogitTransform<scalar_t>& transform, int64_t begin, int64_t end) {
  using V = Vec<scalar_t>;
  constexpr auto inf = std::numeric_limits<scalar_t>::infinity();
  constexpr auto lowest = std::numeric_limits<scalar_t>::lowest();
  alignas(64) scalar_t scaled[kBlock];
  double highest = -inf, low = inf;
  double mass = 0, weighted = 0;  // sums of e = exp(s - highest) and of e (s - highest)
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t size = std::min(kBlock, end - start);
    V top(-inf), bottom(inf), slope;
    for (int64_t i = 0; i < size; i += V::size()) {
      const int64_t count = std::min<int64_t>(V::size(), size - i);
      const V s = transform.template load<SOFTCAP>(row, start + i, count, slope);
      s.store(scaled + i, count);
      top = at::vec::maximum(top, first_lanes(s, count, V(-inf)));
      bottom = at::vec::minimum(bottom, first_lanes(s, count, V(inf)));
    }
    const scalar_t block_top = max_lanes(top);
    low = std::min<double>(low, -max_lanes(bottom.neg()));
    if (block_top == -inf) {
      continue;  // only masked entries: no mass
    }
    V block_mass(0), block_weighted(0);
    for (int64_t i = 0; i < size; i += V::size()) {
      const int64_t count = std::min<int64_t>(V::size(), size - i);
      const V s = V::loadu(scaled + i, count);
      const V above = at::vec::maximum(s - V(block_top), V(lowest));  // 0 * -inf is not 0
      const V e = first_lanes(above.exp(), count, V(0));
      block_mass = block_mass + e;
      block_weighted = block_weighted + first_lanes(e * above, count, V(0));
    }
    const double next = std::max<double>(highest, block_top);
    const auto add = [next, &mass, &weighted](double top, double of_mass, double of_weighted) {
      const double scale = std::exp(top - next);
      weighted = weighted + scale * (of_weighted + (top - next) * of_mass);
      mass = mass + scale * of_mass;
    };
    const double mass_before = mass, weighted_before = weighted;
    mass = weighted = 0;
    if (mass_before > 0) {
      add(highest, mass_before, weighted_before);
    }
    add(block_top, sum_lanes(block_mass), sum_lanes(block_weighted));
    highest = next;
  }
  return {highest + std::log(mass), highest, low, std::log(mass) - weighted / mass};
}

}  // namespace rosd
