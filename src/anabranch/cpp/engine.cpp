// The public face for C++ over one specialization of the runtime, without graphs.
#include "anabranch/engine.h"

#include <ATen/ScalarOps.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <mutex>
#include <optional>
#include <sstream>
#include <unordered_map>

#include "../runtime/_core/specialization.h"
#include "device.h"
#include "file.h"

namespace anabranch {

namespace {

// The first line of what PyTorch has to say.
std::string first_line(const std::exception& error) {
  auto* torch = dynamic_cast<const c10::Error*>(&error);
  std::string all = torch ? torch->what_without_backtrace() : error.what();
  return all.substr(0, all.find('\n'));
}

std::string str(c10::IntArrayRef numbers) {
  std::ostringstream out;
  for (size_t i = 0; i < numbers.size(); ++i) out << (i ? ", " : "[") << numbers[i];
  out << (numbers.empty() ? "[]" : "]");
  return out.str();
}

// -- devices ---------------------------------------------------------------------------------------------------------

// Of devices that this file does not know. Written before the first engine.
const runtime::DeviceApi* other_api = nullptr;

c10::Device checked(c10::Device device) {
  auto given = "device " + device.str() + " given";
  if (device.is_cpu()) return c10::Device(c10::kCPU);
  if (!device.is_cuda() && !(device.is_privateuseone() && other_api)) {
    throw InputError(given + "; engines in C++ run on cpu and cuda, give one of these");
  }
  auto* guard = c10::impl::hasDeviceGuardImpl(device.type()) ? c10::impl::getDeviceGuardImpl(device.type()) : nullptr;
  if (!guard) {
    throw InputError(given +
                     ", and the PyTorch in this process has no CUDA. Link one that has, with -Wl,--no-as-needed"
                     " ahead of -ltorch (see anabranch.cpp.link_flags()), or give cpu.");
  }
  auto count = guard->deviceCount();
  if (device.index() >= count || !count) {
    throw InputError(given + ", and there are " + std::to_string(count) + " such devices; give one of them, or cpu");
  }
  return device.has_index() ? device : guard->getDevice();
}

// Null: it has no streams.
const runtime::DeviceApi* api_of(c10::Device device) {
  if (device.is_cpu()) return nullptr;
  if (!device.is_cuda()) return other_api;
  try {
    return &runtime::cuda_api();
  } catch (std::runtime_error& e) {
    throw Error(e.what());
  }
}

// A stream that nobody queues anything on but engines that go. One for each device, made with its first engine (a
// destructor had better not) and never destroyed.
//
// PyTorch's pool would do in the order of things, but its streams are lent to strangers: their work would wait for our
// last uses, and where one is under capture a wait for an event from outside breaks the capture.
c10::Stream reaper_of(c10::Device device, const runtime::DeviceApi& api) {
  static std::mutex lock;
  static auto& made = *new std::unordered_map<c10::DeviceIndex, c10::Stream>;
  std::lock_guard<std::mutex> guard(lock);
  auto found = made.find(device.index());
  if (found != made.end()) return found->second;
  c10::impl::VirtualGuardImpl impl(device.type());
  c10::DeviceGuard on(device);
  std::optional<c10::Stream> stream;
  if (api.new_stream) {
    runtime::StreamRef ref{nullptr, 0, device.index()};
    if (int code = api.new_stream(&ref)) throw DeviceError("making a stream failed with code " + std::to_string(code));
    stream.emplace(c10::Stream::UNSAFE, device, ref.id);
    if (impl.getStreamNativeHandle(*stream) != ref.handle) stream.reset();  // this PyTorch numbers them otherwise
  }
  if (!stream) stream = impl.getNewStream(device);
  return made.emplace(device.index(), *stream).first->second;
}

// -- programs --------------------------------------------------------------------------------------------------------

template <class T, class Convert>
c10::IValue list_of(const c10::IValue& value, Convert convert) {
  c10::List<T> list;
  for (auto& v : value.isTuple() ? value.toTupleRef().elements().vec() : value.toListRef().vec()) {
    list.push_back(convert(v));
  }
  return list;
}

int64_t integer(const c10::IValue& v) {
  return v.isBool() ? v.toBool() : v.toInt();
}

double real(const c10::IValue& v) {
  return v.isDouble() ? v.toDouble() : static_cast<double>(integer(v));
}

// A constant as the schema wants it: the unpickler makes lists of anything, and 2 where 2.0 is meant.
c10::IValue conform(const c10::IValue& value, const c10::TypePtr& type, std::optional<int32_t> length) {
  if (auto optional = type->cast<c10::OptionalType>()) {
    return value.isNone() ? value : conform(value, optional->getElementType(), length);
  }
  switch (type->kind()) {
    case c10::TypeKind::IntType:
    case c10::TypeKind::SymIntType:
      return integer(value);
    case c10::TypeKind::FloatType:
    case c10::TypeKind::SymFloatType:
      return real(value);
    case c10::TypeKind::BoolType:
    case c10::TypeKind::SymBoolType:
      return value.toBool();
    case c10::TypeKind::NumberType:
      if (value.isScalar()) return value;
      break;
    case c10::TypeKind::TensorType:
      if (value.isScalar()) {
        // As in Python, where x * 2.5 is mul.Tensor too: a number has no say in the result's dtype.
        auto number = at::scalar_to_tensor(value.toScalar());
        number.unsafeGetTensorImpl()->set_wrapped_number(true);
        return number;
      }
      break;
    case c10::TypeKind::StringType:
      return value.toStringRef();
    case c10::TypeKind::DeviceObjType:
      return value.toDevice();
    case c10::TypeKind::ListType: {
      auto element = type->expectRef<c10::ListType>().getElementType()->kind();
      if (!value.isList() && !value.isTuple()) {
        // One number stands for a list of a fixed length.
        if (!length || !value.isScalar()) break;
        if (element == c10::TypeKind::FloatType) return c10::List<double>(std::vector<double>(*length, real(value)));
        return c10::List<int64_t>(std::vector<int64_t>(static_cast<size_t>(*length), integer(value)));
      }
      switch (element) {
        case c10::TypeKind::IntType:
        case c10::TypeKind::SymIntType:
          return list_of<int64_t>(value, integer);
        case c10::TypeKind::FloatType:
          return list_of<double>(value, real);
        case c10::TypeKind::BoolType:
          return list_of<bool>(value, [](auto& v) { return v.toBool(); });
        case c10::TypeKind::StringType:
          return list_of<std::string>(value, [](auto& v) { return v.toStringRef(); });
        case c10::TypeKind::NumberType:
          return list_of<c10::Scalar>(value, [](auto& v) { return v.toScalar(); });
        case c10::TypeKind::TensorType:
          return list_of<at::Tensor>(value, [](auto& v) { return v.toTensor(); });
        default:
          break;
      }
      break;
    }
    default:
      break;
  }
  throw InputError("a constant " + value.tagKind() + " is given where the schema says " + type->str());
}

class Builder {
 public:
  Builder(const std::vector<at::Tensor>& weights, size_t inputs)
      : end_(weights.size() + inputs), made_(weights, static_cast<int>(inputs)) {}

  void append(const Step& step) {
    if (step.name.empty()) return pick(step);
    auto op = c10::Dispatcher::singleton().findSchemaOrThrow(step.name.c_str(), step.overload.c_str());
    auto& declared = op.schema().arguments();
    if (step.arguments.size() > declared.size()) {
      throw InputError(std::to_string(step.arguments.size()) + " arguments given, the schema has " +
                       std::to_string(declared.size()));
    }
    std::vector<runtime::Program::Argument> all;
    for (size_t i = 0; i < declared.size(); ++i) {
      if (i < step.arguments.size()) {
        all.push_back(argument(step.arguments[i], declared[i]));
      } else if (declared[i].default_value()) {
        all.emplace_back().constant = *declared[i].default_value();
      } else {
        throw InputError("no " + declared[i].name() + " given, which has no default");
      }
    }
    made_.call(step.name, step.overload, std::move(all));
    end_ += op.schema().returns().size();
  }

  std::shared_ptr<const runtime::Program> finish(const std::vector<int64_t>& results) {
    std::vector<int> all;
    for (auto slot : results) all.push_back(checked(slot));
    made_.finish(std::move(all));
    return std::make_shared<const runtime::Program>(std::move(made_));
  }

  // `slot`, if something lies there.
  int checked(int64_t slot) const {
    if (slot >= 0 && static_cast<size_t>(slot) < end_) return static_cast<int>(slot);
    throw InputError("slot " + std::to_string(slot) + " given, and so far there are " + std::to_string(end_));
  }

 private:
  void pick(const Step& step) {
    auto& given = step.arguments;
    if (given.size() != 2 || given[0].kind != Argument::kValue || !given[1].data.isInt()) {
      throw InputError("a step without a name takes the slot of a list and a number");
    }
    made_.pick(checked(given[0].slots.at(0)), static_cast<int>(given[1].data.toInt()));
    ++end_;
  }

  runtime::Program::Argument argument(const Argument& given, const c10::Argument& declared) const {
    runtime::Program::Argument made;
    switch (given.kind) {
      case Argument::kValue:
        made.kind = runtime::Program::Argument::kSlot;
        made.slot = checked(given.slots.at(0));
        break;
      case Argument::kValues: {
        made.kind = runtime::Program::Argument::kList;
        auto type = declared.type();
        if (auto optional = type->cast<c10::OptionalType>()) type = optional->getElementType();
        auto list = type->cast<c10::ListType>();
        if (!list) throw InputError("a list is given for " + declared.name() + ", which is a " + type->str());
        made.element = list->getElementType();
        bool optional = made.element->kind() == c10::TypeKind::OptionalType;
        for (auto slot : given.slots) {
          auto& item = made.items.emplace_back();  // a constant None
          if (slot == -1 && optional) continue;
          item.kind = runtime::Program::Argument::kSlot;
          item.slot = checked(slot);
        }
        break;
      }
      case Argument::kConstant:
        made.constant = conform(given.data, declared.type(), declared.N());
        break;
    }
    return made;
  }

  size_t end_;
  runtime::Program made_;
};

// -- inputs ----------------------------------------------------------------------------------------------------------

// Throws what is wrong with input `i`, if anything is.
void check(const at::Tensor& x, size_t i, const Input& expected, c10::Device device) {
  auto name = "input " + std::to_string(i);
  if (!x.defined()) throw InputError(name + " is undefined; expected " + expected.str() + ". Pass a tensor.");
  if (x.device() != device) {
    throw InputError(name + " is on " + x.device().str() + "; this engine runs on " + device.str() + ". Pass x.to(\"" +
                     device.str() + "\"), or load another engine there.");
  }
  if (x.layout() != c10::kStrided) {
    std::ostringstream layout;
    layout << x.layout();
    throw InputError(name + " has layout " + layout.str() + "; expected Strided. Pass x.to_dense().");
  }
  if (x.is_conj() || x.is_neg() || x._is_zerotensor()) {
    throw InputError(name +
                     " is a lazy conjugate, negative or zero; expected its values in memory. Pass"
                     " x.resolve_conj().resolve_neg().");
  }
  if (!runtime::is_plain(x)) {
    throw InputError(name +
                     " stands in for another tensor, or is of another kind; expected a plain one with memory. Pass"
                     " x.clone(), outside of any torch.func transform.");
  }
  if (x.scalar_type() != expected.dtype || x.sizes() != c10::IntArrayRef(expected.sizes)) {
    Input given{x.scalar_type(), x.sizes().vec(), {}};
    throw InputError(name + " is " + given.str() + "; this engine takes " + expected.str() +
                     ". Pass such a tensor, or save a program for yours.");
  }
}

}  // namespace

void set_private_device(const runtime::DeviceApi* api) {
  other_api = api;
}

std::string Input::str() const {
  return dtype_name(dtype) + anabranch::str(sizes) + (strides.empty() ? "" : " strides " + anabranch::str(strides));
}

// -- Engine ----------------------------------------------------------------------------------------------------------

namespace {

// `made` of a weight's values. Some operators look whether a tensor requires a gradient, even with autograd off, and
// choose by it among kernels that round otherwise.
at::Tensor as_given(const at::Tensor& weight, at::Tensor made) {
  made.set_requires_grad(weight.requires_grad());
  return made;
}

}  // namespace

struct Engine::Impl {
  Impl(const Program& program, std::vector<at::Tensor> given_weights, std::vector<Input> given, c10::Device device,
       const runtime::DeviceApi* api)
      : inputs(std::move(given)), spec(device, api, specs_of(inputs), &limits, &counters), guard(device.type()) {
    for (size_t i = 0; i < given_weights.size(); ++i) {
      auto name = "weight " + std::to_string(i);
      auto& w = given_weights[i];
      if (!w.defined() || !runtime::is_plain(w)) {
        throw InputError(name + " is no plain tensor with memory; expected one. Pass w.clone().");
      }
      if (w.device() != device) {
        throw InputError(name + " is on " + w.device().str() + "; this engine runs on " + device.str() +
                         ". Pass w.to(\"" + device.str() + "\").");
      }
      if (runtime::extent(w).second > w.storage().nbytes())
        throw InputError(name +
                         " does not fit into its storage; expected a storage of all of its elements. Pass w.clone().");
      weights.push_back(as_given(w, w.detach()));
    }
    build(program);
    if (!api) return;
    // What was written on this stream just before is there for every stream.
    guard.synchronizeStream(guard.getStream(device));
    if (weights.empty()) return;
    spec.has_weights = true;
    spec.new_event = [type = device.type()](c10::StreamId) -> std::unique_ptr<runtime::Payload> {
      auto event = std::make_shared<c10::Event>(type);
      auto last_use = std::make_unique<runtime::Context>();
      last_use->done = event.get();
      last_use->owner = std::move(event);
      return last_use;
    };
    reaper = reaper_of(device, *api);
  }

  // Why the weights are freed after their last use. Each direct call has recorded an event behind what it queued, in
  // `spec.events`; no call is under way, because each is made through a handle. A caller's stream may be gone by now,
  // so no weight is recorded on it. One stream of ours waits for all those events, and the weights are recorded on that
  // one. When the last reference to a weight goes, below or later on, the allocator records an event of its own there,
  // and hands the memory out again when that is done: after every last use.
  //
  //     a caller's stream:  ... kernels that read the weights; record last use
  //     the reaper:                                   wait for each last use; the allocator's event
  //     the next owner of the memory:                                              ... after that
  ~Impl() {
    if (!reaper) return;
    try {
      c10::DeviceGuard on(spec.device);
      std::vector<c10::Event*> last_uses;
      spec.events.for_each([&](runtime::Payload& p) { last_uses.push_back(static_cast<runtime::Context&>(p).done); });
      for (auto* event : last_uses) event->block(*reaper);
      for (auto& w : weights) guard.recordDataPtrOnStream(w.storage().data_ptr(), *reaper);
    } catch (...) {
      // The device is lost, or the process at its end: nothing says when a last use is over, so nothing is freed.
      (void)new std::vector<at::Tensor>(std::move(weights));
    }
  }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  static std::vector<runtime::InputSpec> specs_of(std::vector<Input>& inputs) {
    std::vector<runtime::InputSpec> all;
    for (auto& input : inputs) {
      for (auto n : input.sizes) {
        if (n < 0) throw InputError("sizes " + str(input.sizes) + " of an input given; each must be 0 or more");
      }
      auto options = at::TensorOptions().dtype(input.dtype).device(c10::kMeta);
      auto rank = input.strides.size();
      if (rank && rank != input.sizes.size()) {
        throw InputError(std::to_string(rank) + " strides of an input given, and " +
                         std::to_string(input.sizes.size()) + " sizes; give as many, or none");
      }
      at::Tensor like = rank ? at::empty_strided(input.sizes, input.strides, options) : at::empty(input.sizes, options);
      if (like.is_contiguous()) input.strides.clear();
      all.emplace_back(like);
    }
    return all;
  }

  void build(const Program& program) {
    auto given = weights.size() + inputs.size();
    Builder builder(weights, inputs.size());
    for (size_t i = 0; i < program.steps.size(); ++i) {
      auto& step = program.steps[i];
      try {
        builder.append(step);
      } catch (std::exception& e) {
        throw InputError("step " + std::to_string(i) + " of the program (" + (step.name.empty() ? "pick" : step.name) +
                         (step.overload.empty() ? "" : "." + step.overload) + "): " + first_line(e) +
                         ". Give each step what the operator's schema says.");
      }
    }
    std::vector<int64_t> computed;
    for (auto slot : program.results) {
      builder.checked(slot);
      if (static_cast<size_t>(slot) < given) {
        outputs.push_back(slot);
      } else {
        outputs.push_back(static_cast<int64_t>(given + computed.size()));
        computed.push_back(slot);
      }
    }
    spec.program = builder.finish(computed);
  }

  std::vector<at::Tensor> run(at::ArrayRef<at::Tensor> given) {
    if (given.size() != inputs.size()) {
      throw InputError(std::to_string(given.size()) + " inputs given; this engine takes " +
                       std::to_string(inputs.size()));
    }
    bool grad = at::GradMode::is_enabled();
    for (size_t i = 0; i < given.size(); ++i) {
      auto& x = given[i];
      if (!x.defined() || x.device() != spec.device || !spec.specs[i].accepts(x)) check(x, i, inputs[i], spec.device);
      if (grad && x.requires_grad()) {
        throw InputError("input " + std::to_string(i) +
                         " requires grad; engines run inference only. Pass x.detach(), or call the engine under"
                         " at::NoGradGuard.");
      }
    }
    runtime::Values computed;
    try {
      if (spec.run(given.data(), {}, nullptr, computed) != runtime::Specialization::Outcome::kDone) {
        throw NotCapturable(
            "this call is made while its stream is under capture, which engines in C++ cannot take part in. Call the"
            " engine outside the capture.");
      }
    } catch (runtime::DeviceError& e) {
      throw DeviceError(e.what());
    }
    std::vector<at::Tensor> results;
    for (auto slot : outputs) {
      auto i = static_cast<size_t>(slot);
      auto first = weights.size();
      results.push_back(i < first                   ? weights[i]
                        : i < first + inputs.size() ? given[i - first]
                                                    : computed[i - first - inputs.size()].toTensor());
    }
    return results;
  }

  std::vector<Input> inputs;
  std::vector<at::Tensor> weights;
  runtime::Limits limits{0, -1};
  runtime::Counters counters;
  runtime::Specialization spec;
  c10::impl::VirtualGuardImpl guard;
  std::vector<int64_t> outputs;  // slots: weights, inputs, and then what the program computes
  std::optional<c10::Stream> reaper;
};

Engine::Engine(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}

Engine::Engine(const Program& program, std::vector<at::Tensor> weights, std::vector<Input> inputs, c10::Device device)
    : impl_([&] {
        device = checked(device);
        return std::make_shared<Impl>(program, std::move(weights), std::move(inputs), device, api_of(device));
      }()) {}

Engine Engine::load(const std::string& path, c10::Device device) {
  device = checked(device);
  auto file = read_program(path, device);
  for (auto& weight : file.weights) weight = as_given(weight, weight.detach().to(device));
  try {
    return Engine(file.program, std::move(file.weights), std::move(file.inputs), device);
  } catch (InputError& e) {
    throw InputError(path + ": " + e.what());
  }
}

std::vector<at::Tensor> Engine::run(at::ArrayRef<at::Tensor> inputs) const {
  return impl_->run(inputs);
}

c10::Device Engine::device() const {
  return impl_->spec.device;
}

const std::vector<Input>& Engine::inputs() const {
  return impl_->inputs;
}

Stats Engine::stats() const {
  using C = runtime::Counters;
  auto& counters = impl_->counters;
  return {counters.read(C::kCalls), counters.read(C::kDirectCalls), counters.read(C::kGraphCalls),
          counters.read(C::kWaits)};
}

const std::vector<at::Tensor>& Tests::weights(const Engine& engine) {
  return engine.impl_->weights;
}

}  // namespace anabranch
