// The kernels of one instruction set, as dispatch.cpp sees them.
#pragma once

#include "../grjca.h"

#define GRJCA_DECLARE_KERNELS(isa)                                                         \
  namespace grjca::isa {                                                                   \
  size_t kept_bytes(const Problem&);                                                       \
  size_t forward_workspace(const Problem&, const Resources&);                              \
  size_t backward_workspace(const Problem&, const Resources&);                             \
  void forward(const Problem&, const Tensors&, const ForwardOutputs&, const Resources&);   \
  void backward(const Problem&, const Tensors&, const BackwardTensors&, const Resources&); \
  }

#ifdef GRJCA_ISA
GRJCA_DECLARE_KERNELS(GRJCA_ISA)
#endif
