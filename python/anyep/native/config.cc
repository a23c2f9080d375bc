// Budget, Tuning, V1's size hints, the log, the version.
#include <anyep/config.h>
#include <anyep/error.h>

#include <atomic>
#include <cmath>
#include <deque>
#include <mutex>
#include <string>
#include <utility>

#include "native.h"

namespace anyep::python {
namespace {

/// @throws Error kArgument: a limit that is no positive number of nanoseconds in 64 bits.
std::chrono::nanoseconds nanoseconds_of(double seconds, const char* name) {
  if (!(seconds > 0) || seconds * 1e9 >= 9.2e18) {
    Error error(ErrorCode::kArgument, std::string(name) + " = " + std::to_string(seconds) +
                                          ", allowed: more than 0 and less than 9.2e9 seconds");
    error.argument = name;
    error.got = std::to_string(seconds);
    error.allowed = "more than 0 and less than 9.2e9 seconds";
    throw error;
  }
  return std::chrono::nanoseconds(std::llround(seconds * 1e9));
}

double seconds_of(std::chrono::nanoseconds time) {
  return std::chrono::duration<double>(time).count();
}

/// Lines wait here until a Python thread fetches them: the threads of the library never wait for the interpreter's lock.
struct LogLines {
  static constexpr std::size_t kMost = 1000;
  std::mutex mutex;
  std::deque<std::pair<int, std::string>> lines;
  std::atomic<bool> any = false;
};

// Never destroyed: threads that outlive static destruction may still log.
LogLines& log_lines() {
  static LogLines& instance = *new LogLines;
  return instance;
}

void collect_log() {
  set_log_callback([](int level, std::string_view line) {
    LogLines& log = log_lines();
    const std::lock_guard lock(log.mutex);
    if (log.lines.size() < LogLines::kMost) log.lines.emplace_back(level, line);
    log.any = true;
  });
}

nb::list take_log() {
  LogLines& log = log_lines();
  std::deque<std::pair<int, std::string>> lines;
  {
    const std::lock_guard lock(log.mutex);
    lines.swap(log.lines);
    log.any = false;
  }
  nb::list result;
  for (const auto& [level, line] : lines) result.append(nb::make_tuple(level, nb::str(line.data(), line.size())));
  return result;
}

void bind_tuning(nb::module_& module) {
  const auto limit = [](std::chrono::nanoseconds Tuning::*member, const char* name) {
    return std::make_pair(
        [member](const Tuning& tuning) { return seconds_of(tuning.*member); },
        [member, name](Tuning& tuning, double seconds) { tuning.*member = nanoseconds_of(seconds, name); });
  };
  const auto timeout = limit(&Tuning::timeout, "timeout_s");
  const auto startup = limit(&Tuning::startup_timeout, "startup_timeout_s");
  const auto close = limit(&Tuning::close_timeout, "close_timeout_s");
  nb::class_<Tuning>(
      module, "Tuning",
      "Limits and switches of an engine.\n\nTuning() has the defaults; Tuning.from_environment() changes "
      "them by ANYEP_* variables.")
      .def(nb::init<>())
      .def_static("from_environment", &Tuning::from_environment)
      .def_prop_rw("timeout_s", timeout.first, timeout.second, "seconds an operation may wait (30)")
      .def_prop_rw("startup_timeout_s", startup.first, startup.second,
                   "seconds create() and the first operation may wait (600)")
      .def_prop_rw("close_timeout_s", close.first, close.second, "seconds close() waits for the peers (5)")
      .def_rw("time_scale", &Tuning::time_scale, "multiplies every limit (1)")
      .def_rw("checked", &Tuning::checked, "ids, digests and red zones are checked at every operation (False)")
      .def_rw("exact_combine", &Tuning::exact_combine, "a low-latency combine rounds once (False)");
}

}  // namespace

Options make_options(double timeout_s, int num_sms, std::vector<Event> after, bool wait) {
  Options options;
  if (timeout_s != 0) options.timeout = nanoseconds_of(timeout_s, "timeout_s");
  options.num_sms = num_sms;
  options.after = std::move(after);
  options.wait = wait;
  return options;
}

void bind_config(nb::module_& module) {
  module.attr("VERSION") = version();
  bind_tuning(module);

  nb::class_<v1::Config>(module, "V1Config")
      .def_ro("num_sms", &v1::Config::num_sms)
      .def_ro("num_max_nvl_chunked_send_tokens", &v1::Config::nvl_send)
      .def_ro("num_max_nvl_chunked_recv_tokens", &v1::Config::nvl_recv)
      .def_ro("num_max_rdma_chunked_send_tokens", &v1::Config::rdma_send)
      .def_ro("num_max_rdma_chunked_recv_tokens", &v1::Config::rdma_recv);
  module.def("v1_config", &v1::make_config, nb::arg("num_sms"), nb::arg("nvl_send"), nb::arg("nvl_recv"),
             nb::arg("rdma_send"), nb::arg("rdma_recv"));
  module.def("v1_dispatch_config", &v1::dispatch_config, nb::arg("num_ranks"), nb::arg("num_sms"));
  module.def("v1_combine_config", &v1::combine_config, nb::arg("num_ranks"), nb::arg("num_sms"));
  module.def("v1_nvl_size_hint", &v1::nvl_size_hint, nb::arg("config"), nb::arg("hidden_bytes"), nb::arg("num_ranks"),
             nb::arg("topk_idx_bytes"));
  module.def("v1_rdma_size_hint", &v1::rdma_size_hint, nb::arg("config"), nb::arg("hidden_bytes"), nb::arg("num_ranks"),
             nb::arg("topk_idx_bytes"));
  module.def("v1_low_latency_size_hint", &v1::low_latency_size_hint, nb::arg("max_tokens"), nb::arg("hidden"),
             nb::arg("num_ranks"), nb::arg("num_experts"));

  module.def("collect_log", &collect_log, "From now on log lines wait for take_log().");
  module.def("log_waits", [] { return log_lines().any.load(std::memory_order_relaxed); });
  module.def("take_log", &take_log, "[(level, line)], oldest first.");
}

}  // namespace anyep::python
