// The selective scan on a GPU: the forward pass. See cuda_selective_scan.h.
#include <tuple>

#include "cuda_selective_scan.h"

namespace star {
namespace {

std::tuple<Tensor, Tensor> selective_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, OptionalTensor D,
                                          OptionalTensor z, OptionalTensor dt_bias, bool dt_softplus,
                                          OptionalTensor initial_state, OptionalTensor cu_seqlens) {
  DeviceArguments arguments(x);
  SelectiveScanCall call = prepare(arguments, {x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens});
  Tensor y = empty_like_shape(x, {x.size(0), x.size(1), call.width});
  Tensor final_state = empty_float(x, {call.sequences.count, call.width, call.states});
  call.y = rows_of(y);
  call.final = floats_in(final_state);
  const OnDevice on(x);
  STAR_WITH_STATES(call.states, STATES, LANES,
                   launch(on, selective_scan_kernel<STATES, LANES, true>, scan_blocks(call), scan_threads, 0, call));
  return {y, final_state};
}

}  // namespace
}  // namespace star

STAR_REGISTER_CUDA(m) { m.impl("selective_scan", TORCH_BOX(&star::selective_scan)); }
