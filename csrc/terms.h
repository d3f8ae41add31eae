// What the entries of a row contribute to its divergence and its gradient. The formulas, and the
// measures against rounding, are those of kernels/rosd_kernels/divergences.py.
//
//     log p = s - lse_s,  log q = z - lse_t,  c and e as in its table,  w = 1 - tanh^2
//     value = sum_v c_v,  K = sum_v e_v,  and in place  student <- p w,  teacher <- e w,
// so that the gradient w.r.t. the raw logits is `teacher - K student`.

#pragma once

#include "logits.h"

#include <algorithm>

namespace rosd {

enum class Divergence : int64_t { forward_kl = 0, reverse_kl = 1, jsd = 2 };

template <typename scalar_t>
struct Options {
  scalar_t beta, one_minus_beta;  // of jsd; each rounded once
  scalar_t entry_clip;
};

struct RowTerms {
  double value, total;
};

// A probability below e^-80 of the other one changes no digit; exp overflows float at 88.7.
constexpr double kMaxLogRatio = 80;

template <typename scalar_t, Divergence D, bool CLIP>
void entry_terms(
    const Vec<scalar_t>& log_p,
    const Vec<scalar_t>& log_q,
    const Options<scalar_t>& options,
    Vec<scalar_t>& p,
    Vec<scalar_t>& c,
    Vec<scalar_t>& e) {
  using V = Vec<scalar_t>;
  p = log_p.exp();
  const V q = log_q.exp();
  // log(q/p); 0 where both are -inf
  const V r = V::blendv(log_q - log_p, V(0), log_q == log_p);
  if constexpr (D == Divergence::forward_kl) {
    c = q * r;
    e = q.neg();
    if constexpr (!CLIP) {
      c = c + (p - q);
    }
  } else if constexpr (D == Divergence::reverse_kl) {
    e = p * r.neg();
    c = e - (p - q);
  } else {
    const V limit(static_cast<scalar_t>(kMaxLogRatio));
    const V ratio = at::vec::minimum(at::vec::maximum(r, limit.neg()), limit);
    if (options.beta <= options.one_minus_beta) {
      const V log_m_over_p = (ratio.expm1() * V(options.beta)).log1p();
      e = (p * log_m_over_p * V(options.one_minus_beta)).neg();
      c = q * (ratio - log_m_over_p) * V(options.beta) + e;
    } else {  // log(m/p) would subtract near 1
      const V log_m_over_q = (ratio.neg().expm1() * V(options.one_minus_beta)).log1p();
      e = (p * (ratio + log_m_over_q) * V(options.one_minus_beta)).neg();
      c = e - q * log_m_over_q * V(options.beta);
    }
  }
  if constexpr (CLIP) {
    const V clip(options.entry_clip);
    e = V::blendv(e, V(0), c > clip);
    c = at::vec::minimum(c, clip);
  }
}

template <typename scalar_t, Divergence D, bool CLIP, bool SOFTCAP>
RowTerms row_terms(
    scalar_t* student,
    scalar_t* teacher,
    int64_t size,
    const LogitTransform<scalar_t>& student_transform,
    const LogitTransform<scalar_t>& teacher_transform,
    scalar_t student_lse,
    scalar_t teacher_lse,
    const Options<scalar_t>& options) {
  using V = Vec<scalar_t>;
  RowTerms row{0, 0};
  for (int64_t start = 0; start < size; start += kBlock) {
    const int64_t stop = std::min(start + kBlock, size);
    V value(0), total(0);
    for (int64_t v = start; v < stop; v += V::size()) {
      const int64_t count = std::min<int64_t>(V::size(), stop - v);
      V slope, unused, p, c, e;
      const V log_q =
          teacher_transform.template load<SOFTCAP>(teacher, v, count, unused) - V(teacher_lse);
      const V log_p =
          student_transform.template load<SOFTCAP>(student, v, count, slope) - V(student_lse);
      entry_terms<scalar_t, D, CLIP>(log_p, log_q, options, p, c, e);
      value = value + first_lanes(c, count, V(0));
      total = total + first_lanes(e, count, V(0));
      if constexpr (SOFTCAP) {
        p = p * slope;
        e = e * slope;
      }
      p.store(student + v, count);
      e.store(teacher + v, count);
    }
    row.value += sum_lanes(value);
    row.total += sum_lanes(total);
  }
  return row;
}

}  // namespace rosd
