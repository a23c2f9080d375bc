#include "workload/math.h"

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>

namespace anyep::workload {
namespace {

// ln 2 in two parts: the high part has 32 trailing zero bits, so that its product with a small integer is exact.
constexpr double kLn2High = 0x1.62e42feep-1;
constexpr double kLn2Low = 0x1.a39ef35793c76p-33;
constexpr double kLog2E = 0x1.71547652b82fep+0;
constexpr double kSqrt2 = 0x1.6a09e667f3bcdp+0;

/// 1 / n!, for e^x on |x| <= ln 2 / 2: the first term left out is below 1e-18.
constexpr std::array<double, 15> kInverseFactorial = [] {
  std::array<double, 15> table{1};
  double factorial = 1;
  for (std::size_t n = 1; n < table.size(); ++n) table[n] = 1 / (factorial *= static_cast<double>(n));
  return table;
}();

}  // namespace

double exp(double x) {
  if (!(x > -700)) x = -700;
  if (x > 700) x = 700;
  const double turns = x * kLog2E;
  const auto n = static_cast<std::int64_t>(turns < 0 ? turns - 0.5 : turns + 0.5);
  const auto count = static_cast<double>(n);
  const double rest = (x - count * kLn2High) - count * kLn2Low;  // |rest| <= ln 2 / 2
  double sum = kInverseFactorial.back();
  for (std::size_t term = kInverseFactorial.size() - 1; term-- > 0;) sum = sum * rest + kInverseFactorial[term];
  return sum * std::bit_cast<double>(static_cast<std::uint64_t>(n + 1023) << 52);
}

double log(double x) {
  const auto bits = std::bit_cast<std::uint64_t>(x);
  auto exponent = static_cast<std::int64_t>(bits >> 52) - 1023;
  double mantissa = std::bit_cast<double>((bits & 0x000fffffffffffffU) | 0x3ff0000000000000U);
  if (mantissa > kSqrt2) {
    mantissa *= 0.5;
    ++exponent;
  }
  // log(m) = 2 atanh(f), f = (m - 1) / (m + 1), |f| < 0.172.
  const double f = (mantissa - 1) / (mantissa + 1);
  const double square = f * f;
  double sum = 0;
  for (int power = 21; power >= 3; power -= 2) sum = (sum + 1.0 / power) * square;
  const auto count = static_cast<double>(exponent);
  return count * kLn2High + (2 * f + (2 * f * sum + count * kLn2Low));
}

double pow(double base, double exponent) {
  return exp(exponent * log(base));
}

double sigmoid(double x) {
  return 1 / (1 + exp(-x));
}

}  // namespace anyep::workload
