// The GPUs that this process sees and what the library would do with them, for people. Makes no CUDA context.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace anyep::core {

struct Device {
  std::string name, uuid, bus_id;
  int major = 0, minor = 0;  ///< compute capability
  int num_sms = 0;
  std::uint64_t memory_bytes = 0;
  bool has_code = false;    ///< this build holds machine code for it
  bool tuned_code = false;  ///< with bulk copies; else the portable path
  // What the driver offers for sharing its memory.
  bool descriptors = false, fabric = false, rdma = false, host_pages = false;
  std::vector<int> peers;         ///< devices whose memory it can access
  std::vector<int> atomic_peers;  ///< of them: with atomics over the link, as NVLink has
};

struct Devices {
  bool built = false;                           ///< this build has a CUDA backend
  std::string architectures;                    ///< that it holds machine code for: "80, 90a"
  std::string problem;                          ///< why no GPU can be used; empty when there are some
  int driver_version = 0, runtime_version = 0;  ///< 13010 = 13.1; 0 = not known
  std::vector<Device> list;                     ///< in the CUDA runtime's order
  std::string sharing;                          ///< how ranks on these devices, one each, would share memory
  std::string sharing_reason;                   ///< why not the best way; empty when it is
};

/// @throws Error kArgument when the environment asks for a way of sharing that does not exist
Devices examine_devices();

/// 13010 -> "13.1"
std::string cuda_version_text(int version);

}  // namespace anyep::core
