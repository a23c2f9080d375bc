// Whole files as text.
#pragma once

#include <string>
#include <string_view>

namespace anyep::workload {

/// @throws Error kArgument with `op` and the path: not a file that can be read.
std::string read_file(std::string_view op, const std::string& path);
/// Replaces the file. @throws Error kResource with `op`: it cannot be written whole.
void write_file(std::string_view op, const std::string& path, std::string_view text);

}  // namespace anyep::workload
