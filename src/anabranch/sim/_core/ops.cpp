// Every operator that the other files do not name. Shapes come from PyTorch's meta kernel (or shapes.cpp, where there
// is none); the CPU kernel is queued. Where a shape or a returned number depends on data, the host waits for the
// stream, as it does on CUDA. What fits neither raises: nothing runs on the host behind the caller's back.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/enum_tag.h>
#include <ATen/native/IndexingUtils.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include <exception>
#include <set>

#include "infer.h"
#include "shapes.h"
#include "values.h"

namespace anabranch::sim {
namespace {

using torch::jit::Stack;

// What cannot be done by queueing the CPU kernel. Composites that read memory on the host, kernels of other libraries.
const char* const kRefused[] = {"_lazy_clone",
                                "_sobol_engine_draw",
                                "_sobol_engine_ff_",
                                "_sobol_engine_scramble_",
                                "_sobol_engine_initialize_state_",
                                "_nnpack_spatial_convolution",
                                "mkldnn_convolution",
                                "mkldnn_max_pool2d",
                                "mkldnn_max_pool3d",
                                "fbgemm_pack_gemm_matrix_fp16",
                                "fbgemm_linear_fp16_weight",
                                "fbgemm_linear_int8_weight",
                                "fbgemm_linear_quantize_weight"};

// Kernels that use a workspace which belongs to the stream on CUDA (cuBLAS, cuDNN).
const std::set<std::string> kWorkspace{"addmm",
                                       "mm",
                                       "bmm",
                                       "baddbmm",
                                       "addbmm",
                                       "addmv",
                                       "dot",
                                       "vdot",
                                       "_int_mm",
                                       "_scaled_mm",
                                       "convolution",
                                       "convolution_backward",
                                       "_addmm_activation",
                                       "_convolution",
                                       "_transformer_encoder_layer_fwd",
                                       "_native_multi_head_attention"};

std::string base_name(const c10::OperatorHandle& op) {
  auto name = op.schema().name().substr(6);  // without "aten::"
  if (name.size() > 1 && name.back() == '_') name.pop_back();
  return name;
}

// Where results of the CPU kernel go: return value `index` into `host`, device memory.
struct Result {
  size_t index;
  c10::IValue host;
};

void deliver(const std::string& name, const Stack& returned, const std::vector<Result>& results) {
  for (auto& result : results) {
    each_pair(result.host, returned[result.index], [&](const at::Tensor& to, const at::Tensor& from) {
      // The two need not agree about what only a backward of theirs would read (the saved mean of an evaluation).
      if (!from.defined() || !from.numel() || !to.numel()) return;
      TORCH_CHECK(to.sizes() == from.sizes(), "sim: ", name, " was expected to return ", to.sizes(),
                  ", its CPU kernel returned ", from.sizes());
      to.copy_(from);
    });
  }
}

class Call {
 public:
  Call(const c10::OperatorHandle& op, Stack* stack) : op_(op), stack_(*stack), name_(op.schema().name()) {
    auto count = op.schema().arguments().size();
    auto last = torch::jit::last(stack_, count);
    args_.assign(last.begin(), last.end());
    torch::jit::drop(stack_, count);
    find_device();
    if (!op.hasComputedKernelForDispatchKey(c10::DispatchKey::CPU)) refuse(op, "PyTorch has no CPU kernel for it");
  }

  void run() {
    const c10::DeviceGuard guard(device_);
    expand_indices();
    find_generator();
    bool depends_on_data = has_tag(at::Tag::dynamic_output_shape) || has_tag(at::Tag::data_dependent_output);
    // Masks are indices by now, so that the sizes of what they give are known.
    if (depends_on_data && base_name(op_) != "index") return run_synchronized();
    infer();
    adapt_written();
    Twins hosts(c10::kCPU);
    auto host_args = on_host(hosts);
    std::vector<Range> ranges = touched();
    std::vector<Result> results;
    bool writes = false, returns = op_.schema().returns().empty();
    for (size_t i = 0; i < args_.size(); ++i) {
      if (written(i)) each(args_[i], [&](const at::Tensor& t) { writes |= t.numel() > 0, returns = true; });
    }
    for (size_t i = 0; i < op_.schema().returns().size(); ++i) {
      auto& inferred = inferred_[i];
      if (auto from = written_by(i)) {
        stack_.push_back(args_[*from]);
        continue;
      }
      if (!inferred.isTensor() && !inferred.isTensorList()) {
        stack_.push_back(inferred);
        continue;
      }
      auto made = mapped(inferred, [&](const at::Tensor& t) { return allocate(t); });
      each(made, [&](const at::Tensor& t) { touch(ranges, t, true), writes |= t.numel() > 0, returns = true; });
      results.push_back({i, mapped(made, [&](const at::Tensor& t) { return t.defined() ? hosts.of(t) : t; })});
      stack_.push_back(std::move(made));
    }
    // Numbers that the meta kernel knows, or nothing but empty results: nothing to run.
    bool only_reads = op_.schema().returns().empty() && !any_written();
    if (!returns || (!writes && !only_reads)) return;
    Work work{name_, std::move(ranges), nullptr, kWorkspace.count(base_name(op_)) > 0};
    // A graph that was captured runs this more than once: the arguments stay, the seeds differ.
    auto runs = std::make_shared<uint64_t>(0);
    work.run = [op = op_, name = name_, args = std::move(host_args), results = std::move(results), seed = seed_,
                generator = generator_, runs] {
      Running running;
      Stack call = args;
      if (generator) call[*generator] = at::detail::createCPUGenerator(seed + (*runs)++);
      op.callBoxed(call);
      deliver(name, call, results);
    };
    enqueue(device_.index(), std::move(work));
  }

 private:
  const c10::OperatorHandle& op_;
  Stack& stack_;
  std::string name_;
  Stack args_, inferred_, metas_;
  c10::Device device_{kSim, -1};
  std::optional<size_t> generator_;
  uint64_t seed_ = 0;

  bool has_tag(at::Tag tag) const { return op_.hasTag(tag); }
  bool written(size_t argument) const {
    auto* alias = op_.schema().arguments()[argument].alias_info();
    return writes_by_rule(name_, args_, argument).value_or(alias && alias->isWrite());
  }
  bool any_written() const {
    for (size_t i = 0; i < args_.size(); ++i) {
      if (written(i)) return true;
    }
    return false;
  }
  // The argument that return value `index` is.
  std::optional<size_t> written_by(size_t index) const {
    auto* alias = op_.schema().returns()[index].alias_info();
    if (!alias) return std::nullopt;
    for (size_t i = 0; alias->isWrite() && i < args_.size(); ++i) {
      auto* other = op_.schema().arguments()[i].alias_info();
      if (other && other->isWrite() && other->beforeSets() == alias->beforeSets()) return i;
    }
    refuse(op_, "it returns a view of its argument");
  }

  void find_device() {
    auto& arguments = op_.schema().arguments();
    for (auto& arg : args_) {
      each(arg, [&](const at::Tensor& t) {
        if (on_sim(t) && !device_.has_index()) device_ = t.device();
      });
    }
    for (size_t i = 0; i < args_.size(); ++i) {
      if (!device_.has_index() && args_[i].isDevice() && args_[i].toDevice().type() == kSim) {
        device_ = args_[i].toDevice();
      }
      if (args_[i].isOptionalTensorList()) continue;  // see expand_indices
      each(args_[i], [&](const at::Tensor& t) {
        if (t.device() == device_ || (t.is_cpu() && !t.dim() && !written(i))) return;
        TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, ", device_,
                    " and ", t.device(), "! (when checking argument ", arguments[i].name(), " of ", name_, ")");
      });
    }
    if (!device_.has_index()) device_ = c10::Device(kSim, static_cast<c10::DeviceIndex>(current_device()));
  }

  void find_generator() {
    auto& arguments = op_.schema().arguments();
    for (size_t i = 0; i < args_.size(); ++i) {
      auto type = arguments[i].type();
      if (auto optional = type->cast<c10::OptionalType>()) type = optional->getElementType();
      if (type->kind() != c10::TypeKind::GeneratorType) continue;
      auto own = args_[i].isNone() ? default_generator(device_.index()) : args_[i].toGenerator();
      TORCH_CHECK(own.device().type() == kSim, "Expected a '", device_.type(),
                  "' device type for generator but found '", own.device().type(), "'");
      generator_ = i;
      seed_ = draw(own);
      args_[i] = c10::IValue();
    }
    if (!generator_ && has_tag(at::Tag::nondeterministic_seeded)) refuse(op_, "it takes no random generator");
  }

  // As on CUDA, indices on the host are copied to the device first, and masks become indices, which the host waits for.
  void expand_indices() {
    for (auto& arg : args_) {
      if (!arg.isOptionalTensorList()) continue;
      bool masks = false;
      c10::List<std::optional<at::Tensor>> indices;
      for (const std::optional<at::Tensor>& t : arg.toOptionalTensorList()) {
        bool given = t && t->defined();
        TORCH_CHECK_INDEX(!given || t->is_cpu() || t->device() == device_,
                          "indices should be either on cpu or on the "
                          "same device as the indexed tensor (",
                          device_, ")");
        indices.push_back(given && t->is_cpu() ? t->to(device_) : t);
        masks |= given && (t->scalar_type() == at::kBool || t->scalar_type() == at::kByte);
      }
      if (masks) {
        auto expanded = at::native::expandTensors(args_[0].toTensor(), indices);
        indices.clear();
        for (auto& t : expanded) indices.push_back(t.defined() ? std::optional<at::Tensor>(t) : std::nullopt);
      }
      arg = indices;
    }
  }

  void infer() {
    bool in_place = any_written();
    for (size_t i = 0; i < args_.size(); ++i) in_place &= !(written(i) && op_.schema().arguments()[i].is_out());
    for (auto& returned : op_.schema().returns()) {
      in_place &= returned.alias_info() && returned.alias_info()->isWrite();
    }
    auto found = anabranch::sim::infer(op_, args_, in_place);
    inferred_ = std::move(found.returns);
    metas_ = std::move(found.args);
  }

  // `out=` may have got another shape.
  void adapt_written() {
    for (size_t i = 0; i < args_.size(); ++i) {
      if (!written(i)) continue;
      each_pair(args_[i], metas_[i], [](const at::Tensor& t, const at::Tensor& meta) {
        if (t.sizes() == meta.sizes() && t.strides() == meta.strides()) return;
        reshape(t, meta.sizes(), meta.strides(), meta.storage_offset());
      });
    }
  }

  at::Tensor allocate(const at::Tensor& like) const {
    if (!like.defined()) return like;
    if (like.layout() != c10::kStrided || like.is_quantized()) refuse(op_, "its result is not a strided tensor");
    return at::empty_strided(like.sizes(), like.strides(), like.options().device(device_));
  }

  Stack on_host(Twins& twins) const {
    Below below;
    Stack hosts;
    for (auto& arg : args_) {
      hosts.push_back(mapped(elsewhere(arg, c10::kCPU), [&](const at::Tensor& t) {
        if (!t.defined()) return t;
        if (on_sim(t)) return twins.of(t);
        auto copy = t.clone();
        if (t.unsafeGetTensorImpl()->is_wrapped_number()) copy.unsafeGetTensorImpl()->set_wrapped_number(true);
        return copy;
      }));
    }
    return hosts;
  }

  std::vector<Range> touched() const {
    std::vector<Range> ranges;
    for (size_t i = 0; i < args_.size(); ++i) {
      each(args_[i], [&](const at::Tensor& t) {
        if (on_sim(t)) touch(ranges, t, written(i));
      });
    }
    return ranges;
  }

  // The results are not known without the data: run, wait, and copy what came out into device memory. Errors are the
  // caller's, as where a host reads the data; they leave the device usable.
  void run_synchronized() {
    struct Outcome {
      Stack returned;
      std::exception_ptr error;
    };
    auto outcome = std::make_shared<Outcome>();
    Twins hosts(c10::kCPU);
    Work work{name_, {}, nullptr, false};
    auto args = on_host(hosts);
    for (size_t i = 0; i < args_.size(); ++i) {
      if (written(i)) {
        args[i] = at::empty({0}, args_[i].toTensor().options().device(c10::kCPU));
      } else {
        each(args_[i], [&](const at::Tensor& t) {
          if (on_sim(t)) touch(work.ranges, t, false);
        });
      }
    }
    work.run = [op = op_, args = std::move(args), outcome] {
      Running running;
      Stack call = args;
      try {
        op.callBoxed(call);
        outcome->returned = std::move(call);
      } catch (...) {
        outcome->error = std::current_exception();
      }
    };
    enqueue(device_.index(), std::move(work));
    synchronize_current(device_.index());
    if (outcome->error) std::rethrow_exception(outcome->error);
    for (size_t i = 0; i < op_.schema().returns().size(); ++i) {
      auto& value = outcome->returned[i];
      if (!value.isTensor()) {
        stack_.push_back(value);
      } else if (auto out = written_by(i)) {
        auto& t = args_[*out].toTensor();
        t.resize_(value.toTensor().sizes());
        write_back(t, value.toTensor());
        stack_.push_back(t);
      } else {
        auto made = allocate(value.toTensor());
        if (made.defined()) write_back(made, value.toTensor());
        stack_.push_back(std::move(made));
      }
    }
  }

  void write_back(const at::Tensor& to, const at::Tensor& from) const {
    if (!to.numel()) return;
    Work work{name_, {}, [host = Twins(c10::kCPU).of(to), from] {
                Running running;
                host.copy_(from);
              }};
    touch(work.ranges, to, true);
    enqueue(device_.index(), std::move(work));
  }
};

void fallback(const c10::OperatorHandle& op, Stack* stack) {
  Call(op, stack).run();
}

void refused(const c10::OperatorHandle& op, Stack*) {
  refuse(op, "it reads memory on the host, or needs another library");
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  // These have a composite kernel, which would choose by device, or split one kernel into many.
  for (auto* name : {"convolution", "convolution_backward", "_convolution", "native_group_norm", "native_layer_norm"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
  }
  for (auto* name : kRefused) m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refused>());
}

}  // namespace
}  // namespace anabranch::sim
