// MPI_Alltoallv of rows: what every exchange of the baseline goes through.
#pragma once

#include <mpi.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace anyep::baselines {

/// Rows of a fixed size between all ranks, in rank order at both ends. MPI counts rows, so that large buffers do not
/// overflow its ints.
class RowExchange {
 public:
  explicit RowExchange(std::int64_t row_bytes);
  RowExchange(const RowExchange&) = delete;
  RowExchange& operator=(const RowExchange&) = delete;
  ~RowExchange();

  /// send[d] rows to rank d, receive[s] rows from rank s.
  void run(const void* from, std::span<const int> send, void* to, std::span<const int> receive) const;
  std::int64_t row_bytes() const { return row_bytes_; }

 private:
  std::int64_t row_bytes_;
  MPI_Datatype row_type_;
};

/// result[i] = sum of counts[0..i), with the total at the end.
std::vector<int> prefix_sums(std::span<const int> counts);

}  // namespace anyep::baselines
