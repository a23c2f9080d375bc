#include <anyep/error.h>

namespace anyep {

Error::Error(ErrorCode error_code, const std::string& text) : std::runtime_error(text), code(error_code) {}

Error::~Error() = default;

const char* name_of(ErrorCode code) noexcept {
  switch (code) {
    case ErrorCode::kArgument:
      return "kArgument";
    case ErrorCode::kUnsupported:
      return "kUnsupported";
    case ErrorCode::kCapacity:
      return "kCapacity";
    case ErrorCode::kMismatch:
      return "kMismatch";
    case ErrorCode::kState:
      return "kState";
    case ErrorCode::kTimeout:
      return "kTimeout";
    case ErrorCode::kPeerDead:
      return "kPeerDead";
    case ErrorCode::kAborted:
      return "kAborted";
    case ErrorCode::kDevice:
      return "kDevice";
    case ErrorCode::kResource:
      return "kResource";
    case ErrorCode::kTransport:
      return "kTransport";
    case ErrorCode::kCorrupt:
      return "kCorrupt";
    case ErrorCode::kInternal:
      return "kInternal";
  }
  return "unknown";
}

}  // namespace anyep
