// The WKV recurrence of RWKV-4 for one channel, forward and backward, one step at a time.
//
// The only text of the arithmetic: g++, clang++ and NVRTC compile this same file. It includes
// nothing, knows nothing of tensors, and is a template on the scalar, so that a test can check the
// derivatives in double precision and a GPU can be checked on a CPU.
//
// In exact arithmetic the state after step t is
//     A_t = e^w A_{t-1} + e^{k_t} v_t,    B_t = e^w B_{t-1} + e^{k_t},
// and y_t = (A_{t-1} + e^{u + k_t} v_t) / (B_{t-1} + e^{u + k_t}). It is held as A = num e^p and
// B = den e^p with p = top + age w: the exponent that dominates and the steps since it came in.
// Adding w to p at every step would add a rounding error at every step, all of one sign; with a
// weak decay the oldest weights then lose three digits in a thousand steps.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define WKV_FN __host__ __device__ __forceinline__
#define WKV_BUILTIN(name) name
#else
#define WKV_FN inline __attribute__((always_inline))
#define WKV_BUILTIN(name) __builtin_##name
#endif

namespace wkv {

// The exponent of a state that has seen nothing.
constexpr float EMPTY = -1e38f;

template <typename To, typename From>
WKV_FN To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  WKV_BUILTIN(memcpy)(&to, &from, sizeof to);
  return to;
}

// e^x for x <= 0 within 2 ulp; 0 where the result would be subnormal, NaN for NaN.
WKV_FN float exp_nonpositive(float x) {
  // the sum leaves round(x / ln 2) + 127, the biased exponent, in the lowest bits
  constexpr float SHIFT = 12582912.0f + 127.0f;
  const float shifted = x * 1.44269504f + SHIFT;
  const float n = shifted - SHIFT;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts
  // minimax of (e^r - 1 - r) / r^2 over |r| <= ln 2 / 2, 3e-9 relative to e^r
  const float r2 = r * r;
  const float low = 0.166665196f * r + 0.49999994f;
  const float high = 0.00138143217f * r2 + (0.00836885069f * r + 0.0416684002f);
  const float e = ((high * r2 + low) * r2 + r) + 1.0f;
  return x < -87.0f ? 0.0f : e * bits_as<float>(bits_as<unsigned>(shifted) << 23);
}

// Only tests compute in double.
WKV_FN double exp_nonpositive(double x) { return WKV_BUILTIN(exp)(x); }

WKV_FN float magnitude(float x) { return WKV_BUILTIN(fabsf)(x); }
WKV_FN double magnitude(double x) { return WKV_BUILTIN(fabs)(x); }

template <typename S>
struct Weights {
  S past, now;
};

// e^{past - m} and e^{now - m} with m the larger exponent: one of the two is exactly 1.
template <typename S>
WKV_FN Weights<S> weigh(S past, S now) {
  const S ahead = now - past;
  const bool leads = ahead > S(0);
  // not by a choice on `leads`: compilers then make two branches of it and no vector code
  const S e = exp_nonpositive(-magnitude(ahead));
  return {leads ? e : S(1), leads ? S(1) : e};
}

template <typename S>
struct State {
  S num, den, top, age;
};

template <typename S>
WKV_FN S exponent(const State<S>& s, S w) {
  return s.age * w + s.top;
}

template <typename S>
WKV_FN void advance(State<S>& s, S w, S k, S v) {
  const S age = s.age + S(1);
  const S aged = age * w + s.top;
  const Weights<S> x = weigh(aged, k);
  const bool renewed = k > aged;
  s.num = x.past * s.num + x.now * v;
  s.den = x.past * s.den + x.now;
  s.top = renewed ? k : s.top;
  s.age = renewed ? S(0) : age;
}

// Returns y of this step and advances the state past it.
template <typename S>
WKV_FN S forward_step(State<S>& s, S w, S u, S k, S v) {
  const Weights<S> x = weigh(exponent(s, w), u + k);
  const S y = (x.past * s.num + x.now * v) / (x.past * s.den + x.now);
  advance(s, w, k, v);
  return y;
}

// The state after `older` and then n steps that on their own, from an empty state, lead to `newer`.
template <typename S>
WKV_FN State<S> join(const State<S>& older, const State<S>& newer, S w, S n) {
  const S age = older.age + n;
  const S aged = age * w + older.top, now = exponent(newer, w);
  const Weights<S> x = weigh(aged, now);
  const bool renewed = now > aged;
  return {x.past * older.num + x.now * newer.num, x.past * older.den + x.now * newer.den,
          renewed ? newer.top : older.top, renewed ? newer.age : age};
}

// Gradients with respect to a state's num, den and p. The scale p is a maximum, whose gradient
// belongs to the key that dominates: `p` waits here until the backward pass meets that key.
template <typename S>
struct Adjoint {
  S num, den, p;
};

// From gradients of the returned (num, den, p) to those of the sums behind them. What depends on
// num e^p and den e^p alone, as every further wkv does, leaves p a gradient of zero.
template <typename S>
WKV_FN Adjoint<S> enter(const State<S>& last, S g_num, S g_den, S g_p) {
  return {g_num, g_den, g_p - g_num * last.num - g_den * last.den};
}

// The inverse of `enter`, at the state that came in.
template <typename S>
WKV_FN S leave(const State<S>& first, const Adjoint<S>& g) {
  return g.p + g.num * first.num + g.den * first.den;
}

// How adjoints pass n steps backwards: num and den by a factor, p or not at all. What the steps add
// on their own is what backward_step leaves of an adjoint of zero.
template <typename S>
struct Passage {
  S scale, keep;
};

// `before` and `after` are the states around the n steps.
template <typename S>
WKV_FN Passage<S> passage(const State<S>& before, const State<S>& after, S w, S n) {
  const S aged = (before.age + n) * w + before.top;
  const S scale = exp_nonpositive(-magnitude(exponent(after, w) - aged));
  const bool renewed = after.age < n;  // a key of these steps dominates since
  return {renewed ? scale : S(1), renewed ? S(0) : S(1)};
}

template <typename S>
WKV_FN Adjoint<S> join(const Adjoint<S>& own, const Passage<S>& x, const Adjoint<S>& after) {
  return {own.num + x.scale * after.num, own.den + x.scale * after.den, own.p + x.keep * after.p};
}

template <typename S>
struct StepGradients {
  S w, u, k, v;
};

// `s` is the state before the step; `g` belongs to the state after it and becomes that before it.
// Every factor is at most 1, so nothing overflows.
template <typename S>
WKV_FN StepGradients<S> backward_step(const State<S>& s, Adjoint<S>& g, S w, S u, S k, S v, S gy) {
  const Weights<S> out = weigh(exponent(s, w), u + k);
  const S inverse = S(1) / (out.past * s.den + out.now);
  const S y = (out.past * s.num + out.now * v) * inverse;
  const S gy_past = gy * inverse * out.past;
  const S gy_now = gy * inverse * out.now;

  const S aged = (s.age + S(1)) * w + s.top;
  const Weights<S> x = weigh(aged, k);
  const bool renewed = k > aged;

  StepGradients<S> step;
  step.w = x.past * (g.num * s.num + g.den * s.den);
  step.u = gy_now * (v - y);
  step.k = step.u + x.now * (g.num * v + g.den) + (renewed ? g.p : S(0));
  step.v = gy_now + x.now * g.num;
  g.num = x.past * g.num + gy_past;
  g.den = x.past * g.den - gy_past * y;
  g.p = renewed ? S(0) : g.p;
  return step;
}

}  // namespace wkv
