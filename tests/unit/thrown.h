// The error that a call throws, to look at its fields.
#pragma once

#include <anyep/error.h>
#include <gtest/gtest.h>

namespace anyep::test {

/// Runs `body` and returns its anyep::Error; a test failure and an empty kInternal error when it throws none.
template <class Body>
Error thrown(Body&& body) {
  try {
    body();
  } catch (const Error& error) {
    return error;
  }
  ADD_FAILURE() << "no anyep::Error was thrown";
  return {ErrorCode::kInternal, ""};
}

}  // namespace anyep::test
