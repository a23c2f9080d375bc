#include "workload/file.h"

#include <fmt/format.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <memory>
#include <system_error>

#include "core/check.h"

namespace anyep::workload {
namespace {

struct Close {
  void operator()(std::FILE* file) const { std::fclose(file); }
};
using File = std::unique_ptr<std::FILE, Close>;

[[noreturn]] void cannot_read(std::string_view op, const std::string& path, int error_number) {
  core::throw_argument(op, "path", path,
                       fmt::format("a readable file ({})", std::generic_category().message(error_number)));
}

}  // namespace

std::string read_file(std::string_view op, const std::string& path) {
  const File file(std::fopen(path.c_str(), "rb"));
  if (file == nullptr) cannot_read(op, path, errno);
  std::string text;
  std::array<char, 1 << 16> part{};
  while (const std::size_t got = std::fread(part.data(), 1, part.size(), file.get())) text.append(part.data(), got);
  if (std::ferror(file.get()) != 0) cannot_read(op, path, errno);
  return text;
}

void write_file(std::string_view op, const std::string& path, std::string_view text) {
  File file(std::fopen(path.c_str(), "wb"));
  if (file == nullptr) core::throw_resource(op, fmt::format("fopen({})", path), errno);
  if (std::fwrite(text.data(), 1, text.size(), file.get()) != text.size()) {
    core::throw_resource(op, fmt::format("fwrite({})", path), errno, text.size());
  }
  if (std::fclose(file.release()) != 0) core::throw_resource(op, fmt::format("fclose({})", path), errno, text.size());
}

}  // namespace anyep::workload
