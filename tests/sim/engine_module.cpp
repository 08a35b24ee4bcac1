// anabranch::Engine on the simulated device, for Python: test_cpp_engine.py.
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <map>
#include <memory>
#include <string>

#include "../../src/anabranch/cpp/device.h"
#include "../../src/anabranch/cpp/tests.h"
#include "anabranch/engine.h"
#include "documented.h"

namespace py = pybind11;

namespace {

using anabranch::Engine;
using anabranch::Session;

// An engine that a test destroys when it wants to.
struct Handle {
  std::unique_ptr<Engine> engine;
};

struct SessionHandle {
  std::unique_ptr<Session> session;
};

using anabranch::Argument;

// It adds what it is given to its state, and then has the host wait for the device.
Handle waiting(const at::Tensor& initial, const at::Tensor& x) {
  anabranch::Program program{
      {{"aten::add_", "Tensor", {Argument::value(1), Argument::value(0)}}, {"aten::nonzero", "", {Argument::value(0)}}},
      {3}};
  return {std::make_unique<Engine>(program, std::vector<at::Tensor>{},
                                   std::vector<anabranch::Input>{{x.scalar_type(), x.sizes().vec()}}, x.device(),
                                   std::vector<anabranch::State>{{"sum", initial}})};
}

// Slots: 0 is the input, 1 and on are state, the next one what `step` gives.
void make(const std::string& name, const std::string& overload, int64_t to, int64_t result,
          const std::vector<at::Tensor>& initial, const at::Tensor& x) {
  anabranch::Program program{{{name, overload, {Argument::value(to), Argument::value(0)}}}, {result}};
  std::vector<anabranch::State> state;
  for (auto& t : initial) state.push_back({"sum", t});
  Engine(program, {}, {{x.scalar_type(), x.sizes().vec()}}, x.device(), state);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("set_private_device", [](uintptr_t api) {
    anabranch::set_private_device(reinterpret_cast<const anabranch::runtime::DeviceApi*>(api));
  });
  m.def("documented", &documented::without_a_file);
  py::register_exception<anabranch::InputError>(m, "InputError");
  py::register_exception<anabranch::NotCapturable>(m, "NotCapturable");
  py::register_exception<anabranch::NeedsSession>(m, "NeedsSession");
  py::register_exception<anabranch::SessionBusy>(m, "SessionBusy");
  py::register_exception<anabranch::SessionBroken>(m, "SessionBroken");
  m.def("waiting", &waiting);
  m.def("make", &make);
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
      .def(
          "session", [](Handle& self) { return SessionHandle{std::make_unique<Session>(self.engine->session())}; },
          Unlocked())
      .def("destroy", [](Handle& self) { self.engine.reset(); }, Unlocked());
  py::class_<SessionHandle>(m, "Session")
      .def(
          "run", [](SessionHandle& self, const std::vector<at::Tensor>& inputs) { return self.session->run(inputs); },
          Unlocked())
      .def(
          "state", [](SessionHandle& self) { return self.session->state(); }, Unlocked())
      .def(
          "load",
          [](SessionHandle& self, const std::map<std::string, at::Tensor>& state) { self.session->load(state); },
          Unlocked())
      .def(
          "reset", [](SessionHandle& self) { self.session->reset(); }, Unlocked())
      .def(
          "clone", [](SessionHandle& self) { return SessionHandle{std::make_unique<Session>(self.session->clone())}; },
          Unlocked())
      .def("destroy", [](SessionHandle& self) { self.session.reset(); }, Unlocked());
}
