// anabranch::Engine on the simulated device, for Python: test_cpp_engine.py.
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>

#include "../../src/anabranch/cpp/device.h"
#include "../../src/anabranch/cpp/tests.h"
#include "anabranch/engine.h"
#include "documented.h"

namespace py = pybind11;

namespace {

using anabranch::Engine;

// An engine that a test destroys when it wants to.
struct Handle {
  std::unique_ptr<Engine> engine;
};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("set_private_device", [](uintptr_t api) {
    anabranch::set_private_device(reinterpret_cast<const anabranch::runtime::DeviceApi*>(api));
  });
  m.def("documented", &documented::without_a_file);
  py::register_exception<anabranch::InputError>(m, "InputError");
  py::register_exception<anabranch::NotCapturable>(m, "NotCapturable");
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  py::class_<Handle>(m, "Engine")
      .def(py::init([](const std::string& path, const c10::Device& device) {
             return Handle{std::make_unique<Engine>(Engine::load(path, device))};
           }),
           Unlocked())
      .def(
          "run", [](Handle& self, const std::vector<at::Tensor>& inputs) { return self.engine->run(inputs); },
          Unlocked())
      .def("weights", [](Handle& self) { return anabranch::Tests::weights(*self.engine); })
      .def("calls", [](Handle& self) { return self.engine->stats().direct_calls; })
      .def("destroy", [](Handle& self) { self.engine.reset(); }, Unlocked());
}
