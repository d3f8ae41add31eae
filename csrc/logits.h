// The transform from a raw logit, a GEMM's output, to a scaled one:
//     s = softcap tanh((x + b) / softcap) / temperature
// and vectorized reads of a row.

#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>

namespace rosd {

template <typename scalar_t>
using Vec = at::vec::Vectorized<scalar_t>;

// Number of entries that one vector sums before the sum is added to a double: with 1024 the
// rounding of float sums does not grow with the vocabulary.
constexpr int64_t kBlock = 1024;

template <typename scalar_t>
struct LogitTransform {
  const scalar_t* bias;  // [C] or nullptr
  scalar_t softcap;      // 0: none
  scalar_t temperature;

  // Loads up to `count` logits of a row at column `c` and scales them. With a soft cap, `slope`
  // becomes ds/dx * temperature = 1 - tanh^2.
  template <bool SOFTCAP>
  Vec<scalar_t> load(const scalar_t* row, int64_t c, int64_t count, Vec<scalar_t>& slope) const {
    auto x = Vec<scalar_t>::loadu(row + c, count);
    if (bias != nullptr) {
      x = x + Vec<scalar_t>::loadu(bias + c, count);
    }
    if constexpr (SOFTCAP) {
      const auto tanh = (x / Vec<scalar_t>(softcap)).tanh();
      slope = Vec<scalar_t>(1) - tanh * tanh;
      return tanh * Vec<scalar_t>(softcap / temperature);
    }
    return x / Vec<scalar_t>(temperature);
  }
};

// The first `count` lanes of `x`, and those of `other` in the rest.
template <typename scalar_t>
Vec<scalar_t> first_lanes(const Vec<scalar_t>& x, int64_t count, const Vec<scalar_t>& other) {
  return count == Vec<scalar_t>::size() ? x : Vec<scalar_t>::set(other, x, count);
}

template <typename scalar_t>
scalar_t sum_lanes(const Vec<scalar_t>& x) {
  return at::vec::vec_reduce_all<scalar_t>(
      [](Vec<scalar_t> a, Vec<scalar_t> b) { return a + b; }, x);
}

template <typename scalar_t>
scalar_t max_lanes(const Vec<scalar_t>& x) {
  return at::vec::vec_reduce_all<scalar_t>(
      [](Vec<scalar_t> a, Vec<scalar_t> b) { return at::vec::maximum(a, b); }, x);
}

}  // namespace rosd
