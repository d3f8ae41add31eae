// What the operators share: their arguments' conversion, and the division of rows among threads.

#pragma once

#include "checks.h"
#include "terms.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>

namespace rosd {

using at::Tensor;

// A thread gets at least this many entries.
constexpr int64_t kGrain = 16384;

inline int64_t rows_per_thread(int64_t columns) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, columns));
}

template <typename scalar_t>
LogitTransform<scalar_t> transform_of(
    const char* name,
    const std::optional<Tensor>& bias,
    const Tensor& logits,
    std::optional<double> softcap,
    double temperature) {
  if (bias.has_value()) {
    check_vector(name, *bias, logits.size(1), logits.scalar_type());
  }
  return {
      bias.has_value() ? bias->const_data_ptr<scalar_t>() : nullptr,
      static_cast<scalar_t>(softcap.value_or(0)), static_cast<scalar_t>(temperature)};
}

template <typename scalar_t>
Options<scalar_t> options_of(double beta, std::optional<double> entry_clip) {
  Options<scalar_t> options{};
  options.beta = static_cast<scalar_t>(beta);
  options.one_minus_beta = static_cast<scalar_t>(1 - beta);
  options.entry_clip = static_cast<scalar_t>(entry_clip.value_or(0));
  return options;
}

// Calls `run<D, CLIP, SOFTCAP>()` of the options.
template <typename Run>
void dispatch_divergence(int64_t divergence, bool has_clip, bool has_softcap, const Run& run) {
  const auto with_flags = [&]<Divergence D>() {
    if (has_clip) {
      has_softcap ? run.template operator()<D, true, true>()
                  : run.template operator()<D, true, false>();
    } else {
      has_softcap ? run.template operator()<D, false, true>()
                  : run.template operator()<D, false, false>();
    }
  };
  switch (static_cast<Divergence>(divergence)) {
    case Divergence::forward_kl:
      return with_flags.template operator()<Divergence::forward_kl>();
    case Divergence::reverse_kl:
      return with_flags.template operator()<Divergence::reverse_kl>();
    case Divergence::jsd:
      return with_flags.template operator()<Divergence::jsd>();
    default:
      TORCH_CHECK_VALUE(false, "divergence: got ", divergence, ", want 0, 1 or 2");
  }
}

}  // namespace rosd
