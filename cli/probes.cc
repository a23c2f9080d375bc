#include "cli/probes.h"

#include <anyep/error.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>

#include "bench/support/machine.h"
#include "cli/table.h"
#include "core/env.h"
#include "cpu/simd/kernels.h"

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010  // Linux 5.1
#endif

namespace anyep::cli {
namespace {

constexpr std::int64_t kGiB = std::int64_t{1} << 30;

std::string first_line(const char* path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

Finding cores() {
  const bench::Machine machine = bench::this_machine();
  const long online = sysconf(_SC_NPROCESSORS_ONLN);
  Finding finding{"processors", Verdict::kUsed,
                  fmt::format("{} usable of {} online: {}", machine.cores, online, machine.cpu_model), ""};
  if (machine.cores < 2) {
    finding.verdict = Verdict::kWarning;
    finding.advice = "several ranks share one core: every wait yields, and times are those of a busy machine";
  }
  return finding;
}

Finding quota() {
  const std::string limit = first_line("/sys/fs/cgroup/cpu.max");
  if (limit.empty() || limit.compare(0, 3, "max") == 0) return {"processor quota", Verdict::kFine, "none", ""};
  return {"processor quota", Verdict::kWarning, "cpu.max = " + limit,
          "the control group stops ranks that spin when the quota is used up; raise it for measurements"};
}

Finding instruction_set() {
  using cpu::simd::Isa;
  std::string all;
  for (const Isa isa : {Isa::kBaseline, Isa::kV3, Isa::kV4}) {
    if (const cpu::simd::Kernels* const kernels = cpu::simd::kernels_of(isa))
      all += std::string(all.empty() ? "" : ", ") + kernels->name;
  }
  return {"instruction sets", Verdict::kUsed, fmt::format("{} of {}", cpu::simd::kernels().name, all),
          "ANYEP_CPU_ISA chooses another; all give the same bits"};
}

Finding memory() {
  const bench::Machine machine = bench::this_machine();
  Finding finding{"memory", Verdict::kUsed,
                  fmt::format("{} free of {}, last-level cache {}",
                              bytes_text(static_cast<std::uint64_t>(machine.memory_free_bytes)),
                              bytes_text(static_cast<std::uint64_t>(machine.memory_bytes)),
                              bytes_text(static_cast<std::uint64_t>(machine.last_cache_bytes))),
                  ""};
  if (machine.memory_free_bytes < 4 * kGiB) {
    finding.verdict = Verdict::kWarning;
    finding.advice = "`anyep run --ranks 4` needs about 2 GiB; use fewer ranks or --tokens";
  }
  return finding;
}

Finding memory_limit() {
  const std::string limit = first_line("/sys/fs/cgroup/memory.max");
  if (limit.empty() || limit == "max") return {"memory limit", Verdict::kFine, "none", ""};
  return {"memory limit", Verdict::kFine, "memory.max = " + limit, "shared memory of all ranks counts"};
}

/// Creates, seals, maps and writes a memory file as ranks do.
Finding sealed_memory() {
  const int fd = static_cast<int>(syscall(SYS_memfd_create, "anyep-doctor", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (fd < 0) {
    return {"memory files", Verdict::kMissing, fmt::format("memfd_create: {}", std::strerror(errno)),
            "ranks as processes cannot share memory here; use --threads"};
  }
  Finding finding{"memory files", Verdict::kUsed, "memfd_create, sealed against resizing and foreign writes", ""};
  void* const page =
      ftruncate(fd, 4096) == 0 ? mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) : MAP_FAILED;
  if (page == MAP_FAILED || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) != 0) {
    finding = {"memory files", Verdict::kMissing, fmt::format("sealing: {}", std::strerror(errno)),
               "a peer could shrink memory under a running rank: engines of processes are refused"};
  } else if (fcntl(fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE) != 0) {
    finding = {"memory files", Verdict::kWarning, "no F_SEAL_FUTURE_WRITE (Linux 5.1)",
               "peers map staging memory without the kernel's promise that they cannot write it"};
  }
  if (page != MAP_FAILED) munmap(page, 4096);
  close(fd);
  return finding;
}

Finding huge_pages() {
  const std::string shared = first_line("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
  const std::string anonymous = first_line("/sys/kernel/mm/transparent_hugepage/enabled");
  return {
      "huge pages", Verdict::kFine,
      fmt::format("shared: {}; anonymous: {}", shared.empty() ? "no" : shared, anonymous.empty() ? "no" : anonymous),
      "brackets mark what holds; nothing depends on them"};
}

Finding death_notice() {
#ifdef SYS_pidfd_open
  const int fd = static_cast<int>(syscall(SYS_pidfd_open, getpid(), 0));
  if (fd >= 0) {
    close(fd);
    return {"notice of death", Verdict::kUsed, "pidfd_open and the control sockets", ""};
  }
#endif
  return {"notice of death", Verdict::kWarning, "no pidfd_open (Linux 5.3)",
          "a dead rank is seen by its closed control socket alone"};
}

Finding sockets() {
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0) {
    return {"Unix sockets", Verdict::kMissing, std::strerror(errno),
            "ranks as processes cannot meet here; use --threads"};
  }
  ucred peer{};
  socklen_t size = sizeof peer;
  const bool credentials = getsockopt(ends[0], SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0;
  close(ends[0]);
  close(ends[1]);
  return {"Unix sockets", credentials ? Verdict::kUsed : Verdict::kWarning,
          credentials ? "for descriptors and control, with the peer's credentials" : "without the peer's credentials",
          ""};
}

Finding limit_of(const char* topic, int which, rlim_t wanted, const char* advice) {
  rlimit limit{};
  getrlimit(static_cast<__rlimit_resource>(which), &limit);
  const std::string found = limit.rlim_cur == RLIM_INFINITY ? "unlimited" : std::to_string(limit.rlim_cur);
  const bool enough = limit.rlim_cur == RLIM_INFINITY || limit.rlim_cur >= wanted;
  return {topic, enough ? Verdict::kFine : Verdict::kWarning, found, enough ? "" : advice};
}

Finding scheduling() {
  const int policy = sched_getscheduler(0);
  const char* const name = policy == SCHED_OTHER   ? "SCHED_OTHER"
                           : policy == SCHED_FIFO  ? "SCHED_FIFO"
                           : policy == SCHED_RR    ? "SCHED_RR"
                           : policy == SCHED_BATCH ? "SCHED_BATCH"
                                                   : "another";
  const bool realtime = policy == SCHED_FIFO || policy == SCHED_RR;
  return {"scheduling", realtime ? Verdict::kWarning : Verdict::kFine,
          fmt::format("{}, nice {}", name, getpriority(PRIO_PROCESS, 0)),
          realtime ? "a spinning rank of this class can starve its peers on the same core" : ""};
}

Finding clock_source() {
  const std::string source = first_line("/sys/devices/system/clocksource/clocksource0/current_clocksource");
  const bool quick = source.empty() || source == "tsc" || source == "kvm-clock" || source == "arch_sys_counter";
  return {"clock", quick ? Verdict::kFine : Verdict::kWarning, source.empty() ? "unknown" : source,
          quick ? "" : "reading the time is a system call here: short operations look slower"};
}

Finding mpi_copies() {
  const std::string scope = first_line("/proc/sys/kernel/yama/ptrace_scope");
  const bool allowed = scope.empty() || scope == "0";
  return {"process_vm_readv", Verdict::kFine, allowed ? "allowed" : "restricted (ptrace_scope " + scope + ")",
          "not used by AnyEP; decides how quick the OpenMPI baseline of `./dev bench cpu` is"};
}

/// The variable's text, or nothing. @throws Error kArgument for garbage.
std::optional<std::string> value_of(const core::EnvVariable& variable) {
  const auto text = [](auto&& value) { return value ? std::optional(fmt::format("{}", *value)) : std::nullopt; };
  switch (variable.kind) {
    case core::EnvKind::kSeconds: {
      const auto value = core::env_seconds(variable.name);
      return value ? std::optional(fmt::format("{:g} s", static_cast<double>(value->count()) * 1e-9)) : std::nullopt;
    }
    case core::EnvKind::kFactor:
      return text(core::env_factor(variable.name));
    case core::EnvKind::kInteger:
      return text(core::env_integer(variable.name));
    case core::EnvKind::kChoice:
      return core::env_choice(variable.name);
    case core::EnvKind::kText:
      return core::env_text(variable.name);
  }
  return std::nullopt;
}

}  // namespace

std::vector<Finding> probe_machine() {
  return {cores(),
          quota(),
          scheduling(),
          instruction_set(),
          memory(),
          memory_limit(),
          huge_pages(),
          sealed_memory(),
          sockets(),
          death_notice(),
          limit_of("open files", RLIMIT_NOFILE, 256, "an engine needs a few descriptors per peer; raise `ulimit -n`"),
          limit_of("address space", RLIMIT_AS, RLIM_INFINITY,
                   "a budget is address space: raise `ulimit -v` or lower the budget"),
          limit_of("processes", RLIMIT_NPROC, 256, "ranks, and one or two threads per engine; raise `ulimit -u`"),
          clock_source(),
          mpi_copies()};
}

std::vector<Finding> probe_environment() {
  std::vector<Finding> findings;
  for (const core::EnvVariable& variable : core::env_variables()) {
    Finding finding{std::string(variable.name), Verdict::kFine, "", std::string(variable.meaning)};
    try {
      const std::optional<std::string> value = value_of(variable);
      finding.found = value ? *value : fmt::format("not set ({})", variable.fallback);
      if (value) finding.verdict = Verdict::kUsed;
    } catch (const Error& error) {
      finding.verdict = Verdict::kMissing;
      finding.found = error.what();
    }
    findings.push_back(std::move(finding));
  }
  return findings;
}

}  // namespace anyep::cli
