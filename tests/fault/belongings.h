// What a process holds: for tests that nothing is left behind.
#pragma once

#include <cstddef>
#include <string>

namespace anyep::test {

struct Belongings {
  std::size_t descriptors = 0;
  std::size_t mappings = 0;  ///< of memfds, and other shared ones
  std::size_t address_space_mib = 0;
  std::size_t threads = 0;
  std::size_t names = 0;  ///< "anyep-*" in the folder for temporary files
  std::string list;       ///< descriptors and mappings, for messages

  static Belongings now();
  /// Threads that have been joined vanish from /proc a moment later.
  static Belongings settled(const Belongings& expected);
  /// Empty when `*this` holds no more than `before`.
  std::string more_than(const Belongings& before) const;
};

}  // namespace anyep::test
