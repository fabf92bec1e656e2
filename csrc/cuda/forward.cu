// The forward kernel of GRJCA_PRECISION.
#include "forward.h"
#include "kernels.h"

namespace grjca::cuda::GRJCA_PRECISION {

__global__ void __launch_bounds__(kThreads, kSharing) forward(const __grid_constant__ ForwardArguments a) {
  forward_kernel<Element, kExact>(a);
}

const void* forward_address() { return reinterpret_cast<const void*>(&forward); }

}  // namespace grjca::cuda::GRJCA_PRECISION
