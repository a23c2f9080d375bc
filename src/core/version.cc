#include <anyep/config.h>

#if __has_include("core/revision.h")
#include "core/revision.h"  // written by the build: ANYEP_VERSION, ANYEP_REVISION
#endif
#ifndef ANYEP_VERSION
#define ANYEP_VERSION "0.1.0"
#endif
#ifndef ANYEP_REVISION
#define ANYEP_REVISION "unknown"
#endif

namespace anyep {

const char* version() noexcept {
  return ANYEP_VERSION "+" ANYEP_REVISION;
}

}  // namespace anyep
