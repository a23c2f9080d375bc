#include "exchange.h"

namespace anyep::baselines {

RowExchange::RowExchange(std::int64_t row_bytes) : row_bytes_(row_bytes) {
  MPI_Type_contiguous(static_cast<int>(row_bytes), MPI_BYTE, &row_type_);
  MPI_Type_commit(&row_type_);
}

RowExchange::~RowExchange() {
  MPI_Type_free(&row_type_);
}

void RowExchange::run(const void* from, std::span<const int> send, void* to, std::span<const int> receive) const {
  const std::vector<int> send_at = prefix_sums(send), receive_at = prefix_sums(receive);
  MPI_Alltoallv(from, send.data(), send_at.data(), row_type_, to, receive.data(), receive_at.data(), row_type_,
                MPI_COMM_WORLD);
}

std::vector<int> prefix_sums(std::span<const int> counts) {
  std::vector<int> sums(counts.size() + 1, 0);
  for (std::size_t i = 0; i < counts.size(); ++i) sums[i + 1] = sums[i] + counts[i];
  return sums;
}

}  // namespace anyep::baselines
