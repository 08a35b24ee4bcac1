// The direct path without Python: a flat list of operator calls through PyTorch's dispatcher.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/core/ivalue.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/SmallVector.h>

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "argument.h"
#include "device.h"
#include "numbers.h"

namespace anabranch::runtime {

// Results of a call: tensors, and numbers.
using Values = c10::SmallVector<c10::IValue, 4>;

// While it lives: what the caller is in the middle of (autograd, autocast, inference mode) makes no difference, as a
// call of the engine promises.
class Neutral {
 public:
  explicit Neutral(c10::DeviceType device);
  ~Neutral();
  Neutral(const Neutral&) = delete;
  Neutral& operator=(const Neutral&) = delete;

 private:
  // A graph may hold numbers as tensors on the CPU, whatever its device.
  std::array<c10::DeviceType, 2> types_;
  std::array<bool, 2> autocast_{};
  std::optional<c10::InferenceMode> normal_;
  at::NoGradGuard no_grad_;
};

// A kernel that a compiler made, for any sizes: `types` has a letter for each parameter.
//   O  a tensor's address, or null for None      i, I, h, H, b, B, l, K  an integer of 32, 16, 8 or 64 bits
//   f, d  a floating-point number of 32 or 64 bits; capitals are unsigned
struct CompiledKernel {
  void* function = nullptr;  // see KernelLaunch
  unsigned threads = 0;      // of a block
  unsigned shared_bytes = 0;
  std::string types;
};

// Where a program's work is queued.
struct Queue {
  c10::Device device;
  const DeviceApi* api = nullptr;  // null where the device has no streams
  StreamRef stream{};
};

// Immutable once it is finished; any number of threads may run it at once, each on its own current stream.
class Program {
 public:
  // The first slots hold `weights`, the next ones the `inputs` values that `run` is given: tensors, then numbers.
  Program(std::vector<at::Tensor> weights, int inputs);

  // Each appends a step and returns the slot of its (first) result; several results lie one after another.

  // Call an operator by its schema's name ("aten::relu"). Throws c10::Error where there is no such operator, or
  // it takes something else.
  int call(const std::string& name, const std::string& overload, const std::vector<Given>& given);
  // The `index`-th of the list in `slot`.
  int pick(int slot, int index);
  // Python's arithmetic.
  int number(const std::string& name, const std::vector<Given>& given);
  // Throws `message` where the argument is false.
  int check(const Given& holds, const std::string& message);
  // The `results` values that `yes` returns, or `no`, given `operands`. `condition`: a number or a tensor of one
  // element.
  int branch(const Given& condition, std::shared_ptr<const Program> yes, std::shared_ptr<const Program> no,
             const std::vector<Given>& operands, size_t results);
  // A new tensor; `sizes` and `strides` are numbers.
  int empty(const std::vector<Given>& sizes, const std::vector<Given>& strides, at::ScalarType dtype);
  // The memory of the tensor `base`, `offset` elements later.
  int view(const Given& base, const std::vector<Given>& sizes, const std::vector<Given>& strides, const Given& offset);
  // Throws where a tensor has other strides than these: what was compiled would read it wrongly.
  int expect(const Given& tensor, const std::vector<Given>& sizes, const std::vector<Given>& strides,
             const std::string& made_by);
  // Launch a kernel on a grid of x, y and z blocks; nothing where one of them is 0.
  int launch(CompiledKernel kernel, const std::vector<Given>& grid, const std::vector<Given>& given);
  // These slots are the results. Nothing may be appended afterwards.
  void finish(std::vector<int> results);

  // Queue it on the queue's stream, which is the current one, without autograd and autocast. False: numbers are not
  // what this knows to compute with; part of it may be queued, and nothing comes of it. May wait for the device, where
  // numbers depend on data. Throws what operators throw.
  bool run(const at::Tensor* inputs, size_t count, const Values& numbers, const Queue& queue, Values& results) const;

  size_t size() const { return steps_.size(); }
  // So far: those of weights, inputs and steps.
  int slots() const { return slots_; }

 private:
  enum class Kind { kCall, kPick, kNumber, kCheck, kBranch, kEmpty, kView, kExpect, kLaunch };
  struct Step {
    Step(Kind kind, size_t results, std::vector<Argument> arguments)
        : kind(kind), results(results), arguments(std::move(arguments)) {}
    Kind kind;
    int first = 0;  // slot of the first result
    size_t results;
    std::vector<Argument> arguments;
    std::vector<int> unused;                // slots that it fills and nothing needs
    std::optional<c10::OperatorHandle> op;  // of a call
    int picked = 0;
    NumberOp number = NumberOp::kAdd;
    std::string message;
    std::shared_ptr<const Program> yes, no;
    at::ScalarType dtype = at::ScalarType::Undefined;
    std::shared_ptr<const CompiledKernel> kernel;
  };
  using Slots = std::vector<c10::IValue>;

  int append(Step step);
  void fold(Argument& argument) const;
  c10::IValue value(const Argument& argument, Slots& slots) const;
  void execute(Slots& slots, const Queue& queue, Values& results) const;
  void compute_in_place(const Step& step, Slots& slots, const Queue& queue) const;

  std::vector<at::Tensor> weights_;
  int inputs_;
  int slots_;
  std::vector<Step> steps_;
  std::vector<int> results_;
  bool only_aten_ = true;
};

}  // namespace anabranch::runtime
