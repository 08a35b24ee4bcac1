// anabranch for programs in C++: inference engines that any thread may call on any stream, without Python.
//
// What a call promises is docs/contract.md; what this face of the runtime does not have is docs/cpp.md. This header is
// all that a program includes; it is compiled together with `anabranch.cpp.sources()`.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <c10/core/Device.h>
#include <c10/util/ArrayRef.h>

#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace anabranch {

// -- errors ----------------------------------------------------------------------------------------------------------

/// Base of all errors below. Each message says what was given, what was expected, and what to do.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// An input of a call, a program or a file is not what it has to be. Raised before any device work is queued; the
/// engine stays usable.
class InputError : public Error {
 public:
  using Error::Error;
};

/// The call is made while its stream is under capture. The capture stays good.
class NotCapturable : public Error {
 public:
  using Error::Error;
};

/// A call of the device failed that PyTorch does not make; PyTorch's own throw `c10::Error`.
class DeviceError : public Error {
 public:
  using Error::Error;
};

/// Base of what only programs with state throw. Raised before anything is queued.
class SessionError : public Error {
 public:
  using Error::Error;
};

/// The engine of a program that keeps state was run itself; `Engine::session()` gives what is to be run.
class NeedsSession : public SessionError {
 public:
  using SessionError::SessionError;
};

/// Two calls of one session at once. The first goes on undisturbed, the second throws this.
class SessionBusy : public SessionError {
 public:
  using SessionError::SessionError;
};

/// An earlier call of the session failed in the middle. `reset()` or `load()` make it whole again.
class SessionBroken : public SessionError {
 public:
  using SessionError::SessionError;
};

// -- programs --------------------------------------------------------------------------------------------------------

/// An argument of an operator: a value, a list of values, or a constant.
struct Argument {
  enum Kind { kConstant, kValue, kValues };

  /// What lies in `slot`.
  static Argument value(int64_t slot) { return {kValue, {slot}, {}}; }
  /// A list of what lies in `slots`; -1 for none, where the operator takes optional tensors.
  static Argument values(std::vector<int64_t> slots) { return {kValues, std::move(slots), {}}; }
  /// A number, a string, a list of them, a device, or none (`c10::IValue()`), of the type that the schema declares.
  static Argument constant(c10::IValue value) { return {kConstant, {}, std::move(value)}; }

  Kind kind;
  std::vector<int64_t> slots;
  c10::IValue data;
};

/// A call of one of PyTorch's operators by the name of its schema: {"aten::add", "Tensor", ...}. Arguments at the end
/// that are left out take the schema's defaults. With an empty name, and a value and a number for arguments: that one
/// of the tensors that lie in a slot as a list.
struct Step {
  std::string name, overload;
  std::vector<Argument> arguments;
};

/// A flat list of operator calls. Values lie in slots, numbered from 0: the weights, the inputs, the state, and then
/// the results of each step in turn, one slot each (a list of tensors is one). Operators that write to their arguments
/// may be given inputs and state that say so (`written`), and views of them; no weights.
struct Program {
  std::vector<Step> steps;
  std::vector<int64_t> results;  ///< Slots. A weight's or an input's: that tensor itself is the result. Not state's.
};

/// What an engine expects of an input.
struct Input {
  c10::ScalarType dtype = c10::ScalarType::Float;
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides = {};  ///< In elements; empty: contiguous.
  bool written = false;               ///< The program writes into it: the caller's tensor changes.

  /// As messages show it: "float32[1, 3, 224, 224]".
  std::string str() const;
};

/// What a program keeps from one call of a session to the next.
struct State {
  std::string name;     ///< The buffer's, in the model.
  at::Tensor initial;   ///< What each session begins with a copy of. Dense.
  bool written = true;  ///< The program writes it; else it only reads it.
};

// -- engines ---------------------------------------------------------------------------------------------------------

/// What an engine has done so far.
struct Stats {
  int64_t calls = 0;         ///< That queued their work.
  int64_t direct_calls = 0;  ///< Of those, operator by operator. All of them, so far: see docs/cpp.md.
  int64_t graph_calls = 0;   ///< Of those, as one launch of a captured graph.
  int64_t waits = 0;         ///< That waited, on the device, for another stream's use of the same context.
};

class Session;

/// A program with its weights on one device. Immutable. A handle: copies are cheap and mean the same engine, which goes
/// when the last of them does.
///
/// Threads: any number may use one engine at once, each through a handle that lives until its call has returned. A
/// thread needs no set-up, and no lock is taken that another thread could hold for longer than it takes to look for an
/// event.
///
/// Streams: a call is ordered on the calling thread's current stream of the engine's device, looked up at every call,
/// exactly as one built-in PyTorch operator would be. The engine has no stream that a caller could observe, and leaves
/// the caller's current stream and device as they were. Calls on different streams are not ordered with each other.
///
/// The end: the last handle may be destroyed as soon as the calls through it have returned, while the device still
/// works on them. Nobody waits: the weights' memory is given back to PyTorch's allocator at once, which hands it out
/// again only when the last use of every stream is done. For weights of the caller's own memory (`at::from_blob`) the
/// caller has to see to that. On CUDA, engines do not survive a fork.
class Engine {
 public:
  /// An engine of a file that `anabranch.cpp.save_program` wrote, its weights on `device` ("cuda": the thread's current
  /// one). The host blocks until they are there. Only data is read from the file: nothing in it is executed.
  ///
  /// Throws InputError where the file or the device cannot be used, and what the device throws.
  static Engine load(const std::string& path, c10::Device device);

  /// An engine of `program`. The weights, and what state begins as, are on `device` and are shared, not copied: do not
  /// change them afterwards. The host blocks until the current stream is done, so that weights written on it just
  /// before are seen by every stream.
  ///
  /// Throws InputError where there is no such operator or slot, or a weight is elsewhere, or a step writes into what is
  /// not `written`.
  Engine(const Program& program, std::vector<at::Tensor> weights, std::vector<Input> inputs, c10::Device device,
         std::vector<State> state = {});

  /// Run the program on `inputs` and return its results: new tensors of the current stream (never inference tensors),
  /// or the input or weight that a result is. Autograd, autocast and inference mode of the caller make no difference.
  ///
  /// Inputs need the dtype, sizes and device of `this->inputs()`. Strides and alignment may differ: then the input is
  /// copied first, on the stream. They may be freed as soon as this returns, under the allocator's usual rule: they are
  /// allocated on, or recorded for, the current stream.
  ///
  /// The host does not wait for the device, but in operators that cannot do without (`aten::nonzero`). An operator's
  /// first use in a process may load kernels.
  ///
  /// Inputs that say `written` are written on the stream, where the caller has them; on a device with streams those
  /// that kernels cannot write there (other strides, misaligned) by a copy and back. None of them may share memory with
  /// another input, or be expanded: InputError. After an error of an operator they may be written in part.
  ///
  /// Throws, before anything is queued, InputError, NotCapturable, and NeedsSession where the program keeps state; and
  /// what the operators throw (`c10::Error`). The engine stays usable; after an error that lasts, each call throws what
  /// the device does.
  std::vector<at::Tensor> run(at::ArrayRef<at::Tensor> inputs) const;

  /// A session: state of its own, for a series of calls. It begins as the model was when it was saved. Any number of
  /// them may exist, and run at once. The copies are queued on the current stream; the host does not wait.
  ///
  /// Throws NotCapturable, and what the device throws.
  Session session() const;

  c10::Device device() const;
  const std::vector<Input>& inputs() const;
  /// Exact when no call is under way.
  Stats stats() const;

 private:
  struct Impl;
  friend struct Tests;
  friend class Session;
  explicit Engine(std::shared_ptr<Impl> impl);
  std::shared_ptr<Impl> impl_;
};

// -- sessions --------------------------------------------------------------------------------------------------------

/// State of its own over the weights of an engine. Made by `Engine::session()`; run as an engine is. A handle: copies
/// are cheap and mean the same session, which goes when the last of them does. It keeps the engine.
///
/// Threads: any may use it, one at a time. A second one at the same moment gets SessionBusy, and what the first does is
/// not disturbed. Sessions have nothing in common that is written: any number may be used at once.
///
/// Streams: whatever a session does is queued on the calling thread's current stream of the engine's device, after all
/// that it did before, on whatever streams: an event orders them. The host does not wait. Under capture each method
/// throws NotCapturable, and the state is what it was.
///
/// Errors: where a call fails with another error than InputError and NotCapturable the state may be half of one call's
/// and half of another's. Then `run`, `state` and `clone` throw SessionBroken until `reset` or `load` has succeeded.
///
/// The end: the last handle may be destroyed as soon as the calls through it have returned, on any thread, while the
/// device still works on them. Nobody waits: PyTorch's allocator hands the state's memory out again when all that was
/// queued is done.
class Session {
 public:
  /// As `Engine::run`, on this session's state. Results are never the state itself, which the next call changes.
  ///
  /// Throws what `Engine::run` throws, but for NeedsSession; SessionBusy; SessionBroken.
  std::vector<at::Tensor> run(at::ArrayRef<at::Tensor> inputs);

  /// A copy of the state, by name: new tensors of the current stream. Throws SessionBusy, SessionBroken, NotCapturable.
  std::map<std::string, at::Tensor> state() const;

  /// Go on from `state`: tensors of the names, sizes and dtypes that `state()` gives. They may be on other devices,
  /// where the host waits for the copy. Throws InputError, and then the state is what it was; SessionBusy;
  /// NotCapturable.
  void load(const std::map<std::string, at::Tensor>& state);

  /// Begin again: the state is what it was at first. Throws SessionBusy, NotCapturable.
  void reset();

  /// Another session, which goes on from where this one is. Throws SessionBusy, SessionBroken, NotCapturable.
  Session clone() const;

 private:
  struct Impl;
  friend class Engine;
  explicit Session(std::shared_ptr<Impl> impl);
  std::shared_ptr<Impl> impl_;
};

}  // namespace anabranch
