// Passes over the logits of a block of rows of which few entries matter. A (row, tile) pair is
// scanned or not; an entry of the vocabulary is active for all rows of the block or for none. See
// kernels/rosd_kernels/active.py for what the results are good for.

#pragma once

#include "terms.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

namespace rosd {

// Marks the entries of a tile whose scaled logit is above the threshold.
template <typename scalar_t, bool SOFTCAP>
void mark_tile(
    const scalar_t* row,
    int64_t begin,
    int64_t end,
    const LogitTransform<scalar_t>& transform,
    scalar_t threshold,
    bool* active) {
  using V = Vec<scalar_t>;
  alignas(64) scalar_t lanes[V::size()];
  for (int64_t v = begin; v < end; v += V::size()) {
    const int64_t count = std::min<int64_t>(V::size(), end - v);
    V slope;
    const V s = first_lanes(
        transform.template load<SOFTCAP>(row, v, count, slope), count,
        V(-std::numeric_limits<scalar_t>::infinity()));
    if (!(max_lanes(s) <= threshold)) {  // NaN is active: it then reaches the gradient
      s.store(lanes);
      for (int64_t i = 0; i < count; ++i) {
        if (!(lanes[i] <= threshold)) {
          active[v + i] = true;
        }
      }
    }
  }
}

// log p of up to kBlock entries of a row at rising positions `index`, in `out`.
template <typename scalar_t, bool SOFTCAP>
void gather_log_p(
    const scalar_t* row,
    const int64_t* index,
    int64_t size,
    LogitTransform<scalar_t> transform,
    scalar_t lse,
    scalar_t* out) {
  using V = Vec<scalar_t>;
  for (int64_t j = 0; j < size; ++j) {
    out[j] = row[index[j]] + (transform.bias != nullptr ? transform.bias[index[j]] : 0);
  }
  transform.bias = nullptr;
  for (int64_t j = 0; j < size; j += V::size()) {
    const int64_t count = std::min<int64_t>(V::size(), size - j);
    V slope;
    (transform.template load<SOFTCAP>(out, j, count, slope) - V(lse)).store(out + j, count);
  }
}

// Sums of p and of -p log p over log-probabilities, in `sums`. p = 0 contributes 0.
template <typename scalar_t>
struct MassSums {
  using V = Vec<scalar_t>;
  V mass = V(0), entropy = V(0);

  void add(const V& log_p, const V& weight) {
    const V finite = at::vec::maximum(log_p, V(std::numeric_limits<scalar_t>::lowest()));
    const V p = finite.exp() * weight;
    mass = mass + p;
    entropy = entropy - p * finite;
  }
};

// Sums of p and -p log p of a row: first over the entries of scanned tiles that are not active, then
// over the active entries of the other tiles.
template <typename scalar_t, bool SOFTCAP>
std::array<double, 4> dropped_row(
    const scalar_t* row,
    int64_t size,
    const LogitTransform<scalar_t>& transform,
    scalar_t lse,
    const bool* scanned,
    const scalar_t* is_dropped,  // [size] 1 where an entry is not active, else 0
    const int64_t* index,
    int64_t num_active,
    int64_t tile) {
  using V = Vec<scalar_t>;
  std::array<double, 4> result{0, 0, 0, 0};
  for (int64_t start = 0; start < size; start += tile) {
    if (!scanned[start / tile]) {
      continue;
    }
    const int64_t stop = std::min(start + tile, size);
    MassSums<scalar_t> sums;
    for (int64_t v = start; v < stop; v += V::size()) {
      const int64_t count = std::min<int64_t>(V::size(), stop - v);
      V slope;
      const V log_p = transform.template load<SOFTCAP>(row, v, count, slope) - V(lse);
      const V weight = first_lanes(V::loadu(is_dropped + v, count), count, V(0));
      sums.add(log_p, weight);
    }
    result[0] += sum_lanes(sums.mass);
    result[1] += sum_lanes(sums.entropy);
  }
  alignas(64) scalar_t log_p[kBlock];
  int64_t chosen[kBlock];
  int64_t filled = 0;
  const auto flush = [&] {
    gather_log_p<scalar_t, SOFTCAP>(row, chosen, filled, transform, lse, log_p);
    MassSums<scalar_t> sums;
    for (int64_t j = 0; j < filled; j += V::size()) {
      const int64_t count = std::min<int64_t>(V::size(), filled - j);
      sums.add(V::loadu(log_p + j, count), first_lanes(V(1), count, V(0)));
    }
    result[2] += sum_lanes(sums.mass);
    result[3] += sum_lanes(sums.entropy);
    filled = 0;
  };
  for (int64_t j = 0; j < num_active; ++j) {
    if (!scanned[index[j] / tile]) {
      chosen[filled++] = index[j];
      if (filled == kBlock) {
        flush();
      }
    }
  }
  flush();
  return result;
}

// Sums over the entries of a row's scanned tiles: c and e, and |e| of the entries that are not
// active.
template <typename scalar_t, Divergence D, bool CLIP, bool SOFTCAP>
std::array<double, 3> scanned_terms_row(
    const scalar_t* student,
    const scalar_t* teacher,
    int64_t size,
    const LogitTransform<scalar_t>& student_transform,
    const LogitTransform<scalar_t>& teacher_transform,
    scalar_t student_lse,
    scalar_t teacher_lse,
    const Options<scalar_t>& options,
    const bool* scanned,
    const scalar_t* is_dropped,
    int64_t tile) {
  using V = Vec<scalar_t>;
  std::array<double, 3> result{0, 0, 0};
  for (int64_t start = 0; start < size; start += tile) {
    if (!scanned[start / tile]) {
      continue;
    }
    const int64_t stop = std::min(start + tile, size);
    V value(0), total(0), dropped(0);
    for (int64_t v = start; v < stop; v += V::size()) {
      const int64_t count = std::min<int64_t>(V::size(), stop - v);
      V slope, p, c, e;
      const V log_q =
          teacher_transform.template load<SOFTCAP>(teacher, v, count, slope) - V(teacher_lse);
      const V log_p =
          student_transform.template load<SOFTCAP>(student, v, count, slope) - V(student_lse);
      entry_terms<scalar_t, D, CLIP>(log_p, log_q, options, p, c, e);
      e = first_lanes(e, count, V(0));
      value = value + first_lanes(c, count, V(0));
      total = total + e;
      dropped = dropped + first_lanes(e.abs() * V::loadu(is_dropped + v, count), count, V(0));
    }
    result[0] += sum_lanes(value);
    result[1] += sum_lanes(total);
    result[2] += sum_lanes(dropped);
  }
  return result;
}

// The scaled logit at or below which the entries of a row hold at most `tolerance` of its mass. One
// read: p is summed in bins of a quarter of an octave, from the least likely upwards.
template <typename scalar_t, bool SOFTCAP>
scalar_t mass_threshold_row(
    const scalar_t* row,
    int64_t size,
    const LogitTransform<scalar_t>& transform,
    scalar_t lse,
    double tolerance) {
  using V = Vec<scalar_t>;
  constexpr int64_t kPerOctave = 4, kOctaves = 64, kBins = kPerOctave * kOctaves;
  std::array<double, kBins> mass{};
  alignas(64) scalar_t p[V::size()], place[V::size()];
  const V per_nat(static_cast<scalar_t>(-kPerOctave / std::log(2.0)));
  for (int64_t v = 0; v < size; v += V::size()) {
    const int64_t count = std::min<int64_t>(V::size(), size - v);
    V slope;
    const V log_p = transform.template load<SOFTCAP>(row, v, count, slope) - V(lse);
    log_p.exp().store(p);
    const V bin = at::vec::maximum(log_p * per_nat, V(0));
    at::vec::minimum(bin, V(static_cast<scalar_t>(kBins - 1))).store(place);
    for (int64_t i = 0; i < count; ++i) {
      // NaN has no bin of its own
      mass[std::clamp<int64_t>(static_cast<int64_t>(place[i]), 0, kBins - 1)] += p[i];
    }
  }
  // Bin k holds p in (2^-(k+1)/4, 2^-k/4]; those beyond the last bin are in it.
  double below = 0;
  int64_t bin = kBins;
  while (bin > 0 && below + mass[bin - 1] <= tolerance) {
    below += mass[--bin];
  }
  if (bin == kBins) {
    return -std::numeric_limits<scalar_t>::infinity();
  }
  // The edge itself is rounded: stay below it by more than that.
  const double edge = -static_cast<double>(bin) / kPerOctave * std::log(2.0);
  return static_cast<scalar_t>(lse + edge - 1e-5 * (1 + std::abs(lse)));
}

}  // namespace rosd
