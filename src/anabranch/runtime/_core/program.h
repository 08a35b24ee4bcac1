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
  // These slots are the results. Nothing may be appended afterwards.
  void finish(std::vector<int> results);

  // Queue it on the current stream of `device`, without autograd and autocast. False: numbers are not what this knows
  // to compute with; part of it may be queued, and nothing comes of it. May wait for the device, where numbers depend
  // on data. Throws what operators throw.
  bool run(const at::Tensor* inputs, size_t count, const Values& numbers, c10::Device device, Values& results) const;

  size_t size() const { return steps_.size(); }
  // So far: those of weights, inputs and steps.
  int slots() const { return slots_; }

 private:
  enum class Kind { kCall, kPick, kNumber, kCheck, kBranch };
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
  };
  using Slots = std::vector<c10::IValue>;

  int append(Step step);
  void fold(Argument& argument) const;
  c10::IValue value(const Argument& argument, Slots& slots) const;
  void execute(Slots& slots, Values& results) const;

  std::vector<at::Tensor> weights_;
  int inputs_;
  int slots_;
  std::vector<Step> steps_;
  std::vector<int> results_;
  bool only_aten_ = true;
};

}  // namespace anabranch::runtime
