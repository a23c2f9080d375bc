#include "core/devices.h"

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include "core/check.h"
#include "cuda/memory/physical.h"
#include "cuda/memory/sharing.h"
#include "cuda/runtime/architectures.h"
#include "cuda/runtime/check.h"
#include "cuda/runtime/driver.h"

namespace anyep::core {
namespace {

/// As nvidia-smi writes it.
std::string text_of(const cudaUUID_t& uuid) {
  std::string text = "GPU-";
  for (int byte = 0; byte < 16; ++byte) {
    if (byte == 4 || byte == 6 || byte == 8 || byte == 10) text += '-';
    text += fmt::format("{:02x}", static_cast<unsigned char>(uuid.bytes[byte]));
  }
  return text;
}

Device examine(int device, int count) {
  cudaDeviceProp properties{};
  cuda::check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties", "doctor");
  Device found;
  found.name = properties.name;
  found.uuid = text_of(properties.uuid);
  found.bus_id =
      fmt::format("{:04x}:{:02x}:{:02x}", properties.pciDomainID, properties.pciBusID, properties.pciDeviceID);
  found.major = properties.major;
  found.minor = properties.minor;
  found.num_sms = properties.multiProcessorCount;
  found.memory_bytes = properties.totalGlobalMem;
  const cuda::Code code = cuda::code_for(cuda::architectures(), found.major, found.minor);
  found.has_code = code != cuda::Code::kNone;
  found.tuned_code = code == cuda::Code::kTuned;
  const cuda::SharingSupport support = cuda::sharing_support(device);
  found.descriptors = support.descriptors;
  found.fabric = support.fabric;
  found.rdma = support.rdma;
  found.host_pages = support.host_pages;
  for (int other = 0; other < count; ++other) {
    if (other == device) continue;
    int access = 0, atomics = 0;
    cuda::check(cudaDeviceCanAccessPeer(&access, device, other), "cudaDeviceCanAccessPeer", "doctor");
    if (access == 0) continue;
    found.peers.push_back(other);
    cuda::check(cudaDeviceGetP2PAttribute(&atomics, cudaDevP2PAttrNativeAtomicSupported, device, other),
                "cudaDeviceGetP2PAttribute", "doctor");
    if (atomics != 0) found.atomic_peers.push_back(other);
  }
  return found;
}

/// As if every device had one rank.
void choose(Devices& all) {
  std::vector<cuda::GpuNote> notes;
  for (std::size_t device = 0; device < all.list.size(); ++device) {
    notes.push_back(cuda::describe_gpu(static_cast<int>(device)));
    notes.back().wish = cuda::wish_from_environment();
  }
  for (std::size_t device = 0; device < notes.size(); ++device) {
    notes[device].unreachable = cuda::find_unreachable(static_cast<int>(device), notes);
  }
  try {
    const cuda::Choice choice = cuda::choose_sharing(notes);
    all.sharing = cuda::name_of(choice.order.front());
    all.sharing_reason = choice.reason;
  } catch (const Error& error) {
    all.sharing = "none";
    all.sharing_reason = error.what();
  }
}

}  // namespace

Devices examine_devices() {
  Devices all;
  all.built = true;
  for (const char letter : cuda::architectures()) {
    all.architectures += letter;
    if (letter == ',') all.architectures += ' ';
  }
  all.problem = cuda::why_unusable();
  (void)cudaDriverGetVersion(&all.driver_version);
  (void)cudaRuntimeGetVersion(&all.runtime_version);
  if (!all.problem.empty()) return all;
  int count = 0;
  cuda::check(cudaGetDeviceCount(&count), "cudaGetDeviceCount", "doctor");
  for (int device = 0; device < count; ++device) all.list.push_back(examine(device, count));
  choose(all);
  return all;
}

}  // namespace anyep::core
