// One token through all layers of the GPT (models/ops/csrc/step.h).
//
// B rows, L layers, C embedding, F feed-forward, H heads, K = C / H.
#include "step.h"

namespace {

using namespace step;  // NOLINT: this file is nothing but one
using rows::Floats;
using rows::LANES;

// x Phi(x), with the error function of Abramowitz and Stegun 7.1.26: within 1.5e-7.
WKV_FN float gelu(float x) {
  const float z = std::fabs(x) * 0.707106781f;
  const float t = 1.0f / (1.0f + 0.3275911f * z);
  const float p = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f +
                  t * (-1.453152027f + t * 1.061405429f))));
  const float tail = 0.5f * p * wkv::exp_nonpositive(-z * z);  // Phi(-|x|)
  return x * (x < 0 ? tail : 1.0f - tail);
}

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

constexpr int64_t PHASES = 5;  // of a layer

// x (B, C) goes through a layer in place.
template <typename W>
void gpt_layer(int64_t B, int64_t C, int64_t F, const Attention& attention, const GptLayer<W>& a,
               float* x, float* scratch, Member& member) {
  float *a1 = scratch, *a2 = a1 + B * C, *qkv = a2 + B * C, *y = qkv + 3 * B * C;
  float *hidden = y + B * C, *scores = hidden + B * F;
  member.share(B, [&](int64_t b) {
    layer_norm(C, x + b * C, a.ln1, a.ln1_bias, a1 + b * C);
    layer_norm(C, x + b * C, a.ln2, a.ln2_bias, a2 + b * C);
  });
  multiply<W>(B, {{C, 3 * C, a1, a.qkv, a.qkv_bias, qkv},
                  {C, F, a2, a.up, a.up_bias, hidden}}, member);
  member.share(B * attention.H + B, [&](int64_t i) {
    if (i < B * attention.H) {
      attention.head(a, i / attention.H, i % attention.H, qkv, scores, y);
      return;
    }
    float* row = hidden + (i - B * attention.H) * F;
#pragma omp simd
    for (int64_t j = 0; j < F; ++j) row[j] = gelu(row[j]);
  });
  multiply<W>(B, {{C, C, y, a.output, a.output_bias, a1},
                  {F, C, hidden, a.down, a.down_bias, a2}}, member);
  member.share(B, [&](int64_t b) {
#pragma omp simd
    for (int64_t i = b * C; i < (b + 1) * C; ++i) x[i] += a1[i] + a2[i];
  });
}

}  // namespace

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
    through<GptLayer<W>>(L, PHASES, layers, threads,
                         [&](int64_t, const GptLayer<W>& layer, Member& member) {
      gpt_layer(B, C, F, attention, layer, x, scratch.get(), member);
    });
  });
}
