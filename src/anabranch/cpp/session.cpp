// State that a program writes and keeps, apart from the engine that all of them share.
#include <c10/core/DeviceGuard.h>

#include <algorithm>

#include "engine_impl.h"
#include "file.h"

namespace anabranch {

struct Session::Impl {
  explicit Impl(std::shared_ptr<Engine::Impl> of) : engine(std::move(of)) {
    if (!engine->api) return;
    done.emplace(engine->spec.device.type());
    order.done = &*done;
  }

  // As of an engine's weights: the stream on which the memory is recorded waits for the session's last use.
  ~Impl() {
    if (!done || tensors.empty()) return;
    try {
      c10::DeviceGuard on(engine->spec.device);
      done->block(*engine->retiring);
      for (auto& x : tensors) engine->guard.recordDataPtrOnStream(x.storage().data_ptr(), *engine->retiring);
    } catch (...) {
      // The device is lost, or the process at its end: nothing says when the last use is over, so nothing is freed.
      (void)new std::vector<at::Tensor>(std::move(tensors));
      (void)new std::shared_ptr<Engine::Impl>(engine);  // what state begins as may be being read
    }
  }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  // `work()`, unless another thread is at work with the session.
  template <class Work>
  auto alone(Work work) {
    if (!busy.change("take", false, true)) {
      throw SessionBusy(
          "a session is in use by another call at this moment; its calls follow one another. Use a session for each"
          " thread, or a lock around the calls.");
    }
    struct Release {
      runtime::Atomic<bool>& busy;
      ~Release() { busy.store("release", false); }
    } release{busy};
    return work();
  }

  // `work()` on the state, on the current stream, after what the session did before and ahead of what follows.
  template <class Work>
  void ordered(Work work) {
    runtime::Neutral neutral(engine->spec.device.type());
    if (!done) return work();
    c10::DeviceGuard on(engine->spec.device);
    engine->refuse_capture();
    auto stream = engine->guard.getStream(engine->spec.device);
    order.stream = -1;
    done->block(stream);
    try {
      work();
    } catch (...) {
      done->record(stream);  // part of it may be queued
      throw;
    }
    done->record(stream);
  }

  void check_usable() const {
    if (why_broken.empty()) return;
    throw SessionBroken(
        "an earlier call of a session failed, and its state may be half of one call's and half of another's (" +
        why_broken + "). Call session.reset(), or session.load() with a state that you saved.");
  }

  // `work()`; an error that may have come in the middle of it breaks the session.
  template <class Work>
  auto breaking(Work work) {
    try {
      return work();
    } catch (const InputError&) {
      throw;
    } catch (const NotCapturable&) {
      throw;
    } catch (const c10::Error& e) {
      break_with(e.what_without_backtrace());
      throw;
    } catch (const std::exception& e) {
      break_with(e.what());
      throw;
    } catch (...) {
      break_with("unknown");
      throw;
    }
  }

  // Write the whole state anew. Where that throws before anything is written the session is as whole as it was.
  template <class Work>
  void mend(Work work) {
    breaking([&] { ordered(work); });
    why_broken.clear();
  }

  std::vector<at::Tensor> copies() const {
    std::vector<at::Tensor> all;
    for (auto& x : tensors) all.push_back(x.clone());
    return all;
  }

  void check_state(const std::map<std::string, at::Tensor>& given) const {
    std::string names;
    for (auto& kept : engine->state) names += (names.empty() ? "'" : ", '") + kept.name + "'";
    if (names.empty()) names = "nothing";
    for (size_t i = 0; i < tensors.size(); ++i) {
      auto name = "state '" + engine->state[i].name + "'";
      auto found = given.find(engine->state[i].name);
      if (found == given.end()) throw InputError(name + " is missing; expected " + names + ". Give each of them.");
      auto& x = found->second;
      Input expected{tensors[i].scalar_type(), tensors[i].sizes().vec()};
      if (!x.defined() || !runtime::is_plain(x)) {
        throw InputError(name + " is no plain tensor with memory; expected " + expected.str() + ". Pass x.clone().");
      }
      Input own{x.scalar_type(), x.sizes().vec()};
      if (own.dtype != expected.dtype || own.sizes != expected.sizes) {
        throw InputError(name + " is " + own.str() + "; expected " + expected.str() + ". Give what state() gave.");
      }
    }
    if (given.size() == tensors.size()) return;
    for (auto& entry : given) {
      auto is_it = [&](auto& kept) { return kept.name == entry.first; };
      if (std::any_of(engine->state.begin(), engine->state.end(), is_it)) continue;
      throw InputError("state '" + entry.first + "' is none of the model's; expected " + names + ". Leave it out.");
    }
  }

  const std::shared_ptr<Engine::Impl> engine;
  std::vector<at::Tensor> tensors;  // as the engine's `state`
  std::optional<c10::Event> done;   // behind whatever was queued last that uses them; none: the device has no streams
  runtime::SessionOrder order;
  runtime::Atomic<bool> busy{"session", false};
  std::string why_broken;  // empty: it is whole

 private:
  void break_with(const std::string& why) {
    why_broken = why.substr(0, why.find('\n'));
    if (why_broken.empty()) why_broken = "unknown";
  }
};

Session::Session(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}

Session Engine::session() const {
  auto made = std::make_shared<Session::Impl>(impl_);
  made->ordered([&] {
    for (auto& kept : impl_->state) made->tensors.push_back(kept.initial.clone());
  });
  return Session(std::move(made));
}

std::vector<at::Tensor> Session::run(at::ArrayRef<at::Tensor> inputs) {
  return impl_->alone([&] {
    impl_->check_usable();
    auto* order = impl_->done ? &impl_->order : nullptr;
    return impl_->breaking([&] { return impl_->engine->run(inputs, impl_->tensors, order); });
  });
}

std::map<std::string, at::Tensor> Session::state() const {
  std::vector<at::Tensor> copies;
  impl_->alone([&] {
    impl_->check_usable();
    impl_->ordered([&] { copies = impl_->copies(); });
  });
  std::map<std::string, at::Tensor> named;
  for (size_t i = 0; i < copies.size(); ++i) named[impl_->engine->state[i].name] = copies[i];
  return named;
}

void Session::load(const std::map<std::string, at::Tensor>& state) {
  impl_->alone([&] {
    impl_->check_state(state);
    impl_->mend([&] {
      for (size_t i = 0; i < impl_->tensors.size(); ++i) {
        impl_->tensors[i].copy_(state.at(impl_->engine->state[i].name));
      }
    });
  });
}

void Session::reset() {
  impl_->alone([&] {
    impl_->mend([&] {
      for (size_t i = 0; i < impl_->tensors.size(); ++i) impl_->tensors[i].copy_(impl_->engine->state[i].initial);
    });
  });
}

Session Session::clone() const {
  auto made = std::make_shared<Impl>(impl_->engine);
  impl_->alone([&] {
    impl_->check_usable();
    impl_->ordered([&] {
      made->tensors = impl_->copies();
      if (made->done) made->done->record(impl_->engine->guard.getStream(impl_->engine->spec.device));
    });
  });
  return Session(std::move(made));
}

}  // namespace anabranch
