// Times of whole operations, and tests of failures.
#pragma once

namespace anyep::test {

/// Prints one table: 2 ranks, hidden 7168, top-8 of 256, 4096 tokens.
void run_bench(bool combine);

/// A rank that never comes, an abort, more rows than the tensor has. Returns how many tests failed.
int fault_tests();

}  // namespace anyep::test
