// Fast Fourier transforms of many channels side by side: lane i of every vector belongs to one pair of
// channels, so a (length, channels) layout needs no transposition and every butterfly is a full vector.
//
// The forward transform decimates in frequency (natural order in, bit-reversed out), the inverse in time
// (bit-reversed in, natural out, scaled by the size): products of spectra need no reordering. Stages are
// taken two at a time (radix 4), depth first, so that sub-transforms stay in the near caches.
// Include only from <family>/*kernels.cpp.
#pragma once

#include <cstdint>

namespace star {
namespace STAR_LEVEL {

#ifdef __AVX512F__
constexpr int lanes = 16;
#else
constexpr int lanes = 8;
#endif
typedef float vec __attribute__((vector_size(lanes * sizeof(float)), aligned(4)));

// One value a lane of a complex sequence.
struct complex_vec {
  vec re, im;
};

inline complex_vec operator+(complex_vec a, complex_vec b) { return {a.re + b.re, a.im + b.im}; }
inline complex_vec operator-(complex_vec a, complex_vec b) { return {a.re - b.re, a.im - b.im}; }
inline complex_vec operator*(complex_vec a, complex_vec b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
inline complex_vec conjugate(complex_vec a) { return {a.re, -a.im}; }
inline complex_vec times_i(complex_vec a) { return {-a.im, a.re}; }
inline complex_vec halved(complex_vec a) { return {a.re * 0.5f, a.im * 0.5f}; }

// a * w and a * conj(w) for a factor that all lanes share.
inline complex_vec turned(complex_vec a, const float* w) {
  return {a.re * w[0] - a.im * w[1], a.re * w[1] + a.im * w[0]};
}
inline complex_vec turned_back(complex_vec a, const float* w) {
  return {a.re * w[0] + a.im * w[1], a.im * w[0] - a.re * w[1]};
}

// `roots` holds e^(-2 pi i j / size) as (cos, sin) pairs for j < size of the whole transform; `step` is the
// whole size over this block's size. Three quarters of the circle are used.
inline void forward_transform(complex_vec* block, int64_t size, const float* roots, int64_t step) {
  if (size == 1) return;
  if (size == 2) {
    const complex_vec a = block[0], b = block[1];
    block[0] = a + b;
    block[1] = a - b;
    return;
  }
  const int64_t quarter = size / 4;
  for (int64_t j = 0; j < quarter; ++j) {
    const float* w = roots + 2 * step * j;
    const float* w2 = roots + 4 * step * j;
    const float* w3 = roots + 6 * step * j;
    const complex_vec a = block[j], b = block[j + quarter], c = block[j + 2 * quarter], d = block[j + 3 * quarter];
    const complex_vec even = a + c, odd = b + d, s = a - c, t = times_i(d - b);
    block[j] = even + odd;
    block[j + quarter] = turned(even - odd, w2);
    block[j + 2 * quarter] = turned(s + t, w);
    block[j + 3 * quarter] = turned(s - t, w3);
  }
  for (int64_t part = 0; part < 4; ++part) forward_transform(block + part * quarter, quarter, roots, 4 * step);
}

inline void inverse_transform(complex_vec* block, int64_t size, const float* roots, int64_t step) {
  if (size == 1) return;
  if (size == 2) {
    const complex_vec a = block[0], b = block[1];
    block[0] = a + b;
    block[1] = a - b;
    return;
  }
  const int64_t quarter = size / 4;
  for (int64_t part = 0; part < 4; ++part) inverse_transform(block + part * quarter, quarter, roots, 4 * step);
  for (int64_t j = 0; j < quarter; ++j) {
    const float* w = roots + 2 * step * j;
    const float* w2 = roots + 4 * step * j;
    const float* w3 = roots + 6 * step * j;
    const complex_vec first = block[j];
    const complex_vec b = turned_back(block[j + quarter], w2);
    const complex_vec c = turned_back(block[j + 2 * quarter], w);
    const complex_vec d = turned_back(block[j + 3 * quarter], w3);
    const complex_vec even = first + b, odd = first - b, s = c + d, t = times_i(c - d);
    block[j] = even + s;
    block[j + quarter] = odd + t;
    block[j + 2 * quarter] = even - s;
    block[j + 3 * quarter] = odd - t;
  }
}

// A transform carries two real sequences a lane, one as its real and one as its imaginary part. Their own
// spectra at frequency f come from positions p(f) and p(-f); in bit-reversed order p(-f) mirrors p(f) within
// its power-of-two block.
struct Pair {
  complex_vec first, second;
};

inline Pair separated(complex_vec at, complex_vec mirrored) {
  const complex_vec other = conjugate(mirrored);
  const complex_vec difference = at - other;  // 2i times the second spectrum
  return {halved(at + other), halved(complex_vec{difference.im, -difference.re})};
}

// into (+)= left * right, or left * conj(right) where `correlate`, frequency by frequency for both sequences.
template <bool correlate, bool add>
inline void multiply_spectra(complex_vec* into, const complex_vec* left, const complex_vec* right, int64_t size) {
  for (int64_t p = 0; p < (size < 2 ? size : 2); ++p) {  // frequencies 0 and size/2: both spectra are real
    const complex_vec product = {left[p].re * right[p].re, left[p].im * right[p].im};
    into[p] = add ? into[p] + product : product;
  }
  for (int64_t start = 2; start < size; start *= 2) {
    for (int64_t offset = 0; offset < start / 2; ++offset) {
      const int64_t p = start + offset, mirror = 2 * start - 1 - offset;
      const Pair l = separated(left[p], left[mirror]);
      const Pair r = separated(right[p], right[mirror]);
      const complex_vec first = l.first * (correlate ? conjugate(r.first) : r.first);
      const complex_vec second = l.second * (correlate ? conjugate(r.second) : r.second);
      const complex_vec at = first + times_i(second);
      const complex_vec mirrored = conjugate(first) + times_i(conjugate(second));
      into[p] = add ? into[p] + at : at;
      into[mirror] = add ? into[mirror] + mirrored : mirrored;
    }
  }
}

}  // namespace STAR_LEVEL
}  // namespace star
