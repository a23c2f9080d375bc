// Which GPUs this build holds machine code for. Nothing is compiled at run time.
#pragma once

#include <string_view>

namespace anyep::cuda {

/// As the build was configured: "80,86,89,90a,100,120".
std::string_view architectures() noexcept;

enum class Code { kNone, kPortable, kTuned };
/// What a list like architectures() gives for a GPU: code for 8.0 runs on 8.6, code for 9.0a ("tuned") on 9.0 only.
Code code_for(std::string_view architectures, int major, int minor) noexcept;

/// @throws Error kUnsupported naming the GPU, its architecture and what there is
void check_code(int device);

}  // namespace anyep::cuda
