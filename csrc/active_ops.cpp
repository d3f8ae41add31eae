// The operators of active.h. OpenMP threads divide the rows, or, where rows mark entries together,
// the vocabulary: equal calls give equal bits for any number of threads.

#include "active.h"

#include "arguments.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace rosd {
namespace {

int64_t checked_tiles(int64_t columns, int64_t tile) {
  TORCH_CHECK_VALUE(tile >= 1, "tile: got ", tile, ", want >= 1");
  return (columns + tile - 1) / tile;
}

void check_shape(
    const char* name, const Tensor& tensor, int64_t rows, int64_t columns, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(
      tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns &&
          tensor.is_contiguous() && tensor.scalar_type() == dtype,
      name, ": got ", tensor.scalar_type(), " of shape ", tensor.sizes(), ", want contiguous ",
      dtype, " of shape [", rows, ", ", columns, "]");
}

void check_index(const Tensor& index, int64_t columns) {
  check_vector("index", index, index.numel(), at::kLong);
  if (index.numel() == 0) {
    return;
  }
  // They rise, so the ends are enough.
  const int64_t* const values = index.const_data_ptr<int64_t>();
  const int64_t first = values[0], last = values[index.numel() - 1];
  TORCH_CHECK_VALUE(
      first >= 0 && last < columns && index.numel() <= columns, "index: got entries ",
      first < 0 ? "from " : "up to ", first < 0 ? first : last, ", want 0 to ", columns - 1);
}

// Sets `active` [C] where a row of `scanned` [R, T] tiles has a scaled logit above its threshold
// [R].
void mark_active_(
    Tensor& active,
    const Tensor& logits,
    const std::optional<Tensor>& bias,
    const Tensor& threshold,
    const Tensor& scanned,
    std::optional<double> softcap,
    double temperature,
    int64_t tile) {
  check_matrix("logits", logits);
  const int64_t num_rows = logits.size(0), num_columns = logits.size(1);
  const int64_t num_tiles = checked_tiles(num_columns, tile);
  check_vector("active", active, num_columns, at::kBool);
  check_vector("threshold", threshold, num_rows, logits.scalar_type());
  check_shape("scanned", scanned, num_rows, num_tiles, at::kBool);
  AT_DISPATCH_FLOATING_TYPES(logits.scalar_type(), "rosd::mark_active_", [&] {
    const auto transform = transform_of<scalar_t>("bias", bias, logits, softcap, temperature);
    const scalar_t* const data = logits.const_data_ptr<scalar_t>();
    const scalar_t* const bound = threshold.const_data_ptr<scalar_t>();
    const bool* const wanted = scanned.const_data_ptr<bool>();
    bool* const out = active.data_ptr<bool>();
    at::parallel_for(0, num_tiles, rows_per_thread(num_rows * tile), [&](int64_t t0, int64_t t1) {
      for (int64_t r = 0; r < num_rows; ++r) {
        const scalar_t* const row = data + r * logits.stride(0);
        for (int64_t t = t0; t < t1; ++t) {
          if (wanted[r * num_tiles + t]) {
            const int64_t begin = t * tile, end = std::min(begin + tile, num_columns);
            softcap.has_value()
                ? mark_tile<scalar_t, true>(row, begin, end, transform, bound[r], out)
                : mark_tile<scalar_t, false>(row, begin, end, transform, bound[r], out);
          }
        }
      }
    });
  });
}

// [4, R] sums of p and -p log p: over entries of scanned tiles with `is_dropped` 1, then over the
// entries `index` of the other tiles.
Tensor dropped_mass(
    const Tensor& logits,
    const std::optional<Tensor>& bias,
    const Tensor& lse,
    const Tensor& scanned,
    const Tensor& is_dropped,
    const Tensor& index,
    std::optional<double> softcap,
    double temperature,
    int64_t tile) {
  check_matrix("logits", logits);
  const int64_t num_rows = logits.size(0), num_columns = logits.size(1);
  const int64_t num_tiles = checked_tiles(num_columns, tile);
  check_vector("lse", lse, num_rows, logits.scalar_type());
  check_shape("scanned", scanned, num_rows, num_tiles, at::kBool);
  check_vector("is_dropped", is_dropped, num_columns, logits.scalar_type());
  check_index(index, num_columns);
  Tensor result = at::empty({4, num_rows}, logits.options());
  AT_DISPATCH_FLOATING_TYPES(logits.scalar_type(), "rosd::dropped_mass", [&] {
    const auto transform = transform_of<scalar_t>("bias", bias, logits, softcap, temperature);
    const scalar_t* const data = logits.const_data_ptr<scalar_t>();
    const scalar_t* const of_lse = lse.const_data_ptr<scalar_t>();
    const bool* const wanted = scanned.const_data_ptr<bool>();
    const scalar_t* const weight = is_dropped.const_data_ptr<scalar_t>();
    const int64_t* const chosen = index.const_data_ptr<int64_t>();
    scalar_t* const out = result.data_ptr<scalar_t>();
    at::parallel_for(0, num_rows, rows_per_thread(num_columns), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        const scalar_t* const row = data + r * logits.stride(0);
        const bool* const tiles = wanted + r * num_tiles;
        const auto sums = softcap.has_value()
            ? dropped_row<scalar_t, true>(
                  row, num_columns, transform, of_lse[r], tiles, weight, chosen, index.numel(),
                  tile)
            : dropped_row<scalar_t, false>(
                  row, num_columns, transform, of_lse[r], tiles, weight, chosen, index.numel(),
                  tile);
        for (int64_t k = 0; k < 4; ++k) {
          out[k * num_rows + r] = static_cast<scalar_t>(sums[k]);
        }
      }
    });
  });
  return result;
}

// [3, R] sums over the entries of scanned tiles: c, e, and |e| of those with `is_dropped` 1.
Tensor scanned_terms(
    const Tensor& student,
    const Tensor& teacher,
    const std::optional<Tensor>& student_bias,
    const std::optional<Tensor>& teacher_bias,
    const Tensor& student_lse,
    const Tensor& teacher_lse,
    const Tensor& scanned,
    const Tensor& is_dropped,
    int64_t divergence,
    double beta,
    std::optional<double> entry_clip,
    std::optional<double> softcap,
    double temperature,
    int64_t tile) {
  check_matrix("student", student);
  check_matrix("teacher", teacher);
  check_same("teacher", teacher, "student", student);
  const int64_t num_rows = student.size(0), num_columns = student.size(1);
  const int64_t num_tiles = checked_tiles(num_columns, tile);
  check_vector("student_lse", student_lse, num_rows, student.scalar_type());
  check_vector("teacher_lse", teacher_lse, num_rows, student.scalar_type());
  check_shape("scanned", scanned, num_rows, num_tiles, at::kBool);
  check_vector("is_dropped", is_dropped, num_columns, student.scalar_type());
  Tensor result = at::empty({3, num_rows}, student.options());
  AT_DISPATCH_FLOATING_TYPES(student.scalar_type(), "rosd::scanned_terms", [&] {
    const auto of_student =
        transform_of<scalar_t>("student_bias", student_bias, student, softcap, temperature);
    const auto of_teacher =
        transform_of<scalar_t>("teacher_bias", teacher_bias, teacher, softcap, temperature);
    const auto options = options_of<scalar_t>(beta, entry_clip);
    const scalar_t* const s = student.const_data_ptr<scalar_t>();
    const scalar_t* const z = teacher.const_data_ptr<scalar_t>();
    const scalar_t* const s_lse = student_lse.const_data_ptr<scalar_t>();
    const scalar_t* const z_lse = teacher_lse.const_data_ptr<scalar_t>();
    const bool* const wanted = scanned.const_data_ptr<bool>();
    const scalar_t* const weight = is_dropped.const_data_ptr<scalar_t>();
    scalar_t* const out = result.data_ptr<scalar_t>();
    dispatch_divergence(
        divergence, entry_clip.has_value(), softcap.has_value(),
        [&]<Divergence D, bool CLIP, bool SOFTCAP>() {
          at::parallel_for(
              0, num_rows, rows_per_thread(num_columns), [&](int64_t first, int64_t last) {
                for (int64_t r = first; r < last; ++r) {
                  const auto sums = scanned_terms_row<scalar_t, D, CLIP, SOFTCAP>(
                      s + r * student.stride(0), z + r * teacher.stride(0), num_columns,
                      of_student, of_teacher, s_lse[r], z_lse[r], options,
                      wanted + r * num_tiles, weight, tile);
                  for (int64_t k = 0; k < 3; ++k) {
                    out[k * num_rows + r] = static_cast<scalar_t>(sums[k]);
                  }
                }
              });
        });
  });
  return result;
}

// Moves the entries at rising positions `index` [A] to the head of each row.
void compact_(Tensor& logits, const Tensor& index) {
  check_matrix("logits", logits);
  const int64_t num_rows = logits.size(0), num_columns = logits.size(1), size = index.numel();
  check_index(index, num_columns);
  AT_DISPATCH_FLOATING_TYPES(logits.scalar_type(), "rosd::compact_", [&] {
    scalar_t* const data = logits.data_ptr<scalar_t>();
    const int64_t* const chosen = index.const_data_ptr<int64_t>();
    at::parallel_for(0, num_rows, rows_per_thread(size), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        scalar_t* const row = data + r * logits.stride(0);
        for (int64_t j = 0; j < size; ++j) {
          row[j] = row[chosen[j]];  // j <= chosen[j]: never an entry that is still to be read
        }
      }
    });
  });
}

// [R] scaled logits at or below which a row holds at most `tolerance` of its mass.
Tensor mass_threshold(
    const Tensor& logits,
    const std::optional<Tensor>& bias,
    const Tensor& lse,
    double tolerance,
    std::optional<double> softcap,
    double temperature) {
  check_matrix("logits", logits);
  const int64_t num_rows = logits.size(0), num_columns = logits.size(1);
  check_vector("lse", lse, num_rows, logits.scalar_type());
  Tensor result = at::empty({num_rows}, logits.options());
  AT_DISPATCH_FLOATING_TYPES(logits.scalar_type(), "rosd::mass_threshold", [&] {
    const auto transform = transform_of<scalar_t>("bias", bias, logits, softcap, temperature);
    const scalar_t* const data = logits.const_data_ptr<scalar_t>();
    const scalar_t* const of_lse = lse.const_data_ptr<scalar_t>();
    scalar_t* const out = result.data_ptr<scalar_t>();
    at::parallel_for(0, num_rows, rows_per_thread(num_columns), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        const scalar_t* const row = data + r * logits.stride(0);
        out[r] = softcap.has_value()
            ? mass_threshold_row<scalar_t, true>(row, num_columns, transform, of_lse[r], tolerance)
            : mass_threshold_row<scalar_t, false>(row, num_columns, transform, of_lse[r], tolerance);
      }
    });
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(rosd, m) {
  m.def(
      "mark_active_(Tensor(a!) active, Tensor logits, Tensor? bias, Tensor threshold, "
      "Tensor scanned, float? softcap, float temperature, int tile) -> ()");
  m.def(
      "dropped_mass(Tensor logits, Tensor? bias, Tensor lse, Tensor scanned, Tensor is_dropped, "
      "Tensor index, float? softcap, float temperature, int tile) -> Tensor");
  m.def(
      "scanned_terms(Tensor student, Tensor teacher, Tensor? student_bias, Tensor? teacher_bias, "
      "Tensor student_lse, Tensor teacher_lse, Tensor scanned, Tensor is_dropped, int divergence, "
      "float beta, float? entry_clip, float? softcap, float temperature, int tile) -> Tensor");
  m.def("compact_(Tensor(a!) logits, Tensor index) -> ()");
  m.def(
      "mass_threshold(Tensor logits, Tensor? bias, Tensor lse, float tolerance, float? softcap, "
      "float temperature) -> Tensor");
}

TORCH_LIBRARY_IMPL(rosd, CPU, m) {
  m.impl("mark_active_", &mark_active_);
  m.impl("dropped_mass", &dropped_mass);
  m.impl("scanned_terms", &scanned_terms);
  m.impl("compact_", &compact_);
  m.impl("mass_threshold", &mass_threshold);
}

}  // namespace rosd
