#include "../program.h"

#include <c10/core/impl/VirtualGuardImpl.h>

#include "values.h"

// Declared here as in <torch/csrc/jit/python/pybind_utils.h>, which brings TorchScript along: seconds of compiling.
namespace torch::jit {
TORCH_PYTHON_API c10::IValue toIValue(pybind11::handle obj, const c10::TypePtr& type, std::optional<int32_t> N);
}  // namespace torch::jit

namespace anabranch::runtime {

namespace {

std::vector<Given> all_given(const py::list& all);

// From ("slot", i) for a tensor, ("number", i), ("list", [...]) or ("constant", value).
Given given_of(const py::tuple& from) {
  Given given;
  auto kind = from[0].cast<std::string>();
  if (kind == "slot" || kind == "number") {
    given.is_tensor = kind == "slot";
    given.kind = given.is_tensor ? Argument::kSlot : Argument::kNumber;
    given.slot = from[1].cast<int>();
  } else if (kind == "list") {
    given.kind = Argument::kList;
    given.items = all_given(from[1].cast<py::list>());
  } else {
    given.number = number_of(from[1]);
    given.constant = [value = py::object(from[1])](auto& type, auto length) {
      return torch::jit::toIValue(value, type, length);
    };
  }
  return given;
}

std::vector<Given> all_given(const py::list& all) {
  std::vector<Given> made;
  for (auto given : all) made.push_back(given_of(given.cast<py::tuple>()));
  return made;
}

}  // namespace

void bind_program(py::module_& m) {
  // For tests: None where it is left to Python.
  m.def("compute", [](const std::string& name, const py::list& given) -> py::object {
    std::vector<c10::IValue> values;
    for (auto x : given) values.push_back(unwrap(x));
    try {
      return wrapped(compute(number_op(name), values.data(), values.size()));
    } catch (Declined&) {
      return py::none();
    }
  });
  py::class_<Program, std::shared_ptr<Program>>(m, "Program")
      .def(py::init<std::vector<at::Tensor>, int>())
      .def("call", [](Program& self, const std::string& name, const std::string& overload,
                      const py::list& given) { return self.call(name, overload, all_given(given)); })
      .def("pick", &Program::pick)
      .def("number", [](Program& self, const std::string& name,
                        const py::list& given) { return self.number(name, all_given(given)); })
      .def("check", [](Program& self, const py::tuple& holds,
                       const std::string& message) { return self.check(given_of(holds), message); })
      .def("branch",
           [](Program& self, const py::tuple& condition, std::shared_ptr<Program> yes, std::shared_ptr<Program> no,
              const py::list& operands, size_t results) {
             return self.branch(given_of(condition), std::move(yes), std::move(no), all_given(operands), results);
           })
      .def("empty", [](Program& self, const py::list& sizes, const py::list& strides,
                       at::ScalarType dtype) { return self.empty(all_given(sizes), all_given(strides), dtype); })
      .def("view",
           [](Program& self, const py::tuple& base, const py::list& sizes, const py::list& strides,
              const py::tuple& offset) {
             return self.view(given_of(base), all_given(sizes), all_given(strides), given_of(offset));
           })
      .def("expect",
           [](Program& self, const py::tuple& tensor, const py::list& sizes, const py::list& strides,
              const std::string& made_by) {
             return self.expect(given_of(tensor), all_given(sizes), all_given(strides), made_by);
           })
      .def("launch",
           [](Program& self, uintptr_t function, unsigned threads, unsigned shared_bytes, const std::string& types,
              const py::list& grid, const py::list& given) {
             return self.launch({reinterpret_cast<void*>(function), threads, shared_bytes, types}, all_given(grid),
                                all_given(given));
           })
      // By itself, on the current stream of the current device. None where it is left to Python.
      .def("run",
           [](const Program& self, const std::vector<at::Tensor>& inputs, c10::Device device,
              uintptr_t api) -> py::object {
             Values results;
             Queue queue{device, reinterpret_cast<const DeviceApi*>(api)};
             if (api) {
               c10::impl::VirtualGuardImpl guard(device.type());
               auto stream = guard.getStream(device);
               queue.stream = {guard.getStreamNativeHandle(stream), stream.id(), device.index()};
             }
             if (!self.run(inputs.data(), inputs.size(), {}, queue, results)) return py::none();
             py::list all;
             for (auto& y : results) all.append(wrapped(std::move(y)));
             return all;
           })
      .def("finish", &Program::finish)
      .def("__len__", &Program::size);
}

}  // namespace anabranch::runtime
