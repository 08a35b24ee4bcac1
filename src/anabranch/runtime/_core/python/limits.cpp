#include "../counters.h"
#include "reservation.h"

namespace anabranch::runtime {

void bind_limits(py::module_& m) {
  py::class_<Reservation>(m, "Reservation")
      .def_property_readonly("nbytes", &Reservation::bytes)
      .def("confirm", &Reservation::confirm)
      .def("cancel", &Reservation::cancel);
  py::class_<Limits>(m, "Limits")
      .def(py::init([](int64_t contexts, std::optional<int64_t> memory) {
        return std::make_unique<Limits>(contexts, memory.value_or(-1));
      }))
      .def("book",
           [](py::object self, int64_t bytes) -> std::unique_ptr<Reservation> {
             if (!self.cast<Limits*>()->reserve(bytes)) return nullptr;
             return std::make_unique<Reservation>(keep(self), bytes);
           })
      .def("has_room", py::overload_cast<int64_t>(&Limits::has_room, py::const_))
      .def("held", &Limits::held)
      .def_readonly("max_contexts", &Limits::max_contexts)
      .def_property_readonly("memory_limit", [](const Limits& self) -> std::optional<int64_t> {
        if (self.memory_limit < 0) return std::nullopt;
        return self.memory_limit;
      });
  py::class_<Counters>(m, "Counters")
      .def(py::init<>())
      .def(
          "add",
          [](Counters& self, const std::string& name, int64_t count) {
            for (int i = 0; i < Counters::kNames; ++i) {
              auto known = static_cast<Counters::Name>(i);
              if (name == Counters::names[static_cast<size_t>(i)]) return self.add(known, count);
            }
            throw py::key_error(name);
          },
          py::arg("name"), py::arg("count") = 1)
      .def("read", [](const Counters& self) {
        py::dict all;
        for (int i = 0; i < Counters::kNames; ++i) {
          all[Counters::names[static_cast<size_t>(i)]] = self.read(static_cast<Counters::Name>(i));
        }
        return all;
      });
}

}  // namespace anabranch::runtime
