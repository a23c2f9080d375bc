// How the library throws: one function per class of error, and the check of our own invariants.
#pragma once

#include <anyep/error.h>

#include <cstdint>
#include <string>
#include <string_view>

namespace anyep::core {

/// kArgument. what(): "<op>: <argument> = <got>, allowed: <allowed>. <remedy>"; fills op, argument, got, allowed.
[[noreturn]] void throw_argument(std::string_view op, std::string_view argument, std::string_view got,
                                 std::string_view allowed, std::string_view remedy = {});

/// Any code. what(): "<op>: <text>"; fills op.
[[noreturn]] void throw_error(ErrorCode code, std::string_view op, std::string_view text);

/// kCapacity. what(): "<op>: <what> needs <need>, there is room for <have>. <remedy>"; fills op, need, have.
[[noreturn]] void throw_capacity(std::string_view op, std::string_view what, std::uint64_t need, std::uint64_t have,
                                 std::string_view remedy = {});

/// kResource. what(): "<op>: <call> failed: <text of error_number> (errno <n>), need <need>, have <have>". Zero for a
/// number means that it is not known, zero for error_number that no system call failed; what is not known is left out.
[[noreturn]] void throw_resource(std::string_view op, std::string_view call, int error_number, std::uint64_t need = 0,
                                 std::uint64_t have = 0);

/// The same error with another text.
Error reworded(const Error& error, const std::string& text);

/// What a call meets of a failure that is nobody's op: the same error, with this op and phase; an error that has an op stays.
Error met_in(const Error& first, std::string_view op, std::string_view phase);

/// kInternal with the place of the broken invariant.
[[noreturn]] void throw_internal(const char* condition, const char* text, const char* file, int line);

}  // namespace anyep::core

/// An invariant of ours, checked in every build: kInternal names it and its place. Never for what a caller can do
/// wrong.
#define ANYEP_CHECK(condition, text)                                       \
  do {                                                                     \
    if (!(condition)) [[unlikely]] {                                       \
      ::anyep::core::throw_internal(#condition, text, __FILE__, __LINE__); \
    }                                                                      \
  } while (false)
