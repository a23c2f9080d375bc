// Whether this MPI copies messages between processes in one step.
#pragma once

#include <string>

namespace anyep::baselines {

/// "Open MPI v4.1.4".
std::string mpi_version();
/// Open MPI's choice after MPI_Init ("cma", "none", ...), "unknown" for another MPI.
std::string single_copy_mechanism();
/// May this process read its neighbour's memory? Collective. What "cma" needs to be more than a name.
bool neighbour_is_readable();

}  // namespace anyep::baselines
