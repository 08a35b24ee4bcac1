// What threads share: a lock, a one-shot event, an atomic. Production uses the standard library's; where an explorer
// watches (`Observer`), each use is told to it first, so that it can try the other orders.
//
// Nothing here knows PyTorch or Python.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>

namespace anabranch::runtime {

// What the explorer offers. Handles are made by it and live until `forget`. In a thread that it does not conduct, each
// does what the plain one would do.
class Observer {
 public:
  enum Kind { kLock, kEvent, kPlace };
  enum Mode { kRead, kWrite, kAdd };  // additions commute

  virtual ~Observer() = default;
  virtual void* make(Kind kind, const char* name) = 0;
  virtual void forget(void* handle) = 0;
  virtual void acquire(void* lock) = 0;
  virtual void release(void* lock) = 0;
  virtual void set(void* event) = 0;
  virtual void wait(void* event) = 0;
  virtual void touch(void* place, const char* what, Mode mode) = 0;
};

// Everything made from now on is made for `observer`; null: plain. Not for two threads at once.
void install(Observer* observer);
Observer* installed();

// A handle of the observer's that was installed when this was made.
class Observed {
 public:
  Observed(Observer::Kind kind, const char* name)
      : observer_(installed()), handle_(observer_ ? observer_->make(kind, name) : nullptr) {}
  ~Observed() {
    if (handle_) observer_->forget(handle_);
  }
  Observed(const Observed&) = delete;
  Observed& operator=(const Observed&) = delete;

  Observer* operator->() const { return observer_; }
  explicit operator bool() const { return handle_ != nullptr; }
  void* handle() const { return handle_; }

 private:
  Observer* observer_;
  void* handle_;
};

// A mutual exclusion lock. A leaf: no other lock is taken, and no device, callback or Python called, while it is held.
class Mutex {
 public:
  explicit Mutex(const char* name) : name_(name) { renew(); }
  ~Mutex() = default;
  Mutex(const Mutex&) = delete;
  Mutex& operator=(const Mutex&) = delete;

  void lock() {
    if (*observed_)
      (*observed_)->acquire(observed_->handle());
    else
      plain_->lock();
  }
  void unlock() {
    if (*observed_)
      (*observed_)->release(observed_->handle());
    else
      plain_->unlock();
  }
  // In a forked child, on its only thread: another thread of the parent may have held it. The old one is leaked,
  // because destroying a lock that is held is undefined.
  void renew() {
    (void)plain_.release();
    plain_ = std::make_unique<std::mutex>();
    observed_ = std::make_unique<Observed>(Observer::kLock, name_);
  }

 private:
  const char* name_;
  std::unique_ptr<std::mutex> plain_;
  std::unique_ptr<Observed> observed_;
};

// Set once; whoever waits goes on.
class Signal {
 public:
  explicit Signal(const char* name) : observed_(Observer::kEvent, name) {}

  void set() {
    if (observed_) return observed_->set(observed_.handle());
    // Notified with the lock held: who waits may destroy this as soon as it has the lock.
    std::lock_guard<std::mutex> guard(mutex_);
    is_set_ = true;
    changed_.notify_all();
  }
  void wait() {
    if (observed_) return observed_->wait(observed_.handle());
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return is_set_; });
  }

 private:
  Observed observed_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool is_set_ = false;
};

// Sequentially consistent; the explorer sees each access.
template <class T>
class Atomic {
 public:
  Atomic(const char* name, T value) : observed_(Observer::kPlace, name), value_(value) {}

  T load(const char* what) const {
    touch(what, Observer::kRead);
    return value_.load();
  }
  void store(const char* what, T value) {
    touch(what, Observer::kWrite);
    value_.store(value);
  }
  bool change(const char* what, T from, T to) {
    touch(what, Observer::kWrite);
    return value_.compare_exchange_strong(from, to);
  }
  T add(const char* what, T more) {
    touch(what, Observer::kWrite);
    return value_.fetch_add(more);
  }
  // For a counter that nobody decides anything by.
  void count(const char* what, T more) {
    touch(what, Observer::kAdd);
    value_.fetch_add(more, std::memory_order_relaxed);
  }
  // Without telling the explorer: by its only thread.
  T peek() const { return value_.load(); }
  void poke(T value) { value_.store(value); }

 private:
  void touch(const char* what, Observer::Mode mode) const {
    if (observed_) observed_->touch(observed_.handle(), what, mode);
  }
  Observed observed_;
  std::atomic<T> value_;
};

}  // namespace anabranch::runtime
