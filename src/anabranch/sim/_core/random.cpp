// Random numbers. A seed is drawn from the device's generator when an operator is queued; when it runs, the CPU kernel
// gets a generator of its own with that seed. So the numbers depend on the order of the calls alone, as on CUDA.
#include <ATen/ops/bernoulli.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones_like.h>
#include <c10/core/GeneratorImpl.h>
#include <torch/library.h>

#include <cstring>
#include <mutex>

#include "ops.h"

namespace anabranch::sim {
namespace {

uint64_t mix(uint64_t x) {  // splitmix64
  x += 0x9E3779B97F4A7C15;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

// The seed, and how many draws were made of it. Guarded by GeneratorImpl::mutex_, which the callers of the virtual
// functions hold.
class SimGenerator final : public c10::GeneratorImpl {
 public:
  SimGenerator(int device, std::string name)
      : GeneratorImpl(c10::Device(kSim, static_cast<c10::DeviceIndex>(device)),
                      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        name(std::move(name)) {}
  static c10::DeviceType device_type() { return kSim; }

  void set_current_seed(uint64_t seed) override {
    seed_ = seed;
    draws_ = 0;
  }
  uint64_t current_seed() const override { return seed_; }
  uint64_t seed() override {
    set_current_seed(c10::detail::getNonDeterministicRandom());
    return seed_;
  }
  void set_offset(uint64_t offset) override { draws_ = offset; }
  uint64_t get_offset() const override { return draws_; }
  void set_state(const c10::TensorImpl& state) override {
    TORCH_CHECK(state.numel() == 16 && state.dtype() == c10::kByte && state.device().is_cpu() && state.is_contiguous(),
                "sim: the state of a generator is 16 bytes on the CPU; give what get_state() returned");
    auto* bytes = static_cast<const char*>(state.data());
    std::memcpy(&seed_, bytes, 8);
    std::memcpy(&draws_, bytes + 8, 8);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    auto state = at::empty({16}, at::TensorOptions(at::kByte).device(at::kCPU));
    auto* bytes = static_cast<char*>(state.data_ptr());
    std::memcpy(bytes, &seed_, 8);
    std::memcpy(bytes + 8, &draws_, 8);
    return state.getIntrusivePtr();
  }
  uint64_t next() { return mix(seed_ ^ mix(draws_++)); }

  const std::string name;  // as the explorer knows it: threads that draw from one generator depend on each other

 private:
  SimGenerator* clone_impl() const override {
    auto* copy = new SimGenerator(device().index(), name + "c");
    copy->seed_ = seed_;
    copy->draws_ = draws_;
    return copy;
  }
  uint64_t seed_ = c10::default_rng_seed_val, draws_ = 0;
};

std::tuple<at::Tensor, at::Tensor> native_dropout(const at::Tensor& input, double p, std::optional<bool> train) {
  auto options = input.options().dtype(at::kBool);
  if (train.has_value() && !*train) return {at::mul(input, 1), at::ones_like(input, options)};
  auto mask = at::empty_like(input, options).bernoulli_(1 - p);
  return {at::mul(input, mask).mul_(p < 1 ? 1 / (1 - p) : 0), mask};
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("native_dropout", &native_dropout);
}

}  // namespace

const at::Generator& default_generator(int device) {
  static auto* all = [] {
    auto* made = new std::vector<at::Generator>;
    for (int d = 0; d < kDevices; ++d)
      made->push_back(at::make_generator<SimGenerator>(d, "var:rng" + std::to_string(d)));
    return made;
  }();
  TORCH_CHECK(device < kDevices, "sim: there is no device sim:", device, "; expected 0 to ", kDevices - 1);
  return (*all)[static_cast<size_t>(device < 0 ? current_device() : device)];
}

at::Generator new_generator(int device) {
  std::string name;
  {
    Lock lock;
    name = "var:rng" + make_id(&Ids::op);
  }
  return at::make_generator<SimGenerator>(device < 0 ? current_device() : device, name);
}

uint64_t draw(const at::Generator& generator) {
  auto* own = dynamic_cast<SimGenerator*>(generator.unsafeGetGeneratorImpl());
  TORCH_CHECK(own, "Expected a 'sim' device type for generator but found '", generator.device().type(), "'");
  if (controlled()) amend({{own->name, 0, 1, kWrite}});
  std::lock_guard<std::mutex> guard(own->mutex_);
  return own->next();
}

void seed_all(uint64_t seed) {
  for (int d = 0; d < kDevices; ++d) {
    auto generator = default_generator(d);
    std::lock_guard<std::mutex> guard(generator.mutex());
    generator.set_current_seed(seed);
  }
}

}  // namespace anabranch::sim
