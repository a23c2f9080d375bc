#include "single_copy.h"

#include <mpi.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

namespace anyep::baselines {
namespace {

constexpr const char* kVariable = "btl_vader_single_copy_mechanism";

/// The value of an integer control variable, as its enumeration spells it.
std::string value_of(int index, MPI_T_enum names) {
  MPI_T_cvar_handle handle;
  int count = 0, value = -1;
  if (MPI_T_cvar_handle_alloc(index, nullptr, &handle, &count) != MPI_SUCCESS) return "unknown";
  MPI_T_cvar_read(handle, &value);
  MPI_T_cvar_handle_free(&handle);
  int items = 0, length = 0;
  char text[128] = {};
  if (names == MPI_T_ENUM_NULL || MPI_T_enum_get_info(names, &items, text, &length) != MPI_SUCCESS) {
    return std::to_string(value);
  }
  for (int item = 0; item < items; ++item) {
    int item_value = 0, item_length = sizeof text;
    MPI_T_enum_get_item(names, item, &item_value, text, &item_length);
    if (item_value == value) return text;
  }
  return std::to_string(value);
}

}  // namespace

std::string mpi_version() {
  char text[MPI_MAX_LIBRARY_VERSION_STRING] = {};
  int length = 0;
  MPI_Get_library_version(text, &length);
  const std::string all(text);
  return all.substr(0, all.find(','));
}

std::string single_copy_mechanism() {
  int provided = 0, index = -1;
  if (MPI_T_init_thread(MPI_THREAD_SINGLE, &provided) != MPI_SUCCESS) return "unknown";
  std::string found = "unknown";
  if (MPI_T_cvar_get_index(kVariable, &index) == MPI_SUCCESS) {
    char name[128], about[512];
    int name_length = sizeof name, about_length = sizeof about, verbosity = 0, bind = 0, scope = 0;
    MPI_Datatype type = MPI_DATATYPE_NULL;
    MPI_T_enum names = MPI_T_ENUM_NULL;
    MPI_T_cvar_get_info(index, name, &name_length, &verbosity, &type, &names, about, &about_length, &bind, &scope);
    found = value_of(index, names);
  }
  MPI_T_finalize();
  return found;
}

bool neighbour_is_readable() {
  int rank = 0, ranks = 1;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &ranks);
  const std::uint64_t mine = 0x616e796570u + static_cast<std::uint64_t>(rank);
  const std::uint64_t offer[2] = {static_cast<std::uint64_t>(getpid()), reinterpret_cast<std::uint64_t>(&mine)};
  std::uint64_t theirs[2] = {};
  const int next = (rank + 1) % ranks, previous = (rank + ranks - 1) % ranks;
  MPI_Sendrecv(offer, 2, MPI_UINT64_T, previous, 0, theirs, 2, MPI_UINT64_T, next, 0, MPI_COMM_WORLD,
               MPI_STATUS_IGNORE);
  std::uint64_t seen = 0;
  const iovec local{&seen, sizeof seen}, remote{reinterpret_cast<void*>(theirs[1]), sizeof seen};
  const bool read = process_vm_readv(static_cast<pid_t>(theirs[0]), &local, 1, &remote, 1, 0) == sizeof seen;
  int good = read && seen == 0x616e796570u + static_cast<std::uint64_t>(next) ? 1 : 0, all = 0;
  MPI_Allreduce(&good, &all, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD);
  return all == 1;
}

}  // namespace anyep::baselines
