// What `anyep doctor` says of GPUs: which there are, how they reach each other, what the library would use.
#include <anyep/error.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <filesystem>
#include <string>
#include <vector>

#include "cli/probes.h"
#include "cli/table.h"
#include "core/devices.h"

namespace anyep::cli {
namespace {

Finding device_finding(const core::Device& device, std::size_t number) {
  Finding finding{fmt::format("GPU {}", number), Verdict::kUsed,
                  fmt::format("{}, {}.{}, {} SMs, {}, {} at {}; {}", device.name, device.major, device.minor,
                              device.num_sms, bytes_text(device.memory_bytes), device.uuid, device.bus_id,
                              device.tuned_code ? "tuned kernels" : "portable kernels"),
                  ""};
  if (!device.has_code) {
    finding.verdict = Verdict::kMissing;
    finding.advice = "this build has no code for it, and compiles none at run time: add it to ANYEP_CUDA_ARCHS";
  }
  return finding;
}

Finding memory_finding(const core::Device& device, std::size_t number) {
  std::vector<std::string> offered;
  if (device.descriptors) offered.push_back("descriptors (VMM)");
  if (device.fabric) offered.push_back("fabric handles (where the system permits them)");
  if (device.rdma) offered.push_back("NIC access");
  if (device.host_pages) offered.push_back("registered host pages");
  Finding finding{fmt::format("GPU {} memory", number), Verdict::kFine,
                  offered.empty() ? "cannot be shared" : fmt::format("{}", fmt::join(offered, ", ")), ""};
  if (!device.descriptors) {
    finding.verdict = Verdict::kWarning;
    finding.advice = "without descriptors cudaIpc is used: windows do not grow, and one GPU per process";
  }
  return finding;
}

Finding links_finding(const core::Devices& all) {
  std::vector<std::string> apart, slow;
  for (std::size_t from = 0; from < all.list.size(); ++from) {
    for (std::size_t to = 0; to < all.list.size(); ++to) {
      if (from == to) continue;
      const auto holds = [&](const std::vector<int>& peers) {
        return std::ranges::count(peers, static_cast<int>(to)) > 0;
      };
      const core::Device& device = all.list[from];
      if (!holds(device.peers)) apart.push_back(fmt::format("{}-{}", from, to));
      if (holds(device.peers) && !holds(device.atomic_peers)) slow.push_back(fmt::format("{}-{}", from, to));
    }
  }
  if (all.list.size() == 1) return {"peer access", Verdict::kFine, "one GPU: ranks share it", ""};
  if (!apart.empty()) {
    return {"peer access", Verdict::kWarning, fmt::format("none between {}", fmt::join(apart, ", ")),
            "ranks on these GPUs exchange rows through pinned host memory"};
  }
  if (!slow.empty()) {
    return {"peer access", Verdict::kFine,
            fmt::format("all pairs; without native atomics, as over PCIe: {}", fmt::join(slow, ", ")), ""};
  }
  return {"peer access", Verdict::kUsed, "all pairs, with native atomics", ""};
}

Finding sharing_finding(const core::Devices& all) {
  Finding finding{"window memory", Verdict::kUsed, all.sharing, ""};
  if (all.sharing_reason.empty()) return finding;
  finding.verdict = all.sharing == "none" ? Verdict::kMissing : Verdict::kWarning;
  finding.advice = all.sharing_reason;
  return finding;
}

}  // namespace

std::vector<Finding> probe_gpus() {
  core::Devices all;
  try {
    all = core::examine_devices();
  } catch (const Error& error) {
    return {{"GPU", Verdict::kMissing, "cannot be examined", error.what()}};
  }
  if (!all.problem.empty()) {
    std::error_code ignored;
    const bool device = std::filesystem::exists("/dev/nvidiactl", ignored);
    return {{"GPU", Verdict::kMissing, !all.built && device ? "there is a driver, not used" : "none can be used",
             all.problem + "; CPU ranks are used"}};
  }
  std::vector<Finding> findings = {
      {"CUDA", Verdict::kFine,
       fmt::format("driver for {}, runtime {} in this build, code for {}", core::cuda_version_text(all.driver_version),
                   core::cuda_version_text(all.runtime_version), all.architectures),
       ""}};
  for (std::size_t number = 0; number < all.list.size(); ++number) {
    findings.push_back(device_finding(all.list[number], number));
    findings.push_back(memory_finding(all.list[number], number));
  }
  findings.push_back(links_finding(all));
  findings.push_back(sharing_finding(all));
  return findings;
}

}  // namespace anyep::cli
