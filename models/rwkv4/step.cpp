// One token through all layers of RWKV-4 (models/ops/csrc/step.h).
//
// B rows, L layers, C embedding, F feed-forward.
#include "step.h"

namespace {

using namespace step;  // NOLINT: this file is nothing but one

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

constexpr int64_t PHASES = 9;  // of a layer

// x (B, C) goes through layer l in place.
template <typename W>
void rwkv4_layer(int64_t B, int64_t L, int64_t C, int64_t F, int64_t l, const RwkvLayer<W>& a,
                 float* x, const RwkvState& old, const RwkvState& now, float* scratch,
                 Member& member) {
  float* mixed[3] = {scratch, scratch + B * C, scratch + 2 * B * C};
  float *k = mixed[2] + B * C, *v = k + B * C, *r = v + B * C, *hidden = r + B * C;
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
  multiply<W>(B, {{C, F, mixed[0], a.ffn_key, nullptr, hidden},
                  {C, C, mixed[1], a.ffn_receptance, nullptr, r}}, member);
  member.share(B, [&](int64_t b) {
#pragma omp simd
    for (int64_t i = b * F; i < (b + 1) * F; ++i)
      hidden[i] = hidden[i] < 0 ? 0.0f : hidden[i] * hidden[i];  // NaN stays
  });
  multiply<W>(B, {{F, C, hidden, a.ffn_value, nullptr, v}}, member);
  member.share(B, [&](int64_t b) {
#pragma omp simd
    for (int64_t i = b * C; i < (b + 1) * C; ++i) x[i] += sigmoid(r[i]) * v[i];
  });
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
    through<RwkvLayer<W>>(L, PHASES, layers, threads,
                          [&](int64_t l, const RwkvLayer<W>& layer, Member& member) {
      rwkv4_layer(B, L, C, F, l, layer, x, old, now, scratch.get(), member);
    });
  });
}
