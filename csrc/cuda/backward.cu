// The backward kernel of GRJCA_PRECISION.
#include "backward.h"
#include "kernels.h"

namespace grjca::cuda::GRJCA_PRECISION {

__global__ void __launch_bounds__(kThreads, kSharing) backward(const __grid_constant__ BackwardArguments a) {
  backward_kernel<Element, kExact>(a);
}

const void* backward_address() { return reinterpret_cast<const void*>(&backward); }

}  // namespace grjca::cuda::GRJCA_PRECISION
