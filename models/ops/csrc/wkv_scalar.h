// The element types of k, v and y, and their conversion to and from the type of the arithmetic.
//
// For g++, clang++ and NVRTC alike: no header of any of them is needed, and a GPU rounds as a CPU.
#pragma once

#include "wkv.h"

namespace wkv {

struct BFloat16 {
  unsigned short bits;
};
struct Half {
  unsigned short bits;
};

template <typename IO>
struct Scalar {
  using type = float;
};
template <>
struct Scalar<double> {
  using type = double;
};

WKV_FN float load(float x) { return x; }
WKV_FN double load(double x) { return x; }
WKV_FN float load(BFloat16 x) { return bits_as<float>(unsigned(x.bits) << 16); }
WKV_FN float load(Half x) {
  // shifted into place and rescaled, a subnormal becomes normal by itself
  const float magnitude = bits_as<float>(unsigned(x.bits & 0x7fffu) << 13) * 0x1p112f;
  const unsigned overflow = magnitude >= 65536.0f ? 0x7f800000u : 0u;
  return bits_as<float>(bits_as<unsigned>(magnitude) | overflow | unsigned(x.bits & 0x8000u) << 16);
}

// Round to nearest, ties to even; NaN stays NaN.
WKV_FN void store(float& to, float x) { to = x; }
WKV_FN void store(double& to, double x) { to = x; }
WKV_FN void store(BFloat16& to, float x) {
  const unsigned bits = bits_as<unsigned>(x);
  const unsigned rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  to.bits = (unsigned short)(x != x ? 0x7fc0u : rounded);
}
WKV_FN void store(Half& to, float x) {
  constexpr unsigned TWO_TO_16 = 0x47800000u, TWO_TO_MINUS_14 = 0x38800000u;
  const unsigned magnitude = bits_as<unsigned>(x) & 0x7fffffffu;
  const unsigned capped = magnitude < TWO_TO_16 ? magnitude : TWO_TO_16;  // becomes infinity
  const unsigned normal = (capped - (112u << 23) + 0xfffu + (capped >> 13 & 1u)) >> 13;
  // next to 0.5 a float's last place is that of a subnormal half
  const unsigned subnormal = bits_as<unsigned>(bits_as<float>(capped) + 0.5f) - 0x3f000000u;
  const unsigned nan = magnitude > 0x7f800000u ? 0x200u : 0u;
  const unsigned sign = bits_as<unsigned>(x) >> 16 & 0x8000u;
  to.bits = (unsigned short)((capped < TWO_TO_MINUS_14 ? subnormal : normal) | nan | sign);
}

}  // namespace wkv
