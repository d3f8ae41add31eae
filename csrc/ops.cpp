// The CPU's elementwise passes over logits, as operators `torch.ops.rosd.*`. OpenMP threads divide
// the rows; one thread sums a row in a fixed sequence, so equal calls give equal bits for any
// number of threads. GEMMs are torch's own; fake implementations and callers are in Python.

#include "arguments.h"
#include "logprob.h"
#include "stats.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

namespace rosd {
namespace {

// Statistics of each tile of each row ([4, R, T]: lse, max, min, entropy), and the scaled logit at
// `columns` ([R]; 0 where it is -1, [0] without columns).
std::tuple<Tensor, Tensor> stats(
    const Tensor& logits,
    const std::optional<Tensor>& bias,
    const std::optional<Tensor>& columns,
    std::optional<double> softcap,
    double temperature,
    int64_t tile) {
  check_matrix("logits", logits);
  TORCH_CHECK_VALUE(tile >= 1, "tile: got ", tile, ", want >= 1");
  const int64_t num_rows = logits.size(0), num_columns = logits.size(1);
  const int64_t num_tiles = (num_columns + tile - 1) / tile;
  if (columns.has_value()) {
    check_vector("columns", *columns, num_rows, at::kLong);
  }
  Tensor result = at::empty({4, num_rows, num_tiles}, logits.options());
  Tensor sampled = at::empty({columns.has_value() ? num_rows : 0}, logits.options());
  AT_DISPATCH_FLOATING_TYPES(logits.scalar_type(), "rosd::stats", [&] {
    const auto transform = transform_of<scalar_t>("bias", bias, logits, softcap, temperature);
    const scalar_t* in = logits.const_data_ptr<scalar_t>();
    const int64_t* column = columns.has_value() ? columns->const_data_ptr<int64_t>() : nullptr;
    scalar_t* out = result.data_ptr<scalar_t>();
    scalar_t* picked = sampled.data_ptr<scalar_t>();
    const int64_t plane = num_rows * num_tiles;
    at::parallel_for(0, num_rows, rows_per_thread(num_columns), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        const scalar_t* row = in + r * logits.stride(0);
        for (int64_t t = 0; t < num_tiles; ++t) {
          const int64_t begin = t * tile, end = std::min(begin + tile, num_columns);
          const TileStats found = softcap.has_value()
              ? tile_stats<scalar_t, true>(row, transform, begin, end)
              : tile_stats<scalar_t, false>(row, transform, begin, end);
          scalar_t* at = out + r * num_tiles + t;
          at[0] = static_cast<scalar_t>(found.lse);
          at[plane] = static_cast<scalar_t>(found.max);
          at[2 * plane] = static_cast<scalar_t>(found.min);
          at[3 * plane] = static_cast<scalar_t>(found.entropy);
        }
        if (column != nullptr) {
          Vec<scalar_t> unused;
          scalar_t lanes[Vec<scalar_t>::size()] = {0};
          if (column[r] >= 0 && column[r] < num_columns) {
            (softcap.has_value() ? transform.template load<true>(row, column[r], 1, unused)
                                 : transform.template load<false>(row, column[r], 1, unused))
                .store(lanes);
          }
          picked[r] = lanes[0];
        }
      }
    });
  });
  return {result, sampled};
}

template <typename scalar_t, Divergence D, bool CLIP, bool SOFTCAP>
void run_terms(
    const Tensor& student,
    const Tensor& teacher,
    const LogitTransform<scalar_t>& student_transform,
    const LogitTransform<scalar_t>& teacher_transform,
    const scalar_t* student_lse,
    const scalar_t* teacher_lse,
    const Options<scalar_t>& options,
    scalar_t* out) {
  const int64_t num_rows = student.size(0), num_columns = student.size(1);
  scalar_t* const of_student = student.data_ptr<scalar_t>();
  scalar_t* const of_teacher = teacher.data_ptr<scalar_t>();
  at::parallel_for(0, num_rows, rows_per_thread(num_columns), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const RowTerms row = row_terms<scalar_t, D, CLIP, SOFTCAP>(
          of_student + r * student.stride(0), of_teacher + r * teacher.stride(0), num_columns,
          student_transform, teacher_transform, student_lse[r], teacher_lse[r], options);
      out[r] = static_cast<scalar_t>(row.value);
      out[num_rows + r] = static_cast<scalar_t>(row.total);
    }
  });
}

// [2, R]: value and K of each row; see terms.h for what becomes of the logits.
Tensor terms_(
    Tensor& student,
    Tensor& teacher,
    const std::optional<Tensor>& student_bias,
    const std::optional<Tensor>& teacher_bias,
    const Tensor& student_lse,
    const Tensor& teacher_lse,
    int64_t divergence,
    double beta,
    std::optional<double> entry_clip,
    std::optional<double> softcap,
    double temperature) {
  check_matrix("student", student);
  check_matrix("teacher", teacher);
  check_same("teacher", teacher, "student", student);
  check_vector("student_lse", student_lse, student.size(0), student.scalar_type());
  check_vector("teacher_lse", teacher_lse, student.size(0), student.scalar_type());
  Tensor result = at::empty({2, student.size(0)}, student.options());
  AT_DISPATCH_FLOATING_TYPES(student.scalar_type(), "rosd::terms_", [&] {
    const auto of_student =
        transform_of<scalar_t>("student_bias", student_bias, student, softcap, temperature);
    const auto of_teacher =
        transform_of<scalar_t>("teacher_bias", teacher_bias, teacher, softcap, temperature);
    const auto options = options_of<scalar_t>(beta, entry_clip);
    dispatch_divergence(
        divergence, entry_clip.has_value(), softcap.has_value(),
        [&]<Divergence D, bool CLIP, bool SOFTCAP>() {
          run_terms<scalar_t, D, CLIP, SOFTCAP>(
              student, teacher, of_student, of_teacher, student_lse.const_data_ptr<scalar_t>(),
              teacher_lse.const_data_ptr<scalar_t>(), options, result.data_ptr<scalar_t>());
        });
  });
  return result;
}

// Turns logits into the gradient of their row's loss; see logprob.h. factors [3, R]: a, b, total.
void logprob_grad_(
    Tensor& logits,
    const std::optional<Tensor>& bias,
    const Tensor& columns,
    const Tensor& lse,
    const Tensor& factors,
    std::optional<double> softcap,
    double temperature) {
  check_matrix("logits", logits);
  const int64_t num_rows = logits.size(0), num_columns = logits.size(1);
  check_vector("columns", columns, num_rows, at::kLong);
  check_vector("lse", lse, num_rows, logits.scalar_type());
  check_matrix("factors", factors);
  check_vector("factors", factors.reshape(-1), 3 * num_rows, logits.scalar_type());
  AT_DISPATCH_FLOATING_TYPES(logits.scalar_type(), "rosd::logprob_grad_", [&] {
    const auto transform = transform_of<scalar_t>("bias", bias, logits, softcap, temperature);
    scalar_t* const data = logits.data_ptr<scalar_t>();
    const int64_t* const column = columns.const_data_ptr<int64_t>();
    const scalar_t* const of_lse = lse.const_data_ptr<scalar_t>();
    const scalar_t* const factor = factors.const_data_ptr<scalar_t>();
    at::parallel_for(0, num_rows, rows_per_thread(num_columns), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        scalar_t* const row = data + r * logits.stride(0);
        const int64_t y = column[r] < num_columns ? column[r] : -1;
        const RowFactors<scalar_t> of_row{
            factor[r], factor[num_rows + r], factor[2 * num_rows + r]};
        softcap.has_value()
            ? logprob_grad_row<scalar_t, true>(row, num_columns, y, transform, of_lse[r], of_row)
            : logprob_grad_row<scalar_t, false>(row, num_columns, y, transform, of_lse[r], of_row);
      }
    });
  });
}

}  // namespace

TORCH_LIBRARY(rosd, m) {
  m.def(
      "stats(Tensor logits, Tensor? bias, Tensor? columns, float? softcap, float temperature, "
      "int tile) -> (Tensor, Tensor)");
  m.def(
      "terms_(Tensor(a!) student, Tensor(b!) teacher, Tensor? student_bias, Tensor? teacher_bias, "
      "Tensor student_lse, Tensor teacher_lse, int divergence, float beta, float? entry_clip, "
      "float? softcap, float temperature) -> Tensor");
  m.def(
      "logprob_grad_(Tensor(a!) logits, Tensor? bias, Tensor columns, Tensor lse, Tensor factors, "
      "float? softcap, float temperature) -> ()");
}

TORCH_LIBRARY_IMPL(rosd, CPU, m) {
  m.impl("stats", &stats);
  m.impl("terms_", &terms_);
  m.impl("logprob_grad_", &logprob_grad_);
}

}  // namespace rosd
