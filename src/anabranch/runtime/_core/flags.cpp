#include "flags.h"

#include <ATen/Context.h>

namespace anabranch::runtime {

std::optional<Flags> flags_now() {
  auto& context = at::globalContext();
  auto of = [](auto value) { return static_cast<int64_t>(value); };
  auto precision = [&](at::Float32Backend backend, at::Float32Op op) {
    return of(context.float32Precision(backend, op));
  };
  using Backend = at::Float32Backend;
  using Op = at::Float32Op;
  try {
    return Flags{of(context.deterministicAlgorithms()),
                 of(context.float32MatmulPrecision()),
                 precision(Backend::CUDA, Op::MATMUL),
                 precision(Backend::CUDA, Op::CONV),
                 precision(Backend::CUDA, Op::RNN),
                 precision(Backend::MKLDNN, Op::MATMUL),
                 precision(Backend::MKLDNN, Op::CONV),
                 precision(Backend::MKLDNN, Op::RNN),
                 of(context.allowFP16ReductionCuBLAS()),
                 of(context.allowBF16ReductionCuBLAS()),
                 of(context.allowFP16AccumulationCuBLAS()),
                 of(context.userEnabledCuDNN()),
                 of(context.benchmarkCuDNN()),
                 of(context.deterministicCuDNN()),
                 of(context.userEnabledFlashSDP()),
                 of(context.userEnabledMemEfficientSDP()),
                 of(context.userEnabledMathSDP()),
                 of(context.userEnabledCuDNNSDP()),
                 of(context.userEnabledMkldnn()),
                 of(context.deterministicAlgorithmsWarnOnly())};
  } catch (const c10::Error&) {
    return std::nullopt;
  }
}

}  // namespace anabranch::runtime
