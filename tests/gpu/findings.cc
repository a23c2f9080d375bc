#include "findings.h"

#include <cstdio>

namespace anyep::test {

std::string text_of(const Findings& found) {
  char text[160];
  std::snprintf(text, sizeof text, "%llu wrong; first: field %u with salt %08x, [%d][%d][%d] = %llx, not %llx",
                found.wrong, static_cast<unsigned>(found.field), found.salt, found.at, found.row, found.column,
                found.got, found.want);
  return text;
}

}  // namespace anyep::test
