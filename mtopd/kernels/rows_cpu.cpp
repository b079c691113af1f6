// Row kernels of the divergences on CPU: the statistics of a row, then its value and gradient.  The mathematics, the
// names and the invariants are those of rows.py; this file only makes them fast.
//
// Vectors are 64 bytes of the compiler's own vector type, lowered to whatever the machine has.  A row is walked in
// blocks of columns that stay in the first-level cache: `load` turns raw logits into logits (scale, bias, softcap),
// the loops then see plain arrays.  The split also keeps the compiler from fusing the multiplication by the scale into
// the error-free difference below, which lives on every operation being rounded by itself.
//
// Rows are spread over threads; a row's result does not depend on how.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int kLanes = 16;
constexpr int kBlock = 1024;  // columns; float accumulators live for one block, then go to double
using Vec = float __attribute__((vector_size(kLanes * sizeof(float))));
using Int = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));

constexpr float kInfinity = __builtin_inff();
constexpr float kExcluded = 1e30f;             // log ratio where one side has no mass; finite, so that 0 * it is 0
constexpr float kLogProbFloor = -87.336544f;   // log of the smallest normal float32, see rows.py
constexpr float kSeriesLimit = 0.35f;
constexpr int64_t kMinThreadElements = 1 << 14;  // below that another thread is not worth waking

inline Vec set(float x) { return Vec{} + x; }
inline Vec load_vec(const float* p) { Vec v; std::memcpy(&v, p, sizeof v); return v; }
inline void store_vec(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline Int bits(Vec v) { Int i; std::memcpy(&i, &v, sizeof i); return i; }
inline Vec from_bits(Int i) { Vec v; std::memcpy(&v, &i, sizeof v); return v; }
inline Vec abs(Vec v) { return from_bits(bits(v) & 0x7fffffff); }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }  // b where a is NaN
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }

inline double sum(Vec v) { double s = 0; for (int i = 0; i < kLanes; ++i) s += v[i]; return s; }

// e^x for x <= 0 to about 1 ulp; 0 below the smallest normal number; NaN stays NaN.
inline Vec exp_nonpositive(Vec x) {
  const Vec is_tiny_to_zero = set(-87.33f);
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  Vec clamped = x < is_tiny_to_zero ? is_tiny_to_zero : x;
  Vec shifted = clamped * 1.44269504088896341f + magic;
  Vec n = shifted - magic;
  Vec r = clamped - n * 0.693145751953125f;
  r = r - n * 1.42860682030941723e-6f;
  Vec poly = set(1.9875691500e-4f);
  poly = poly * r + 1.3981999507e-3f;
  poly = poly * r + 8.3334519073e-3f;
  poly = poly * r + 4.1665795894e-2f;
  poly = poly * r + 1.6666665459e-1f;
  poly = poly * r + 5.0000001201e-1f;
  Vec value = poly * (r * r) + r + 1.f;
  Int exponent = (bits(shifted) - bits(set(magic))) << 23;
  value = from_bits(bits(value) + exponent);
  value = x == x ? value : x;
  return x < is_tiny_to_zero ? Vec{} : value;
}

// x + expm1(-x) >= 0 for |x| < 0.5: x^2 (1/2! - x/3! + x^2/4! - ...), no cancellation.
inline Vec expm1_remainder(Vec x) {
  Vec poly = set(1.f / 40320);
  poly = 1.f / 5040 - poly * x;
  poly = 1.f / 720 - poly * x;
  poly = 1.f / 120 - poly * x;
  poly = 1.f / 24 - poly * x;
  poly = 1.f / 6 - poly * x;
  poly = 0.5f - poly * x;
  return x * x * poly;
}

// 2 atanh(s) - 2 s, for |s| < 0.22.
inline Vec atanh_remainder(Vec s) {
  Vec z = s * s;
  Vec poly = set(2.f / 11);
  poly = poly * z + 2.f / 9;
  poly = poly * z + 2.f / 7;
  poly = poly * z + 2.f / 5;
  poly = poly * z + 2.f / 3;
  return poly * z * s;
}

inline Vec log_positive(Vec x) {
  Int ix = bits(x) - 0x3f3504f3;  // of sqrt(1/2): mantissa in [sqrt(1/2), sqrt(2))
  Int k = ix >> 23;
  Vec f = from_bits((ix & 0x007fffff) + 0x3f3504f3) - 1.f;
  Vec n = __builtin_convertvector(k, Vec);
  Vec s = f / (2.f + f);
  return n * 0.693145751953125f + (n * 1.42860682030941723e-6f + (2.f * s + atanh_remainder(s)));
}

// log(1 + y), and y - log(1 + y) >= 0 where |y| < kSeriesLimit.
inline Vec log1p(Vec y, Vec* remainder) {
  Vec s = y / (2.f + y);
  Vec tail = atanh_remainder(s);
  *remainder = s * y - tail;
  return abs(y) < set(kSeriesLimit) ? 2.f * s + tail : log_positive(1.f + y);
}

struct Model {  // how raw logits become logits
  float scale, softcap;  // softcap 0: none
  const float* bias;     // nullptr: none
  bool is_plain() const { return scale == 1.f && softcap == 0.f && bias == nullptr; }
};

// Columns [begin, begin + n) of a row as logits, filled up to whole vectors with -inf; also d logit / d (h @ W.T).
__attribute__((noinline)) const float* load(const Model& model, const float* raw, int64_t begin, int n, float* block,
                                            float* slope) {
  if (model.is_plain() && n % kLanes == 0) return raw + begin;
  const int padded = (n + kLanes - 1) / kLanes * kLanes;
  std::memcpy(block, raw + begin, n * sizeof(float));
  std::fill(block + n, block + padded, 0.f);
  if (!model.is_plain()) {
    alignas(64) float bias[kBlock] = {};
    if (model.bias) std::memcpy(bias, model.bias + begin, n * sizeof(float));
    for (int i = 0; i < padded; i += kLanes) {
      Vec z = load_vec(block + i) * model.scale;
      if (model.bias) z = z + load_vec(bias + i);
      if (model.softcap != 0.f) {
        Vec x = z / model.softcap, y = 2.f * abs(x), e = exp_nonpositive(-y);
        Vec one_minus_e = y < set(0.5f) ? y - expm1_remainder(y) : 1.f - e;
        Vec tanh = one_minus_e / (1.f + e);
        z = model.softcap * (x < Vec{} ? -tanh : tanh);
        if (slope) store_vec(slope + i, 4.f * e / ((1.f + e) * (1.f + e)));
      }
      store_vec(block + i, z);
    }
  }
  std::fill(block + n, block + padded, -kInfinity);
  return block;
}

inline float finite_or_zero(float max) { return max == -kInfinity ? 0.f : max; }

// a - b = difference + *error, exactly (Knuth).
template <typename T> inline T difference(T a, T b, T* error) {
  T d = a - b, b_part = a - d, a_part = d + b_part;
  *error = (a - a_part) + (b_part - b);
  return d;
}

struct Frame {  // of a row: both maxima, their difference in two parts
  float student_max, teacher_max, offset, offset_error;
  Frame(float s, float t) : student_max(finite_or_zero(s)), teacher_max(finite_or_zero(t)) {
    offset = difference(student_max, teacher_max, &offset_error);
  }
};

struct Columns {  // one vector of columns in the frame
  Vec student, student_exp, teacher_exp, delta;
  Int student_excludes, teacher_excludes;
  Columns(Vec a, Vec b, const Frame& frame, float inverse_temperature) {
    student_excludes = a == set(-kInfinity);
    teacher_excludes = b == set(-kInfinity);
    student = (a - frame.student_max) * inverse_temperature;
    student_exp = exp_nonpositive(student);
    teacher_exp = exp_nonpositive((b - frame.teacher_max) * inverse_temperature);
    student = student_excludes ? Vec{} : student;
    Vec error, d = difference(a, b, &error);
    delta = ((d - frame.offset) + (error - frame.offset_error)) * inverse_temperature;
    delta = (student_excludes | teacher_excludes) ? Vec{} : delta;
  }
};

enum Statistic { kStudentMax, kStudentSum, kMeanDelta, kMeanStudent, kTeacherMax, kTeacherSum, kSumDifference,
                 kExcludedMass, kExcludedMean, kNumStatistics };

struct Shape { int64_t rows, columns, student_stride, teacher_stride; };

float row_max(const Model& model, const float* raw, int64_t columns, float* block) {
  Vec m0 = set(-kInfinity), m1 = m0, m2 = m0, m3 = m0;
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    const int n = (int)std::min<int64_t>(kBlock, columns - begin);
    const float* z = load(model, raw, begin, n, block, nullptr);
    int i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
      m0 = max(load_vec(z + i), m0), m1 = max(load_vec(z + i + kLanes), m1);
      m2 = max(load_vec(z + i + 2 * kLanes), m2), m3 = max(load_vec(z + i + 3 * kLanes), m3);
    }
    for (; i < n; i += kLanes) m0 = max(load_vec(z + i), m0);
  }
  m0 = max(max(m0, m1), max(m2, m3));
  float m = -kInfinity;
  for (int i = 0; i < kLanes; ++i) m = std::max(m, (float)m0[i]);
  return m;
}

void statistics_row(const float* student_raw, const float* teacher_raw, int64_t columns, const Model& student,
                    const Model& teacher, float inverse_temperature, float* out, int64_t stride) {
  alignas(64) float a_block[kBlock], b_block[kBlock];
  const float student_max = row_max(student, student_raw, columns, a_block);
  const float teacher_max = row_max(teacher, teacher_raw, columns, b_block);
  const Frame frame(student_max, teacher_max);
  double s = 0, d = 0, a_mean = 0, t = 0, g = 0, x = 0, y = 0;
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    const int n = (int)std::min<int64_t>(kBlock, columns - begin);
    const float* a = load(student, student_raw, begin, n, a_block, nullptr);
    const float* b = load(teacher, teacher_raw, begin, n, b_block, nullptr);
    Vec sv{}, dv{}, av{}, tv{}, gv{}, xv{}, yv{};
    for (int i = 0; i < n; i += kLanes) {
      const Columns c(load_vec(a + i), load_vec(b + i), frame, inverse_temperature);
      const Int is_near = (abs(c.delta) < set(0.5f)) & ~(c.student_excludes | c.teacher_excludes);
      const Vec near = c.student_exp * (expm1_remainder(c.delta) - c.delta);
      const Vec excluded = c.teacher_excludes ? c.student_exp : Vec{};
      sv += c.student_exp;
      dv += c.student_exp * c.delta;
      av += c.student_exp * c.student;
      tv += c.teacher_exp;
      gv += is_near ? near : c.teacher_exp - c.student_exp;
      xv += excluded;
      yv += excluded * c.student;
    }
    s += sum(sv), d += sum(dv), a_mean += sum(av), t += sum(tv), g += sum(gv), x += sum(xv), y += sum(yv);
  }
  const double inverse = s == 0 ? 0 : 1 / s;
  out[kStudentMax * stride] = student_max, out[kStudentSum * stride] = (float)s;
  out[kMeanDelta * stride] = (float)(d * inverse), out[kMeanStudent * stride] = (float)(a_mean * inverse);
  out[kTeacherMax * stride] = teacher_max, out[kTeacherSum * stride] = (float)t;
  out[kSumDifference * stride] = (float)g;
  out[kExcludedMass * stride] = (float)x, out[kExcludedMean * stride] = (float)(y * inverse);
}

enum Kind { kReverseKl, kForwardKl, kTvd, kMixture };
struct Mixture { float student_part, teacher_part, student_term, teacher_term, phi_log, phi_excess, phi_share; };

struct MixtureTerm { Vec term, log_ratio, excess; };

// Of KL(self || m) with m = w_self self + w_other other and delta = log self - log other: the Bregman term
// self log(self / m) - self + m, then log(m / self), then log(m / self) - (m - self) / m.
// near_expm1 is expm1(-delta) where is_near; far_exp is exp(-|delta|).
inline MixtureTerm mixture_term(Vec self, Vec mixture, Vec delta, Vec near_expm1, Vec far_exp, Int is_near,
                                float w_self, float w_other) {
  const Int is_small = delta > set(-0.5f);  // m / self is
  const Vec y = is_small ? w_other * (is_near ? near_expm1 : far_exp - 1.f) : Vec{};  // m / self - 1
  Vec remainder;
  const Vec log_small = log1p(y, &remainder);
  const Vec log_large = log_positive(w_self * far_exp + w_other) - delta;
  const Vec log_ratio = is_small ? log_small : log_large;
  const Int use_series = is_small & (abs(y) < set(kSeriesLimit));
  const Vec far_share = mixture > Vec{} ? (mixture - self) / mixture : Vec{};
  return {use_series ? self * remainder : mixture - self - self * log_ratio, log_ratio,
          use_series ? y * (y / (1.f + y)) - remainder : log_ratio - far_share};
}

// Whether derivatives are written is asked at run time, so that the compiler rounds the values in one way.
template <Kind kind>
void gradient_row(const float* student_raw, const float* teacher_raw, float* out, int64_t columns, const Model& student,
                  const Model& teacher, float inverse_temperature, const Mixture& mix, const float* row,
                  int64_t stride, float* value_out, float* mean_out) {
  const bool write = out != nullptr;
  const Frame frame(row[0], row[stride]);
  const float inverse_s = row[2 * stride], inverse_t = row[3 * stride], log_ratio = row[4 * stride];
  const float centre = row[5 * stride], alpha = row[6 * stride];
  const float log_prob_offset = std::log(inverse_s) - kLogProbFloor;
  alignas(64) float a_block[kBlock], b_block[kBlock], slope[kBlock];
  double value = 0, mean = 0;
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    const int n = (int)std::min<int64_t>(kBlock, columns - begin);
    const float* a = load(student, student_raw, begin, n, a_block, slope);
    const float* b = load(teacher, teacher_raw, begin, n, b_block, nullptr);
    Vec value_v{}, mean_v{};
    for (int i = 0; i < n; i += kLanes) {
      const Columns c(load_vec(a + i), load_vec(b + i), frame, inverse_temperature);
      const Vec p = c.student_exp * inverse_s, q = c.teacher_exp * inverse_t;
      const Int excluded = c.student_excludes | c.teacher_excludes;
      Vec delta = c.delta + log_ratio;  // log p - log q
      Vec term, gradient;
      if constexpr (kind == kReverseKl) {
        const Vec floored = c.student + log_prob_offset;
        delta = excluded ? (c.student_excludes ? Vec{} : floored) : delta;
        const Vec u = excluded ? floored - log_ratio : c.delta;
        const Int is_near = (abs(delta) < set(0.5f)) & ~excluded;
        term = is_near ? p * expm1_remainder(delta) : p * delta - p + q;
        gradient = p * (u - centre);
      } else {
        delta = c.teacher_excludes ? set(kExcluded) : c.student_excludes ? set(-kExcluded) : delta;
        const Int is_near = abs(delta) < set(0.5f);
        const Vec remainder = expm1_remainder(delta);         // delta + expm1(-delta)
        const Vec difference = is_near ? p * (delta - remainder) : p - q;
        if constexpr (kind == kForwardKl) {
          const Vec far = (c.student_excludes & (q > Vec{})) ? set(kInfinity) : p - q - q * delta;
          term = is_near ? q * expm1_remainder(-delta) : far;
          gradient = difference;
        } else if constexpr (kind == kTvd) {
          term = 0.5f * abs(difference);
          const Vec sign = difference > Vec{} ? set(0.5f) : difference < Vec{} ? set(-0.5f) : Vec{};
          gradient = p * sign;
        } else {
          const Vec far_exp = exp_nonpositive(-abs(delta));
          const Vec mixture = mix.student_part * p + mix.teacher_part * q;
          const MixtureTerm of_p = mixture_term(p, mixture, delta, remainder - delta, far_exp, is_near,
                                                mix.student_part, mix.teacher_part);
          const MixtureTerm of_q = mixture_term(q, mixture, -delta, expm1_remainder(-delta) + delta, far_exp, is_near,
                                                mix.teacher_part, mix.student_part);
          term = mix.student_term * of_p.term + mix.teacher_term * of_q.term;
          const Vec share = mixture > Vec{} ? difference / mixture : Vec{};
          gradient = p * (mix.phi_share * share - mix.phi_log * of_p.log_ratio - mix.phi_excess * of_p.excess);
        }
        if constexpr (kind == kTvd || kind == kMixture) {
          mean_v += gradient;
          gradient = gradient - p * centre;
        }
      }
      value_v += term;
      if (write) {
        gradient = gradient * alpha;
        if (student.softcap != 0.f) gradient = gradient * load_vec(slope + i);
        const int valid = std::min(kLanes, n - i);
        if (valid == kLanes) store_vec(out + begin + i, gradient);
        else std::memcpy(out + begin + i, &gradient, valid * sizeof(float));
      }
    }
    value += sum(value_v), mean += sum(mean_v);
  }
  *value_out = (float)value;
  *mean_out = (float)mean;
}

// On torch's own OpenMP threads: others would compete with those, which spin for a while after each product.
template <typename Body> void for_rows(const Shape& shape, int num_threads, const Body& body) {
  const int64_t worth = shape.rows * shape.columns / kMinThreadElements + 1;
  const int threads = (int)std::min<int64_t>(num_threads, worth);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < shape.rows; ++r) body(r);
}

}  // namespace

extern "C" {

// out: [kNumStatistics, rows].
void mtopd_statistics(const float* student, const float* teacher, Shape shape, Model student_model,
                      Model teacher_model, float inverse_temperature, float* out, int num_threads) {
  for_rows(shape, num_threads, [&](int64_t r) {
    statistics_row(student + r * shape.student_stride, teacher + r * shape.teacher_stride, shape.columns,
                   student_model, teacher_model, inverse_temperature, out + r, shape.rows);
  });
}

// rows: [7, rows], see rows.py.  gradient nullptr: none is written, and mean is the mean of the derivatives.
void mtopd_gradient(const float* student, const float* teacher, float* gradient, Shape shape, Model student_model,
                    Model teacher_model, float inverse_temperature, int kind, Mixture mixture, const float* rows,
                    float* value, float* mean, int num_threads) {
  for_rows(shape, num_threads, [&](int64_t r) {
    const auto run = [&](auto function) {
      function(student + r * shape.student_stride, teacher + r * shape.teacher_stride,
               gradient ? gradient + r * shape.student_stride : nullptr, shape.columns, student_model, teacher_model,
               inverse_temperature, mixture, rows + r, shape.rows, value + r, mean + r);
    };
    switch (kind) {
      case kReverseKl: run(gradient_row<kReverseKl>); break;
      case kForwardKl: run(gradient_row<kForwardKl>); break;
      case kTvd: run(gradient_row<kTvd>); break;
      case kMixture: run(gradient_row<kMixture>); break;
    }
  });
}
}
