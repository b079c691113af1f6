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

// e^x for x <= 0 to about 1 ulp; 0 below the smallest normal number.  A NaN may come out as a number: it reaches the
// value through Delta.
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

// One vector of columns in the frame.  Blocks in which no logit is -inf, nearly all, skip what only those need.
template <bool excludes> struct Columns {
  Vec student, student_exp, teacher_exp, delta;
  Int student_excludes{}, teacher_excludes{};
  Columns(Vec a, Vec b, const Frame& frame, float inverse_temperature) {
    student = (a - frame.student_max) * inverse_temperature;
    student_exp = exp_nonpositive(student);
    teacher_exp = exp_nonpositive((b - frame.teacher_max) * inverse_temperature);
    Vec error, d = difference(a, b, &error);
    delta = ((d - frame.offset) + (error - frame.offset_error)) * inverse_temperature;
    if constexpr (excludes) {
      student_excludes = a == set(-kInfinity);
      teacher_excludes = b == set(-kInfinity);
      student = student_excludes ? Vec{} : student;
      delta = (student_excludes | teacher_excludes) ? Vec{} : delta;
    }
  }
  // Whether delta, or a shifted delta, is close to 0 and both sides have mass.
  Int is_near(Vec delta) const {
    if constexpr (excludes) return (abs(delta) < set(0.5f)) & ~(student_excludes | teacher_excludes);
    return abs(delta) < set(0.5f);
  }
};

bool has_neginf(const float* a, const float* b, int n) {
  Vec m = set(kInfinity);
  for (int i = 0; i < n; i += kLanes) m = min(load_vec(a + i), min(load_vec(b + i), m));
  for (int i = 0; i < kLanes; ++i)
    if (m[i] == -kInfinity) return true;
  return false;
}

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

struct Sums { double s = 0, delta = 0, student = 0, t = 0, difference = 0, excluded = 0, excluded_student = 0; };

template <bool excludes>
void add_statistics(Sums* sums, const float* a, const float* b, int n, const Frame& frame, float inverse_temperature) {
  Vec s{}, delta{}, student{}, t{}, difference{}, excluded{}, excluded_student{};
  for (int i = 0; i < n; i += kLanes) {
    const Columns<excludes> c(load_vec(a + i), load_vec(b + i), frame, inverse_temperature);
    const Vec near = c.student_exp * (expm1_remainder(c.delta) - c.delta);
    s += c.student_exp;
    delta += c.student_exp * c.delta;
    student += c.student_exp * c.student;
    t += c.teacher_exp;
    difference += c.is_near(c.delta) ? near : c.teacher_exp - c.student_exp;
    if constexpr (excludes) {
      const Vec e = c.teacher_excludes ? c.student_exp : Vec{};
      excluded += e;
      excluded_student += e * c.student;
    }
  }
  sums->s += sum(s), sums->delta += sum(delta), sums->student += sum(student), sums->t += sum(t);
  sums->difference += sum(difference);
  if constexpr (excludes) sums->excluded += sum(excluded), sums->excluded_student += sum(excluded_student);
}

void statistics_row(const float* student_raw, const float* teacher_raw, int64_t columns, const Model& student,
                    const Model& teacher, float inverse_temperature, float* out, int64_t stride) {
  alignas(64) float a_block[kBlock], b_block[kBlock];
  const float student_max = row_max(student, student_raw, columns, a_block);
  const float teacher_max = row_max(teacher, teacher_raw, columns, b_block);
  const Frame frame(student_max, teacher_max);
  Sums sums;
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    const int n = (int)std::min<int64_t>(kBlock, columns - begin);
    const float* a = load(student, student_raw, begin, n, a_block, nullptr);
    const float* b = load(teacher, teacher_raw, begin, n, b_block, nullptr);
    (has_neginf(a, b, n) ? add_statistics<true> : add_statistics<false>)(&sums, a, b, n, frame, inverse_temperature);
  }
  const double inverse = sums.s == 0 ? 0 : 1 / sums.s;
  out[kStudentMax * stride] = student_max, out[kStudentSum * stride] = (float)sums.s;
  out[kMeanDelta * stride] = (float)(sums.delta * inverse), out[kMeanStudent * stride] = (float)(sums.student * inverse);
  out[kTeacherMax * stride] = teacher_max, out[kTeacherSum * stride] = (float)sums.t;
  out[kSumDifference * stride] = (float)sums.difference;
  out[kExcludedMass * stride] = (float)sums.excluded;
  out[kExcludedMean * stride] = (float)(sums.excluded_student * inverse);
}

enum Row { kRowStudentMax, kRowTeacherMax, kRowStudentInverseSum, kRowTeacherInverseSum, kRowLogRatio, kRowCentre,
           kRowAlpha, kRowEntropy, kRowExcludedMass, kNumRows };
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

// What `gradient` knows of a row; the names are those of rows.Row.
struct RowNumbers {
  float student_inverse_sum, teacher_inverse_sum, log_ratio, centre, alpha, log_prob_offset, inverse_temperature;
};

struct Terms { Vec value, phi; };  // phi times p; reverse_kl and forward_kl: centred

template <Kind kind, bool excludes>
inline Terms terms(const Columns<excludes>& c, const RowNumbers& row, const Mixture& mix, Vec p, Vec q) {
  Vec delta = c.delta + row.log_ratio;  // log p - log q
  if constexpr (kind == kReverseKl) {
    Vec u = c.delta;
    if constexpr (excludes) {
      const Int excluded = c.student_excludes | c.teacher_excludes;
      const Vec floored = c.student + row.log_prob_offset;
      delta = excluded ? (c.student_excludes ? Vec{} : floored) : delta;
      u = excluded ? floored - row.log_ratio : u;
    }
    return {c.is_near(delta) ? p * expm1_remainder(delta) : p * delta - p + q, p * (u - row.centre)};
  } else {
    if constexpr (excludes)
      delta = c.teacher_excludes ? set(kExcluded) : c.student_excludes ? set(-kExcluded) : delta;
    const Int is_near = abs(delta) < set(0.5f);
    const Vec remainder = expm1_remainder(delta);  // delta + expm1(-delta)
    const Vec difference = is_near ? p * (delta - remainder) : p - q;
    if constexpr (kind == kForwardKl) {
      Vec far = p - q - q * delta;
      if constexpr (excludes) far = (c.student_excludes & (q > Vec{})) ? set(kInfinity) : far;
      return {is_near ? q * expm1_remainder(-delta) : far, difference};
    } else if constexpr (kind == kTvd) {
      const Vec sign = difference > Vec{} ? set(0.5f) : difference < Vec{} ? set(-0.5f) : Vec{};
      return {0.5f * abs(difference), p * sign};
    } else {
      const Vec far_exp = exp_nonpositive(-abs(delta));
      const Vec mixture = mix.student_part * p + mix.teacher_part * q;
      const MixtureTerm of_p = mixture_term(p, mixture, delta, remainder - delta, far_exp, is_near, mix.student_part,
                                            mix.teacher_part);
      const MixtureTerm of_q = mixture_term(q, mixture, -delta, expm1_remainder(-delta) + delta, far_exp, is_near,
                                            mix.teacher_part, mix.student_part);
      const Vec share = mixture > Vec{} ? difference / mixture : Vec{};
      return {mix.student_term * of_p.term + mix.teacher_term * of_q.term,
              p * (mix.phi_share * share - mix.phi_log * of_p.log_ratio - mix.phi_excess * of_p.excess)};
    }
  }
}

// Whether derivatives are written is asked at run time, so that the compiler rounds the values in one way.
template <Kind kind, bool excludes>
void add_gradient(double* value, double* mean, const float* a, const float* b, const float* slope, float* out, int n,
                  const Frame& frame, const RowNumbers& row, const Mixture& mix) {
  Vec value_sum{}, mean_sum{};
  for (int i = 0; i < n; i += kLanes) {
    const Columns<excludes> c(load_vec(a + i), load_vec(b + i), frame, row.inverse_temperature);
    const Vec p = c.student_exp * row.student_inverse_sum, q = c.teacher_exp * row.teacher_inverse_sum;
    const Terms t = terms<kind>(c, row, mix, p, q);
    Vec gradient = t.phi;
    value_sum += t.value;
    if constexpr (kind == kTvd || kind == kMixture) {
      mean_sum += gradient;
      gradient = gradient - p * row.centre;
    }
    if (out) {
      gradient = gradient * row.alpha;
      if (slope) gradient = gradient * load_vec(slope + i);
      if (n - i >= kLanes) store_vec(out + i, gradient);
      else std::memcpy(out + i, &gradient, (n - i) * sizeof(float));
    }
  }
  *value += sum(value_sum), *mean += sum(mean_sum);
}

template <Kind kind>
void gradient_row(const float* student_raw, const float* teacher_raw, float* out, int64_t columns, const Model& student,
                  const Model& teacher, float inverse_temperature, const Mixture& mix, const float* row,
                  int64_t stride, float* value_out, float* mean_out) {
  const Frame frame(row[kRowStudentMax * stride], row[kRowTeacherMax * stride]);
  const float inverse_sum = row[kRowStudentInverseSum * stride];
  const RowNumbers numbers{inverse_sum, row[kRowTeacherInverseSum * stride], row[kRowLogRatio * stride],
                           row[kRowCentre * stride], row[kRowAlpha * stride], std::log(inverse_sum) - kLogProbFloor,
                           inverse_temperature};
  alignas(64) float a_block[kBlock], b_block[kBlock], slope_block[kBlock];
  float* slope = student.softcap != 0.f ? slope_block : nullptr;
  double value = 0, mean = 0;
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    const int n = (int)std::min<int64_t>(kBlock, columns - begin);
    const float* a = load(student, student_raw, begin, n, a_block, slope);
    const float* b = load(teacher, teacher_raw, begin, n, b_block, nullptr);
    (has_neginf(a, b, n) ? add_gradient<kind, true> : add_gradient<kind, false>)(
        &value, &mean, a, b, slope, out ? out + begin : nullptr, n, frame, numbers, mix);
  }
  *value_out = (float)value;
  *mean_out = (float)mean;
}

// One row of `rows.merge`, the ranks in order.  A rank without mass has a maximum of -inf and sums of 0.
void merge_row(const float* statistics, int64_t ranks, int64_t rows, double temperature, double alpha, bool has_centre,
               float* out) {
  const auto of = [&](int64_t rank, int name) { return statistics[(rank * kNumStatistics + name) * rows]; };
  float student_max = -kInfinity, teacher_max = -kInfinity;
  for (int64_t r = 0; r < ranks; ++r) {  // a NaN stays
    const float p = of(r, kStudentMax), q = of(r, kTeacherMax);
    if (p > student_max || p != p) student_max = p;
    if (q > teacher_max || q != q) teacher_max = q;
  }
  double mass = 0, teacher_mass = 0, difference = 0, delta = 0, log_e = 0, excluded = 0, excluded_log_e = 0;
  for (int64_t r = 0; r < ranks; ++r) {
    const bool has_p = of(r, kStudentMax) != -kInfinity, has_q = of(r, kTeacherMax) != -kInfinity;
    const double shift_p = has_p ? ((double)of(r, kStudentMax) - student_max) / temperature : 0;
    const double shift_q = has_q ? ((double)of(r, kTeacherMax) - teacher_max) / temperature : 0;
    const double factor_p = has_p ? std::exp(shift_p) : 0, factor_q = has_q ? std::exp(shift_q) : 0;
    const double frame = has_p && has_q ? shift_p - shift_q : 0;
    const double p = of(r, kStudentSum), own_excluded = of(r, kExcludedMass);
    mass += p * factor_p;
    teacher_mass += of(r, kTeacherSum) * factor_q;
    difference += of(r, kSumDifference) * factor_q + p * (factor_q - factor_p);
    delta += factor_p * (p * of(r, kMeanDelta) + (p - own_excluded) * frame);
    log_e += factor_p * p * (of(r, kMeanStudent) + shift_p);
    excluded += factor_p * own_excluded;
    excluded_log_e += factor_p * (p * of(r, kExcludedMean) + own_excluded * shift_p);
  }
  const double relative = difference / mass, log_mass = std::log(mass);
  const double log_ratio = std::abs(relative) < 0.5 ? std::log1p(relative) : std::log(teacher_mass) - log_mass;
  excluded /= mass;
  double centre = delta / mass;
  if (excluded > 0) centre += excluded_log_e / mass - excluded * (log_mass + kLogProbFloor + log_ratio);
  out[kRowStudentMax * rows] = student_max;
  out[kRowTeacherMax * rows] = teacher_max;
  out[kRowStudentInverseSum * rows] = (float)(1 / mass);
  out[kRowTeacherInverseSum * rows] = (float)(1 / teacher_mass);
  out[kRowLogRatio * rows] = (float)log_ratio;
  out[kRowCentre * rows] = has_centre ? (float)centre : 0.f;
  out[kRowAlpha * rows] = (float)alpha;
  out[kRowEntropy * rows] = (float)(log_mass - log_e / mass);
  out[kRowExcludedMass * rows] = (float)excluded;
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

// statistics: [ranks, kNumStatistics, rows]; weight: [rows]; out: [kNumRows, rows].
void mtopd_merge(const float* statistics, const float* weight, int64_t ranks, int64_t rows, double temperature,
                 double alpha_scale, int has_centre, float* out) {
  for (int64_t r = 0; r < rows; ++r)
    merge_row(statistics + r, ranks, rows, temperature, weight[r] * alpha_scale, has_centre, out + r);
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
