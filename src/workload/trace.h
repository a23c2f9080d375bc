// The text of a trace, apart from the file that holds it.
#pragma once

#include <anyep/workload.h>

#include <string>
#include <string_view>

namespace anyep::workload {

/// @throws Error kArgument: a batch that the reader would refuse.
std::string trace_text(const Batch& batch);
/// `name` is what errors call the text. @throws Error kArgument as read_trace does.
Batch parse_trace(const std::string& name, std::string_view text);

}  // namespace anyep::workload
