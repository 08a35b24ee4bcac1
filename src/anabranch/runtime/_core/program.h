// The direct path without Python: a flat list of operator calls through PyTorch's dispatcher.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>

#include <optional>
#include <string>
#include <vector>

namespace anabranch::runtime {

// Immutable once it is finished; any number of threads may run it at once, each on its own current stream.
class Program {
 public:
  // An argument of an operator: a value that an earlier instruction left in a slot, a list of such values, a constant.
  struct Argument {
    enum Kind { kSlot, kList, kConstant } kind = kConstant;
    int slot = -1;
    std::vector<int> slots;  // of a list; -1: none
    bool optional = false;   // a list of optional tensors
    c10::IValue constant;
  };

  // The first slots hold what `run` is given.
  explicit Program(int inputs) : inputs_(inputs), slots_(inputs) {}

  // Append a call of an operator by its schema's name ("aten::relu"). Returns the slot of its (first) result; several
  // results lie one after another. Throws c10::Error where there is no such operator.
  int call(const std::string& name, const std::string& overload, std::vector<Argument> arguments);
  // The `index`-th of the tensors that are listed in `slot`. Returns its slot.
  int pick(int slot, int index);
  // These slots are the results. Nothing may be appended afterwards.
  void finish(std::vector<int> results);

  // Queue it on the current stream, without autograd and autocast. `weights` and then `inputs` fill the first slots.
  std::vector<at::Tensor> run(const std::vector<at::Tensor>& weights, const at::Tensor* inputs, size_t count) const;

  size_t size() const { return steps_.size(); }

 private:
  struct Step {
    std::optional<c10::OperatorHandle> op;  // none: the `picked`-th of a list, which is the argument
    int picked;
    std::vector<Argument> arguments;
    int first;  // slot of the first result
    size_t results;
    std::vector<int> last_uses;  // slots that nothing needs afterwards
  };
  int inputs_;
  int slots_;
  std::vector<Step> steps_;
  std::vector<int> results_;
};

}  // namespace anabranch::runtime
