#include "bootstrap/memfd.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

#include "core/check.h"

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010  // Linux 5.1
#endif

namespace anyep::bootstrap {

UniqueFd make_memfd(const char* name, std::size_t bytes, Seals seals) {
  UniqueFd memory(::memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!memory) core::throw_resource("create", "memfd_create", errno);
  if (::ftruncate(memory.get(), static_cast<off_t>(bytes)) != 0) {
    core::throw_resource("create", "ftruncate of a memfd", errno, bytes);
  }
  if (seals == Seals::kNone) return memory;
  const int wanted = F_SEAL_SHRINK | F_SEAL_GROW | (seals == Seals::kSize ? F_SEAL_SEAL : 0);
  if (::fcntl(memory.get(), F_ADD_SEALS, wanted) != 0) core::throw_resource("create", "sealing a memfd", errno);
  return memory;
}

bool seal_future_writes(int fd) noexcept {
  return ::fcntl(fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE | F_SEAL_SEAL) == 0;
}

void check_memfd(int fd, std::size_t bytes) {
  const int seals = ::fcntl(fd, F_GET_SEALS);
  struct stat status {};
  const bool good = seals >= 0 && (seals & F_SEAL_SHRINK) != 0 && ::fstat(fd, &status) == 0 &&
                    S_ISREG(status.st_mode) && status.st_size >= 0 && static_cast<std::size_t>(status.st_size) >= bytes;
  if (good) return;
  core::throw_error(ErrorCode::kCorrupt, "import",
                    fmt::format("descriptor is no sealed memfd of at least {} bytes", bytes));
}

}  // namespace anyep::bootstrap
