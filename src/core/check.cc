#include "core/check.h"

#include <fmt/format.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <system_error>

namespace anyep::core {
namespace {

// A remedy is a sentence of its own; the full stop belongs to what precedes it.
std::string with_remedy(std::string text, std::string_view remedy) {
  if (!remedy.empty()) text += fmt::format(". {}", remedy);
  return text;
}

// Messages must not differ with the folder that the library was built in.
std::string_view without_build_folder(std::string_view file) {
  const std::size_t sources = file.rfind("src/");
  return sources == std::string_view::npos ? file : file.substr(sources);
}

}  // namespace

void throw_argument(std::string_view op, std::string_view argument, std::string_view got, std::string_view allowed,
                    std::string_view remedy) {
  Error error(ErrorCode::kArgument,
              with_remedy(fmt::format("{}: {} = {}, allowed: {}", op, argument, got, allowed), remedy));
  error.op = op;
  error.argument = argument;
  error.got = got;
  error.allowed = allowed;
  throw error;
}

void throw_error(ErrorCode code, std::string_view op, std::string_view text) {
  Error error(code, fmt::format("{}: {}", op, text));
  error.op = op;
  throw error;
}

void throw_capacity(std::string_view op, std::string_view what, std::uint64_t need, std::uint64_t have,
                    std::string_view remedy) {
  Error error(ErrorCode::kCapacity,
              with_remedy(fmt::format("{}: {} needs {}, there is room for {}", op, what, need, have), remedy));
  error.op = op;
  error.need = need;
  error.have = have;
  throw error;
}

void throw_resource(std::string_view op, std::string_view call, int error_number, std::uint64_t need,
                    std::uint64_t have) {
  std::string text = fmt::format("{}: {} failed", op, call);
  if (error_number != 0) {
    text += fmt::format(": {} (errno {})", std::generic_category().message(error_number), error_number);
  }
  if (need != 0) text += fmt::format(", need {}", need);
  if (have != 0) text += fmt::format(", have {}", have);
  Error error(ErrorCode::kResource, text);
  error.op = op;
  error.need = need;
  error.have = have;
  throw error;
}

Error reworded(const Error& error, const std::string& text) {
  Error other(error);
  static_cast<std::runtime_error&>(other) = std::runtime_error(text);
  return other;
}

Error met_in(const Error& first, std::string_view op, std::string_view phase) {
  if (!first.op.empty()) return first;
  Error error = reworded(first, fmt::format("{} (phase {}): {}", op, phase, first.what()));
  error.op = op;
  error.phase = phase;
  return error;
}

void throw_internal(const char* condition, const char* text, const char* file, int line) {
  throw Error(ErrorCode::kInternal,
              fmt::format("broken invariant: {} ({}) at {}:{}. This is a defect of AnyEP, please report it", text,
                          condition, without_build_folder(file), line));
}

}  // namespace anyep::core
