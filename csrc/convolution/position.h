// Where in a history a step's token stands, given as a tensor: one place for all sequences or one for each.
#pragma once

#include "../common/tensor.h"

namespace star {

inline void check_position(const Tensor& position, int64_t batch) {
  const bool shaped = position.dim() == 0 ||
                      (position.dim() == 1 && (position.size(0) == 1 || position.size(0) == batch));
  STD_TORCH_CHECK(shaped, "position must hold one value, or one for each sequence");
  STD_TORCH_CHECK(position.scalar_type() == ScalarType::Int || position.scalar_type() == ScalarType::Long,
                  "position must be int32 or int64");
}

}  // namespace star
