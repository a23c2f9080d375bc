// What a host says that it could still give.
#include <gmock/gmock.h>

#include <cstdint>
#include <sstream>

#include "host/memory.h"

namespace anyep::host {
namespace {

TEST(AvailableMemory, IsReadInBytes) {
  std::istringstream meminfo(
      "MemTotal:       16000 kB\nMemFree:            7 kB\nMemAvailable:    9000 kB\nBuffers: 1 kB\n");
  EXPECT_EQ(available_in(meminfo), 9000u * 1024);
}

TEST(AvailableMemory, IsNotRefusedByAFileThatDoesNotSay) {
  std::istringstream without("MemTotal:       16000 kB\n"), zero("MemTotal: 16000 kB\nMemAvailable:       0 kB\n");
  EXPECT_EQ(available_in(without), UINT64_MAX);
  EXPECT_EQ(available_in(zero), UINT64_MAX);
}

}  // namespace
}  // namespace anyep::host
