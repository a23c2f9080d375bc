// Elementary functions whose bits do not depend on a mathematics library: + - * / on doubles in a fixed order.
// Relative error below 1e-14.
#pragma once

namespace anyep::workload {

/// e^x; x is clamped to [-700, 700].
double exp(double x);
/// Natural logarithm of a positive normal number.
double log(double x);
/// base^exponent for a positive base.
double pow(double base, double exponent);
/// 1 / (1 + e^-x).
double sigmoid(double x);

}  // namespace anyep::workload
