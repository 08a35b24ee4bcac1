// A server in C++ around one anabranch engine, without Python in the process.
//
//     server PROGRAM SOCKET [--device cpu|cuda|cuda:1] [--workers 4]
//
// PROGRAM is a file of anabranch.cpp.save_program, SOCKET the path of a Unix socket to make; client.py is a client. One
// thread waits for clients; each request is served by whichever worker is free, on that worker's own stream. All
// workers use one engine, and none of them synchronizes for another: that is the engine's business. SIGTERM or SIGINT
// ends it, after the requests that it has begun.
//
// A request and a reply are a frame each: "ANB1", the bytes to follow (4 bytes; numbers are little-endian), and then
//   request: tensors
//   reply:   a byte; 0 and tensors, or 1 and a message
//   tensors: how many (4 bytes); of each the length of its dtype's name (a byte), that name, the number of its sizes
//            (a byte), the sizes (8 bytes each), its elements in order
#include <anabranch/engine.h>

#include <ATen/ops/empty.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

constexpr char kMagic[4] = {'A', 'N', 'B', '1'};
constexpr uint32_t kMostBytes = 1u << 28;  // of a request
constexpr time_t kPatience = 5;            // seconds for a client to send what it has begun

const std::pair<const char*, c10::ScalarType> kDtypes[] = {
    {"float32", at::kFloat}, {"float16", at::kHalf}, {"bfloat16", at::kBFloat16}, {"float64", at::kDouble},
    {"int64", at::kLong},    {"int32", at::kInt},    {"uint8", at::kByte},        {"bool", at::kBool},
};

[[noreturn]] void die(const std::string& why) {
  std::fprintf(stderr, "server: %s\n", why.c_str());
  std::exit(1);
}

// -- frames ----------------------------------------------------------------------------------------------------------

// A request that cannot be read.
struct BadRequest : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// False: the client has gone, or takes too long.
bool receive(int client, void* to, size_t bytes) {
  for (auto* at = static_cast<char*>(to); bytes;) {
    auto n = recv(client, at, bytes, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    at += n, bytes -= static_cast<size_t>(n);
  }
  return true;
}

bool send_all(int client, const std::string& bytes) {
  for (size_t sent = 0; sent < bytes.size();) {
    auto n = send(client, bytes.data() + sent, bytes.size() - sent, MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    sent += static_cast<size_t>(n);
  }
  return true;
}

template <class T>
void put(std::string& to, T value) {
  to.append(reinterpret_cast<const char*>(&value), sizeof value);
}

bool reply(int client, bool is_error, const std::string& body) {
  std::string frame(kMagic, sizeof kMagic);
  put(frame, static_cast<uint32_t>(body.size() + 1));
  put(frame, static_cast<uint8_t>(is_error));
  return send_all(client, frame + body);
}

// What is left to read of a request.
struct Reader {
  const char* at;
  size_t left;

  const char* take(size_t bytes) {
    if (bytes > left) throw BadRequest("the request ends in the middle of a tensor");
    at += bytes, left -= bytes;
    return at - bytes;
  }
  template <class T>
  T number() {
    T value;
    std::memcpy(&value, take(sizeof value), sizeof value);
    return value;
  }
};

std::vector<at::Tensor> read_tensors(const std::string& body) {
  Reader reader{body.data(), body.size()};
  std::vector<at::Tensor> all;
  for (auto count = reader.number<uint32_t>(); all.size() < count;) {
    auto length = reader.number<uint8_t>();
    std::string name(reader.take(length), length);
    const c10::ScalarType* dtype = nullptr;
    for (auto& known : kDtypes) {
      if (known.first == name) dtype = &known.second;
    }
    if (!dtype) throw BadRequest("the dtype " + name + " is not known here");
    std::vector<int64_t> sizes(reader.number<uint8_t>());
    auto bytes = c10::elementSize(*dtype);
    for (auto& size : sizes) {
      size = reader.number<int64_t>();
      if (size < 0 || static_cast<uint64_t>(size) > kMostBytes) throw BadRequest("a size is out of range");
      bytes *= static_cast<size_t>(size);
      if (bytes > kMostBytes) throw BadRequest("a tensor is too large");
    }
    auto x = at::empty(sizes, *dtype);
    std::memcpy(x.mutable_data_ptr(), reader.take(bytes), bytes);
    all.push_back(std::move(x));
  }
  if (reader.left) throw BadRequest(std::to_string(reader.left) + " bytes follow the last tensor");
  return all;
}

std::string write_tensors(const std::vector<at::Tensor>& tensors) {
  std::string body;
  put(body, static_cast<uint32_t>(tensors.size()));
  for (auto& x : tensors) {
    std::string name = "?";
    for (auto& known : kDtypes) {
      if (known.second == x.scalar_type()) name = known.first;
    }
    put(body, static_cast<uint8_t>(name.size()));
    body += name;
    put(body, static_cast<uint8_t>(x.dim()));
    for (auto size : x.sizes()) put(body, size);
    body.append(static_cast<const char*>(x.const_data_ptr()), x.nbytes());
  }
  return body;
}

// -- workers ---------------------------------------------------------------------------------------------------------

// Clients with something to say, in the order in which they said it.
class Queue {
 public:
  void push(int client) {
    std::lock_guard<std::mutex> guard(lock_);
    clients_.push_back(client);
    changed_.notify_one();
  }
  void close() {
    std::lock_guard<std::mutex> guard(lock_);
    is_closed_ = true;
    changed_.notify_all();
  }
  // -1: there will be no more.
  int pop() {
    std::unique_lock<std::mutex> lock(lock_);
    changed_.wait(lock, [this] { return is_closed_ || !clients_.empty(); });
    if (clients_.empty()) return -1;
    int client = clients_.front();
    clients_.pop_front();
    return client;
  }

 private:
  std::mutex lock_;
  std::condition_variable changed_;
  std::deque<int> clients_;
  bool is_closed_ = false;
};

std::atomic<int64_t> g_served{0}, g_refused{0}, g_busy_ns{0};

// One request of `client`; false where the connection is of no further use.
bool serve(const anabranch::Engine& engine, int client) {
  char magic[4];
  uint32_t bytes = 0;
  if (!receive(client, magic, sizeof magic) || !receive(client, &bytes, sizeof bytes)) return false;
  if (std::memcmp(magic, kMagic, sizeof magic) || bytes > kMostBytes) {
    ++g_refused;
    reply(client, true, "no frame of this protocol, or one that is too large");
    return false;  // where the next one begins cannot be told
  }
  std::string body(bytes, '\0');
  if (!receive(client, body.data(), bytes)) return false;
  auto start = Clock::now();
  try {
    auto inputs = read_tensors(body);
    // Everything from here is ordered on this thread's current stream; the last copy waits for it.
    for (auto& x : inputs) x = x.to(engine.device());
    auto results = engine.run(inputs);
    for (auto& y : results) y = y.to(at::kCPU).contiguous();
    auto answer = write_tensors(results);
    ++g_served;
    g_busy_ns += (Clock::now() - start).count();
    return reply(client, false, answer);
  } catch (std::exception& e) {
    ++g_refused;
    std::string why = e.what();
    return reply(client, true, why.substr(0, why.find('\n')));
  }
}

void work(const anabranch::Engine& engine, Queue& queue, int back) {
  if (!engine.device().is_cpu()) {
    c10::impl::VirtualGuardImpl guard(engine.device().type());
    guard.setDevice(engine.device());
    guard.exchangeStream(guard.getNewStream(engine.device()));
  }
  for (int client; (client = queue.pop()) >= 0;) {
    if (!serve(engine, client) || write(back, &client, sizeof client) != sizeof client) close(client);
  }
}

// -- the thread that waits for clients -------------------------------------------------------------------------------

int g_back[2];  // a pipe: clients that were served; -1 to end

void on_signal(int) {
  int end = -1;
  (void)!write(g_back[1], &end, sizeof end);
}

int listen_at(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path) die(path + " is too long for a socket");
  std::strcpy(address.sun_path, path.c_str());
  int listener = socket(AF_UNIX, SOCK_STREAM, 0);
  if (listener < 0 || bind(listener, reinterpret_cast<sockaddr*>(&address), sizeof address) || listen(listener, 128)) {
    die(path + ": " + std::strerror(errno));
  }
  return listener;
}

void wait_for_clients(int listener, Queue& queue) {
  std::vector<pollfd> waiting{{g_back[0], POLLIN, 0}, {listener, POLLIN, 0}};
  for (;;) {
    if (poll(waiting.data(), waiting.size(), -1) < 0 && errno != EINTR) die(std::strerror(errno));
    for (size_t i = waiting.size(); i-- > 2;) {
      if (!waiting[i].revents) continue;
      queue.push(waiting[i].fd);
      waiting.erase(waiting.begin() + static_cast<std::ptrdiff_t>(i));
    }
    if (waiting[1].revents) {
      int client = accept(listener, nullptr, nullptr);
      timeval patience{kPatience, 0};
      if (client >= 0) {
        setsockopt(client, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
        setsockopt(client, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
        waiting.push_back({client, POLLIN, 0});
      }
    }
    if (waiting[0].revents) {
      int client = -1;
      if (read(g_back[0], &client, sizeof client) != sizeof client || client < 0) break;
      waiting.push_back({client, POLLIN, 0});
    }
    for (auto& w : waiting) w.revents = 0;
  }
  for (size_t i = 2; i < waiting.size(); ++i) close(waiting[i].fd);
}

}  // namespace

int main(int count, char** given) {
  std::vector<std::string> names;
  std::string device = "cpu";
  int workers = 4;
  for (int i = 1; i < count; ++i) {
    std::string word = given[i];
    if (word == "--device" && i + 1 < count) {
      device = given[++i];
    } else if (word == "--workers" && i + 1 < count) {
      workers = std::atoi(given[++i]);
    } else {
      names.push_back(word);
    }
  }
  if (names.size() != 2 || workers < 1) {
    die("expected: server PROGRAM SOCKET [--device cpu|cuda|cuda:1] [--workers 4]");
  }
  try {
    auto engine = anabranch::Engine::load(names[0], c10::Device(device));
    int listener = listen_at(names[1]);
    if (pipe(g_back)) die(std::strerror(errno));
    signal(SIGTERM, on_signal);
    signal(SIGINT, on_signal);

    Queue queue;
    std::vector<std::thread> threads;
    for (int i = 0; i < workers; ++i) threads.emplace_back([&] { work(engine, queue, g_back[1]); });
    std::printf("listening on %s, %d workers on %s\n", names[1].c_str(), workers, engine.device().str().c_str());
    std::fflush(stdout);
    auto start = Clock::now();
    wait_for_clients(listener, queue);
    queue.close();
    for (auto& thread : threads) thread.join();
    close(listener);
    unlink(names[1].c_str());
    std::chrono::duration<double> seconds = Clock::now() - start;
    auto served = g_served.load();
    std::printf(
        "served %lld requests, refused %lld, in %.1f s: %.1f requests/s; %.0f us of a worker each; %lld calls\n",
        static_cast<long long>(served), static_cast<long long>(g_refused.load()), seconds.count(),
        static_cast<double>(served) / seconds.count(),
        served ? static_cast<double>(g_busy_ns.load()) / 1e3 / static_cast<double>(served) : 0.0,
        static_cast<long long>(engine.stats().calls));
  } catch (std::exception& e) {
    die(e.what());
  }
}
