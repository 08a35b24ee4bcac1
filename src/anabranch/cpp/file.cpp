// Reading program files: a zip as torch.save writes it, of lists, tuples, dicts, strings, numbers and tensors.
// PyTorch's C++ unpickler knows no others, so nothing in a file can be executed.
#include "file.h"

#include <ATen/core/Dict.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>

namespace anabranch {

namespace {

constexpr const char* kFormat = "anabranch program";
constexpr int64_t kVersion = 2;

struct Dtype {
  const char* name;
  c10::ScalarType type;
};
constexpr Dtype kDtypes[] = {
    {"bool", c10::ScalarType::Bool},
    {"uint8", c10::ScalarType::Byte},
    {"int8", c10::ScalarType::Char},
    {"int16", c10::ScalarType::Short},
    {"int32", c10::ScalarType::Int},
    {"int64", c10::ScalarType::Long},
    {"float16", c10::ScalarType::Half},
    {"bfloat16", c10::ScalarType::BFloat16},
    {"float32", c10::ScalarType::Float},
    {"float64", c10::ScalarType::Double},
    {"complex64", c10::ScalarType::ComplexFloat},
    {"complex128", c10::ScalarType::ComplexDouble},
};

c10::ScalarType dtype_of(const std::string& name) {
  for (auto& dtype : kDtypes) {
    if (dtype.name == name) return dtype.type;
  }
  throw InputError("the dtype " + name +
                   " is not known to this version. Save it with the anabranch that this program was built with.");
}

c10::MemoryFormat memory_format_of(const std::string& name) {
  if (name == "contiguous_format") return c10::MemoryFormat::Contiguous;
  if (name == "preserve_format") return c10::MemoryFormat::Preserve;
  if (name == "channels_last") return c10::MemoryFormat::ChannelsLast;
  if (name == "channels_last_3d") return c10::MemoryFormat::ChannelsLast3d;
  throw InputError("the memory format " + name +
                   " is not known to this version. Save it with the anabranch that this program was built with.");
}

std::vector<int64_t> integers(const c10::IValue& list) {
  std::vector<int64_t> all;
  for (auto& v : list.toListRef()) all.push_back(v.toInt());
  return all;
}

// (kind, value); see _encode in _save.py.
Argument argument_of(const c10::IValue& given, c10::Device device) {
  auto& pair = given.toTupleRef().elements();
  auto& kind = pair.at(0).toStringRef();
  auto& value = pair.at(1);
  if (kind == "slot") return Argument::value(value.toInt());
  if (kind == "list") return Argument::values(integers(value));
  if (kind == "constant") return Argument::constant(value);
  if (kind == "complex") {
    auto& parts = value.toTupleRef().elements();
    return Argument::constant(c10::complex<double>(parts.at(0).toDouble(), parts.at(1).toDouble()));
  }
  auto& name = value.toStringRef();
  if (kind == "dtype") return Argument::constant(static_cast<int64_t>(dtype_of(name)));
  if (kind == "memory_format") return Argument::constant(static_cast<int64_t>(memory_format_of(name)));
  if (kind == "layout" && name == "strided") return Argument::constant(static_cast<int64_t>(c10::kStrided));
  if (kind == "device") return Argument::constant(name.empty() ? device : c10::Device(name));
  throw InputError("an argument of kind " + kind +
                   " is not known to this version. Save it with the anabranch that this program was built with.");
}

ProgramFile parse(const c10::IValue& content, c10::Device device) {
  c10::impl::GenericDict dict = content.toGenericDict();
  auto version = dict.at("version").toInt();
  if (version != kVersion) {
    throw InputError("format version " + std::to_string(version) + " given; this build reads version " +
                     std::to_string(kVersion) + ". Save it with the anabranch that this program was built with.");
  }
  ProgramFile file;
  for (auto& weight : dict.at("weights").toListRef()) file.weights.push_back(weight.toTensor());
  for (auto& input : dict.at("inputs").toListRef()) {
    auto& parts = input.toTupleRef().elements();
    file.inputs.push_back({dtype_of(parts.at(0).toStringRef()), integers(parts.at(1)), integers(parts.at(2))});
  }
  for (auto position : integers(dict.at("written"))) {
    file.inputs.at(static_cast<size_t>(position)).written = true;
  }
  for (auto& kept : dict.at("state").toListRef()) {
    auto& parts = kept.toTupleRef().elements();
    file.state.push_back({parts.at(0).toStringRef(), parts.at(1).toTensor(), parts.at(2).toBool()});
  }
  for (auto& given : dict.at("steps").toListRef()) {
    auto& parts = given.toTupleRef().elements();
    auto& step = file.program.steps.emplace_back(Step{parts.at(0).toStringRef(), parts.at(1).toStringRef(), {}});
    for (auto& argument : parts.at(2).toListRef()) step.arguments.push_back(argument_of(argument, device));
  }
  file.program.results = integers(dict.at("results"));
  return file;
}

}  // namespace

std::string dtype_name(c10::ScalarType dtype) {
  for (auto& known : kDtypes) {
    if (known.type == dtype) return known.name;
  }
  return c10::toString(dtype);
}

ProgramFile read_program(const std::string& path, c10::Device device) {
  const std::string expected = " Expected a file that anabranch.cpp.save_program wrote.";
  std::ifstream in(path, std::ios::binary);
  if (!in) throw InputError(path + ": cannot be opened (" + std::strerror(errno) + ")." + expected);
  std::vector<char> bytes{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
  c10::IValue content;
  try {
    content = torch::jit::pickle_load(bytes);
  } catch (std::exception& e) {
    auto* error = dynamic_cast<c10::Error*>(&e);
    std::string why = error ? error->what_without_backtrace() : e.what();
    throw InputError(path + ": is no program file (" + why.substr(0, why.find('\n')) + ")." + expected);
  }
  bytes = {};
  auto format = [&]() -> std::string {
    if (!content.isGenericDict()) return "";
    for (auto& entry : content.toGenericDict()) {
      if (entry.key().isString() && entry.key().toStringRef() == "format" && entry.value().isString()) {
        return entry.value().toStringRef();
      }
    }
    return "";
  }();
  if (format != kFormat) throw InputError(path + ": is no program file (its content is something else)." + expected);
  try {
    return parse(content, device);
  } catch (InputError& e) {
    throw InputError(path + ": " + e.what());
  } catch (c10::Error& e) {
    std::string why = e.what_without_backtrace();
    throw InputError(path + ": is damaged (" + why.substr(0, why.find('\n')) + "). Save it again.");
  } catch (std::out_of_range& e) {
    throw InputError(path + ": is damaged (something is missing). Save it again.");
  }
}

}  // namespace anabranch
