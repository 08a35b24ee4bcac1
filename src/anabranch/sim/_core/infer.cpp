// Meta kernels, some of which are written in Python and take a millisecond: what they say is remembered.
#include "infer.h"

#include <c10/core/DefaultDtype.h>

#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "shapes.h"
#include "values.h"

namespace anabranch::sim {
namespace {

using torch::jit::Stack;

// All that a meta kernel can know of its arguments, as a string of bytes.
class Key {
 public:
  explicit Key(const c10::OperatorHandle& op) {
    add(reinterpret_cast<uintptr_t>(&op.schema()));
    add(c10::get_default_dtype_as_scalartype());
  }

  // False for what it has no name for.
  bool add_value(const c10::IValue& value) {
    text += static_cast<char>('a' + static_cast<int>(kind(value)));
    if (value.isNone()) return true;
    if (value.isTensor()) return add_tensor(value.toTensor());
    if (value.isInt()) return add(value.toInt());
    if (value.isDouble()) return add(value.toDouble());
    if (value.isBool()) return add(value.toBool());
    if (value.isDevice()) return value.toDevice().type() == kSim;
    if (value.isString()) return add(value.toStringRef().size()), text += value.toStringRef(), true;
    if (!value.isList()) return false;
    auto list = value.toListRef();
    add(list.size());
    for (auto& item : list) {
      if (!add_value(item)) return false;
    }
    return true;
  }

  std::string text;

 private:
  enum class Kind { none, tensor, integer, number, boolean, device, string, list, other };
  static Kind kind(const c10::IValue& value) {
    if (value.isNone()) return Kind::none;
    if (value.isTensor()) return Kind::tensor;
    if (value.isInt()) return Kind::integer;
    if (value.isDouble()) return Kind::number;
    if (value.isBool()) return Kind::boolean;
    if (value.isDevice()) return Kind::device;
    if (value.isString()) return Kind::string;
    return value.isList() ? Kind::list : Kind::other;
  }
  std::vector<std::pair<c10::StorageImpl*, int64_t>> storages_;

  template <class T>
  bool add(const T& value) {
    text.append(reinterpret_cast<const char*>(&value), sizeof value);
    return true;
  }
  bool add_tensor(const at::Tensor& t) {
    if (!t.defined()) return true;
    if (!on_sim(t)) {  // a number of the host
      if (t.numel() != 1) return false;
      text.append(static_cast<const char*>(t.const_data_ptr()), t.element_size());
    }
    add(t.scalar_type());
    add(t.dim());
    for (auto n : t.sizes()) add(n);
    for (auto n : t.strides()) add(n);
    // Kernels refuse outputs that overlap inputs: who shares a storage with whom, and how far apart they lie.
    auto* storage = t.storage().unsafeGetStorageImpl();
    size_t i = 0;
    while (i < storages_.size() && storages_[i].first != storage) ++i;
    if (i == storages_.size()) storages_.emplace_back(storage, t.storage_offset() * t.element_size());
    add(i);
    add(t.storage_offset() * t.element_size() - storages_[i].second);
    text += t.unsafeGetTensorImpl()->is_wrapped_number() ? 'w' : t.is_conj() ? 'c' : t.is_neg() ? 'n' : '-';
    return true;
  }
};

// Guarded by its mutex.
struct Memory {
  std::mutex mutex;
  std::unordered_map<std::string, Inferred> known;
};
Memory& memory() {
  static auto* one = new Memory;
  return *one;
}

Stack on_meta(const Stack& args) {
  Stack metas;
  Twins twins(c10::kMeta);
  for (auto& arg : args) {
    metas.push_back(
        mapped(elsewhere(arg, c10::kMeta), [&](const at::Tensor& t) { return on_sim(t) ? twins.of(t) : t; }));
  }
  return metas;
}

Inferred run(const c10::OperatorHandle& op, const Stack& args, bool in_place) {
  Below below;
  Inferred found;
  found.args = on_meta(args);
  if (auto shape = shape_rule(op.operator_name())) {
    found.returns = shape(found.args);
  } else if (in_place && !op.hasKernelForDispatchKey(c10::DispatchKey::Meta)) {
    found.returns.resize(op.schema().returns().size());
  } else {
    found.returns = found.args;
    try {
      op.callBoxed(found.returns);
    } catch (const c10::NotImplementedError& e) {
      refuse(op, std::string("its shape is not known without running it: ") + e.what_without_backtrace());
    }
  }
  return found;
}

}  // namespace

void refuse(const c10::OperatorHandle& op, const std::string& why) {
  C10_THROW_ERROR(NotImplementedError,
                  "sim cannot simulate " + c10::toString(op.operator_name()) + ": " + why.substr(0, why.find('\n')));
}

c10::IValue elsewhere(const c10::IValue& arg, c10::DeviceType type) {
  return arg.isDevice() && arg.toDevice().type() == kSim ? c10::IValue(c10::Device(type)) : arg;
}

Inferred infer(const c10::OperatorHandle& op, const Stack& args, bool in_place) {
  constexpr size_t kLimit = 4096;
  Key key(op);
  bool named = true;
  for (auto& arg : args) named = named && key.add_value(arg);
  if (!named) return run(op, args, in_place);
  {
    std::lock_guard<std::mutex> guard(memory().mutex);
    auto found = memory().known.find(key.text);
    if (found != memory().known.end()) return found->second;
  }
  auto made = run(op, args, in_place);
  std::lock_guard<std::mutex> guard(memory().mutex);
  if (memory().known.size() >= kLimit) memory().known.clear();
  memory().known.emplace(std::move(key.text), made);
  return made;
}

}  // namespace anabranch::sim
