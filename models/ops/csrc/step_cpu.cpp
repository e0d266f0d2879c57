// One token through all layers of a model on a CPU, behind a C interface for ctypes.
//
// A step reads every weight once and does little else, so what it must not do is wait: threads are
// woken once, and then go through the phases of all layers together. What comes in is only read. Arrays are contiguous and float32, but for matrices, which share a
// type; a layer's arrays come as a run of pointers, in the order of its struct.
//
// B rows, L layers, C embedding, F feed-forward, H heads, K = C / H.
#include <cmath>
#include <memory>
#include <new>

#include "rows.h"

namespace {

using rows::Floats;
using rows::LANES;
using rows::multiply;
using parallel::Member;
using parallel::Threads;

constexpr float EPSILON = 1e-5f;  // nn.LayerNorm's

// ---- what both families do to a vector

WKV_FN float total(const float* x, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i];
  return sum;
}

void layer_norm(int64_t n, const float* x, const float* weight, const float* bias, float* y) {
  const float mean = total(x, n) / float(n);
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const float scale = 1.0f / std::sqrt(squares / float(n) + EPSILON);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = (x[i] - mean) * scale * weight[i] + bias[i];
}

WKV_FN float sigmoid(float x) {
  const float e = wkv::exp_nonpositive(-std::fabs(x));
  return (x < 0 ? e : 1.0f) / (1.0f + e);
}

// x Phi(x), with the error function of Abramowitz and Stegun 7.1.26: within 1.5e-7.
WKV_FN float gelu(float x) {
  const float z = std::fabs(x) * 0.707106781f;
  const float t = 1.0f / (1.0f + 0.3275911f * z);
  const float p = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f +
                  t * (-1.453152027f + t * 1.061405429f))));
  const float outside = 0.5f * p * wkv::exp_nonpositive(-z * z);  // Phi(-|x|)
  return x * (x < 0 ? outside : 1.0f - outside);
}

// ---- RWKV-4

template <typename W>
struct RwkvLayer {
  const float *ln1, *ln1_bias, *ln2, *ln2_bias;
  const float *decay, *first, *mix_k, *mix_v, *mix_r, *ffn_mix_k, *ffn_mix_r;
  const W *key, *value, *receptance, *output, *ffn_key, *ffn_receptance, *ffn_value;
};

struct RwkvState {  // (B, L, C), (B, L, C) and (B, L, 3, C)
  float *att, *ffn, *wkv;
};

WKV_FN void mix(int64_t n, const float* before, const float* x, const float* share, float* y) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = before[i] + share[i] * (x[i] - before[i]);
}

// y = sigmoid(r) wkv, and the state after; states are (3, C).
void gated_wkv(int64_t n, const float* decay, const float* first, const float* k, const float* v,
               const float* r, const float* before, float* after, float* y) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float e = wkv::exp_nonpositive(-std::fabs(decay[i]));
    const float w = -(decay[i] > 0 ? 1.0f / e : e);
    wkv::State<float> s{before[i], before[n + i], before[2 * n + i], 0.0f};
    y[i] = sigmoid(r[i]) * wkv::forward_step(s, w, first[i], k[i], v[i]);
    after[i] = s.num;
    after[n + i] = s.den;
    after[2 * n + i] = wkv::exponent(s, w);
  }
}

constexpr int64_t RWKV_PHASES = 9;  // of a layer

// x (B, C) goes through layer l in place.
template <typename W>
void rwkv4_layer(int64_t B, int64_t L, int64_t C, int64_t F, int64_t l, const RwkvLayer<W>& a,
                 float* x, const RwkvState& old, const RwkvState& now, float* scratch,
                 Member& member) {
  float* mixed[3] = {scratch, scratch + B * C, scratch + 2 * B * C};
  float *k = mixed[2] + B * C, *v = k + B * C, *r = v + B * C, *wide = r + B * C;
  member.share(B, [&](int64_t b) {
    const int64_t at = (b * L + l) * C;
    layer_norm(C, x + b * C, a.ln1, a.ln1_bias, now.att + at);
    const float* shares[] = {a.mix_k, a.mix_v, a.mix_r};
    for (int i = 0; i < 3; ++i) mix(C, old.att + at, now.att + at, shares[i], mixed[i] + b * C);
  });
  multiply<W>(B, {{C, C, mixed[0], a.key, nullptr, k},
                  {C, C, mixed[1], a.value, nullptr, v},
                  {C, C, mixed[2], a.receptance, nullptr, r}}, member);
  member.share(B, [&](int64_t b) {
    const int64_t row = b * C, at = (b * L + l) * 3 * C;
    gated_wkv(C, a.decay, a.first, k + row, v + row, r + row, old.wkv + at, now.wkv + at,
              mixed[0] + row);
  });
  multiply<W>(B, {{C, C, mixed[0], a.output, nullptr, v}}, member);
  member.share(B, [&](int64_t b) {
    const int64_t row = b * C, at = (b * L + l) * C;
#pragma omp simd
    for (int64_t i = row; i < row + C; ++i) x[i] += v[i];
    layer_norm(C, x + row, a.ln2, a.ln2_bias, now.ffn + at);
    mix(C, old.ffn + at, now.ffn + at, a.ffn_mix_k, mixed[0] + row);
    mix(C, old.ffn + at, now.ffn + at, a.ffn_mix_r, mixed[1] + row);
  });
  multiply<W>(B, {{C, F, mixed[0], a.ffn_key, nullptr, wide},
                  {C, C, mixed[1], a.ffn_receptance, nullptr, r}}, member);
  member.share(B, [&](int64_t b) {
#pragma omp simd
    for (int64_t i = b * F; i < (b + 1) * F; ++i)
      wide[i] = wide[i] < 0 ? 0.0f : wide[i] * wide[i];  // NaN stays
  });
  multiply<W>(B, {{F, C, wide, a.ffn_value, nullptr, v}}, member);
  member.share(B, [&](int64_t b) {
#pragma omp simd
    for (int64_t i = b * C; i < (b + 1) * C; ++i) x[i] += sigmoid(r[i]) * v[i];
  });
}

// ---- GPT-NeoX

template <typename W>
struct GptLayer {
  const float *ln1, *ln1_bias, *ln2, *ln2_bias, *qkv_bias, *output_bias, *up_bias, *down_bias;
  const W *qkv, *output, *up, *down;
  // the cache: what stays as it is (B, H, still, K), what a token joins (B, H, grown, K), and what
  // becomes of that (B, H, grown + 1, K)
  const float *still_k, *still_v, *old_k, *old_v;
  float *new_k, *new_v;
};

struct Rotary {  // of each row, or one for all (stride 0)
  int64_t half, stride;
  const float *cos, *sin;
};

// Turns the first 2 * half channels, pairing i with i + half.
void rotate(const Rotary& by, int64_t row, float* x) {
  const float *cos = by.cos + row * by.stride, *sin = by.sin + row * by.stride;
  for (int64_t i = 0; i < by.half; ++i) {
    const float a = x[i], b = x[i + by.half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + by.half] = b * cos[i] + a * sin[i];
  }
}

// Adds weights[i] * rows[i] over n rows of K to y.
void add_rows(int64_t n, int64_t K, const float* weights, const float* from, float* y) {
  int64_t c = 0;
  for (; c + 4 * LANES <= K; c += 4 * LANES) {
    Floats sums[4] = {};
    for (int64_t i = 0; i < n; ++i) {
      __builtin_prefetch(from + (i + 16) * K + c, 0, 2);
      for (int j = 0; j < 4; ++j) sums[j] += weights[i] * rows::widen(from + i * K + c + j * LANES);
    }
    for (int j = 0; j < 4; ++j)
      for (int64_t i = 0; i < LANES; ++i) y[c + j * LANES + i] += sums[j][i];
  }
  if (c == K) return;
  for (int64_t i = 0; i < n; ++i) {
#pragma omp simd
    for (int64_t j = c; j < K; ++j) y[j] += weights[i] * from[i * K + j];
  }
}

struct Attention {
  int64_t H, K, still, grown;
  const int64_t* n_pad;  // (B), or null
  Rotary rotary;

  // Head h of row b: rotates and joins its key and value, and attends to all that is not padding.
  template <typename W>
  void head(const GptLayer<W>& a, int64_t b, int64_t h, float* qkv, float* all, float* y) const {
    float *q = qkv + (b * H + h) * 3 * K, *k = q + K, *v = k + K;
    rotate(rotary, b, q);
    rotate(rotary, b, k);
    const int64_t unit = b * H + h, fresh = grown + 1, t = still + fresh;
    float *new_k = a.new_k + unit * fresh * K, *new_v = a.new_v + unit * fresh * K;
    append(a.old_k + unit * grown * K, k, new_k);
    append(a.old_v + unit * grown * K, v, new_v);
    const float scale = 1.0f / std::sqrt(float(K));
    for (int64_t i = 0; i < K; ++i) q[i] *= scale;
    const int64_t start = n_pad ? std::min(n_pad[b], t - 1) : 0;  // padding sees itself alone
    const int64_t of_still = std::min(start, still), of_new = std::max<int64_t>(start - still, 0);
    const float* still_k = a.still_k + (unit * still + of_still) * K;
    const float* still_v = a.still_v + (unit * still + of_still) * K;
    const int64_t n_still = still - of_still, n_new = fresh - of_new, n = n_still + n_new;
    float* scores = all + unit * t;
    rows::Product<float>{K, n_still, q, still_k, nullptr, scores}.run(1, 0, n_still);
    rows::Product<float>{K, n_new, q, new_k + of_new * K, nullptr, scores + n_still}.run(
        1, 0, n_new);
    const float sum = softmax(n, scores);
    float* out = y + unit * K;
    std::fill_n(out, K, 0.0f);
    add_rows(n_still, K, scores, still_v, out);
    add_rows(n_new, K, scores + n_still, new_v + of_new * K, out);
    for (int64_t i = 0; i < K; ++i) out[i] /= sum;
  }

  void append(const float* old, const float* last, float* to) const {
    std::copy_n(old, grown * K, to);
    std::copy_n(last, K, to + grown * K);
  }

  // Not yet divided by their sum, which it returns.
  static float softmax(int64_t n, float* x) {
    float most = x[0], sum = 0;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < n; ++i) most = x[i] > most ? x[i] : most;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) {
      x[i] = wkv::exp_nonpositive(x[i] - most);
      sum += x[i];
    }
    return sum;
  }
};

constexpr int64_t GPT_PHASES = 5;  // of a layer

// x (B, C) goes through a layer in place.
template <typename W>
void gpt_layer(int64_t B, int64_t C, int64_t F, const Attention& attention, const GptLayer<W>& a,
               float* x, float* scratch, Member& member) {
  float *a1 = scratch, *a2 = a1 + B * C, *qkv = a2 + B * C, *y = qkv + 3 * B * C;
  float *wide = y + B * C, *scores = wide + B * F;
  member.share(B, [&](int64_t b) {
    layer_norm(C, x + b * C, a.ln1, a.ln1_bias, a1 + b * C);
    layer_norm(C, x + b * C, a.ln2, a.ln2_bias, a2 + b * C);
  });
  multiply<W>(B, {{C, 3 * C, a1, a.qkv, a.qkv_bias, qkv},
                  {C, F, a2, a.up, a.up_bias, wide}}, member);
  member.share(B * attention.H + B, [&](int64_t i) {
    if (i < B * attention.H) {
      attention.head(a, i / attention.H, i % attention.H, qkv, scores, y);
      return;
    }
    float* row = wide + (i - B * attention.H) * F;
#pragma omp simd
    for (int64_t j = 0; j < F; ++j) row[j] = gelu(row[j]);
  });
  multiply<W>(B, {{C, C, y, a.output, a.output_bias, a1},
                  {F, C, wide, a.down, a.down_bias, a2}}, member);
  member.share(B, [&](int64_t b) {
#pragma omp simd
    for (int64_t i = b * C; i < (b + 1) * C; ++i) x[i] += a1[i] + a2[i];
  });
}

// ---- the way through all layers

// Calls layer(arrays, l, member) for each of L layers, whose arrays are n bytes of pointers.
template <typename Layer, typename Call>
void through(int64_t L, int64_t n_phases, const void* const* pointers, Threads threads,
             const Call& call) {
  parallel::in_phases(L * n_phases, threads, [&](Member& member) {
    for (int64_t l = 0; l < L; ++l) {
      Layer arrays;
      std::memcpy(&arrays, pointers + l * (sizeof arrays / sizeof(void*)), sizeof arrays);
      call(l, arrays, member);
    }
  });
}

// 0, 1 for a type of matrices it does not know, or 2 when memory ran out.
template <typename Run>
int for_dtype(int dtype, const Run& run) {
  try {
    switch (dtype) {  // the order of _DTYPES in cpu.py
      case 0: return run(float{}), 0;
      case 1: return run(wkv::Half{}), 0;
      case 2: return run(wkv::BFloat16{}), 0;
    }
  } catch (const std::bad_alloc&) {
    return 2;
  }
  return 1;
}

}  // namespace

extern "C" int rwkv4_step(int dtype, int64_t B, int64_t L, int64_t C, int64_t F,
                          const void* const* layers, float* x, float* att, float* ffn, float* wkv,
                          float* new_att, float* new_ffn, float* new_wkv, int64_t n_threads,
                          void* fork) {
  const RwkvState old{att, ffn, wkv}, now{new_att, new_ffn, new_wkv};
  return for_dtype(dtype, [&](auto like) {
    using W = decltype(like);
    const std::unique_ptr<float[]> scratch(new float[B * (6 * C + F)]);
    const Threads threads =
        rows::worthwhile({n_threads, reinterpret_cast<parallel::Fork>(fork)},
                         (5 * C * C + 2 * C * F) * int64_t(sizeof(W)), B);
    through<RwkvLayer<W>>(L, RWKV_PHASES, layers, threads,
                          [&](int64_t l, const RwkvLayer<W>& layer, Member& member) {
      rwkv4_layer(B, L, C, F, l, layer, x, old, now, scratch.get(), member);
    });
  });
}

// cos and sin are (B or 1, half); n_pad (B) may be null.
extern "C" int gpt_step(int dtype, int64_t B, int64_t L, int64_t C, int64_t F, int64_t H,
                        int64_t still, int64_t grown, int64_t half, int64_t n_angles,
                        const void* const* layers, float* x, const int64_t* n_pad,
                        const float* cos, const float* sin, int64_t n_threads, void* fork) {
  const Rotary rotary{half, n_angles > 1 ? half : 0, cos, sin};
  const Attention attention{H, C / H, still, grown, n_pad, rotary};
  return for_dtype(dtype, [&](auto like) {
    using W = decltype(like);
    const int64_t t = still + grown + 1;
    const std::unique_ptr<float[]> scratch(new float[B * (6 * C + F + H * t)]);
    const Threads threads =
        rows::worthwhile({n_threads, reinterpret_cast<parallel::Fork>(fork)},
                         (4 * C * C + 2 * C * F) * int64_t(sizeof(W)) + 8 * C * t, B);
    through<GptLayer<W>>(L, GPT_PHASES, layers, threads,
                         [&](int64_t, const GptLayer<W>& layer, Member& member) {
      gpt_layer(B, C, F, attention, layer, x, scratch.get(), member);
    });
  });
}
